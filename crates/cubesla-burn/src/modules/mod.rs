//! Modules in Burn's conventions.

mod linear;
mod linear_layer;
mod multi_head;
mod multi_head_config;
mod qat_linear;
mod quant_linear;
mod quant_scheme;
mod sparse_linear;
mod sparse_linear_config;
mod values;

pub use linear::{LinearAttention, LinearAttentionConfig};
pub use linear_layer::LinearLayer;
pub use multi_head::{SlaMhaInput, SlaMhaOutput, SlaMultiHeadAttention};
pub use multi_head_config::SlaMultiHeadAttentionConfig;
pub use qat_linear::QatLinear;
pub use quant_linear::{QuantLinear, QuantLinearConfig};
pub use quant_scheme::{Activations, FormatConfig, GranularityConfig, QuantLinearScheme};
pub use sparse_linear::SparseLinearAttention;
pub use sparse_linear_config::SparseLinearAttentionConfig;
pub use values::{FeatureMapConfig, LinearModeConfig, PrecisionConfig, SlaVariant};
