//! Tensors to codes and back.

use cubecl::prelude::*;

use super::codes::code;
use super::{
    Format, Granularity, QuantizedTensor, Regions, expect_format, flattened, matrix_shape, number,
    regions, rows, scales,
};
use crate::limits::{expect_buffer, expect_dtype, line_grid};
use crate::{DType, DeviceTensor, ProblemError};

/// Units of a cube.
const UNITS: usize = 256;

/// `x` in a low-bit format; `zero_point` for codes that need not be symmetric about 0.
///
/// # Errors
/// The [module](crate::quantize)'s refusals, a type that the device lacks, a buffer that it cannot
/// hold.
pub fn quantize<const R: usize>(
    client: &Client,
    x: &DeviceTensor<R>,
    format: Format,
    granularity: Granularity,
    zero_point: bool,
) -> Result<QuantizedTensor<R>, ProblemError> {
    expect_format("x", x.shape(), format, granularity, zero_point)?;
    let device = client.properties();
    expect_dtype(device, x.dtype())?;
    let matrix = matrix_shape(x.shape());
    let view = flattened("x", x)?;
    let pitch = format.words_per_row(matrix[1]);
    let words = matrix[0] * pitch;
    expect_buffer(device, "x, quantized", words * 4)?;
    if rows::fits(&view, format, granularity, zero_point) {
        let handle = client.empty(words * 4);
        // SAFETY: the buffer was made with this many words.
        let buffer = unsafe { BufferArg::from_raw_parts(handle.clone(), words) };
        let scales = rows::launch(client, &view, buffer, format)?;
        return QuantizedTensor::new(handle, scales, None, x.shape(), format, granularity);
    }
    let grid = line_grid(device, "words", words.div_ceil(UNITS))?;
    let (scales, zeros) = scales::scales(client, &view, format, granularity, zero_point)?;
    let handle = client.empty(words * 4);
    let region = granularity.region(matrix);
    // SAFETY: a unit writes its own word and reads elements inside the matrix only.
    unsafe {
        encode::launch_unchecked(
            client,
            grid,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(view.extent()),
            view.tensor_arg(),
            scales.buffer_arg(),
            zeros.buffer_arg(),
            BufferArg::from_raw_parts(handle.clone(), words),
            regions(region, matrix),
            words as u32,
            pitch as u32,
            format,
            zero_point,
            x.dtype().elem_type(),
        );
    }
    let zeros = zero_point.then_some(zeros);
    QuantizedTensor::new(handle, scales, zeros, x.shape(), format, granularity)
}

/// The values of `x`, contiguous, rounded to `dtype`.
///
/// # Errors
/// [`ProblemError`] for a type that the device lacks or a buffer that it cannot hold.
pub fn dequantize<const R: usize>(
    client: &Client,
    x: &QuantizedTensor<R>,
    dtype: DType,
) -> Result<DeviceTensor<R>, ProblemError> {
    let device = client.properties();
    expect_dtype(device, dtype)?;
    let [rows, columns] = x.matrix();
    expect_buffer(device, "x, dequantized", rows * columns * dtype.size())?;
    let words = rows * x.words_per_row();
    let grid = line_grid(device, "words", words.div_ceil(UNITS))?;
    let out = DeviceTensor::empty(client, x.shape(), dtype);
    // SAFETY: a unit reads its own word and writes elements inside the matrix only.
    unsafe {
        decode::launch_unchecked(
            client,
            grid,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(out.extent()),
            x.words_arg(),
            x.scales().buffer_arg(),
            x.zeros_arg(),
            out.buffer_arg(),
            x.regions(),
            words as u32,
            x.words_per_row() as u32,
            columns as u32,
            x.format(),
            x.zeros().is_some(),
            dtype.elem_type(),
        );
    }
    Ok(out)
}

/// `x` as its low-bit form has it, in its own type: what quantization-aware training computes with.
///
/// Scales reach the largest element, so nothing is cut off, and the straight-through gradient with
/// respect to `x` is the incoming one.
///
/// # Errors
/// As for [`quantize`].
pub fn fake_quantize<const R: usize>(
    client: &Client,
    x: &DeviceTensor<R>,
    format: Format,
    granularity: Granularity,
    zero_point: bool,
) -> Result<DeviceTensor<R>, ProblemError> {
    let quantized = quantize(client, x, format, granularity, zero_point)?;
    dequantize(client, &quantized, x.dtype())
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn encode<F: Float>(
    x: &Tensor<F>,
    scales: &[f32],
    zeros: &[f32],
    words: &mut [u32],
    regions: Regions,
    count: u32,
    pitch: u32,
    #[comptime] format: Format,
    #[comptime] zero_point: bool,
    #[define(F)] _dtype: ElemType,
) {
    let at = (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) * CUBE_DIM + UNIT_POS;
    if at < count {
        let row = at / pitch;
        let first = at % pitch * comptime!(format.per_word() as u32);
        let mut word = 0u32.runtime();
        for e in 0..comptime!(format.per_word() as u32) {
            let column = first + e;
            if column < x.shape(1) as u32 {
                let from = row as usize * x.stride(0) + column as usize * x.stride(1);
                let scale = regions.index(row, column);
                let value = f32::cast_from(x[from]);
                let bits = code(value, scales[scale], zeros[scale], format, zero_point);
                word |= bits << (e * comptime!(format.bits() as u32));
            }
        }
        words[at as usize] = word;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn decode<F: Float>(
    words: &[u32],
    scales: &[f32],
    zeros: &[f32],
    out: &mut [F],
    regions: Regions,
    count: u32,
    pitch: u32,
    columns: u32,
    #[comptime] format: Format,
    #[comptime] zero_point: bool,
    #[define(F)] _dtype: ElemType,
) {
    let at = (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) * CUBE_DIM + UNIT_POS;
    if at < count {
        let row = at / pitch;
        let first = at % pitch * comptime!(format.per_word() as u32);
        let word = words[at as usize];
        for e in 0..comptime!(format.per_word() as u32) {
            let column = first + e;
            if column < columns {
                let scale = regions.index(row, column);
                let mut zero = 0.0f32.runtime();
                if zero_point {
                    zero = zeros[scale];
                }
                let value = number(word, e, zero, format, zero_point) * scales[scale];
                out[row as usize * columns as usize + column as usize] = F::cast_from(value);
            }
        }
    }
}
