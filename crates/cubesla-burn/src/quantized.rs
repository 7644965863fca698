//! Products with weights in low bits, and quantization-aware training.

use burn_core::backend::Dispatch;
use burn_core::tensor::Tensor;
use cubesla::{Format, Granularity};

use crate::error::unwrap;
use crate::ops::{Form, QuantizedOps};
use crate::{Activations, Error, QuantizedWeight, convert};

/// A weight `w [N, K]` in low bits, any strides, f32, f16 or bf16: `linear.weight.val().transpose()`
/// is read as it lies. With `zero_point` codes need not be symmetric about 0.
///
/// Not differentiable; see [`try_fake_quantize`] and [`cubesla::quantize`].
///
/// # Errors
/// [`Error::NotDifferentiable`] for a tracked weight; [`Error`] for any other argument that is
/// refused, before anything is launched.
///
/// # Panics
/// Where only a launch can tell; with fusion that is when the result is read.
pub fn try_quantize_weight(
    w: Tensor<2>,
    format: Format,
    granularity: Granularity,
    zero_point: bool,
) -> Result<QuantizedWeight, Error> {
    convert::expect_floats("w", &w)?;
    let hint = "detach it, or train it through `fake_quantize`";
    convert::expect_untracked("quantize_weight", "w", &w, hint)?;
    cubesla::expect_format("w", w.dims(), format, granularity, zero_point)?;
    cubesla::expect_weights(granularity)?;
    let form = Form {
        format,
        granularity,
        columns: w.dims()[1],
    };
    let packed = Dispatch::cubesla_quantize(w.into_dispatch(), form, zero_point);
    Ok(QuantizedWeight::from_dispatch(packed, form))
}

/// [`try_quantize_weight`] that panics with the message of its error.
///
/// # Panics
/// Where [`try_quantize_weight`] returns an error.
#[track_caller]
pub fn quantize_weight(
    w: Tensor<2>,
    format: Format,
    granularity: Granularity,
    zero_point: bool,
) -> QuantizedWeight {
    unwrap(
        "quantize_weight",
        try_quantize_weight(w, format, granularity, zero_point),
    )
}

/// `w` of any rank and strides rounded to what its low-bit form holds, in its own type: f32, f16 or
/// bf16. Leading axes count as rows.
///
/// The gradient is the straight-through one (arXiv 1308.3432): that of the result, as scales reach the
/// largest element and nothing is cut off. See [`cubesla::fake_quantize`].
///
/// # Errors
/// [`Error`] for an argument that is refused, before anything is launched.
///
/// # Panics
/// Where only a launch can tell; with fusion that is when the result is read.
pub fn try_fake_quantize<const D: usize>(
    w: Tensor<D>,
    format: Format,
    granularity: Granularity,
    zero_point: bool,
) -> Result<Tensor<D>, Error> {
    convert::expect_floats("w", &w)?;
    cubesla::expect_format("w", w.dims(), format, granularity, zero_point)?;
    let shape = w.dims();
    let matrix = rows(w);
    let form = Form {
        format,
        granularity,
        columns: matrix.dims()[1],
    };
    let rounded = Dispatch::cubesla_fake_quantize(matrix.into_dispatch(), form, zero_point);
    Ok(Tensor::<2>::from_dispatch(rounded).reshape(shape))
}

/// [`try_fake_quantize`] that panics with the message of its error.
///
/// # Panics
/// Where [`try_fake_quantize`] returns an error.
#[track_caller]
pub fn fake_quantize<const D: usize>(
    w: Tensor<D>,
    format: Format,
    granularity: Granularity,
    zero_point: bool,
) -> Tensor<D> {
    unwrap(
        "fake_quantize",
        try_fake_quantize(w, format, granularity, zero_point),
    )
}

/// `X W^T + b` with low-bit weights.
///
/// | argument | shape | type |
/// |---|---|---|
/// | `x` | `[.., K]`, any strides | f32, f16 or bf16 |
/// | `w` | `[N, K]` | |
/// | `bias` | `[N]` | any float, used as f32 |
/// | result | `[.., N]` | that of `x` |
///
/// With [`Activations::Full`] weights are decoded to f32 on the way. With
/// [`Activations::Quantized`] `x` is quantized first, to the format of `w`; INT8 by INT8 without
/// zero points is then summed in integers. Rows of `x` that no single stride walks are copied.
///
/// Differentiable in `x`, by a kernel of this library, and in `bias`. Where `x` was quantized its
/// gradient is the straight-through one. See [`cubesla::weight_only_matmul`] and
/// [`cubesla::dynamic_matmul`].
///
/// # Errors
/// [`Error`] for an argument that is refused, before anything is launched.
///
/// # Panics
/// Where only a launch can tell; with fusion that is when the result is read.
pub fn try_quantized_linear<const D: usize>(
    x: Tensor<D>,
    w: &QuantizedWeight,
    bias: Option<Tensor<1>>,
    activations: Activations,
) -> Result<Tensor<D>, Error> {
    convert::expect_floats("x", &x)?;
    convert::expect_device(&[("x", x.device()), ("w", w.device())])?;
    let [outputs, inputs] = w.shape();
    let mut shape = x.dims();
    shape[D - 1] = inputs;
    convert::expect_shape("x", &x, shape)?;
    shape[D - 1] = outputs;
    let x = rows(x);
    if activations == Activations::Quantized {
        let zero_point = w.zeros().is_some();
        cubesla::expect_dynamic(x.dims(), w.format(), w.granularity(), zero_point)?;
    }
    let (packed, form) = w.to_dispatch();
    let out = match bias {
        None => Dispatch::cubesla_quantized_linear(x.into_dispatch(), packed, form, activations),
        Some(bias) => {
            convert::expect_device(&[("x", x.device()), ("bias", bias.device())])?;
            convert::expect_shape("bias", &bias, [outputs])?;
            let bias = convert::to_f32(bias).into_dispatch();
            let x = x.into_dispatch();
            Dispatch::cubesla_quantized_linear_bias(x, packed, bias, form, activations)
        }
    };
    Ok(Tensor::<2>::from_dispatch(out).reshape(shape))
}

/// [`try_quantized_linear`] that panics with the message of its error.
///
/// # Panics
/// Where [`try_quantized_linear`] returns an error.
#[track_caller]
pub fn quantized_linear<const D: usize>(
    x: Tensor<D>,
    w: &QuantizedWeight,
    bias: Option<Tensor<1>>,
    activations: Activations,
) -> Tensor<D> {
    unwrap(
        "quantized_linear",
        try_quantized_linear(x, w, bias, activations),
    )
}

/// `x` with all axes but the last as rows; a matrix stays as it lies.
fn rows<const D: usize>(x: Tensor<D>) -> Tensor<2> {
    if D == 2 {
        return Tensor::from_dispatch(x.into_dispatch());
    }
    let columns = x.dims()[D - 1];
    let rows = x.dims()[..D - 1].iter().product();
    x.reshape([rows, columns])
}
