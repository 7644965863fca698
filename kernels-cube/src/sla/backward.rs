//! Gradients of the two branches and of their combination.
//!
//! ```text
//! SLA   dO^s = dO      dO^l = dO Wl         dWl = sum dO^T O^l    dbl = sum dO
//! SLA2  dO^s = a dO    dO^l = (1 - a) dO    da = sum over the block of dO (O^s - O^l)
//! ```

use cubecl::prelude::*;

use super::{
    Combination, LinearMode, SlaInputs, SlaSaved, check_sla, lists_the_fewer, logit_strides,
    transposed,
};
use crate::attention::{BackwardInputs, BackwardOutputs, BackwardPlan, launch_backward};
use crate::limits::{expect_loop_budget, grid, line_grid};
use crate::linear::{
    FeatureMap, Gradients, LinearInputs, Taken, linear_gradients, multiply_rows, outer_sums,
};
use crate::problem::expect_f32;
use crate::problem::expect_shape;
use crate::rows::RowRange;
use crate::{AttentionProblem, BlockList, DType, DeviceTensor, ProblemError};

/// Gradients of the weights of a combination, f32.
#[derive(Clone, Debug)]
pub enum CombinationGradients {
    /// SLA's.
    Sla {
        /// `dWl [Dv, Dv]`.
        wl: DeviceTensor<2>,
        /// `dbl [Dv]`.
        bl: DeviceTensor<1>,
    },
    /// SLA2's.
    Sla2 {
        /// Of the shape of the logits; one that several blocks share has the sum of their gradients.
        alpha_logit: DeviceTensor<2>,
    },
}

/// What [`sla_backward`] returns.
#[derive(Clone, Debug)]
pub struct SlaGradients {
    /// `dQ`, `dK` and `dV`, contiguous, the inputs' type.
    pub inputs: Gradients,
    /// Of the combination's weights.
    pub weights: CombinationGradients,
}

impl SlaSaved {
    /// An error unless the branches and `grad_out` are those of `problem`.
    pub(super) fn check(
        &self,
        problem: &AttentionProblem,
        grad_out: &DeviceTensor<4>,
    ) -> Result<(), ProblemError> {
        for (argument, tensor) in [
            ("saved.sparse", &self.sparse),
            ("saved.linear", &self.linear),
            ("grad_out", grad_out),
        ] {
            expect_shape(argument, tensor.shape(), problem.out_shape())?;
            if tensor.dtype() != problem.dtype() {
                return Err(ProblemError::DTypeMismatch {
                    argument,
                    found: tensor.dtype(),
                    expected: problem.dtype(),
                });
            }
            if argument != "grad_out" && !tensor.is_contiguous() {
                return Err(ProblemError::NotContiguous { argument });
            }
        }
        expect_f32("saved.lse", &self.lse, problem.lse_shape())
    }
}

/// What a combination passes on.
pub(super) struct BranchGradients {
    /// `dO^s`, any strides.
    pub sparse: DeviceTensor<4>,
    /// `dO^l`, contiguous.
    pub linear: DeviceTensor<4>,
    pub weights: CombinationGradients,
}

/// Gradients of [`sla_forward`](super::sla_forward) for `grad_out [B, Hq, Lq, Dv]`, any strides.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
#[allow(clippy::too_many_arguments)] // the forward's arguments, what it saved, and its gradient
pub fn sla_backward(
    client: &Client,
    problem: &AttentionProblem,
    inputs: SlaInputs<'_>,
    combination: Combination<'_>,
    phi: FeatureMap,
    mode: LinearMode,
    saved: &SlaSaved,
    grad_out: &DeviceTensor<4>,
) -> Result<SlaGradients, ProblemError> {
    check_sla(client, problem, &inputs, &combination)?;
    saved.check(problem, grad_out)?;
    let plan = BackwardPlan::new(problem, client.properties())?;
    let SlaInputs {
        q,
        k,
        v,
        critical,
        negligible,
    } = inputs;
    let branches = match combination {
        Combination::Sla { wl, .. } => {
            let wl = transposed(client, wl, problem.dtype());
            let linear = DeviceTensor::empty(client, problem.out_shape(), problem.dtype());
            multiply_rows(client, grad_out, &wl, &linear, 1.0, false)?;
            let (wl, bl) = outer_sums(client, grad_out, &saved.linear)?;
            BranchGradients {
                sparse: grad_out.clone(),
                linear,
                weights: CombinationGradients::Sla { wl, bl },
            }
        }
        Combination::Sla2 { alpha_logit } => split(client, problem, alpha_logit, saved, grad_out)?,
    };
    let sums = Gradients::sums(client, [q, k, v])?;
    launch_backward(
        client,
        problem,
        &plan,
        BackwardInputs {
            q,
            k,
            v,
            out: &saved.sparse,
            lse: &saved.lse,
            grad_out: &branches.sparse,
            list: critical,
        },
        BackwardOutputs {
            dq: &sums.dq,
            dk: &sums.dk,
            dv: &sums.dv,
        },
    )?;
    let (list, taken) = linear_blocks(client, problem, critical, negligible, mode)?;
    let linear = LinearInputs {
        q,
        k,
        v,
        out: &saved.linear,
        grad_out: &branches.linear,
        list: &list,
        taken,
        weights: None,
    };
    Ok(SlaGradients {
        inputs: linear_gradients(client, problem, linear, phi, &sums)?,
        weights: branches.weights,
    })
}

/// The shorter of two ways to say over which blocks the linear branch sums.
fn linear_blocks(
    client: &Client,
    problem: &AttentionProblem,
    critical: &BlockList,
    negligible: Option<&BlockList>,
    mode: LinearMode,
) -> Result<(BlockList, Taken), ProblemError> {
    if mode == LinearMode::Global {
        return Ok((BlockList::empty(client, critical.shape()), Taken::Unlisted));
    }
    if !lists_the_fewer(problem, critical, negligible) {
        return Ok((critical.remaining(client, negligible)?, Taken::Listed));
    }
    let list = match negligible {
        None => critical.clone(),
        // What is neither critical nor negligible is left out twice.
        Some(_) => critical
            .remaining(client, negligible)?
            .remaining(client, None)?,
    };
    Ok((list, Taken::Unlisted))
}

/// Units of a cube.
const UNITS: usize = 256;

/// `a dO`, `(1 - a) dO` and the gradient of the logits.
pub(super) fn split(
    client: &Client,
    problem: &AttentionProblem,
    alpha_logit: &DeviceTensor<2>,
    saved: &SlaSaved,
    grad_out: &DeviceTensor<4>,
) -> Result<BranchGradients, ProblemError> {
    let device = client.properties();
    let (batch, heads, blocks) = (
        problem.batch(),
        problem.query_heads(),
        problem.query_blocks(),
    );
    let rows = batch * heads * blocks;
    let block = problem.block_q() * problem.value_dim();
    let iterations = block.max(rows).div_ceil(UNITS) + UNITS;
    expect_loop_budget(device, "the gradient of SLA2's weights", iterations)?;
    let branch = || DeviceTensor::empty(client, problem.out_shape(), problem.dtype());
    let (sparse, linear) = (branch(), branch());
    let partial = DeviceTensor::empty(client, [rows], DType::F32);
    let logits = DeviceTensor::empty(client, alpha_logit.shape(), DType::F32);
    let [logit_heads, logit_blocks] = alpha_logit.shape();
    let strides = logit_strides(alpha_logit);
    // SAFETY: each cube writes the rows of its own block; the second kernel a logit to a cube.
    unsafe {
        split_kernel::launch_unchecked(
            client,
            grid(
                device,
                [("query blocks", blocks), ("Hq", heads), ("B", batch)],
            )?,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(grad_out.extent().max(sparse.len())),
            grad_out.tensor_arg(),
            saved.sparse.buffer_arg(),
            saved.linear.buffer_arg(),
            alpha_logit.buffer_arg(),
            sparse.buffer_arg(),
            linear.buffer_arg(),
            partial.buffer_arg(),
            LogitStridesLaunch::new(strides[0] as u32, strides[1] as u32),
            problem.block_q() as u32,
            problem.value_dim(),
            problem.dtype().elem_type(),
        );
        sum_logits_kernel::launch_unchecked(
            client,
            line_grid(device, "logits", logits.len())?,
            CubeDim::new_1d(UNITS as u32),
            partial.buffer_arg(),
            logits.buffer_arg(),
            heads as u32,
            blocks as u32,
            logit_heads as u32,
            logit_blocks as u32,
        );
    }
    Ok(BranchGradients {
        sparse,
        linear,
        weights: CombinationGradients::Sla2 {
            alpha_logit: logits,
        },
    })
}

/// Distances between the logits of neighbouring heads and query blocks; 0 if they share one.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct LogitStrides {
    head: u32,
    block: u32,
}

/// The sum over the units of a cube, in the first unit. All units must call it, once.
#[cube]
fn cube_sum(x: f32) -> f32 {
    let mut partial = Shared::<[f32]>::new_slice(UNITS);
    partial[UNIT_POS as usize] = x;
    sync_cube();
    let mut sum = 0.0f32;
    if UNIT_POS == 0 {
        for i in 0..UNITS {
            sum += partial[i];
        }
    }
    sum
}

/// Grid: x = query block, y = query head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
fn split_kernel<F: Float>(
    grad_out: &Tensor<Vector<F, Const<1>>>, // [B, Hq, Lq, Dv]
    out_sparse: &[F],
    out_linear: &[F],
    alpha_logit: &[f32],
    sparse: &mut [F],
    linear: &mut [F],
    partial: &mut [f32], // [B, Hq, M]
    strides: LogitStrides,
    block_q: u32,
    #[comptime] value_dim: usize,
    #[define(F)] _dtype: ElemType,
) {
    let (batch, head) = (CUBE_POS_Z as usize, CUBE_POS_Y as usize);
    let index = batch * grad_out.shape(1) + head;
    let first = CUBE_POS_X * block_q;
    let end = min(first + block_q, grad_out.shape(2) as u32);
    let rows = RowRange::new::<F, Const<1>>(grad_out, batch, head, first, end);
    let logit = alpha_logit[(CUBE_POS_Y * strides.head + CUBE_POS_X * strides.block) as usize];
    let a = 1.0 / (1.0 + (-logit).exp());
    let start = (index * grad_out.shape(2) + first as usize) * value_dim;
    let mut sum = 0.0f32;
    let mut at = UNIT_POS as usize;
    while at < rows.len as usize * value_dim {
        let (row, column) = (at / value_dim, at % value_dim);
        let from = rows.base + row * rows.row_stride + column * rows.col_stride;
        let grad = f32::cast_from(grad_out[from].extract(0usize));
        let to = start + at;
        sum += grad * (f32::cast_from(out_sparse[to]) - f32::cast_from(out_linear[to]));
        sparse[to] = F::cast_from(a * grad);
        linear[to] = F::cast_from((1.0 - a) * grad);
        at += UNITS;
    }
    let total = cube_sum(sum);
    if UNIT_POS == 0 {
        partial[index * CUBE_COUNT_X as usize + CUBE_POS_X as usize] = total * a * (1.0 - a);
    }
}

/// Adds up the gradients of the blocks that share a logit, a cube to each.
#[cube(launch_unchecked)]
fn sum_logits_kernel(
    partial: &[f32], // [B, Hq, M]
    logits: &mut [f32],
    heads: u32,
    blocks: u32,
    logit_heads: u32,
    logit_blocks: u32,
) {
    let logit = CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X;
    // Whole cubes past the end have nothing to add and nothing to write.
    let (head, block) = (logit / logit_blocks, logit % logit_blocks);
    let mut sum = 0.0f32;
    let mut at = UNIT_POS;
    while at < partial.len() as u32 {
        let own_head = logit_heads == 1 || at / blocks % heads == head;
        let own_block = logit_blocks == 1 || at % blocks == block;
        if own_head && own_block {
            sum += partial[at as usize];
        }
        at += comptime!(UNITS as u32);
    }
    let total = cube_sum(sum);
    if UNIT_POS == 0 && logit < logits.len() as u32 {
        logits[logit as usize] = total;
    }
}
