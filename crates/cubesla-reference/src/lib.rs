//! The operations of CubeSLA in plain f64 Rust.
//!
//! Loops here read like the formulas and are as slow as that makes them. Nothing is fused, nothing
//! is approximated, and every kernel is judged against this crate. Inputs are `f64`: a test of an
//! f16 kernel rounds its inputs to f16 first and hands the same rounded values to both sides.
//!
//! | module | operation | source |
//! |---|---|---|
//! | [`attention`] | softmax attention, dense or weighted by blocks, forward and backward | SLA (arXiv 2509.24006), SLA2 (arXiv 2602.12675) |
//! | [`router`] | pooled scores and the gradient of their projections, top-k, top-p, three-way map | SLA, SLA2 |
//! | [`soft_top_k`] | differentiable selection, forward and backward | SoftTop-k (arXiv 2403.19969) |
//! | [`linear`] | linear attention with four feature maps, forward and backward | SLA |
//! | [`low_bit`] | attention with INT8 scores and FP8 values | SageAttention2++ (arXiv 2505.21136), SLA2 |
//! | [`quantize`] | INT8, INT4 and FP8 storage, products with it | OCP 8-bit floating point (e4m3), SageAttention2++ (arXiv 2505.21136) for the scales |
//! | [`sla`] | the branches combined, forward and backward | SLA, SLA2 |
//!
//! Shapes are `[batch, heads, length, dim]` throughout; see [`Tensor`].

pub mod attention;
pub mod blocks;
pub mod linear;
pub mod low_bit;
pub mod quantize;
pub mod router;
pub mod sla;
pub mod soft_top_k;
mod tensor;

pub use tensor::{Tensor, cosine, relative_error, relative_l1};
