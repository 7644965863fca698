//! Linear attention as a module.

use burn_core as burn;
use burn_core::config::Config;
use burn_core::module::Module;
use burn_core::tensor::Tensor;

use super::FeatureMapConfig;
use crate::error::unwrap;
use crate::{Error, try_linear_attention};

/// Configuration of [`LinearAttention`].
#[derive(Config, Debug)]
pub struct LinearAttentionConfig {
    /// phi.
    #[config(default = "FeatureMapConfig::Softmax")]
    pub feature_map: FeatureMapConfig,
    /// Whether query `i` sees keys up to `i` only.
    #[config(default = false)]
    pub causal: bool,
}

impl LinearAttentionConfig {
    /// The module; it has no parameters.
    pub fn init(&self) -> LinearAttention {
        LinearAttention {
            config: self.clone(),
        }
    }
}

/// [`linear_attention`](crate::linear_attention) as a module without parameters.
#[derive(Module, Debug)]
pub struct LinearAttention {
    /// What it was made with.
    #[module(skip)]
    pub config: LinearAttentionConfig,
}

impl LinearAttention {
    /// Attention of `q [B, Hq, Lq, D]` over `k [B, Hkv, Lk, D]` and `v [B, Hkv, Lk, Dv]`; returns
    /// `[B, Hq, Lq, Dv]`.
    ///
    /// # Errors
    /// As for [`try_linear_attention`].
    pub fn try_forward(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
    ) -> Result<Tensor<4>, Error> {
        let phi = self.config.feature_map.into();
        try_linear_attention(q, k, v, phi, self.config.causal)
    }

    /// [`try_forward`](Self::try_forward) that panics with the message of its error.
    ///
    /// # Panics
    /// Where [`try_forward`](Self::try_forward) returns an error.
    #[track_caller]
    pub fn forward(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
        unwrap("LinearAttention", self.try_forward(q, k, v))
    }
}
