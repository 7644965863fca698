//! SLA2's first training stage: soft masks, and the scores that they are made of.

use burn_core::backend::Dispatch;
use burn_core::tensor::Tensor;
use cubesla::plan::BackwardPlan;
use cubesla::{AttentionOptions, FeatureMap};

use crate::error::unwrap;
use crate::ops::{SlaOps, SoftOps};
use crate::sla::refuse_causal;
use crate::{Error, RouterWeights, convert};

/// Scores of a learnable router, f32 `[B, Hq, M, N]`:
/// `Pc = scale (mean_pool(Q, b_q) Wq^T) (mean_pool(K - mean(K), b_k) Wk^T)^T`.
///
/// `q` is `[B, Hq, Lq, D]` and `k` `[B, Hkv, Lk, D]`, any strides, f32, f16 or bf16, untracked.
/// Differentiable in the projections, which is what [`soft_top_k`](crate::soft_top_k) and
/// [`try_sla2_soft`] hand gradients to.
///
/// Source: SLA2 (arXiv 2602.12675); see [`cubesla::pooled_scores`].
///
/// # Errors
/// [`Error::NotDifferentiable`] for tracked `q` or `k`; [`Error`] for any other argument that is
/// refused, before anything is launched.
///
/// # Panics
/// Where only a launch can tell; with fusion that is when the result is read.
pub fn try_router_scores(
    q: Tensor<4>,
    k: Tensor<4>,
    weights: &RouterWeights,
    attention: &AttentionOptions,
) -> Result<Tensor<4>, Error> {
    // The router looks at no values.
    let (problem, _) = convert::problem(&q, &k, &k, attention)?;
    refuse_causal(attention.causal)?;
    convert::expect_row(problem.key_blocks())?;
    let hint = "a router learns from frozen queries and keys: pass them with `inner()`";
    convert::expect_untracked("router_scores", "q", &q, hint)?;
    convert::expect_untracked("router_scores", "k", &k, hint)?;
    let [wq, wk] = weights.checked(&q.device(), problem.head_dim())?;
    let scores = Dispatch::cubesla_projected_scores(
        q.into_dispatch(),
        k.into_dispatch(),
        wq.into_dispatch(),
        wk.into_dispatch(),
        *attention,
    );
    Ok(Tensor::from_dispatch(scores))
}

/// SLA2 with a soft mask: block `j` has the weight `m_ij` in the sparse branch and `1 - m_ij` in the
/// linear one, and none is left out.
///
/// ```text
/// O^s = sum_j P_ij V_j,  P = m exp(S) / sum m exp(S)
/// O^l = sum_j u_ij V_j / sum_j u_ij,  u = (1 - m) phi(Q) phi(K)^T
/// O   = a O^s + (1 - a) O^l,  a = sigmoid(alpha_logit)
/// ```
///
/// | argument | shape | type |
/// |---|---|---|
/// | `q`, `k`, `v` | as for [`try_block_sparse_attention`](crate::try_block_sparse_attention) | f32, f16 or bf16 |
/// | `weights` | `m [B, Hq, M, N]`, from 0 to 1, `N` at most 8192 | f32 |
/// | `alpha_logit` | `[1, 1]`, `[Hq, 1]` or `[Hq, M]` | any float, used as f32 |
///
/// Differentiable in every tensor. With weights of 0 and 1 it is [`try_sla2`](crate::try_sla2). No matrix
/// of size `Lq x Lk` is stored.
///
/// Source: SLA2 (arXiv 2602.12675), the first training stage; see [`cubesla::sla2_soft_forward`].
///
/// # Errors
/// [`Error`] for an argument that is refused, before anything is launched.
///
/// # Panics
/// Where only a launch can tell; with fusion that is when the result is read.
pub fn try_sla2_soft(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    weights: Tensor<4>,
    alpha_logit: Tensor<2>,
    attention: &AttentionOptions,
    phi: FeatureMap,
) -> Result<Tensor<4>, Error> {
    let (problem, client) = convert::problem(&q, &k, &v, attention)?;
    refuse_causal(attention.causal)?;
    let devices = [
        ("q", q.device()),
        ("weights", weights.device()),
        ("alpha_logit", alpha_logit.device()),
    ];
    convert::expect_device(&devices)?;
    convert::expect_f32("weights", &weights)?;
    let (heads, rows) = (problem.query_heads(), problem.query_blocks());
    let blocks = problem.key_blocks();
    convert::expect_shape("weights", &weights, [problem.batch(), heads, rows, blocks])?;
    convert::expect_row(blocks)?;
    convert::expect_logits(&alpha_logit, heads, rows)?;
    let tracked = weights.is_tracked() || alpha_logit.is_tracked();
    if tracked || [&q, &k, &v].into_iter().any(Tensor::is_tracked) {
        BackwardPlan::new(&problem, client.properties())?;
    }
    let out = Dispatch::cubesla_soft(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        weights.into_dispatch(),
        convert::to_f32(alpha_logit).into_dispatch(),
        *attention,
        phi,
    );
    Ok(Tensor::from_dispatch(out))
}

/// [`try_router_scores`] that panics with the message of its error.
///
/// # Panics
/// Where [`try_router_scores`] returns an error.
#[track_caller]
pub fn router_scores(
    q: Tensor<4>,
    k: Tensor<4>,
    weights: &RouterWeights,
    attention: &AttentionOptions,
) -> Tensor<4> {
    unwrap("router_scores", try_router_scores(q, k, weights, attention))
}

/// [`try_sla2_soft`] that panics with the message of its error.
///
/// # Panics
/// Where [`try_sla2_soft`] returns an error.
#[track_caller]
pub fn sla2_soft(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    weights: Tensor<4>,
    alpha_logit: Tensor<2>,
    attention: &AttentionOptions,
    phi: FeatureMap,
) -> Tensor<4> {
    let result = try_sla2_soft(q, k, v, weights, alpha_logit, attention, phi);
    unwrap("sla2_soft", result)
}
