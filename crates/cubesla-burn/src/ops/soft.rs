//! SLA2's first training stage as a Burn backend extension.

use burn_core::backend::Backend;
use burn_core::backend::tensor::FloatTensor;
use cubesla::{AttentionOptions, FeatureMap};

use super::shapes;
use crate::shim as burn;

/// What a caller's tensors are dispatched to, with or without autodiff and fusion.
#[burn_core::backend::backend_extension(
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Autodiff,
    Fusion,
)]
pub trait SoftOps: Backend {
    /// SLA2 with a weight for each block.
    #[fusion(meta = shapes::soft)]
    fn cubesla_soft(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        alpha_logit: FloatTensor<Self>,
        options: AttentionOptions,
        phi: FeatureMap,
    ) -> FloatTensor<Self>;
}

/// What gradients are made with: never under autodiff themselves.
#[burn_core::backend::backend_extension(
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Fusion,
)]
pub trait SoftGradientOps: Backend {
    /// `O`, `O^s`, `O^l` and the log-sum-exp.
    #[fusion(meta = shapes::soft_saving)]
    fn cubesla_soft_saving(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        alpha_logit: FloatTensor<Self>,
        options: AttentionOptions,
        phi: FeatureMap,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    );

    /// `dQ`, `dK`, `dV`, and the gradients of the blocks' weights and of the logits.
    #[allow(
        clippy::type_complexity,
        reason = "the macro takes tuples, and no name for one"
    )]
    #[fusion(meta = shapes::soft_backward)]
    fn cubesla_soft_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        alpha_logit: FloatTensor<Self>,
        sparse: FloatTensor<Self>,
        linear: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        options: AttentionOptions,
        phi: FeatureMap,
    ) -> (
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
        FloatTensor<Self>,
    );

    /// `dWq` and `dWk` of a learnable router.
    #[fusion(meta = shapes::router_backward)]
    fn cubesla_router_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        wq: FloatTensor<Self>,
        wk: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}
