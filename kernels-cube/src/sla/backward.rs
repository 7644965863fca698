//! Gradients of the two branches and of their combination.
//!
//! ```text
//! SLA   dO^s = dO      dO^l = dO Wl         dWl = sum dO^T O^l    dbl = sum dO
//! SLA2  dO^s = a dO    dO^l = (1 - a) dO    da = sum over the block of dO (O^s - O^l)
//! ```

use cubecl::prelude::*;

use super::{
    Combination, LinearMode, Precision, SlaInputs, SlaSaved, check_sla, lists_the_fewer,
    logit_strides, transposed,
};
use crate::attention::{BackwardInputs, rounded_inputs};
use crate::limits::{expect_loop_budget, grid, line_grid};
use crate::linear::{
    FeatureMap, Gradients, LinearInputs, Taken, global_gradients, linear_gradients, multiply_rows,
    outer_sums,
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

/// What the backward of SLA and SLA2 needs beside its inputs.
#[derive(Clone, Copy, Debug)]
pub struct SlaBackward<'a> {
    /// The forward's.
    pub combination: Combination<'a>,
    /// phi of the linear branch.
    pub phi: FeatureMap,
    /// The keys that the linear branch sums over.
    pub mode: LinearMode,
    /// Of the forward's sparse branch, whose gradients are taken at the inputs as it rounded them.
    pub precision: Precision,
    /// What the forward saved.
    pub saved: &'a SlaSaved,
    /// `dO [B, Hq, Lq, Dv]`, any strides.
    pub grad_out: &'a DeviceTensor<4>,
}

/// Gradients of [`sla_forward`](super::sla_forward). `sparse_branch` computes those of the sparse branch,
/// in f32 or in the inputs' type; those of the linear branch are added to them in f32, so that sums in
/// f32 are rounded once and others twice. `sparse_branch` is called when all arguments have been
/// checked; its error is returned.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn sla_backward(
    client: &Client,
    problem: &AttentionProblem,
    inputs: SlaInputs<'_>,
    given: SlaBackward<'_>,
    sparse_branch: impl FnOnce(BackwardInputs<'_>) -> Result<Gradients, ProblemError>,
) -> Result<SlaGradients, ProblemError> {
    let SlaBackward {
        combination,
        phi,
        mode,
        precision,
        saved,
        grad_out,
    } = given;
    check_sla(client, problem, &inputs, &combination)?;
    saved.check(problem, grad_out)?;
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
            multiply_rows(
                client,
                grad_out,
                &wl,
                &linear,
                1.0,
                false,
                problem.factors(),
            )?;
            let (wl, bl) = outer_sums(client, grad_out, &saved.linear, problem.factors())?;
            BranchGradients {
                sparse: grad_out.clone(),
                linear,
                weights: CombinationGradients::Sla { wl, bl },
            }
        }
        Combination::Sla2 { alpha_logit } => split(client, problem, alpha_logit, saved, grad_out)?,
    };
    let rounded = match precision.formats() {
        None => None,
        Some(low) => Some(rounded_inputs(client, problem, [q, k, v], &saved.lse, low)?),
    };
    let ([sparse_q, sparse_k, sparse_v], lse) = match &rounded {
        None => ([q, k, v], &saved.lse),
        Some(rounded) => ([&rounded.q, &rounded.k, &rounded.v], &rounded.lse),
    };
    let others = sparse_branch(BackwardInputs {
        q: sparse_q,
        k: sparse_k,
        v: sparse_v,
        out: &saved.sparse,
        lse,
        grad_out: &branches.sparse,
        list: critical,
    })?;
    // The linear branch may have their memory.
    drop(rounded);
    let grad_out = &branches.linear;
    let inputs = match mode {
        LinearMode::Global => global_gradients(client, problem, [q, k, v], grad_out, phi, &others)?,
        LinearMode::Complement => {
            let (list, taken) = marginal_blocks(client, problem, critical, negligible)?;
            let linear = LinearInputs {
                q,
                k,
                v,
                out: &saved.linear,
                grad_out,
                list: &list,
                taken,
                weights: None,
            };
            linear_gradients(client, problem, linear, phi, &others)?
        }
    };
    Ok(SlaGradients {
        inputs,
        weights: branches.weights,
    })
}

/// The shorter of two ways to say over which marginal blocks the linear branch sums.
fn marginal_blocks(
    client: &Client,
    problem: &AttentionProblem,
    critical: &BlockList,
    negligible: Option<&BlockList>,
) -> Result<(BlockList, Taken), ProblemError> {
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
    let vector = if problem.dtype() == DType::F32 { 4 } else { 8 };
    let load = if grad_out.is_aligned() { vector } else { 1 };
    let block = problem.block_q() * problem.value_dim() / vector;
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
            load,
            vector,
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
    let unit = UNIT_POS as usize;
    partial[unit] = x;
    sync_cube();
    #[unroll]
    for step in 0..comptime!(UNITS.ilog2() as usize) {
        let half = comptime!(UNITS >> (step + 1));
        if unit < half {
            partial[unit] += partial[unit + half];
        }
        sync_cube();
    }
    partial[0]
}

/// Grid: x = query block, y = query head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
fn split_kernel<F: Float, N: Size, V: Size>(
    grad_out: &Tensor<Vector<F, N>>, // [B, Hq, Lq, Dv]
    out_sparse: &[Vector<F, V>],
    out_linear: &[Vector<F, V>],
    alpha_logit: &[f32],
    sparse: &mut [Vector<F, V>],
    linear: &mut [Vector<F, V>],
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
    let rows = RowRange::new::<F, N>(grad_out, batch, head, first, end);
    let logit = alpha_logit[(CUBE_POS_Y * strides.head + CUBE_POS_X * strides.block) as usize];
    let a = 1.0 / (1.0 + (-logit).exp());
    let (size, load) = (out_sparse.vector_size(), grad_out.vector_size());
    // Vectors of a row.
    let vectors = comptime!(value_dim / size);
    let start = (index * grad_out.shape(2) + first as usize) * vectors;
    let mut sum = 0.0f32;
    let mut at = UNIT_POS as usize;
    while at < rows.len as usize * vectors {
        let (row, column) = (at / vectors, at % vectors * size);
        let from = rows.base + row * rows.row_stride;
        let mut grad = Vector::<f32, V>::empty();
        if comptime!(load == size) {
            grad = Vector::cast_from(grad_out[(from + column) / size]);
        } else {
            #[unroll]
            for e in 0..size {
                let x = grad_out[from + (column + e) * rows.col_stride].extract(0usize);
                grad.insert(e, f32::cast_from(x));
            }
        }
        let to = start + at;
        let difference = Vector::<f32, V>::cast_from(out_sparse[to])
            - Vector::<f32, V>::cast_from(out_linear[to]);
        let products = grad * difference;
        #[unroll]
        for e in 0..size {
            sum += products.extract(e);
        }
        sparse[to] = Vector::cast_from(grad * Vector::new(a));
        linear[to] = Vector::cast_from(grad * Vector::new(1.0 - a));
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
