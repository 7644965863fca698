//! Configuration of multi-head self-attention.

use burn_core as burn;
use burn_core::config::Config;
use burn_core::tensor::Device;
use burn_nn::{Initializer, LinearConfig};

use super::{SlaMultiHeadAttention, SparseLinearAttentionConfig};

/// Configuration of [`SlaMultiHeadAttention`], with the names and defaults of Burn's
/// `MultiHeadAttentionConfig` where they mean the same.
#[derive(Config, Debug)]
pub struct SlaMultiHeadAttentionConfig {
    /// Features of the input and of the output.
    pub d_model: usize,
    /// Heads, a divisor of `d_model`.
    pub n_heads: usize,
    /// The attention inside, of heads of `d_model / n_heads`; `None` is its default.
    pub attention: Option<SparseLinearAttentionConfig>,
    /// How the four linear layers start.
    #[config(default = "Initializer::KaimingUniform{gain:1.0/f64::sqrt(3.0), fan_out_only:false}")]
    pub initializer: Initializer,
    /// Whether the key layer has a bias.
    #[config(default = true)]
    pub key_bias: bool,
    /// Whether the value layer has a bias.
    #[config(default = true)]
    pub value_bias: bool,
    /// Whether the query layer has a bias.
    #[config(default = true)]
    pub query_bias: bool,
    /// Whether the output layer has a bias.
    #[config(default = true)]
    pub output_bias: bool,
}

impl SlaMultiHeadAttentionConfig {
    /// The module with its parameters on `device`.
    ///
    /// # Panics
    /// If `n_heads` does not divide `d_model`, or `attention` is of another head dimension than
    /// their quotient.
    #[track_caller]
    pub fn init(&self, device: &Device) -> SlaMultiHeadAttention {
        assert!(
            self.n_heads > 0 && self.d_model.is_multiple_of(self.n_heads),
            "d_model = {} is not a multiple of n_heads = {}",
            self.d_model,
            self.n_heads
        );
        let head_dim = self.d_model / self.n_heads;
        let attention = match &self.attention {
            Some(attention) => attention.clone(),
            None => SparseLinearAttentionConfig::new(head_dim),
        };
        assert_eq!(
            attention.head_dim, head_dim,
            "attention.head_dim must be d_model / n_heads"
        );
        let linear = |bias| {
            LinearConfig::new(self.d_model, self.d_model)
                .with_initializer(self.initializer.clone())
                .with_bias(bias)
                .init(device)
        };
        SlaMultiHeadAttention {
            query: linear(self.query_bias),
            key: linear(self.key_bias),
            value: linear(self.value_bias),
            output: linear(self.output_bias),
            attention: attention.init(device),
            d_model: self.d_model,
            n_heads: self.n_heads,
        }
    }
}
