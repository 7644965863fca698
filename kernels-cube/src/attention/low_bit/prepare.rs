//! Queries and keys to INT8 or FP8 by blocks.

use cubecl::prelude::*;

use super::LowBit;
use super::values::CHUNK;
use crate::limits::{expect_buffer, expect_loop_budget, grid};
use crate::quantize::{Format, code_of_quotient, finite_magnitude, reciprocal_of_scale, scale_of};
use crate::router::mean_pool;
use crate::{AttentionProblem, DType, DeviceTensor, ProblemError};

/// Units of a cube.
pub(super) const UNITS: usize = 256;

/// An error unless the kernels' loops are carried out.
pub(super) fn expect_budget(
    client: &Client,
    problem: &AttentionProblem,
) -> Result<(), ProblemError> {
    let rows = problem.block_q().max(problem.block_k());
    let blocks = 2 * (rows * problem.head_dim()).div_ceil(UNITS);
    let chunks = problem.key_len().div_ceil(CHUNK);
    let columns = chunks + CHUNK + 2 * CHUNK * problem.value_dim() / UNITS;
    let operation = "quantizing queries, keys and values";
    expect_loop_budget(client.properties(), operation, blocks.max(columns))
}

/// Keys of a head whose mean is its mean key, at least, where there are more.
const SAMPLE: usize = 1024;

/// The keys of `k [B, H, L, D]` whose mean smoothing takes from all of them: every key, or of a long head
/// every `step`-th.
///
/// Softmax is the same whatever is taken from all keys. To leave little to quantize it has to be near their
/// mean, and that of a few thousand is. `step` is odd, so that keys of a picture or a video, whose rows are
/// even, are taken from all columns.
pub fn smoothing_sample(k: &DeviceTensor<4>) -> DeviceTensor<4> {
    k.every((k.shape()[2] / (2 * SAMPLE)) | 1, 2)
}

/// The mean key of each head of `k [B, H, L, D]`, f32 `[B, H, 1, D]`: the means of chunks of rows of the
/// [sample](smoothing_sample), put together. A NaN or infinity among them spoils its head.
pub(super) fn mean_key(
    client: &Client,
    k: &DeviceTensor<4>,
) -> Result<DeviceTensor<4>, ProblemError> {
    let sample = smoothing_sample(k);
    let [batch, heads, len, dim] = sample.shape();
    let chunks = mean_pool(client, &sample, CHUNK)?;
    let mean = DeviceTensor::empty(client, [batch, heads, 1, dim], DType::F32);
    let grid = grid(
        client.properties(),
        [("B * H", batch * heads), ("", 1), ("", 1)],
    )?;
    // SAFETY: a cube writes the mean of its own head.
    unsafe {
        mean_of_chunks::launch_unchecked(
            client,
            grid,
            CubeDim::new_1d(UNITS as u32),
            chunks.buffer_arg(),
            mean.buffer_arg(),
            len as u32,
            dim as u32,
        );
    }
    Ok(mean)
}

/// Grid: x = (batch, head). A unit has a column.
#[cube(launch_unchecked)]
fn mean_of_chunks(chunks: &[f32], mean: &mut [f32], len: u32, dim: u32) {
    let column = UNIT_POS;
    if column < dim {
        let count = len.div_ceil(comptime!(CHUNK as u32));
        let start = CUBE_POS_X * count * dim + column;
        let mut sum = 0.0f32;
        for chunk in 0..count {
            let rows = min(
                len - chunk * comptime!(CHUNK as u32),
                comptime!(CHUNK as u32),
            );
            sum += chunks[(start + chunk * dim) as usize] * f32::cast_from(rows);
        }
        mean[(CUBE_POS_X * dim + column) as usize] = sum / f32::cast_from(len);
    }
}

/// Words and scales of `x [B, H, L, D]`, less the mean of its head's rows if one is given: of an 8-bit
/// `format`, with a scale to each `block` rows of a head, `[B, H, ceil(L / block)]`.
pub(super) fn quantize_blocks(
    client: &Client,
    x: &DeviceTensor<4>,
    block: usize,
    mean: Option<&DeviceTensor<4>>,
    format: Format,
) -> Result<LowBit, ProblemError> {
    let [batch, heads, len, dim] = x.shape();
    let device = client.properties();
    let blocks = len.div_ceil(block);
    let words = batch * heads * len * dim / 4;
    expect_buffer(device, "queries or keys in 8 bits", words * 4)?;
    let grid = grid(device, [("blocks", blocks), ("H", heads), ("B", batch)])?;
    let words = DeviceTensor::empty(client, [words], DType::F32);
    let scales = DeviceTensor::empty(client, [batch * heads * blocks], DType::F32);
    // SAFETY: a cube writes the words and the scale of its own block; rows past the end are skipped.
    unsafe {
        quantize_blocks_kernel::launch_unchecked(
            client,
            grid,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(x.extent()),
            x.tensor_arg(),
            mean.map_or(words.buffer_arg(), DeviceTensor::buffer_arg),
            words.buffer_arg(),
            scales.buffer_arg(),
            block as u32,
            mean.is_some(),
            format,
            x.dtype().elem_type(),
        );
    }
    Ok(LowBit {
        words: words.buffer_arg(),
        scales: scales.buffer_arg(),
    })
}

/// Grid: x = block, y = head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
fn quantize_blocks_kernel<F: Float>(
    x: &Tensor<F>,
    mean: &[f32],
    words: &mut [u32],
    scales: &mut [f32],
    block: u32,
    #[comptime] smooth: bool,
    #[comptime] format: Format,
    #[define(F)] _dtype: ElemType,
) {
    let (len, dim) = (x.shape(2) as u32, x.shape(3) as u32);
    let head = (CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) as usize;
    let base = CUBE_POS_Z as usize * x.stride(0) + CUBE_POS_Y as usize * x.stride(1);
    let first = CUBE_POS_X * block;
    let rows = min(block, len - first);
    let mut largest = 0u32.runtime();
    for step in 0..(rows * dim).div_ceil(comptime!(UNITS as u32)) {
        let at = step * comptime!(UNITS as u32) + UNIT_POS;
        if at < rows * dim {
            let row = (first + at / dim) as usize;
            let column = (at % dim) as usize;
            let mut value = f32::cast_from(x[base + row * x.stride(2) + column * x.stride(3)]);
            if smooth {
                value -= mean[head * dim as usize + column];
            }
            largest = max(largest, finite_magnitude(value));
        }
    }
    let mut shared = Shared::<[u32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    shared[unit] = largest;
    #[unroll]
    for step in 0..comptime!(UNITS.ilog2() as usize) {
        let half = comptime!(UNITS >> (step + 1));
        sync_cube();
        if unit < half {
            shared[unit] = max(shared[unit], shared[unit + half]);
        }
    }
    sync_cube();
    let scale = scale_of(shared[0], format);
    if unit == 0 {
        scales[head * CUBE_COUNT_X as usize + CUBE_POS_X as usize] = scale;
    }
    let reciprocal = reciprocal_of_scale(scale);
    let per_row = dim / 4;
    for step in 0..(rows * per_row).div_ceil(comptime!(UNITS as u32)) {
        let at = step * comptime!(UNITS as u32) + UNIT_POS;
        if at < rows * per_row {
            let row = (first + at / per_row) as usize;
            let mut word = 0u32.runtime();
            for e in 0..4u32 {
                let column = (at % per_row * 4 + e) as usize;
                let mut value = f32::cast_from(x[base + row * x.stride(2) + column * x.stride(3)]);
                if smooth {
                    value -= mean[head * dim as usize + column];
                }
                word |= code_of_quotient(value * reciprocal, scale, 0.0, format, false) << (8 * e);
            }
            let to = (head * len as usize + row) * per_row as usize;
            words[to + (at % per_row) as usize] = word;
        }
    }
}
