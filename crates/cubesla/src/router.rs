//! Routing: from queries and keys to block lists, without leaving the device.

use cubecl::client::Client;
use cubesla_kernels::router::{RouterWeights, pooled_scores};
use cubesla_kernels::select::{Critical, select_blocks};
use cubesla_kernels::{AttentionOptions, AttentionProblem, BlockList, DeviceTensor, ProblemError};

use crate::Error;

/// How a router chooses.
#[derive(Clone, Copy, Debug)]
pub struct RouterOptions<'a> {
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
    pub weights: Option<RouterWeights<'a>>,
}

impl RouterOptions<'_> {
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

    /// What [`select_blocks`] is to choose of rows of `key_blocks`: the widths of the lists are
    /// known before anything runs.
    ///
    /// # Errors
    /// [`Error::Problem`] for ratios outside [0, 1] or a mass outside (0, 1].
    pub fn selection(&self, key_blocks: usize) -> Result<(Critical, usize), Error> {
        for (argument, ratio) in [("critical", self.critical), ("negligible", self.negligible)] {
            if !(0.0..=1.0).contains(&ratio) {
                return Err(ProblemError::Share { argument, ratio }.into());
            }
        }
        let of = |ratio: f64| (ratio * key_blocks as f64).floor() as usize;
        let critical = of(self.critical).clamp(1, key_blocks);
        let negligible = of(self.negligible).min(key_blocks - critical);
        let rule = match self.mass {
            None => Critical::Count(critical),
            Some(mass) if !(mass > 0.0 && mass <= 1.0) => {
                return Err(ProblemError::Mass { mass }.into());
            }
            Some(mass) => Critical::Mass {
                mass,
                min: critical,
                max: key_blocks - negligible,
            },
        };
        Ok((rule, negligible))
    }
}

/// What a router chose.
#[derive(Clone, Debug)]
pub struct Routing {
    /// Blocks for exact attention.
    pub critical: BlockList,
    /// Blocks left out, if there are any.
    pub negligible: Option<BlockList>,
    /// The scores, f32 `[B, Hq, M, N]`.
    pub scores: DeviceTensor<4>,
}

/// Chooses the blocks of each query block from pooled scores.
///
/// `q` is `[B, Hq, Lq, D]` and `k` `[B, Hkv, Lk, D]`, any strides. Deterministic: equal scores are
/// taken by rising index. Nothing is read back to the host.
///
/// ```text
/// Pc = scale (mean_pool(Q, b_q) Wq^T) (mean_pool(K - mean(K), b_k) Wk^T)^T
/// ```
///
/// Source: SLA (arXiv 2509.24006), SLA2 (arXiv 2602.12675); the reference is
/// `cubesla_reference::router`.
///
/// # Errors
/// [`Error::Problem`] for ratios outside [0, 1], a mass outside (0, 1], weights that are not
/// contiguous f32 `[D, D]`, more than 8192 key blocks, or shapes that do not fit.
pub fn route(
    client: &Client,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    attention: &AttentionOptions,
    options: &RouterOptions<'_>,
) -> Result<Routing, Error> {
    // The router looks at no values.
    let problem = AttentionProblem::new(q, k, k, attention)?;
    let (critical, negligible) = options.selection(problem.key_blocks())?;
    let scores = pooled_scores(client, &problem, q, k, options.weights)?;
    let selection = select_blocks(client, &scores, critical, negligible)?;
    Ok(Routing {
        critical: selection.critical,
        negligible: selection.negligible,
        scores,
    })
}
