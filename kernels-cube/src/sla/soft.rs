//! SLA2's first training stage: every block is in both branches, with a weight `m` in the sparse one
//! and `1 - m` in the linear one.
//!
//! ```text
//! O^s = sum_j P_ij V_j,  P = m exp(S) / sum m exp(S)
//! O^l = sum_j u_ij V_j / sum_j u_ij,  u = (1 - m) phi(Q) phi(K)^T
//! O   = a O^s + (1 - a) O^l
//! ```

use cubecl::prelude::*;

use super::backward::{BranchGradients, split};
use super::{Combination, SlaGradients, SlaInputs, SlaSaved, check_sla, logit_strides};
use crate::attention::{BackwardInputs, ForwardInputs, ForwardOutputs};
use crate::block_list::expect_weights;
use crate::limits::line_grid;
use crate::linear::{
    FeatureMap, Gradients, LinearInputs, Taken, linear_gradients, weighted_output,
};
use crate::{AttentionProblem, BlockList, DType, DeviceTensor, ProblemError};

/// Inputs of the soft forward.
#[derive(Clone, Copy, Debug)]
pub struct SoftInputs<'a> {
    /// `[B, Hq, Lq, D]`.
    pub q: &'a DeviceTensor<4>,
    /// `[B, Hkv, Lk, D]`.
    pub k: &'a DeviceTensor<4>,
    /// `[B, Hkv, Lk, Dv]`.
    pub v: &'a DeviceTensor<4>,
    /// `m` from 0 to 1, contiguous f32 `[B, Hq, M, N]`.
    pub weights: &'a DeviceTensor<4>,
    /// As SLA2's forward has it.
    pub alpha_logit: &'a DeviceTensor<2>,
}

impl<'a> SoftInputs<'a> {
    /// A list of all blocks, if the inputs are those of `problem`.
    fn check(
        &self,
        client: &Client,
        problem: &AttentionProblem,
    ) -> Result<BlockList, ProblemError> {
        expect_weights(problem, self.weights)?;
        let all = BlockList::dense(client, self.weights.shape())?;
        let inputs = SlaInputs {
            q: self.q,
            k: self.k,
            v: self.v,
            critical: &all,
            negligible: None,
        };
        check_sla(client, problem, &inputs, &self.combination())?;
        Ok(all)
    }

    fn combination(&self) -> Combination<'a> {
        Combination::Sla2 {
            alpha_logit: self.alpha_logit,
        }
    }
}

/// Softmax attention with a weight for every block, and its log-sum-exp. `launch` computes them as
/// [`launch_forward_weighted`](crate::attention::launch_forward_weighted) does, for a list of all
/// blocks; its error is returned.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn soft_attention(
    client: &Client,
    problem: &AttentionProblem,
    [q, k, v]: [&DeviceTensor<4>; 3],
    weights: &DeviceTensor<4>,
    launch: impl FnOnce(ForwardInputs<'_>, ForwardOutputs<'_>) -> Result<(), ProblemError>,
) -> Result<(DeviceTensor<4>, DeviceTensor<3>), ProblemError> {
    expect_weights(problem, weights)?;
    let list = &BlockList::dense(client, weights.shape())?;
    let out = DeviceTensor::empty(client, problem.out_shape(), problem.dtype());
    let lse = DeviceTensor::empty(client, problem.lse_shape(), DType::F32);
    let outputs = ForwardOutputs {
        out: &out,
        lse: &lse,
    };
    launch(ForwardInputs { q, k, v, list }, outputs)?;
    Ok((out, lse))
}

/// The forward of the first stage: `O`, and what its backward needs. `sparse_branch` is what
/// [`soft_attention`] launches.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn soft_forward(
    client: &Client,
    problem: &AttentionProblem,
    inputs: SoftInputs<'_>,
    phi: FeatureMap,
    sparse_branch: impl FnOnce(ForwardInputs<'_>, ForwardOutputs<'_>) -> Result<(), ProblemError>,
) -> Result<(DeviceTensor<4>, SlaSaved), ProblemError> {
    let list = inputs.check(client, problem)?;
    let SoftInputs {
        q, k, v, weights, ..
    } = inputs;
    let (sparse, lse) = soft_attention(client, problem, [q, k, v], weights, sparse_branch)?;
    let linear = weighted_output(client, problem, [q, k, v], &list, weights, phi)?;
    let out = DeviceTensor::empty(client, problem.out_shape(), problem.dtype());
    let units = 256;
    let cubes = out.len().div_ceil(units);
    // SAFETY: one unit to an element of three tensors of one shape.
    unsafe {
        mix_kernel::launch_unchecked(
            client,
            line_grid(client.properties(), "elements of the output", cubes)?,
            CubeDim::new_1d(units as u32),
            AddressType::from_len(out.len()),
            sparse.buffer_arg(),
            linear.buffer_arg(),
            inputs.alpha_logit.buffer_arg(),
            out.buffer_arg(),
            MixScalarsLaunch::new(
                problem.query_heads(),
                problem.query_len(),
                problem.block_q(),
                logit_strides(inputs.alpha_logit)[0],
                logit_strides(inputs.alpha_logit)[1],
            ),
            problem.value_dim(),
            problem.dtype().elem_type(),
        );
    }
    let saved = SlaSaved {
        sparse,
        linear,
        lse,
    };
    Ok((out, saved))
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct MixScalars {
    heads: usize,
    len: usize,
    block_q: usize,
    logit_head: usize,
    logit_block: usize,
}

/// `a O^s + (1 - a) O^l`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn mix_kernel<F: Float>(
    sparse: &[F],
    linear: &[F],
    alpha_logit: &[f32],
    out: &mut [F],
    scalars: MixScalars,
    #[comptime] width: usize,
    #[define(F)] _dtype: ElemType,
) {
    let cube = CUBE_POS_Y as usize * CUBE_COUNT_X as usize + CUBE_POS_X as usize;
    let at = cube * CUBE_DIM as usize + UNIT_POS as usize;
    if at < out.len() {
        let row = at / width;
        let head = row / scalars.len % scalars.heads;
        let block = row % scalars.len / scalars.block_q;
        let logit = alpha_logit[head * scalars.logit_head + block * scalars.logit_block];
        let a = 1.0 / (1.0 + (-logit).exp());
        let mixed = a * f32::cast_from(sparse[at]) + (1.0 - a) * f32::cast_from(linear[at]);
        out[at] = F::cast_from(mixed);
    }
}

/// Gradients of [`soft_attention`] for its output `out` and the gradient `grad_out` of that: `launch`'s
/// result, and the gradient of the weights.
///
/// `launch` computes the gradients as
/// [`launch_backward_weighted`](crate::attention::launch_backward_weighted) does, for a list of all
/// blocks, that of the weights into the tensor that it is given; its error is returned.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn soft_attention_backward<T>(
    client: &Client,
    problem: &AttentionProblem,
    [q, k, v]: [&DeviceTensor<4>; 3],
    weights: &DeviceTensor<4>,
    [out, grad_out]: [&DeviceTensor<4>; 2],
    lse: &DeviceTensor<3>,
    launch: impl FnOnce(BackwardInputs<'_>, &DeviceTensor<4>) -> Result<T, ProblemError>,
) -> Result<(T, DeviceTensor<4>), ProblemError> {
    expect_weights(problem, weights)?;
    let list = &BlockList::dense(client, weights.shape())?;
    let inputs = BackwardInputs {
        q,
        k,
        v,
        out,
        lse,
        grad_out,
        list,
    };
    let grad = DeviceTensor::empty(client, weights.shape(), DType::F32);
    Ok((launch(inputs, &grad)?, grad))
}

/// Gradients of [`soft_forward`], with that of the weights, f32 `[B, Hq, M, N]`. `sparse_branch` is what
/// [`soft_attention_backward`] launches; it computes gradients in f32 or in the inputs' type, to which
/// those of the linear branch are added in f32.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn soft_backward(
    client: &Client,
    problem: &AttentionProblem,
    inputs: SoftInputs<'_>,
    phi: FeatureMap,
    saved: &SlaSaved,
    grad_out: &DeviceTensor<4>,
    sparse_branch: impl FnOnce(BackwardInputs<'_>, &DeviceTensor<4>) -> Result<Gradients, ProblemError>,
) -> Result<(SlaGradients, DeviceTensor<4>), ProblemError> {
    let list = inputs.check(client, problem)?;
    saved.check(problem, grad_out)?;
    let SoftInputs {
        q, k, v, weights, ..
    } = inputs;
    let BranchGradients {
        sparse,
        linear,
        weights: logits,
    } = split(client, problem, inputs.alpha_logit, saved, grad_out)?;
    let (others, grad) = soft_attention_backward(
        client,
        problem,
        [q, k, v],
        weights,
        [&saved.sparse, &sparse],
        &saved.lse,
        sparse_branch,
    )?;
    let linear = LinearInputs {
        q,
        k,
        v,
        out: &saved.linear,
        grad_out: &linear,
        list: &list,
        taken: Taken::Listed,
        weights: Some([weights, &grad]),
    };
    let grads = SlaGradients {
        inputs: linear_gradients(client, problem, linear, phi, &others)?,
        weights: logits,
    };
    Ok((grads, grad))
}
