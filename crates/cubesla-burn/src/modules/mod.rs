//! Modules in Burn's conventions.

mod linear;
mod multi_head;
mod multi_head_config;
mod sparse_linear;
mod sparse_linear_config;
mod values;

pub use linear::{LinearAttention, LinearAttentionConfig};
pub use multi_head::{SlaMhaInput, SlaMhaOutput, SlaMultiHeadAttention};
pub use multi_head_config::SlaMultiHeadAttentionConfig;
pub use sparse_linear::SparseLinearAttention;
pub use sparse_linear_config::SparseLinearAttentionConfig;
pub use values::{FeatureMapConfig, LinearModeConfig, PrecisionConfig, SlaVariant};
