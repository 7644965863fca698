//! Shapes and types of results, which fusion needs before anything runs.

use burn_core::tensor::DType;
use burn_fusion::custom::TensorSpec;

use super::Form;
use super::values::PackedMetadata;
use crate::Activations;

fn matrix(rows: usize, columns: usize, dtype: DType) -> TensorSpec {
    TensorSpec::new([rows, columns].into(), dtype)
}

/// Rows of the matrix in low bits.
fn rows(w: &PackedMetadata) -> usize {
    let (PackedMetadata::Symmetric { words, .. } | PackedMetadata::ZeroPoint { words, .. }) = w;
    words.shape[0]
}

pub(super) fn quantize(w: &TensorSpec, form: &Form, zero_point: &bool) -> PackedMetadata {
    let rows = w.shape[0];
    let words = matrix(rows, form.format.words_per_row(form.columns), DType::I32);
    let [down, across] = form.granularity.scales_shape([rows, form.columns]);
    let scales = matrix(down, across, DType::F32);
    if *zero_point {
        let zeros = scales.clone();
        PackedMetadata::ZeroPoint {
            words,
            scales,
            zeros,
        }
    } else {
        PackedMetadata::Symmetric { words, scales }
    }
}

pub(super) fn dequantize(w: &PackedMetadata, form: &Form, dtype: &DType) -> TensorSpec {
    matrix(rows(w), form.columns, *dtype)
}

pub(super) fn linear(
    x: &TensorSpec,
    w: &PackedMetadata,
    _form: &Form,
    _activations: &Activations,
) -> TensorSpec {
    matrix(x.shape[0], rows(w), x.dtype)
}

pub(super) fn linear_bias(
    x: &TensorSpec,
    w: &PackedMetadata,
    _bias: &TensorSpec,
    form: &Form,
    activations: &Activations,
) -> TensorSpec {
    linear(x, w, form, activations)
}

pub(super) fn linear_backward(grad: &TensorSpec, _w: &PackedMetadata, form: &Form) -> TensorSpec {
    matrix(grad.shape[0], form.columns, grad.dtype)
}
