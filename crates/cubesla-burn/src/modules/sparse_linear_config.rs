//! Configuration of SLA and SLA2.

use burn_core as burn;
use burn_core::config::Config;
use burn_core::module::Param;
use burn_core::tensor::{Device, Tensor};
use burn_nn::{Initializer, Linear, LinearConfig};
use cubesla::{AttentionOptions, Causal};

use super::{
    FeatureMapConfig, LinearModeConfig, PrecisionConfig, SlaVariant, SparseLinearAttention,
};
use crate::{Error, RouterOptions};

/// Configuration of [`SparseLinearAttention`].
///
/// ```
/// use cubesla_burn::{SlaVariant, SparseLinearAttentionConfig};
///
/// let config = SparseLinearAttentionConfig::new(64)
///     .with_variant(SlaVariant::Sla2)
///     .with_critical(0.10)
///     .with_alpha_heads(8);
/// assert_eq!(config.block_q, 128);
/// ```
#[derive(Config, Debug)]
pub struct SparseLinearAttentionConfig {
    /// Width of queries, keys and values of a head, from 32 to 256 in steps of 8.
    pub head_dim: usize,
    /// SLA or SLA2.
    #[config(default = "SlaVariant::Sla2")]
    pub variant: SlaVariant,
    /// Share of each row's blocks that get exact attention.
    #[config(default = 0.05)]
    pub critical: f64,
    /// With a mass, also the fewest of the largest blocks that hold that share of a row's softmax.
    pub mass: Option<f64>,
    /// Share of each row's blocks that are left out; `None` is the variant's own: 10 % for SLA, none
    /// for SLA2.
    pub negligible: Option<f64>,
    /// Query rows per block, a multiple of 16 from 16 to 128.
    #[config(default = 128)]
    pub block_q: usize,
    /// Keys per block, a multiple of 16 from 16 to 128.
    #[config(default = 64)]
    pub block_k: usize,
    /// Factor on the scores; `None` is `1/sqrt(head_dim)`.
    pub scale: Option<f64>,
    /// phi of the linear branch.
    #[config(default = "FeatureMapConfig::Softmax")]
    pub feature_map: FeatureMapConfig,
    /// The keys that the linear branch sums over.
    #[config(default = "LinearModeConfig::Complement")]
    pub linear: LinearModeConfig,
    /// Arithmetic of the sparse branch; its gradients are always those of the inputs' type.
    #[config(default = "PrecisionConfig::Full")]
    pub precision: PrecisionConfig,
    /// SLA2: rows of the logits of alpha, 1 or the number of query heads.
    #[config(default = 1)]
    pub alpha_heads: usize,
    /// SLA2: columns of the logits of alpha, 1 or, with a row to a head, the number of query blocks,
    /// which fixes the length.
    #[config(default = 1)]
    pub alpha_blocks: usize,
    /// SLA2: the logits' first value; at 0 both branches have the same weight.
    #[config(default = 0.0)]
    pub alpha_logit: f64,
    /// Whether the router projects pooled queries and keys. The projections start as the identity,
    /// which is the router without them, and do not require gradients: a hard selection has none.
    #[config(default = false)]
    pub router_weights: bool,
}

impl SparseLinearAttentionConfig {
    /// The module with its parameters on `device`.
    pub fn init(&self, device: &Device) -> SparseLinearAttention {
        let dim = self.head_dim;
        let is_sla = self.variant == SlaVariant::Sla;
        let projection = || Linear {
            weight: Param::from_tensor(Tensor::eye(dim, device)).set_require_grad(false),
            bias: None,
        };
        SparseLinearAttention {
            proj_l: is_sla.then(|| {
                LinearConfig::new(dim, dim)
                    .with_initializer(Initializer::Zeros)
                    .init(device)
            }),
            alpha_logit: (!is_sla).then(|| {
                let value = self.alpha_logit;
                let shape = [self.alpha_heads, self.alpha_blocks];
                Initializer::Constant { value }.init(shape, device)
            }),
            proj_q: self.router_weights.then(projection),
            proj_k: self.router_weights.then(projection),
            config: self.clone(),
        }
    }

    /// Blocks and scale, as the functions of this crate take them.
    pub fn attention(&self) -> AttentionOptions {
        AttentionOptions {
            scale: self.scale.map(|scale| scale as f32),
            causal: Causal::None,
            block_q: self.block_q,
            block_k: self.block_k,
            ..AttentionOptions::default()
        }
    }

    /// How many of `blocks` blocks of a row are critical.
    pub(crate) fn critical_blocks(&self, blocks: usize) -> Result<usize, Error> {
        let router = cubesla::RouterOptions {
            critical: self.critical,
            ..cubesla::RouterOptions::sla2()
        };
        Ok(router.selection(blocks)?.0.max())
    }

    /// The share that is left out, the variant's own unless it was set.
    pub(super) fn negligible(&self) -> f64 {
        self.negligible.unwrap_or(match self.variant {
            SlaVariant::Sla => RouterOptions::sla().negligible,
            SlaVariant::Sla2 => RouterOptions::sla2().negligible,
        })
    }
}
