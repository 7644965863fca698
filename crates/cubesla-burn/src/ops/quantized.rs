//! Products with low-bit weights, as a Burn backend extension of their own. Arguments were checked by
//! the functions that call it.

mod autodiff;
mod cube;
mod shapes;
mod values;

pub use values::{Form, Packed};

use burn_core::backend::Backend;
use burn_core::backend::tensor::FloatTensor;
use burn_core::tensor::DType;

use crate::Activations;
use crate::shim as burn;

/// What a caller's tensors are dispatched to, with or without autodiff and fusion. Matrices are of
/// rank 2.
#[burn_core::backend::backend_extension(
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Autodiff,
    Fusion,
)]
pub trait QuantizedOps: Backend {
    /// A matrix in low bits; without a gradient.
    #[fusion(meta = shapes::quantize)]
    fn cubesla_quantize(w: FloatTensor<Self>, form: Form, zero_point: bool) -> Packed<Self>;

    /// The values of a matrix in low bits; without a gradient.
    #[fusion(meta = shapes::dequantize)]
    fn cubesla_dequantize(
        #[extension_type] w: Packed<Self>,
        form: Form,
        dtype: DType,
    ) -> FloatTensor<Self>;

    /// A matrix rounded to what its low-bit form holds; the gradient passes through.
    #[fusion(dtype = w, shape = w)]
    fn cubesla_fake_quantize(
        w: FloatTensor<Self>,
        form: Form,
        zero_point: bool,
    ) -> FloatTensor<Self>;

    /// `X W^T`, of which `X` has a gradient.
    #[fusion(meta = shapes::linear)]
    fn cubesla_quantized_linear(
        x: FloatTensor<Self>,
        #[extension_type] w: Packed<Self>,
        form: Form,
        activations: Activations,
    ) -> FloatTensor<Self>;

    /// `X W^T + b`, of which `X` and `b` have gradients; `b` is f32.
    #[fusion(meta = shapes::linear_bias)]
    fn cubesla_quantized_linear_bias(
        x: FloatTensor<Self>,
        #[extension_type] w: Packed<Self>,
        bias: FloatTensor<Self>,
        form: Form,
        activations: Activations,
    ) -> FloatTensor<Self>;
}

/// What gradients are made with: never under autodiff themselves.
#[burn_core::backend::backend_extension(
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Fusion,
)]
pub trait QuantizedGradientOps: Backend {
    /// `dX = dY W`.
    #[fusion(meta = shapes::linear_backward)]
    fn cubesla_quantized_linear_backward(
        grad: FloatTensor<Self>,
        #[extension_type] w: Packed<Self>,
        form: Form,
    ) -> FloatTensor<Self>;
}
