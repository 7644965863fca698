//! The router: which key blocks each query block attends to, decided from block means.
//!
//! ```text
//! Qp = mean_pool(Q, b_q)    Kp = mean_pool(K - mean(K), b_k)
//! Pc = scale Qp Kp^T                          heuristic (SLA, arXiv 2509.24006)
//! Pc = scale (Qp Wq^T) (Kp Wk^T)^T            learnable (SLA2, arXiv 2602.12675)
//! ```
//!
//! Scores are f32 whatever the inputs are; the selection from them is exact ([`crate::select`]), so
//! that equal scores give equal lists on every device.

mod backward;
mod pool;
mod scores;

pub use backward::{RouterGradients, router_backward};
pub use pool::mean_pool;
use pool::{pooled, smooth_pooled};
use scores::product;

use cubecl::prelude::*;

use crate::problem::{expect_f32, expect_shape};
use crate::{AttentionProblem, DeviceTensor, ProblemError};

/// Projections of a learnable router, f32 `[D, D]` each, shared by all heads. The identity makes it
/// the heuristic one.
#[derive(Clone, Copy, Debug)]
pub struct RouterWeights<'a> {
    /// `Wq`, applied to pooled queries from the right as `Wq^T`.
    pub wq: &'a DeviceTensor<2>,
    /// `Wk`, likewise for pooled keys.
    pub wk: &'a DeviceTensor<2>,
}

/// Pooled scores `Pc`, f32 `[B, Hq, M, N]`.
///
/// # Errors
/// [`ProblemError`] for tensors of another shape than `problem`'s, weights that are not contiguous
/// f32 `[D, D]`, a causal problem, or a type that the device lacks.
pub fn pooled_scores(
    client: &Client,
    problem: &AttentionProblem,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    weights: Option<RouterWeights<'_>>,
) -> Result<DeviceTensor<4>, ProblemError> {
    let [mut pooled_q, mut pooled_k] = pooled_inputs(client, problem, q, k, weights)?;
    if let Some(RouterWeights { wq, wk }) = weights {
        pooled_q = product(client, &pooled_q, &shared_by_heads(wq), 1.0)?;
        pooled_k = product(client, &pooled_k, &shared_by_heads(wk), 1.0)?;
    }
    product(client, &pooled_q, &pooled_k, problem.scale())
}

/// `Qp [B, Hq, M, D]` and `Kp [B, Hkv, N, D]`, f32, or what is wrong with the arguments.
fn pooled_inputs(
    client: &Client,
    problem: &AttentionProblem,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    weights: Option<RouterWeights<'_>>,
) -> Result<[DeviceTensor<4>; 2], ProblemError> {
    problem.refuse_causal()?;
    let dim = problem.head_dim();
    let (batch, heads, kv_heads) = (problem.batch(), problem.query_heads(), problem.kv_heads());
    expect_shape("q", q.shape(), [batch, heads, problem.query_len(), dim])?;
    expect_shape("k", k.shape(), [batch, kv_heads, problem.key_len(), dim])?;
    if let Some(RouterWeights { wq, wk }) = weights {
        for (argument, weight) in [("wq", wq), ("wk", wk)] {
            expect_f32(argument, weight, [dim, dim])?;
        }
    }
    let pooled_q = pooled(client, "q", q, problem.block_q())?;
    let pooled_k = pooled(client, "k", k, problem.block_k())?;
    smooth_pooled(client, &pooled_k, problem.block_k(), problem.key_len())?;
    Ok([pooled_q, pooled_k])
}

/// A weight `[E, D]` as `[1, 1, E, D]`.
fn shared_by_heads(weight: &DeviceTensor<2>) -> DeviceTensor<4> {
    let [rows, columns] = weight.shape();
    DeviceTensor::new(
        weight.handle().clone(),
        [1, 1, rows, columns],
        [rows * columns, rows * columns, columns, 1],
        weight.dtype(),
    )
    .expect("the same elements as the weight's")
}
