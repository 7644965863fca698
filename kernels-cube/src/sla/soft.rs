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
use crate::attention::{
    BackwardInputs, BackwardOutputs, BackwardPlan, ForwardInputs, ForwardOutputs, ForwardPlan,
    launch_backward_weighted, launch_forward_weighted,
};
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

/// The fastest plan of the portable engines.
fn forward_plan(client: &Client, problem: &AttentionProblem) -> Result<ForwardPlan, ProblemError> {
    let device = client.properties();
    ForwardPlan::mma(problem, device)
        .or_else(|_| ForwardPlan::simt(problem, device))
        .map_err(|reason| ProblemError::NoPlan {
            device: device.identity.name.clone(),
            reason: reason.into(),
        })
}

/// Softmax attention with a weight for every block, and its log-sum-exp.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn soft_attention(
    client: &Client,
    problem: &AttentionProblem,
    [q, k, v]: [&DeviceTensor<4>; 3],
    weights: &DeviceTensor<4>,
) -> Result<(DeviceTensor<4>, DeviceTensor<3>), ProblemError> {
    expect_weights(problem, weights)?;
    let list = &BlockList::dense(client, weights.shape())?;
    let out = DeviceTensor::empty(client, problem.out_shape(), problem.dtype());
    let lse = DeviceTensor::empty(client, problem.lse_shape(), DType::F32);
    launch_forward_weighted(
        client,
        problem,
        &forward_plan(client, problem)?,
        ForwardInputs { q, k, v, list },
        Some(weights),
        ForwardOutputs {
            out: &out,
            lse: &lse,
        },
    )?;
    Ok((out, lse))
}

/// The forward of the first stage: `O`, and what its backward needs.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn soft_forward(
    client: &Client,
    problem: &AttentionProblem,
    inputs: SoftInputs<'_>,
    phi: FeatureMap,
) -> Result<(DeviceTensor<4>, SlaSaved), ProblemError> {
    let list = inputs.check(client, problem)?;
    let SoftInputs {
        q, k, v, weights, ..
    } = inputs;
    let (sparse, lse) = soft_attention(client, problem, [q, k, v], weights)?;
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

/// Gradients of [`soft_attention`] for its output `out` and the gradient `grad_out` of that: of `q`,
/// `k` and `v` into `outputs`, and of the weights, returned.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn soft_attention_backward(
    client: &Client,
    problem: &AttentionProblem,
    [q, k, v]: [&DeviceTensor<4>; 3],
    weights: &DeviceTensor<4>,
    [out, grad_out]: [&DeviceTensor<4>; 2],
    lse: &DeviceTensor<3>,
    outputs: BackwardOutputs<'_>,
) -> Result<DeviceTensor<4>, ProblemError> {
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
    let plan = BackwardPlan::new(problem, client.properties())?;
    let grad = DeviceTensor::empty(client, weights.shape(), DType::F32);
    launch_backward_weighted(
        client,
        problem,
        &plan,
        inputs,
        Some([weights, &grad]),
        outputs,
    )?;
    Ok(grad)
}

/// Gradients of [`soft_forward`], with that of the weights, f32 `[B, Hq, M, N]`.
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
) -> Result<(SlaGradients, DeviceTensor<4>), ProblemError> {
    BackwardPlan::new(problem, client.properties())?;
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
    let sums = Gradients::empty(client, [q, k, v], DType::F32)?;
    let grad = soft_attention_backward(
        client,
        problem,
        [q, k, v],
        weights,
        [&saved.sparse, &sparse],
        &saved.lse,
        sums.outputs(),
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
        inputs: linear_gradients(client, problem, linear, phi, &sums)?,
        weights: logits,
    };
    Ok((grads, grad))
}
