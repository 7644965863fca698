//! Gradients of the learnable router's projections.

use cubecl::prelude::*;

use super::{RouterWeights, pooled_inputs, product, shared_by_heads};
use crate::block_list::expect_scores;
use crate::linear::{outer_sums, weighted_by_key, weighted_by_query};
use crate::{AttentionProblem, DeviceTensor, FactorType, ProblemError};

/// What [`router_backward`] returns, f32 `[D, D]` each.
#[derive(Clone, Debug)]
pub struct RouterGradients {
    /// `dWq`.
    pub wq: DeviceTensor<2>,
    /// `dWk`.
    pub wk: DeviceTensor<2>,
}

/// Gradients of [`pooled_scores`](super::pooled_scores) for `grad [B, Hq, M, N]`, contiguous f32,
/// with respect to the projections. With `A = Qp Wq^T` and `B = Kp Wk^T`:
///
/// ```text
/// dWq = scale sum (dPc B)^T Qp          dWk = scale sum (dPc^T A)^T Kp
/// ```
///
/// # Errors
/// As for [`pooled_scores`](super::pooled_scores), and for a gradient of another shape or type.
pub fn router_backward(
    client: &Client,
    problem: &AttentionProblem,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    weights: RouterWeights<'_>,
    grad: &DeviceTensor<4>,
) -> Result<RouterGradients, ProblemError> {
    expect_scores("grad", problem, grad)?;
    let [pooled_q, pooled_k] = pooled_inputs(client, problem, q, k, Some(weights))?;
    let a = product(client, &pooled_q, &shared_by_heads(weights.wq), 1.0)?;
    let b = product(client, &pooled_k, &shared_by_heads(weights.wk), 1.0)?;
    let scale = problem.scale();
    let da = weighted_by_query(client, grad, &b, false, scale)?;
    let db = weighted_by_key(client, grad, &a, problem.kv_heads(), false, scale)?;
    Ok(RouterGradients {
        wq: outer_sums(client, &da, &pooled_q, FactorType::F32)?.0,
        wk: outer_sums(client, &db, &pooled_k, FactorType::F32)?.0,
    })
}
