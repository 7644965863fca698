//! Routing.

use burn_core::backend::Dispatch;
use burn_core::tensor::{Device, Tensor};
use cubesla::AttentionOptions;

use crate::error::unwrap;
use crate::ops::SlaOps;
use crate::sla::refuse_causal;
use crate::{Blocks, Error, convert};

/// How a router chooses.
#[derive(Clone, Debug)]
pub struct RouterOptions {
    /// `k_h`, the share of each row's blocks that are critical, from 0 to 1: of `N` blocks
    /// `floor(k_h N)`, and at least one.
    pub critical: f64,
    /// With a mass, also the fewest of the largest blocks that hold that share of the softmax of a
    /// row's scores (top-p), above 0 and at most 1.
    pub mass: Option<f32>,
    /// `k_l`, the share of each row's blocks that are negligible, from 0 to 1: of `N` blocks
    /// `floor(k_l N)`, and at most those that are not critical.
    pub negligible: f64,
    /// Projections of a learnable router; without them it is the heuristic one.
    pub weights: Option<RouterWeights>,
}

/// Projections of pooled queries and keys, applied from the right as Burn's `Linear` does: the
/// paper's `Wq` and `Wk` transposed.
#[derive(Clone, Debug)]
pub struct RouterWeights {
    /// `[D, D]`, of the queries; any float, used as f32.
    pub proj_q: Tensor<2>,
    /// `[D, D]`, of the keys; likewise.
    pub proj_k: Tensor<2>,
}

impl RouterWeights {
    /// The paper's `Wq` and `Wk` in f32, if they are `[dim, dim]` on `device`.
    pub(crate) fn checked(&self, device: &Device, dim: usize) -> Result<[Tensor<2>; 2], Error> {
        let devices = [
            ("q", device.clone()),
            ("proj_q", self.proj_q.device()),
            ("proj_k", self.proj_k.device()),
        ];
        convert::expect_device(&devices)?;
        convert::expect_shape("proj_q", &self.proj_q, [dim, dim])?;
        convert::expect_shape("proj_k", &self.proj_k, [dim, dim])?;
        let paper = |weight: &Tensor<2>| convert::to_f32(weight.clone()).transpose();
        Ok([paper(&self.proj_q), paper(&self.proj_k)])
    }
}

impl RouterOptions {
    /// SLA's: 5 % critical, 10 % negligible (arXiv 2509.24006).
    pub fn sla() -> Self {
        Self {
            critical: 0.05,
            mass: None,
            negligible: 0.10,
            weights: None,
        }
    }

    /// SLA2's: 5 % critical, the rest marginal (arXiv 2602.12675).
    pub fn sla2() -> Self {
        Self {
            negligible: 0.0,
            ..Self::sla()
        }
    }
}

/// What a router chose.
#[derive(Clone, Debug)]
pub struct Routing {
    /// The blocks.
    pub blocks: Blocks,
    /// The scores they were chosen by, f32 `[B, Hq, M, N]`.
    pub scores: Tensor<4>,
}

/// Chooses the blocks of each query block from pooled scores.
///
/// `q` is `[B, Hq, Lq, D]` and `k` `[B, Hkv, Lk, D]`, any strides, f32, f16 or bf16. Deterministic,
/// and nothing is read back to the host. A selection has no gradient: none flows into `q` and `k`,
/// as in the papers, and tracked weights are refused.
///
/// ```text
/// Pc = scale (mean_pool(Q, b_q) Wq^T) (mean_pool(K - mean(K), b_k) Wk^T)^T
/// ```
///
/// Source: SLA (arXiv 2509.24006), SLA2 (arXiv 2602.12675); see [`cubesla::route`].
///
/// # Errors
/// [`Error::NotDifferentiable`] for tracked weights; [`Error`] for any other argument that is
/// refused, before anything is launched.
///
/// # Panics
/// Where only a launch can tell; with fusion that is when the result is read.
pub fn try_route(
    q: Tensor<4>,
    k: Tensor<4>,
    attention: &AttentionOptions,
    options: &RouterOptions,
) -> Result<Routing, Error> {
    // The router looks at no values.
    let (problem, _) = convert::problem(&q, &k, &k, attention)?;
    refuse_causal(attention.causal)?;
    let key_blocks = problem.key_blocks();
    let (critical, negligible) = library_options(options).selection(key_blocks)?;
    convert::expect_row(key_blocks)?;
    let scores = match &options.weights {
        None => Dispatch::cubesla_scores(q.into_dispatch(), k.into_dispatch(), *attention),
        Some(weights) => {
            let [wq, wk] = weights.checked(&q.device(), problem.head_dim())?;
            for (argument, weight) in [("proj_q", &weights.proj_q), ("proj_k", &weights.proj_k)] {
                let hint = "a hard selection passes none on; use `set_require_grad(false)`, and train \
                            them through `soft_top_k` of `router_scores`";
                convert::expect_untracked("route", argument, weight, hint)?;
            }
            Dispatch::cubesla_projected_scores(
                q.into_dispatch(),
                k.into_dispatch(),
                wq.into_dispatch(),
                wk.into_dispatch(),
                *attention,
            )
        }
    };
    let lists = Dispatch::cubesla_select(scores.clone(), critical, negligible);
    Ok(Routing {
        blocks: Blocks::from_dispatch(lists, key_blocks),
        scores: Tensor::from_dispatch(scores),
    })
}

/// [`try_route`] that panics with the message of its error.
///
/// # Panics
/// Where [`try_route`] returns an error.
#[track_caller]
pub fn route(
    q: Tensor<4>,
    k: Tensor<4>,
    attention: &AttentionOptions,
    options: &RouterOptions,
) -> Routing {
    unwrap("route", try_route(q, k, attention, options))
}

fn library_options(options: &RouterOptions) -> cubesla::RouterOptions<'static> {
    cubesla::RouterOptions {
        critical: options.critical,
        mass: options.mass,
        negligible: options.negligible,
        weights: None,
    }
}
