//! Gradients of block-sparse attention.
//!
//! ```text
//! delta_i = rowsum(dO_i * O_i)
//! P_ij = exp(scale Q_i K_j^T - L_i)      dS_ij = P_ij (dO_i V_j^T - delta_i)
//! dQ_i = scale sum_j dS_ij K_j           over the list of i
//! dK_j = scale sum_i dS_ij^T Q_i         over the inverse list of j
//! dV_j = sum_i P_ij^T dO_i               likewise
//! ```
//!
//! With weights `m` of blocks, `P = m exp(S - L)` and `dm = sum over the block of dS / m`.
//!
//! Two passes recompute `P`, so that each gradient has one owner: no atomics, and two runs give the
//! same bits.

mod delta;
mod key;
#[allow(missing_docs, reason = "`CubeLaunch` derives a struct of its own")]
mod query;
mod weight;

pub use delta::row_dots;
pub(crate) use weight::{WeightJob, WeightTerm};

use std::fmt;

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;
use key::key_gradients;
use query::query_gradient;

use super::forward::ForwardScalarsLaunch;
use crate::block_list::{expect_weights, weights_arg};
use crate::engine::{
    EngineKind, Mma, MmaTf32, Simt, Tile, TileEngine, TileNeeds, mma_tile, simt_supported,
    simt_tile,
};
use crate::limits::{expect_bindings, expect_dtype, expect_loop_budget, grid};
use crate::problem::expect_shape;
use crate::{
    AttentionProblem, BlockList, Causal, DType, DeviceTensor, InverseBlockList, ProblemError,
};

/// How the backward is run: an engine and the sizes of its two tile programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackwardPlan {
    engine: EngineKind,
    /// Owns query rows.
    query: Tile,
    /// Owns keys.
    key: Tile,
}

/// Inputs of the backward.
#[derive(Clone, Copy, Debug)]
pub struct BackwardInputs<'a> {
    /// `[B, Hq, Lq, D]`.
    pub q: &'a DeviceTensor<4>,
    /// `[B, Hkv, Lk, D]`.
    pub k: &'a DeviceTensor<4>,
    /// `[B, Hkv, Lk, Dv]`.
    pub v: &'a DeviceTensor<4>,
    /// The forward's `O [B, Hq, Lq, Dv]`, any strides, the inputs' type.
    pub out: &'a DeviceTensor<4>,
    /// The forward's `L [B, Hq, Lq]`, contiguous f32.
    pub lse: &'a DeviceTensor<3>,
    /// `dO [B, Hq, Lq, Dv]`, any strides, the inputs' type.
    pub grad_out: &'a DeviceTensor<4>,
    /// `[B, Hq, M, N]`, the forward's.
    pub list: &'a BlockList,
}

/// Outputs of the backward, contiguous, every element of which is written: of the inputs' type, or
/// f32.
#[derive(Clone, Copy, Debug)]
pub struct BackwardOutputs<'a> {
    /// `[B, Hq, Lq, D]`.
    pub dq: &'a DeviceTensor<4>,
    /// `[B, Hkv, Lk, D]`.
    pub dk: &'a DeviceTensor<4>,
    /// `[B, Hkv, Lk, Dv]`.
    pub dv: &'a DeviceTensor<4>,
}

/// What the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BackwardConfig {
    pub tile: Tile,
    pub head_dim: usize,
    pub value_dim: usize,
    pub block_q: usize,
    pub block_k: usize,
    pub causal: bool,
    /// Whether blocks have weights.
    pub weighted: bool,
}

/// Two numbers for each query row, `[B, Hq, Lq]`.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct RowStatistics {
    pub lse: Box<[f32]>,
    pub delta: Box<[f32]>,
}

impl BackwardPlan {
    /// The plan of the fastest engine that can run `problem`.
    ///
    /// # Errors
    /// [`ProblemError::NoPlan`] with every engine's reason, if none can.
    pub fn new(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Self, ProblemError> {
        Self::all(problem, device).map(|mut plans| plans.swap_remove(0))
    }

    /// A plan for every engine that can run `problem`, fastest first.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn all(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Vec<Self>, ProblemError> {
        let mma = Self::mma(problem, device);
        let simt = Self::simt(problem, device);
        match (mma, simt) {
            (Err(mma), Err(simt)) => Err(ProblemError::NoPlan {
                device: device.identity.name.clone(),
                reason: format!("not mma: {mma}; not simt: {simt}"),
            }),
            (mma, simt) => Ok(mma.into_iter().chain(simt).collect()),
        }
    }

    fn mma(problem: &AttentionProblem, device: &DeviceProperties) -> Result<Self, &'static str> {
        let tile = |needs| mma_tile(&needs, problem.factors(), device);
        Ok(Self {
            engine: EngineKind::mma(problem.factors()),
            query: tile(query_needs(problem))?,
            key: tile(key_needs(problem))?,
        })
    }

    fn simt(problem: &AttentionProblem, device: &DeviceProperties) -> Result<Self, &'static str> {
        simt_supported(problem.factors())?;
        let tile = |needs| {
            simt_tile(&needs, &device.hardware)
                .ok_or("no tile of these head dimensions fits the shared memory")
        };
        Ok(Self {
            engine: EngineKind::Simt,
            query: tile(query_needs(problem))?,
            key: tile(key_needs(problem))?,
        })
    }
}

impl fmt::Display for BackwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} dq {}; dk dv {}", self.engine, self.query, self.key)
    }
}

fn query_needs(problem: &AttentionProblem) -> TileNeeds {
    let (d, dv) = (problem.head_dim(), problem.value_dim());
    TileNeeds {
        owned: vec![d, dv],
        streamed: vec![d, dv],
        accumulators: vec![d],
        lefts: 1,
        max_rows: problem.block_q(),
        max_cols: problem.block_k(),
        max_stages: 3,
        unit_bytes: 0,
    }
}

fn key_needs(problem: &AttentionProblem) -> TileNeeds {
    let (d, dv) = (problem.head_dim(), problem.value_dim());
    TileNeeds {
        accumulators: vec![d, dv],
        lefts: 2,
        max_rows: problem.block_k(),
        max_cols: problem.block_q(),
        ..query_needs(problem)
    }
}

/// An error unless inputs and outputs are those of `problem`, in types that the device has.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn check_backward(
    client: &Client,
    problem: &AttentionProblem,
    inputs: &BackwardInputs<'_>,
    outputs: &BackwardOutputs<'_>,
) -> Result<(), ProblemError> {
    let (q, k, v) = (inputs.q, inputs.k, inputs.v);
    let mut q_shape = problem.out_shape();
    q_shape[3] = problem.head_dim();
    let k_shape = [
        problem.batch(),
        problem.kv_heads(),
        problem.key_len(),
        problem.head_dim(),
    ];
    let mut v_shape = k_shape;
    v_shape[3] = problem.value_dim();
    inputs.list.expect_problem(problem)?;
    for (argument, tensor, shape) in [
        ("q", q, q_shape),
        ("k", k, k_shape),
        ("v", v, v_shape),
        ("out", inputs.out, problem.out_shape()),
        ("grad_out", inputs.grad_out, problem.out_shape()),
    ] {
        expect_shape(argument, tensor.shape(), shape)?;
        expect_type(argument, tensor.dtype(), problem.dtype())?;
    }
    expect_shape("lse", inputs.lse.shape(), problem.lse_shape())?;
    expect_type("lse", inputs.lse.dtype(), DType::F32)?;
    if !inputs.lse.is_contiguous() {
        return Err(ProblemError::NotContiguous { argument: "lse" });
    }
    for (argument, tensor, shape) in [
        ("dq", outputs.dq, q_shape),
        ("dk", outputs.dk, k_shape),
        ("dv", outputs.dv, v_shape),
    ] {
        expect_shape(argument, tensor.shape(), shape)?;
        expect_type(argument, tensor.dtype(), outputs.dq.dtype())?;
        if !tensor.is_contiguous() {
            return Err(ProblemError::NotContiguous { argument });
        }
    }
    if outputs.dq.dtype() != DType::F32 {
        expect_type("dq", outputs.dq.dtype(), problem.dtype())?;
    }
    expect_bindings(client.properties(), "attention's backward", 11)?;
    expect_dtype(client.properties(), problem.dtype())
}

fn expect_type(argument: &'static str, found: DType, expected: DType) -> Result<(), ProblemError> {
    if found == expected {
        return Ok(());
    }
    Err(ProblemError::DTypeMismatch {
        argument,
        found,
        expected,
    })
}

/// Computes the gradients as `plan` says. No gradient is computed if an argument is refused.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn launch_backward(
    client: &Client,
    problem: &AttentionProblem,
    plan: &BackwardPlan,
    inputs: BackwardInputs<'_>,
    outputs: BackwardOutputs<'_>,
) -> Result<(), ProblemError> {
    launch_backward_weighted(client, problem, plan, inputs, None, outputs)
}

/// [`launch_backward`] for [`launch_forward_weighted`](super::launch_forward_weighted): with
/// `weights` come the weights and where their gradients go, both f32 `[B, Hq, M, N]`, contiguous.
/// Only gradients of blocks of the list are written; that of a weight of 0 is 0.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn launch_backward_weighted(
    client: &Client,
    problem: &AttentionProblem,
    plan: &BackwardPlan,
    inputs: BackwardInputs<'_>,
    weights: Option<[&DeviceTensor<4>; 2]>,
    outputs: BackwardOutputs<'_>,
) -> Result<(), ProblemError> {
    check_backward(client, problem, &inputs, &outputs)?;
    for weights in weights.into_iter().flatten() {
        expect_weights(problem, weights)?;
    }
    if plan.engine == EngineKind::Simt {
        let most = loop_iterations(problem, plan, inputs.list.width());
        expect_loop_budget(
            client.properties(),
            "the gradient of block-sparse attention",
            most,
        )?;
    }
    let inverse = InverseBlockList::new(client, inputs.list)?;
    let delta = row_dots(client, inputs.out, inputs.grad_out)?;
    let job = BackwardJob {
        client,
        problem,
        plan,
        inputs,
        outputs,
        delta: &delta,
        inverse: &inverse,
        weights: weights.map(|[weights, _]| weights),
    };
    match plan.engine {
        EngineKind::Simt => {
            job.launch_query::<Simt>([4, 4])?;
            job.launch_key::<Simt>([4, 4])?;
        }
        EngineKind::Mma => {
            job.launch_query::<Mma>([8, 2])?;
            job.launch_key::<Mma>([8, 2])?;
        }
        EngineKind::MmaTf32 => {
            job.launch_query::<MmaTf32>([4, 2])?;
            job.launch_key::<MmaTf32>([4, 2])?;
        }
    }
    let Some([weights, grad]) = weights else {
        return Ok(());
    };
    let BackwardInputs {
        q,
        k,
        v,
        lse,
        grad_out,
        list,
        ..
    } = inputs;
    let job = WeightJob {
        tensors: [q, k, grad_out, v],
        lse,
        delta: &delta,
        list,
        weights,
        grad,
        term: WeightTerm::Softmax,
        factor: problem.scale(),
    };
    job.run(client, problem)
}

struct BackwardJob<'a> {
    client: &'a Client,
    problem: &'a AttentionProblem,
    plan: &'a BackwardPlan,
    inputs: BackwardInputs<'a>,
    outputs: BackwardOutputs<'a>,
    delta: &'a DeviceTensor<3>,
    inverse: &'a InverseBlockList,
    weights: Option<&'a DeviceTensor<4>>,
}

impl BackwardJob<'_> {
    fn config(&self, tile: Tile) -> BackwardConfig {
        BackwardConfig {
            tile,
            head_dim: self.problem.head_dim(),
            value_dim: self.problem.value_dim(),
            block_q: self.problem.block_q(),
            block_k: self.problem.block_k(),
            causal: self.problem.causal() != Causal::None,
            weighted: self.weights.is_some(),
        }
    }

    fn address_type(&self) -> AddressType {
        let BackwardInputs {
            q, k, v, grad_out, ..
        } = self.inputs;
        let BackwardOutputs { dq, dk, dv } = self.outputs;
        let extent = [q, k, v, grad_out, dq, dk, dv].map(DeviceTensor::extent);
        AddressType::from_len(extent.into_iter().max().unwrap_or(0))
    }

    fn load(&self, vector: usize) -> usize {
        if self.problem.is_aligned() && self.inputs.grad_out.is_aligned() {
            vector
        } else {
            1
        }
    }

    fn statistics(&self) -> RuntimeArg<RowStatistics> {
        RowStatisticsLaunch::new(self.inputs.lse.buffer_arg(), self.delta.buffer_arg())
    }

    fn launch_query<E: TileEngine<query_gradient::F>>(
        &self,
        [load, store]: [usize; 2],
    ) -> Result<(), ProblemError> {
        let (problem, tile) = (self.problem, self.plan.query);
        let tiles = problem.query_blocks() * problem.block_q().div_ceil(tile.rows);
        let count = grid(
            self.client.properties(),
            [
                ("tiles of query rows", tiles),
                ("Hq", problem.query_heads()),
                ("B", problem.batch()),
            ],
        )?;
        // SAFETY: the arguments were checked against the problem; the kernel masks rows and keys
        // past the ends.
        unsafe {
            query_gradient::launch_unchecked::<E>(
                self.client,
                count,
                CubeDim::new_1d(tile.units as u32),
                self.address_type(),
                self.load(load),
                store,
                self.inputs.q.tensor_arg(),
                self.inputs.k.tensor_arg(),
                self.inputs.v.tensor_arg(),
                self.inputs.grad_out.tensor_arg(),
                self.statistics(),
                self.inputs.list.launch_arg(),
                weights_arg(self.weights, self.inputs.list),
                self.outputs.dq.buffer_arg(),
                ForwardScalarsLaunch::new(problem.scale(), problem.causal_shift()),
                self.config(tile),
                problem.dtype().elem_type(),
                self.outputs.dq.dtype().elem_type(),
            );
        }
        Ok(())
    }

    fn launch_key<E: TileEngine<key_gradients::F>>(
        &self,
        [load, store]: [usize; 2],
    ) -> Result<(), ProblemError> {
        let (problem, tile) = (self.problem, self.plan.key);
        let tiles = problem.key_blocks() * problem.block_k().div_ceil(tile.rows);
        let count = grid(
            self.client.properties(),
            [
                ("tiles of keys", tiles),
                ("Hkv", problem.kv_heads()),
                ("B", problem.batch()),
            ],
        )?;
        // SAFETY: as for the queries; the inverse holds query blocks of the list's shape.
        unsafe {
            key_gradients::launch_unchecked::<E>(
                self.client,
                count,
                CubeDim::new_1d(tile.units as u32),
                self.address_type(),
                self.load(load),
                store,
                self.inputs.q.tensor_arg(),
                self.inputs.k.tensor_arg(),
                self.inputs.v.tensor_arg(),
                self.inputs.grad_out.tensor_arg(),
                self.statistics(),
                self.inverse.launch_arg(),
                weights_arg(self.weights, self.inputs.list),
                self.outputs.dk.buffer_arg(),
                self.outputs.dv.buffer_arg(),
                ForwardScalarsLaunch::new(problem.scale(), problem.causal_shift()),
                self.config(tile),
                problem.dtype().elem_type(),
                self.outputs.dk.dtype().elem_type(),
            );
        }
        Ok(())
    }
}

/// Most loop iterations of one invocation of the portable engine's kernels: a key block may have
/// been selected by every query block.
fn loop_iterations(problem: &AttentionProblem, plan: &BackwardPlan, width: usize) -> usize {
    let (d, dv) = (problem.head_dim(), problem.value_dim());
    let walk = |tile: Tile, tiles: usize, products: usize| {
        let loads = |rows: usize| {
            (rows * d / 4).div_ceil(tile.units) + (rows * dv / 4).div_ceil(tile.units) + 2
        };
        let per_tile = 1 + loads(tile.cols) + (d + dv) / 4 + products * tile.cols;
        loads(tile.rows) + 64 + tiles * per_tile
    };
    let group = problem.query_heads() / problem.kv_heads();
    let queries = problem.query_blocks() * problem.block_q().div_ceil(plan.key.cols);
    let keys = width * problem.block_k().div_ceil(plan.query.cols);
    walk(plan.query, keys, 1).max(walk(plan.key, group * (queries + 32), 2))
}
