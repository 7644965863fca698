//! Sparse and linear attention, and layers in low bits, for [Burn](https://burn.dev): CubeSLA's kernels
//! as operations with gradients, and modules made of them.
//!
//! Functions take and return Burn's tensors on any device of a CubeCL runtime, with Burn's fusion and
//! without, and are differentiable under its autodiff. Each comes twice: `try_name` returns an
//! [`Error`], `name` panics with its message.
//!
//! | | gradient |
//! |---|---|
//! | [`block_sparse_attention`] | the library's kernels |
//! | [`sla`], [`sla2`] | the library's kernels |
//! | [`sla2_soft`], [`router_scores`] | the library's kernels |
//! | [`soft_top_k`] | the library's kernel |
//! | [`linear_attention`] | Burn's operations; the causal form has none |
//! | [`route`], [`top_k`] | none, and tracked weights or rows are refused |
//! | [`quantized_linear`] | the library's kernel; that of a bias in Burn's operations |
//! | [`fake_quantize`] | straight through |
//! | [`quantize_weight`] | none, and a tracked weight is refused |
//!
//! Modules: [`SparseLinearAttention`], [`LinearAttention`], [`SlaMultiHeadAttention`]; [`QuantLinear`]
//! and [`QatLinear`]. Weights of published models: [`checkpoint`]. Training: [`training`].

#[cfg(not(any(feature = "wgpu", feature = "cuda")))]
compile_error!("cubesla-burn needs a runtime: enable the feature `wgpu`, `vulkan` or `cuda`");

mod attention;
mod block_list;
mod blocks;
pub mod checkpoint;
mod convert;
mod error;
mod linear;
mod modules;
mod ops;
mod quantized;
mod quantized_weight;
mod router;
mod select;
mod sla;
mod soft;
pub mod training;

/// Burn's macros expand to paths in `burn::backend`; this one has `fusion` in it whether or not the
/// application turned Burn's fusion on.
#[doc(hidden)]
pub mod shim {
    #[doc(hidden)]
    pub mod backend {
        pub use burn_core::backend::*;
        pub use burn_fusion as fusion;
    }
}

pub use attention::{
    AttentionOutput, block_sparse_attention, low_bit_attention, try_block_sparse_attention,
    try_low_bit_attention,
};
pub use block_list::BlockList;
pub use blocks::Blocks;
pub use cubesla::{
    AttentionOptions, Causal, F32Products, FeatureMap, Format, Granularity, HostBlockList,
    LinearMode, LowBitFormats, LowBitScores, LowBitValues, Precision, ProblemError, TopKOrder,
};
pub use error::Error;
pub use linear::{linear_attention, try_linear_attention};
pub use modules::{
    Activations, FeatureMapConfig, FormatConfig, GranularityConfig, LinearAttention,
    LinearAttentionConfig, LinearLayer, LinearModeConfig, PrecisionConfig, QatLinear, QuantLinear,
    QuantLinearConfig, QuantLinearScheme, SlaMhaInput, SlaMhaOutput, SlaMultiHeadAttention,
    SlaMultiHeadAttentionConfig, SlaVariant, SparseLinearAttention, SparseLinearAttentionConfig,
};
pub use quantized::{
    fake_quantize, quantize_weight, quantized_linear, try_fake_quantize, try_quantize_weight,
    try_quantized_linear,
};
pub use quantized_weight::QuantizedWeight;
pub use router::{RouterOptions, RouterWeights, Routing, route, try_route};
pub use select::{soft_top_k, top_k, try_soft_top_k, try_top_k};
pub use sla::{SlaOptions, sla, sla2, try_sla, try_sla2};
pub use soft::{router_scores, sla2_soft, try_router_scores, try_sla2_soft};
