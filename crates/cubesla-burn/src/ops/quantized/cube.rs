//! The operations on CubeCL's runtimes: a call into the library each.

use burn_core::backend::TensorMetadata;
use burn_core::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubesla::{DeviceTensor, Error, QuantizedTensor};

use super::super::launched;
use super::super::layout::{contiguous, view, wrap, wrap_handle};
use super::{Form, Packed, QuantizedGradientOps, QuantizedOps};
use crate::Activations;
use crate::convert::element_type;

impl QuantizedOps for CubeBackend {
    fn cubesla_quantize(w: CubeTensor, form: Form, zero_point: bool) -> Packed<Self> {
        let like = w.clone();
        let run = || {
            let w = view::<2>(w)?;
            let (format, granularity) = (form.format, form.granularity);
            Ok(cubesla::quantize(
                &like.client,
                &w,
                format,
                granularity,
                zero_point,
            )?)
        };
        let w = launched("quantize_weight", run());
        let shape = [w.shape()[0], w.words_per_row()];
        let words = wrap_handle(&like, w.words(), shape, DType::I32);
        let scales = wrap(&like, w.scales());
        match w.zeros() {
            None => Packed::Symmetric { words, scales },
            Some(zeros) => Packed::ZeroPoint {
                words,
                scales,
                zeros: wrap(&like, zeros),
            },
        }
    }

    fn cubesla_dequantize(w: Packed<Self>, form: Form, dtype: DType) -> CubeTensor {
        let like = words(&w).clone();
        let dtype = element_type(dtype).expect("callers refuse other types");
        let run = || {
            let w = matrix(w, form)?;
            Ok(cubesla::dequantize(&like.client, &w, dtype)?)
        };
        wrap(&like, &launched("dequantize", run()))
    }

    fn cubesla_fake_quantize(w: CubeTensor, form: Form, zero_point: bool) -> CubeTensor {
        let like = w.clone();
        let run = || {
            let w = view::<2>(w)?;
            let (format, granularity) = (form.format, form.granularity);
            Ok(cubesla::fake_quantize(
                &like.client,
                &w,
                format,
                granularity,
                zero_point,
            )?)
        };
        wrap(&like, &launched("fake_quantize", run()))
    }

    fn cubesla_quantized_linear(
        x: CubeTensor,
        w: Packed<Self>,
        form: Form,
        activations: Activations,
    ) -> CubeTensor {
        linear(x, w, None, form, activations)
    }

    fn cubesla_quantized_linear_bias(
        x: CubeTensor,
        w: Packed<Self>,
        bias: CubeTensor,
        form: Form,
        activations: Activations,
    ) -> CubeTensor {
        linear(x, w, Some(bias), form, activations)
    }
}

impl QuantizedGradientOps for CubeBackend {
    fn cubesla_quantized_linear_backward(
        grad: CubeTensor,
        w: Packed<Self>,
        form: Form,
    ) -> CubeTensor {
        let like = grad.clone();
        let run = || {
            let (grad, w) = (view::<2>(grad)?, matrix(w, form)?);
            Ok(cubesla::quantized_matmul_backward(&like.client, &grad, &w)?)
        };
        wrap(&like, &launched("quantized_linear's backward", run()))
    }
}

fn linear(
    x: CubeTensor,
    w: Packed<CubeBackend>,
    bias: Option<CubeTensor>,
    form: Form,
    activations: Activations,
) -> CubeTensor {
    let like = x.clone();
    let run = || {
        let (x, w) = (view::<2>(x)?, matrix(w, form)?);
        let bias = bias.map(contiguous::<1>).transpose()?;
        let multiply = match activations {
            Activations::Full => cubesla::weight_only_matmul::<2>,
            Activations::Quantized => cubesla::dynamic_matmul::<2>,
        };
        Ok(multiply(&like.client, &x, &w, bias.as_ref(), x.dtype())?)
    };
    wrap(&like, &launched("quantized_linear", run()))
}

fn words(w: &Packed<CubeBackend>) -> &CubeTensor {
    let (Packed::Symmetric { words, .. } | Packed::ZeroPoint { words, .. }) = w;
    words
}

/// The library's matrix of these tensors.
fn matrix(w: Packed<CubeBackend>, form: Form) -> Result<QuantizedTensor<2>, Error> {
    let (words, scales, zeros) = match w {
        Packed::Symmetric { words, scales } => (words, scales, None),
        Packed::ZeroPoint {
            words,
            scales,
            zeros,
        } => (words, scales, Some(zeros)),
    };
    let zeros: Option<DeviceTensor<2>> = zeros.map(contiguous).transpose()?;
    let words = into_contiguous(words);
    let shape = words.shape();
    // A view into a larger buffer ends where its last row does.
    let rest = words.handle.size_in_used() - 4 * (shape[0] * shape[1]) as u64;
    let handle = words.handle.clone().offset_end(rest);
    Ok(QuantizedTensor::new(
        handle,
        contiguous(scales)?,
        zeros,
        [shape[0], form.columns],
        form.format,
        form.granularity,
    )?)
}
