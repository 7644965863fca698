//! Values to FP8 by columns.

use cubecl::prelude::*;

use super::LowBit;
use super::prepare::UNITS;
use crate::limits::{expect_buffer, grid};
use crate::quantize::{Format, code, finite_magnitude, is_nan, scale_of};
use crate::{DType, DeviceTensor, ProblemError};

/// Rows of values that a cube reads.
pub(super) const CHUNK: usize = 256;

/// Words and scales of values `v [B, H, L, D]`: FP8 with a scale to each column of a head, `[B, H, D]`.
pub(super) fn quantize_values(
    client: &Client,
    v: &DeviceTensor<4>,
) -> Result<LowBit, ProblemError> {
    let [batch, heads, len, dim] = v.shape();
    let device = client.properties();
    let chunks = len.div_ceil(CHUNK);
    let words = batch * heads * len * dim / 4;
    expect_buffer(device, "values in FP8", words * 4)?;
    let count = grid(device, [("chunks", chunks), ("H", heads), ("B", batch)])?;
    let words = DeviceTensor::empty(client, [words], DType::F32);
    let largest = DeviceTensor::empty(client, [batch * heads * chunks * dim], DType::F32);
    let scales = DeviceTensor::empty(client, [batch * heads * dim], DType::F32);
    // SAFETY: a cube writes the maxima or the words of its own chunk; rows past the end are skipped.
    unsafe {
        largest_of_columns::launch_unchecked(
            client,
            count.clone(),
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(v.extent()),
            v.tensor_arg(),
            largest.buffer_arg(),
            v.dtype().elem_type(),
        );
        quantize_values_kernel::launch_unchecked(
            client,
            count,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(v.extent()),
            v.tensor_arg(),
            largest.buffer_arg(),
            words.buffer_arg(),
            scales.buffer_arg(),
            v.dtype().elem_type(),
        );
    }
    Ok(LowBit {
        words: words.buffer_arg(),
        scales: scales.buffer_arg(),
    })
}

/// The largest finite magnitude of each column in a chunk of rows, as bits, `[B, H, chunks, D]`.
///
/// Grid: x = chunk, y = head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
fn largest_of_columns<F: Float>(v: &Tensor<F>, largest: &mut [u32], #[define(F)] _dtype: ElemType) {
    let base = CUBE_POS_Z as usize * v.stride(0) + CUBE_POS_Y as usize * v.stride(1);
    let first = CUBE_POS_X as usize * CHUNK;
    let rows = min(CHUNK, v.shape(2) - first);
    let column = UNIT_POS as usize;
    if column < v.shape(3) {
        let mut most = 0u32.runtime();
        for i in 0..rows {
            let at = base + (first + i) * v.stride(2) + column * v.stride(3);
            let size = finite_magnitude(f32::cast_from(v[at]));
            most = max(most, select(is_nan(size), 0, size));
        }
        let head = (CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) as usize;
        let chunk = head * CUBE_COUNT_X as usize + CUBE_POS_X as usize;
        largest[chunk * v.shape(3) + column] = most;
    }
}

/// Grid: x = chunk, y = head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
fn quantize_values_kernel<F: Float>(
    v: &Tensor<F>,
    largest: &[u32],
    words: &mut [u32],
    scales: &mut [f32],
    #[define(F)] _dtype: ElemType,
) {
    let (len, dim) = (v.shape(2), v.shape(3));
    let head = (CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) as usize;
    let base = CUBE_POS_Z as usize * v.stride(0) + CUBE_POS_Y as usize * v.stride(1);
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    if unit < dim {
        let mut most = 0u32.runtime();
        for chunk in 0..CUBE_COUNT_X as usize {
            most = max(
                most,
                largest[(head * CUBE_COUNT_X as usize + chunk) * dim + unit],
            );
        }
        let scale = scale_of(most, Format::Fp8);
        shared[unit] = scale;
        if CUBE_POS_X == 0 {
            scales[head * dim + unit] = scale;
        }
    }
    sync_cube();
    let first = CUBE_POS_X as usize * CHUNK;
    let rows = min(CHUNK, len - first);
    let per_row = dim / 4;
    for step in 0..(rows * per_row).div_ceil(UNITS) {
        let at = step * UNITS + unit;
        if at < rows * per_row {
            let row = first + at / per_row;
            let mut word = 0u32.runtime();
            for e in 0..4u32 {
                let column = at % per_row * 4 + e as usize;
                let value = f32::cast_from(v[base + row * v.stride(2) + column * v.stride(3)]);
                word |= code(value, shared[column], 0.0, Format::Fp8, false) << (8 * e);
            }
            words[(head * len + row) * per_row + at % per_row] = word;
        }
    }
}
