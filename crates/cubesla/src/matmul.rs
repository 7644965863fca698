//! Products of low-bit matrices, by the fastest engine.

use cubecl::client::Client;
use cubesla_kernels::matmul::{MatmulProblem, activation_granularity};
use cubesla_kernels::quantize::{QuantizedTensor, quantize};
use cubesla_kernels::{DType, DeviceTensor, ProblemError};

use crate::plan::MatmulPlan;

/// `X W^T + b` of low-bit activations `x [.., K]` and weights `w [N, K]`: `[.., N]`, contiguous, in
/// `dtype`.
///
/// INT8 by INT8 without zero points is summed in integers, exactly. FP8 by FP8 is summed by tensor
/// cores where a [plan](MatmulPlan) finds them: 128 or 256 products at a time with about 14 bits, then in
/// f32.
/// Of other formats the activations are decoded to f32 first. `bias` is contiguous f32 `[N]`.
///
/// # Errors
/// Weights with a scale per column, which is one per summand; sums of more than 133144 INT8 products
/// under one scale, which could overflow; a type that the device lacks; shapes that do not fit.
pub fn quantized_matmul<const R: usize>(
    client: &Client,
    x: &QuantizedTensor<R>,
    w: &QuantizedTensor<2>,
    bias: Option<&DeviceTensor<1>>,
    dtype: DType,
) -> Result<DeviceTensor<R>, ProblemError> {
    let problem = MatmulProblem::new(x, w, bias, dtype);
    MatmulPlan::new(&problem, client.properties()).launch(client, x, w, bias, dtype)
}

/// [`quantized_matmul`] of activations that are quantized first, to the format of `w`: with a scale a
/// row, or a scale for each 128 of a row where `w` has scales of blocks.
///
/// # Errors
/// As for [`quantized_matmul`]; and weights of blocks with a K that 128 does not divide.
pub fn dynamic_matmul<const R: usize>(
    client: &Client,
    x: &DeviceTensor<R>,
    w: &QuantizedTensor<2>,
    bias: Option<&DeviceTensor<1>>,
    dtype: DType,
) -> Result<DeviceTensor<R>, ProblemError> {
    let granularity = activation_granularity(w.granularity());
    let x = quantize(client, x, w.format(), granularity, false)?;
    quantized_matmul(client, &x, w, bias, dtype)
}
