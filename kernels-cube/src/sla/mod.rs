//! Sparse-linear attention: exact attention over critical blocks, linear attention over marginal
//! ones, and their combination, fused.
//!
//! ```text
//! O^s_i = softmax(scale Q_i K_j^T) V_j              over the critical j
//! O^l_i = phi(Q_i) H_i / (phi(Q_i) . Z_i)           over the marginal j, or over all
//! SLA   O = O^s + O^l Wl^T + bl                     (arXiv 2509.24006)
//! SLA2  O = a O^s + (1 - a) O^l, a = sigmoid(logit) (arXiv 2602.12675)
//! ```
//!
//! Where marginal blocks are the fewer they are added up; else what listed blocks contribute is taken
//! from the sums over all keys. Both sides of that difference come from the same rounded `phi(K)` and
//! `V`, so that it does not cancel badly; the sums over all keys are rounded to the inputs' type
//! once. A NaN or infinity in `K` or `V` then spoils the linear branch of every row of its heads.
//!
//! A sparse branch in low bits is a kernel of its own, whose result the kernel here reads; its linear
//! branch is computed as ever.
//!
//! Supported: what [`crate::attention`] supports, with D and Dv such that a tile fits.
//! Rejected, with a [`ProblemError`]: causal masks; lists, weights or logits of another shape.

mod backward;
mod forward;
mod low_bit;
mod soft;

pub use backward::{CombinationGradients, SlaBackward, SlaGradients, sla_backward};
pub use low_bit::Precision;
pub use soft::{SoftInputs, soft_attention, soft_attention_backward, soft_backward, soft_forward};

use cubecl::prelude::*;
use forward::{
    Combine, LinearForm, SlaConfig, SlaOutputsLaunch, SlaScalarsLaunch, sla_forward_kernel,
};
use low_bit::{SparseBranch, sparse_branch};

use crate::attention::{LowBitPlan, expect_low_bit};
use crate::engine::{EngineKind, Mma, MmaTf32, Simt, Tile, TileEngine, TileNeeds};
use crate::limits::{expect_bindings, expect_dtype, expect_loop_budget, grid};
use crate::linear::{Chunks, FeatureMap, States, feature_rows, state_scale, states, tile_of};
use crate::problem::expect_f32;
use crate::{AttentionProblem, BlockList, DType, DeviceTensor, ProblemError};

/// Over which keys the linear branch sums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LinearMode {
    /// Those of marginal blocks, as in the papers.
    #[default]
    Complement,
    /// All keys, as in SLA's public code.
    Global,
}

/// How the branches are combined, with the weights of it.
#[derive(Clone, Copy, Debug)]
pub enum Combination<'a> {
    /// SLA's projection of the linear branch.
    Sla {
        /// `Wl`, contiguous f32 `[Dv, Dv]`, applied from the right as `Wl^T`.
        wl: &'a DeviceTensor<2>,
        /// `bl`, contiguous f32 `[Dv]`.
        bl: &'a DeviceTensor<1>,
    },
    /// SLA2's weight of the sparse branch.
    Sla2 {
        /// Contiguous f32 `[1, 1]`, `[Hq, 1]` or `[Hq, M]`; the weight is its sigmoid.
        alpha_logit: &'a DeviceTensor<2>,
    },
}

/// Inputs of the forward.
#[derive(Clone, Copy, Debug)]
pub struct SlaInputs<'a> {
    /// `[B, Hq, Lq, D]`.
    pub q: &'a DeviceTensor<4>,
    /// `[B, Hkv, Lk, D]`.
    pub k: &'a DeviceTensor<4>,
    /// `[B, Hkv, Lk, Dv]`.
    pub v: &'a DeviceTensor<4>,
    /// Blocks of exact attention.
    pub critical: &'a BlockList,
    /// Blocks left out, disjoint from the critical ones; the rest is marginal.
    pub negligible: Option<&'a BlockList>,
}

/// What the forward returns.
#[derive(Clone, Debug)]
pub struct SlaOutput {
    /// `O [B, Hq, Lq, Dv]`, the inputs' type.
    pub out: DeviceTensor<4>,
    /// What a backward needs, if it was asked for.
    pub saved: Option<SlaSaved>,
}

/// The branches, and the sparse branch's log-sum-exp.
#[derive(Clone, Debug)]
pub struct SlaSaved {
    /// `O^s [B, Hq, Lq, Dv]`, the inputs' type.
    pub sparse: DeviceTensor<4>,
    /// `O^l [B, Hq, Lq, Dv]`, the inputs' type, before any projection.
    pub linear: DeviceTensor<4>,
    /// f32 `[B, Hq, Lq]`.
    pub lse: DeviceTensor<3>,
}

/// An error unless inputs and combination are those of `problem`.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn check_sla(
    client: &Client,
    problem: &AttentionProblem,
    inputs: &SlaInputs<'_>,
    combination: &Combination<'_>,
) -> Result<(), ProblemError> {
    problem.refuse_causal()?;
    expect_dtype(client.properties(), problem.dtype())?;
    problem.expect_products(client.properties())?;
    problem.expect_inputs(inputs.q, inputs.k, inputs.v)?;
    inputs.critical.expect_problem(problem)?;
    if let Some(negligible) = inputs.negligible {
        negligible.expect_problem(problem)?;
    }
    match *combination {
        Combination::Sla { wl, bl } => {
            let dv = problem.value_dim();
            expect_f32("wl", wl, [dv, dv])?;
            expect_f32("bl", bl, [dv])
        }
        Combination::Sla2 { alpha_logit } => {
            let (heads, blocks) = (problem.query_heads(), problem.query_blocks());
            let shape = alpha_logit.shape();
            let fits = [[1, 1], [heads, 1], [heads, blocks]].contains(&shape);
            expect_f32(
                "alpha_logit",
                alpha_logit,
                if fits { shape } else { [heads, blocks] },
            )
        }
    }
}

/// Both branches combined, with the portable engines.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault; nothing is launched then.
pub fn sla_forward(
    client: &Client,
    problem: &AttentionProblem,
    inputs: SlaInputs<'_>,
    combination: Combination<'_>,
    phi: FeatureMap,
    mode: LinearMode,
    precision: Precision,
    save: bool,
) -> Result<SlaOutput, ProblemError> {
    check_sla(client, problem, &inputs, &combination)?;
    let SlaInputs {
        q, k, v, critical, ..
    } = inputs;
    expect_bindings(client.properties(), "sparse-linear attention", 16)?;
    let formats = precision.formats();
    let low_bit = match formats {
        None => None,
        Some(formats) => {
            expect_low_bit(problem)?;
            let plan = LowBitPlan::fastest(problem, client.properties(), formats)?;
            plan.expect_device(client, problem, critical)?;
            Some((plan, formats))
        }
    };
    let (form, second) = match mode {
        LinearMode::Global => (LinearForm::Global, None),
        LinearMode::Complement => {
            if lists_the_fewer(problem, critical, inputs.negligible) {
                (LinearForm::Subtract, inputs.negligible.cloned())
            } else {
                let marginal = critical.remaining(client, inputs.negligible)?;
                (LinearForm::Add, Some(marginal))
            }
        }
    };
    let (d, dv) = (problem.head_dim(), problem.value_dim());
    let spare = form != LinearForm::Global;
    let (mut owned, mut streamed) = (Vec::new(), vec![dv]);
    if formats.is_none() || !spare {
        owned.push(d);
    }
    if formats.is_none() {
        streamed.push(d);
    }
    if spare {
        owned.push(d);
        streamed.push(d);
    }
    if matches!(combination, Combination::Sla { .. }) {
        owned.push(dv);
    }
    let needs = TileNeeds {
        owned,
        streamed,
        accumulators: vec![dv, dv],
        lefts: 2,
        max_rows: problem.block_q(),
        max_cols: problem.block_k(),
        max_stages: 1,
        unit_bytes: 4,
    };
    let (engine, tile) = tile_of(&needs, &[d], problem.factors(), client.properties())?;
    let second_width = second.as_ref().map_or(0, BlockList::width);
    let iterations = loop_iterations(problem, tile, critical.width() + second_width);
    expect_loop_budget(client.properties(), "sparse-linear attention", iterations)?;
    let given = low_bit
        .map(|(plan, formats)| sparse_branch(client, problem, &plan, inputs, formats))
        .transpose()?;

    let (phi_k, states) = match form {
        LinearForm::Global => (
            None,
            states(client, k, v, phi, Chunks::Total, problem.factors())?,
        ),
        LinearForm::Subtract => {
            let phi_k = feature_rows(client, k, phi)?;
            let states = states(
                client,
                &phi_k,
                v,
                FeatureMap::Identity,
                Chunks::Total,
                problem.factors(),
            )?;
            (Some(phi_k), states)
        }
        // No sum over all keys is needed; the kernel takes one, so it gets the smallest there is.
        LinearForm::Add => (
            Some(feature_rows(client, k, phi)?),
            States {
                h: DeviceTensor::empty(
                    client,
                    [problem.batch(), problem.kv_heads(), d, dv],
                    problem.dtype(),
                ),
                z: DeviceTensor::empty(
                    client,
                    [problem.batch(), problem.kv_heads(), d, 1],
                    DType::F32,
                ),
            },
        ),
    };
    let job = SlaJob {
        client,
        problem,
        tensors: [q, k, v, phi_k.as_ref().unwrap_or(k)],
        states: &states,
        critical,
        second: second.as_ref(),
        given: given.as_ref(),
        combination,
        config: SlaConfig {
            tile,
            head_dim: d,
            value_dim: dv,
            block_q: problem.block_q(),
            block_k: problem.block_k(),
            phi,
            form,
            second: second.is_some(),
            combine: match combination {
                Combination::Sla { .. } => Combine::Sla,
                Combination::Sla2 { .. } => Combine::Sla2,
            },
            given: given.is_some(),
            save,
        },
    };
    match engine {
        EngineKind::Simt => job.launch::<Simt>([4, 4]),
        EngineKind::Mma => job.launch::<Mma>([8, 2]),
        EngineKind::MmaTf32 => job.launch::<MmaTf32>([4, 2]),
    }
}

struct SlaJob<'a> {
    client: &'a Client,
    problem: &'a AttentionProblem,
    /// q, k, v, phi(K).
    tensors: [&'a DeviceTensor<4>; 4],
    states: &'a States,
    critical: &'a BlockList,
    second: Option<&'a BlockList>,
    given: Option<&'a SparseBranch>,
    combination: Combination<'a>,
    config: SlaConfig,
}

impl SlaJob<'_> {
    fn launch<E: TileEngine<sla_forward_kernel::F>>(
        &self,
        [load, store]: [usize; 2],
    ) -> Result<SlaOutput, ProblemError> {
        let (client, problem, tile) = (self.client, self.problem, self.config.tile);
        let dtype = problem.dtype();
        let out = DeviceTensor::empty(client, problem.out_shape(), dtype);
        let saved = self.config.save.then(|| {
            let (sparse, lse) = match self.given {
                Some(branch) => (branch.out.clone(), branch.lse.clone()),
                None => (
                    DeviceTensor::empty(client, problem.out_shape(), dtype),
                    DeviceTensor::empty(client, problem.lse_shape(), DType::F32),
                ),
            };
            SlaSaved {
                sparse,
                linear: DeviceTensor::empty(client, problem.out_shape(), dtype),
                lse,
            }
        });
        let sparse = match self.given {
            Some(branch) => Some(&branch.out),
            None => saved.as_ref().map(|saved| &saved.sparse),
        };
        // Arguments of a variant that does not use them: something small of the right type.
        let nothing = DeviceTensor::empty(client, [1, 1, 1, 8], dtype);
        let nothing_f32 = DeviceTensor::empty(client, [8], DType::F32);
        let (wl, weights, logit_strides) = match self.combination {
            Combination::Sla { wl, bl } => (transposed(client, wl, dtype), bl.buffer_arg(), [0, 0]),
            Combination::Sla2 { alpha_logit } => {
                let strides = logit_strides(alpha_logit);
                (nothing.clone(), alpha_logit.buffer_arg(), strides)
            }
        };
        let [q, k, v, phi_k] = self.tensors;
        let extent = self.tensors.iter().map(|t| t.extent()).max().unwrap_or(0);
        let tiles = problem.query_blocks() * problem.block_q().div_ceil(tile.rows);
        // SAFETY: the problem was validated against the tensors; rows and keys past the ends read as
        // zeros, are masked and are not stored.
        unsafe {
            sla_forward_kernel::launch_unchecked::<E>(
                client,
                grid(
                    client.properties(),
                    [
                        ("tiles of query rows", tiles),
                        ("Hq", problem.query_heads()),
                        ("B", problem.batch()),
                    ],
                )?,
                CubeDim::new_1d(tile.units as u32),
                AddressType::from_len(extent),
                if problem.is_aligned() { load } else { 1 },
                store,
                q.tensor_arg(),
                k.tensor_arg(),
                v.tensor_arg(),
                phi_k.tensor_arg(),
                self.states.h.tensor_arg(),
                self.states.z.buffer_arg(),
                self.critical.launch_arg(),
                self.second.unwrap_or(self.critical).launch_arg(),
                wl.tensor_arg(),
                weights,
                SlaOutputsLaunch::new(
                    out.buffer_arg(),
                    sparse.map_or(nothing.buffer_arg(), DeviceTensor::buffer_arg),
                    saved
                        .as_ref()
                        .map_or(nothing.buffer_arg(), |s| s.linear.buffer_arg()),
                    saved
                        .as_ref()
                        .map_or(nothing_f32.buffer_arg(), |s| s.lse.buffer_arg()),
                ),
                SlaScalarsLaunch::new(
                    problem.scale(),
                    state_scale(problem.key_len()),
                    logit_strides[0] as u32,
                    logit_strides[1] as u32,
                ),
                self.config,
                dtype.elem_type(),
            );
        }
        Ok(SlaOutput { out, saved })
    }
}

/// Whether listed blocks are at most half of all: the sums over marginal blocks are then those over all
/// keys less those over listed blocks, else the marginal ones' added up.
pub fn lists_the_fewer(
    problem: &AttentionProblem,
    critical: &BlockList,
    negligible: Option<&BlockList>,
) -> bool {
    2 * (critical.width() + negligible.map_or(0, BlockList::width)) <= problem.key_blocks()
}

/// Distances between the logits of neighbouring heads and query blocks; 0 if they share one.
pub fn logit_strides(alpha_logit: &DeviceTensor<2>) -> [usize; 2] {
    let [heads, blocks] = alpha_logit.shape();
    [if heads > 1 { blocks } else { 0 }, usize::from(blocks > 1)]
}

/// `w^T` as `[1, 1, E, D]` of type `dtype`.
pub fn transposed(client: &Client, w: &DeviceTensor<2>, dtype: DType) -> DeviceTensor<4> {
    let [rows, columns] = w.shape();
    let out = DeviceTensor::empty(client, [1, 1, columns, rows], dtype);
    let units = 256;
    // SAFETY: one unit to an element.
    unsafe {
        transpose_kernel::launch_unchecked(
            client,
            CubeCount::Static((rows * columns).div_ceil(units) as u32, 1, 1),
            CubeDim::new_1d(units as u32),
            w.buffer_arg(),
            out.buffer_arg(),
            rows as u32,
            columns as u32,
            dtype.elem_type(),
        );
    }
    out
}

#[cube(launch_unchecked)]
fn transpose_kernel<F: Float>(
    w: &[f32],
    out: &mut [F],
    rows: u32,
    columns: u32,
    #[define(F)] _dtype: ElemType,
) {
    let at = ABSOLUTE_POS as u32;
    if at < rows * columns {
        let (column, row) = (at / rows, at % rows);
        out[at as usize] = F::cast_from(w[(row * columns + column) as usize]);
    }
}

/// Most loop iterations of one invocation of the portable engine's kernel.
fn loop_iterations(problem: &AttentionProblem, tile: Tile, width: usize) -> usize {
    let (d, dv) = (problem.head_dim(), problem.value_dim());
    let loads = |rows: usize, width: usize| (rows * width / 4).div_ceil(tile.units);
    let tiles = width * problem.block_k().div_ceil(tile.cols);
    let per_tile = 2 * loads(tile.cols, d) + loads(tile.cols, dv) + d / 2 + 2 * tile.cols;
    let states = (d + dv).div_ceil(tile.cols) * (loads(tile.cols, dv) + tile.cols);
    2 * loads(tile.rows, d) + 64 + states + tiles * per_tile
}
