//! The operations as a Burn backend extension. Arguments were checked by the functions that call it.

mod autodiff;
mod cube;
mod layout;
mod quantized;
mod shapes;
mod soft;
mod values;

use cube::launched;
pub use quantized::{Form, Packed, QuantizedOps};
pub use soft::SoftOps;
pub use values::{Combination, Lists};

use burn_core::backend::Backend;
use burn_core::backend::tensor::{FloatTensor, IntTensor};
use cubesla::{
    AttentionOptions, Critical, FeatureMap, LowBitFormats, SlaBackwardOptions, TopKOrder,
};

use crate::shim as burn;

/// What a caller's tensors are dispatched to, with or without autodiff and fusion.
#[burn_core::backend::backend_extension(
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Autodiff,
    Fusion,
)]
pub trait SlaOps: Backend {
    /// `O` and the log-sum-exp, of which only `O` has a gradient; in low bits if there are `formats`.
    #[fusion(meta = shapes::attention)]
    fn cubesla_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        indices: IntTensor<Self>,
        counts: IntTensor<Self>,
        options: AttentionOptions,
        formats: Option<LowBitFormats>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// SLA or SLA2, as the combination's weights say.
    #[fusion(meta = shapes::sla)]
    fn cubesla_sla(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] weights: Combination<Self>,
        #[extension_type] lists: Lists<Self>,
        options: SlaBackwardOptions,
    ) -> FloatTensor<Self>;

    /// Linear attention; without a gradient.
    #[fusion(meta = shapes::linear)]
    fn cubesla_linear(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        phi: FeatureMap,
        causal: bool,
    ) -> FloatTensor<Self>;

    /// Scores of the heuristic router; without a gradient.
    #[fusion(meta = shapes::scores)]
    fn cubesla_scores(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        options: AttentionOptions,
    ) -> FloatTensor<Self>;

    /// Scores of a learnable router, weights as `Wq` and `Wk` of the formula; with a gradient for the
    /// weights alone.
    #[fusion(meta = shapes::projected_scores)]
    fn cubesla_projected_scores(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        wq: FloatTensor<Self>,
        wk: FloatTensor<Self>,
        options: AttentionOptions,
    ) -> FloatTensor<Self>;

    /// Lists of critical and, if there are any, of negligible blocks.
    #[fusion(meta = shapes::select)]
    fn cubesla_select(
        scores: FloatTensor<Self>,
        critical: Critical,
        negligible: usize,
    ) -> Lists<Self>;

    /// Values and indices of the largest elements of each row; without a gradient.
    #[fusion(meta = shapes::top_k)]
    fn cubesla_top_k(
        rows: FloatTensor<Self>,
        k: usize,
        order: TopKOrder,
    ) -> (FloatTensor<Self>, IntTensor<Self>);

    /// SoftTop-k of each row.
    #[fusion(dtype = scores, shape = scores)]
    fn cubesla_soft_top_k(scores: FloatTensor<Self>, tau: f32, ratio: f32) -> FloatTensor<Self>;
}

/// What gradients are made with: never under autodiff themselves, as Burn's gradients are of first
/// order.
#[burn_core::backend::backend_extension(
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Fusion,
)]
pub trait SlaGradientOps: Backend {
    /// `dQ`, `dK` and `dV` of a forward with these `formats`.
    #[fusion(meta = shapes::attention_backward)]
    fn cubesla_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        out: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        indices: IntTensor<Self>,
        counts: IntTensor<Self>,
        options: AttentionOptions,
        formats: Option<LowBitFormats>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// `O`, `O^s`, `O^l` and the log-sum-exp.
    #[fusion(meta = shapes::sla_saving)]
    fn cubesla_sla_saving(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] weights: Combination<Self>,
        #[extension_type] lists: Lists<Self>,
        options: SlaBackwardOptions,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    );

    /// `dQ`, `dK`, `dV` and the gradients of the combination's weights.
    #[fusion(meta = shapes::sla_backward)]
    fn cubesla_sla_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] weights: Combination<Self>,
        #[extension_type] lists: Lists<Self>,
        sparse: FloatTensor<Self>,
        linear: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        options: SlaBackwardOptions,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        Combination<Self>,
    );

    /// The gradient of SoftTop-k's scores.
    #[fusion(dtype = soft, shape = soft)]
    fn cubesla_soft_top_k_backward(
        soft: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        tau: f32,
    ) -> FloatTensor<Self>;
}
