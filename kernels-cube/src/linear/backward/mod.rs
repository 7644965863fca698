//! Gradients of the linear branch, over all keys, marginal blocks, or all blocks but listed ones.
//!
//! With `n_i = phi(Q_i) . Z_i` and `delta_i = rowsum(dO_i * O_i)` for each row:
//!
//! ```text
//! dphi(Q_i) = (dO_i H_i^T - delta_i Z_i) / n_i
//! dH_i = (phi(Q_i) / n_i)^T dO_i          dZ_i = -delta_i phi(Q_i) / n_i
//! dphi(K_j) = V_j (sum_i dH_i)^T + sum_i dZ_i          dV_j = phi(K_j) sum_i dH_i
//! ```
//!
//! Neither `H_i` nor `dH_i` is ever made for a block: what all blocks share is one state, and what
//! listed blocks take from it, or are all of it, is computed as attention weights are, a tile of
//! scores at a time. Vectors are small enough to be made for each block.
//!
//! `n` and the states carry the factor [`state_scale`](super::state_scale) that keeps them in the
//! range of f16; it cancels in `dphi(Q)` and is put back in the others.

mod global;
mod product;
mod rows;
mod sums;
mod walk;

pub(crate) use global::global_gradients;
use global::transposed_states;
pub(crate) use product::multiply_rows;
use rows::{FeatureGradient, normalised, rounded, rounded_sum, slope, through_phi};
use sums::{block_sums, sums_by_key, sums_by_query};
pub(crate) use sums::{weighted_by_key, weighted_by_query};
use walk::{WalkConfig, key_walk, query_walk};

use cubecl::prelude::*;

use super::{Chunks, FeatureMap, feature_rows, state_scale, states};
use crate::attention::{BackwardOutputs, WeightJob, WeightTerm, row_dots};
use crate::block_list::weights_arg;
use crate::engine::*;
use crate::limits::{expect_buffer, expect_loop_budget, grid};
use crate::tensor::contiguous;
use crate::{AttentionProblem, BlockList, DType, DeviceTensor, InverseBlockList, ProblemError};

/// Which blocks a query block sums over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Taken {
    /// Those of its list.
    Listed,
    /// All others.
    Unlisted,
}

/// Inputs of the gradient.
#[derive(Clone, Copy)]
pub(crate) struct LinearInputs<'a> {
    /// `[B, Hq, Lq, D]`.
    pub q: &'a DeviceTensor<4>,
    /// `[B, Hkv, Lk, D]`.
    pub k: &'a DeviceTensor<4>,
    /// `[B, Hkv, Lk, Dv]`.
    pub v: &'a DeviceTensor<4>,
    /// `O [B, Hq, Lq, Dv]`.
    pub out: &'a DeviceTensor<4>,
    /// `dO [B, Hq, Lq, Dv]`, contiguous.
    pub grad_out: &'a DeviceTensor<4>,
    /// `[B, Hq, M, N]`.
    pub list: &'a BlockList,
    /// What the list says.
    pub taken: Taken,
    /// Weights `m` of blocks, of which the branch has the rest `1 - m`, and where their gradients
    /// are added, both f32 `[B, Hq, M, N]` and contiguous; only with a list of all blocks, taken as
    /// listed.
    pub weights: Option<[&'a DeviceTensor<4>; 2]>,
}

/// `dQ`, `dK` and `dV`.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// `[B, Hq, Lq, D]`.
    pub dq: DeviceTensor<4>,
    /// `[B, Hkv, Lk, D]`.
    pub dk: DeviceTensor<4>,
    /// `[B, Hkv, Lk, Dv]`.
    pub dv: DeviceTensor<4>,
}

impl Gradients {
    /// Buffers for gradients of `q`, `k` and `v`, in `dtype` and with undefined contents.
    ///
    /// # Errors
    /// [`ProblemError::BufferTooLarge`] if one of them does not fit the device.
    pub fn empty(
        client: &Client,
        inputs: [&DeviceTensor<4>; 3],
        dtype: DType,
    ) -> Result<Self, ProblemError> {
        for (what, input) in ["dq", "dk", "dv"].into_iter().zip(inputs) {
            expect_buffer(client.properties(), what, input.len() * dtype.size())?;
        }
        let [dq, dk, dv] = inputs.map(|x| DeviceTensor::empty(client, x.shape(), dtype));
        Ok(Self { dq, dk, dv })
    }

    /// The buffers as outputs of attention's backward.
    pub fn outputs(&self) -> BackwardOutputs<'_> {
        let Self { dq, dk, dv } = self;
        BackwardOutputs { dq, dk, dv }
    }
}

/// The gradients of the linear branch, added to `others`, which are f32 or of the inputs' type; in the
/// inputs' type.
pub(crate) fn linear_gradients(
    client: &Client,
    problem: &AttentionProblem,
    inputs: LinearInputs<'_>,
    phi: FeatureMap,
    others: &Gradients,
) -> Result<Gradients, ProblemError> {
    let LinearInputs {
        q,
        k,
        v,
        out,
        grad_out,
        list,
        taken,
        weights,
    } = inputs;
    let widths = [problem.head_dim(), problem.value_dim()];
    let rest = weights.map(|[weights, _]| weights);
    let job = WalkJob::new(client, problem, list, widths, taken, rest)?;
    let (block_q, block_k) = (problem.block_q(), problem.block_k());
    let (phi_q, phi_k) = (feature_rows(client, q, phi)?, feature_rows(client, k, phi)?);
    let inverse = InverseBlockList::new(client, list)?;
    let scale = state_scale(problem.key_len());

    let z = block_sums(client, &phi_k, None, block_k)?;
    let z = match rest {
        Some(weights) => weighted_by_query(client, weights, &z, true, scale)?,
        None => sums_by_query(client, &z, list, taken, scale)?,
    };
    let (qn, inverse_n) = normalised(client, &phi_q, &z, block_q)?;
    let delta = row_dots(client, out, grad_out)?;
    let dz = block_sums(client, &qn, Some(&delta), block_q)?;
    let kv_heads = problem.kv_heads();
    let dz = match rest {
        Some(weights) => weighted_by_key(client, weights, &dz, kv_heads, true, -scale)?,
        None => sums_by_key(client, &dz, &inverse, kv_heads, taken, -scale)?,
    };

    let dphi_q = DeviceTensor::empty(client, phi_q.shape(), DType::F32);
    let dphi_k = DeviceTensor::empty(client, phi_k.shape(), DType::F32);
    let dv = DeviceTensor::empty(client, v.shape(), DType::F32);
    if taken == Taken::Unlisted {
        let factors = problem.factors();
        let total = |a, b| {
            let (phi, chunks) = (FeatureMap::Identity, Chunks::Total);
            states(client, a, b, phi, chunks, factors).map(|total| total.h)
        };
        let h = total(&phi_k, v)?;
        multiply_rows(client, grad_out, &h, &dphi_q, 1.0, false, factors)?;
        // The query heads of a group follow each other, so that their rows are one key head's.
        let rows = problem.query_len() * problem.query_heads() / problem.kv_heads();
        let by_key_head = |x: &DeviceTensor<4>| {
            let shape = [problem.batch(), problem.kv_heads(), rows, x.shape()[3]];
            DeviceTensor::new(x.handle().clone(), shape, contiguous(shape), x.dtype())
        };
        let dh = total(&by_key_head(&qn)?, &by_key_head(grad_out)?)?;
        let factor = scale / state_scale(rows);
        multiply_rows(client, v, &dh, &dphi_k, factor, false, factors)?;
        let dh = transposed_states(client, &dh)?;
        multiply_rows(client, &phi_k, &dh, &dv, factor, false, factors)?;
    }
    let factor = if taken == Taken::Listed {
        scale
    } else {
        -scale
    };
    job.run_query([grad_out, &phi_k, v], &dphi_q, factor)?;
    let tensors = [grad_out, &qn, &phi_k, v];
    match job.engine {
        EngineKind::Simt => {
            job.launch_key::<Simt>(tensors, &inverse, [&dphi_k, &dv], factor, [4, 4])?;
        }
        EngineKind::Mma => {
            job.launch_key::<Mma>(tensors, &inverse, [&dphi_k, &dv], factor, [8, 2])?;
        }
        EngineKind::MmaTf32 => {
            job.launch_key::<MmaTf32>(tensors, &inverse, [&dphi_k, &dv], factor, [4, 2])?;
        }
    }

    if let Some([weights, grad]) = weights {
        let job = WeightJob {
            tensors: [&qn, &phi_k, grad_out, v],
            lse: &delta,
            delta: &delta,
            list,
            weights,
            grad,
            term: WeightTerm::Linear,
            factor: scale,
        };
        job.run(client, problem)?;
    }

    let dq = FeatureGradient {
        products: &dphi_q,
        vectors: &z,
        block: block_q,
        rows: Some([&delta, &inverse_n]),
    };
    let dk = FeatureGradient {
        products: &dphi_k,
        vectors: &dz,
        block: block_k,
        rows: None,
    };
    Ok(Gradients {
        dq: through_phi(client, &phi_q, dq, phi, &others.dq)?,
        dk: through_phi(client, &phi_k, dk, phi, &others.dk)?,
        dv: rounded_sum(client, &dv, &others.dv, problem.dtype())?,
    })
}

/// The linear branch where each block has a weight `m` and the branch the rest of it:
/// `O_i = sum_j (1 - m_ij) phi(Q_i) phi(K_j)^T V_j / n_i`, in the inputs' type. `list` is one of all
/// blocks.
pub(crate) fn weighted_output(
    client: &Client,
    problem: &AttentionProblem,
    [q, k, v]: [&DeviceTensor<4>; 3],
    list: &BlockList,
    weights: &DeviceTensor<4>,
    phi: FeatureMap,
) -> Result<DeviceTensor<4>, ProblemError> {
    let (phi_q, phi_k) = (feature_rows(client, q, phi)?, feature_rows(client, k, phi)?);
    let scale = state_scale(problem.key_len());
    let z = block_sums(client, &phi_k, None, problem.block_k())?;
    let z = weighted_by_query(client, weights, &z, true, scale)?;
    let (qn, _) = normalised(client, &phi_q, &z, problem.block_q())?;
    // The walk of dphi(Q), with phi(Q) / n in the place of dO, phi(K) in that of V and V in that of
    // phi(K).
    let widths = [problem.value_dim(), problem.head_dim()];
    let job = WalkJob::new(client, problem, list, widths, Taken::Listed, Some(weights))?;
    let out = DeviceTensor::empty(client, problem.out_shape(), DType::F32);
    job.run_query([&qn, v, &phi_k], &out, scale)?;
    rounded(client, &out, problem.dtype())
}

/// The two walks over a list.
struct WalkJob<'a> {
    client: &'a Client,
    problem: &'a AttentionProblem,
    list: &'a BlockList,
    weights: Option<&'a DeviceTensor<4>>,
    engine: EngineKind,
    query: WalkConfig,
    key: WalkConfig,
}

impl<'a> WalkJob<'a> {
    fn new(
        client: &'a Client,
        problem: &'a AttentionProblem,
        list: &'a BlockList,
        [d, dv]: [usize; 2],
        taken: Taken,
        weights: Option<&'a DeviceTensor<4>>,
    ) -> Result<Self, ProblemError> {
        let device = client.properties();
        let query = TileNeeds {
            owned: vec![dv],
            streamed: vec![d, dv],
            accumulators: vec![d],
            lefts: 1,
            max_rows: problem.block_q(),
            max_cols: problem.block_k(),
            max_stages: 3,
            unit_bytes: 0,
        };
        let key = TileNeeds {
            owned: vec![d, dv],
            accumulators: vec![d, dv],
            lefts: 2,
            max_rows: problem.block_k(),
            max_cols: problem.block_q(),
            ..query.clone()
        };
        let factors = problem.factors();
        let mma = [&query, &key].map(|needs| mma_tile(needs, factors, device));
        let simt = [&query, &key].map(|needs| simt_tile(needs, &device.hardware));
        let (engine, query_tile, key_tile) = match (mma, simt) {
            ([Ok(query), Ok(key)], _) => (EngineKind::mma(factors), query, key),
            ([Err(reason), _] | [_, Err(reason)], simt) => {
                expect_simt(factors, reason, device)?;
                let [Some(query), Some(key)] = simt else {
                    return Err(no_tile(device));
                };
                (EngineKind::Simt, query, key)
            }
        };
        let config = |tile| WalkConfig {
            tile,
            head_dim: d,
            value_dim: dv,
            block_q: problem.block_q(),
            block_k: problem.block_k(),
            accumulate: taken == Taken::Unlisted,
            weighted: weights.is_some(),
        };
        let job = Self {
            client,
            problem,
            list,
            weights,
            engine,
            query: config(query_tile),
            key: config(key_tile),
        };
        expect_loop_budget(
            device,
            "the gradient of the linear branch",
            job.iterations(),
        )?;
        Ok(job)
    }

    /// Most loop iterations of one invocation of the portable engine's kernels.
    fn iterations(&self) -> usize {
        let (d, dv) = (self.query.head_dim, self.query.value_dim);
        let walk = |tile: Tile, tiles: usize| {
            let loads = (tile.cols * (d + dv) / 4).div_ceil(tile.units) + 4;
            let owned = (tile.rows * (d + dv) / 4).div_ceil(tile.units) + 4;
            owned + tiles * (loads + (d + dv) / 4 + 2 * tile.cols)
        };
        let problem = self.problem;
        let group = problem.query_heads() / problem.kv_heads();
        let keys = self.list.width() * problem.block_k().div_ceil(self.query.tile.cols);
        let queries = problem.query_blocks() * problem.block_q().div_ceil(self.key.tile.cols);
        walk(self.query.tile, keys).max(walk(self.key.tile, group * (queries + 1)))
    }

    fn load(tensors: &[&DeviceTensor<4>], vector: usize) -> usize {
        if tensors.iter().all(|x| x.is_aligned()) {
            vector
        } else {
            1
        }
    }

    fn address_type(tensors: &[&DeviceTensor<4>], out: &DeviceTensor<4>) -> AddressType {
        let extent = tensors.iter().map(|x| x.extent()).max();
        AddressType::from_len(extent.unwrap_or(0).max(out.extent()))
    }

    /// `tensors` are dO, phi(K) and V.
    fn run_query(
        &self,
        tensors: [&DeviceTensor<4>; 3],
        dphi: &DeviceTensor<4>,
        factor: f32,
    ) -> Result<(), ProblemError> {
        match self.engine {
            EngineKind::Simt => self.launch_query::<Simt>(tensors, dphi, factor, [4, 4]),
            EngineKind::Mma => self.launch_query::<Mma>(tensors, dphi, factor, [8, 2]),
            EngineKind::MmaTf32 => self.launch_query::<MmaTf32>(tensors, dphi, factor, [4, 2]),
        }
    }

    fn launch_query<E: TileEngine<query_walk::F>>(
        &self,
        tensors: [&DeviceTensor<4>; 3],
        dphi: &DeviceTensor<4>,
        factor: f32,
        [load, store]: [usize; 2],
    ) -> Result<(), ProblemError> {
        let (problem, tile) = (self.problem, self.query.tile);
        let tiles = problem.query_blocks() * problem.block_q().div_ceil(tile.rows);
        let [dout, phi_k, v] = tensors;
        // SAFETY: all tensors have the problem's shapes; rows past the ends are not stored.
        unsafe {
            query_walk::launch_unchecked::<E>(
                self.client,
                grid(
                    self.client.properties(),
                    [
                        ("tiles of query rows", tiles),
                        ("Hq", problem.query_heads()),
                        ("B", problem.batch()),
                    ],
                )?,
                CubeDim::new_1d(tile.units as u32),
                Self::address_type(&tensors, dphi),
                Self::load(&tensors, load),
                store,
                dout.tensor_arg(),
                phi_k.tensor_arg(),
                v.tensor_arg(),
                self.list.launch_arg(),
                weights_arg(self.weights, self.list),
                dphi.buffer_arg(),
                factor,
                self.query,
                problem.dtype().elem_type(),
            );
        }
        Ok(())
    }

    /// `tensors` are dO, phi(Q) / n, phi(K) and V; `outs` are dphi(K) and dV.
    fn launch_key<E: TileEngine<key_walk::F>>(
        &self,
        tensors: [&DeviceTensor<4>; 4],
        inverse: &InverseBlockList,
        [dphi, dv]: [&DeviceTensor<4>; 2],
        factor: f32,
        [load, store]: [usize; 2],
    ) -> Result<(), ProblemError> {
        let (problem, tile) = (self.problem, self.key.tile);
        let tiles = problem.key_blocks() * problem.block_k().div_ceil(tile.rows);
        let [dout, qn, phi_k, v] = tensors;
        let largest = if dphi.extent() > dv.extent() {
            dphi
        } else {
            dv
        };
        // SAFETY: as for the queries; each cube writes its own keys.
        unsafe {
            key_walk::launch_unchecked::<E>(
                self.client,
                grid(
                    self.client.properties(),
                    [
                        ("tiles of keys", tiles),
                        ("Hkv", problem.kv_heads()),
                        ("B", problem.batch()),
                    ],
                )?,
                CubeDim::new_1d(tile.units as u32),
                Self::address_type(&tensors, largest),
                Self::load(&tensors, load),
                store,
                dout.tensor_arg(),
                qn.tensor_arg(),
                phi_k.tensor_arg(),
                v.tensor_arg(),
                inverse.launch_arg(),
                weights_arg(self.weights, self.list),
                dphi.buffer_arg(),
                dv.buffer_arg(),
                factor,
                self.key,
                problem.dtype().elem_type(),
            );
        }
        Ok(())
    }
}
