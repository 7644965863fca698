//! What low-bit attention computes with, for its gradients.

use cubecl::prelude::*;

use super::prepare::{UNITS, expect_budget, mean_key, quantize_blocks};
use super::values::quantize_values;
use super::{LowBit, LowBitFormats, LowBitValues, expect_low_bit};
use crate::limits::{expect_buffer, expect_dtype, grid, line_grid};
use crate::problem::expect_f32;
use crate::quantize::{Format, number};
use crate::rows::RowRange;
use crate::{AttentionProblem, DType, DeviceTensor, ProblemError};

/// The inputs of low-bit attention as it rounds them, contiguous and of the inputs' type, and its
/// log-sum-exp as that of their scores.
///
/// Keys have their mean taken off: softmax and gradients are the same without it.
#[derive(Clone, Debug)]
pub struct RoundedInputs {
    /// `[B, Hq, Lq, D]`.
    pub q: DeviceTensor<4>,
    /// `[B, Hkv, Lk, D]`.
    pub k: DeviceTensor<4>,
    /// `[B, Hkv, Lk, Dv]`; the values as they are where only scores are in low bits.
    pub v: DeviceTensor<4>,
    /// `[B, Hq, Lq]`, f32.
    pub lse: DeviceTensor<3>,
}

/// `q`, `k` and `v` as [`launch_low_bit`](super::launch_low_bit) rounds them, and `lse`, its log-sum-exp,
/// less `scale Q mean(K)^T`.
///
/// The backward of block-sparse attention, given these and the low-bit output, has the gradient of
/// what the low-bit forward computed, straight through the rounding of inputs and of weights. Given
/// the inputs as they are it has not: `rowsum(dO * O)` is then not that of `P * dP`, and the
/// difference, times `P`, stays in every gradient of a score.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault; nothing is launched then.
pub fn rounded_inputs(
    client: &Client,
    problem: &AttentionProblem,
    [q, k, v]: [&DeviceTensor<4>; 3],
    lse: &DeviceTensor<3>,
    formats: LowBitFormats,
) -> Result<RoundedInputs, ProblemError> {
    expect_low_bit(problem)?;
    problem.expect_inputs(q, k, v)?;
    expect_dtype(client.properties(), problem.dtype())?;
    expect_f32("lse", lse, problem.lse_shape())?;
    expect_budget(client, problem)?;
    let format = formats.scores.format();
    let mean = mean_key(client, k)?;
    let (block_q, block_k) = (problem.block_q(), problem.block_k());
    let queries = quantize_blocks(client, q, block_q, None, format)?;
    let keys = quantize_blocks(client, k, block_k, Some(&mean), format)?;
    let values = match formats.values {
        LowBitValues::Full => v.clone(),
        LowBitValues::Fp8 => {
            let codes = quantize_values(client, v)?;
            decoded(client, v, codes, ScaleOf::Column, Format::Fp8)?
        }
    };
    Ok(RoundedInputs {
        q: decoded(client, q, queries, ScaleOf::Rows(block_q as u32), format)?,
        k: decoded(client, k, keys, ScaleOf::Rows(block_k as u32), format)?,
        v: values,
        lse: smoothed(client, problem, q, &mean, lse)?,
    })
}

/// The elements of a head that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum ScaleOf {
    /// So many rows.
    Rows(u32),
    /// A column.
    Column,
}

/// The values of `codes` in the shape and type of `like`.
fn decoded(
    client: &Client,
    like: &DeviceTensor<4>,
    codes: LowBit,
    scale_of: ScaleOf,
    format: Format,
) -> Result<DeviceTensor<4>, ProblemError> {
    let [batch, heads, len, dim] = like.shape();
    let device = client.properties();
    let words = batch * heads * len * dim / 4;
    expect_buffer(device, "rounded inputs", words * 4 * like.dtype().size())?;
    let grid = line_grid(device, "words", words.div_ceil(UNITS))?;
    let out = DeviceTensor::empty(client, like.shape(), like.dtype());
    // SAFETY: a unit reads its own word and a scale of its head, and writes four elements of its own.
    unsafe {
        decode_kernel::launch_unchecked(
            client,
            grid,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(out.len()),
            4,
            codes.words,
            codes.scales,
            out.buffer_arg(),
            words as u32,
            len as u32,
            dim,
            scale_of,
            format,
            like.dtype().elem_type(),
        );
    }
    Ok(out)
}

/// A unit has a word.
#[cube(launch_unchecked, address_type = "dynamic")]
fn decode_kernel<F: Float, V: Size>(
    words: &[u32], // [B, H, L, D / 4]
    scales: &[f32],
    out: &mut [Vector<F, V>],
    count: u32,
    len: u32,
    #[comptime] dim: usize,
    #[comptime] scale_of: ScaleOf,
    #[comptime] format: Format,
    #[define(F)] _dtype: ElemType,
) {
    let at = (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) * CUBE_DIM + UNIT_POS;
    if at < count {
        let per_row = comptime!(dim as u32 / 4);
        let row = at / per_row;
        let head = row / len;
        let word = words[at as usize];
        let mut values = Vector::<F, V>::empty();
        #[unroll]
        for e in 0..4u32 {
            let scale = match comptime!(scale_of) {
                ScaleOf::Rows(block) => head * len.div_ceil(block) + row % len / block,
                ScaleOf::Column => head * comptime!(dim as u32) + at % per_row * 4 + e,
            };
            let value = number(word, e, 0.0, format, false) * scales[scale as usize];
            values.insert(e as usize, F::cast_from(value));
        }
        out[at as usize] = values;
    }
}

/// `lse` less `scale Q mean(K)^T`.
fn smoothed(
    client: &Client,
    problem: &AttentionProblem,
    q: &DeviceTensor<4>,
    mean: &DeviceTensor<4>,
    lse: &DeviceTensor<3>,
) -> Result<DeviceTensor<3>, ProblemError> {
    let device = client.properties();
    let (batch, heads) = (problem.batch(), problem.query_heads());
    let blocks = problem.query_len().div_ceil(UNITS);
    let grid = grid(
        device,
        [("rows / 256", blocks), ("Hq", heads), ("B", batch)],
    )?;
    let vector = if q.is_aligned() { 4 } else { 1 };
    let out = DeviceTensor::empty(client, problem.lse_shape(), DType::F32);
    // SAFETY: a unit reads and writes the element of its own row; rows past the length are skipped.
    unsafe {
        smoothed_kernel::launch_unchecked(
            client,
            grid,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(q.extent()),
            vector,
            q.tensor_arg(),
            mean.buffer_arg(),
            lse.buffer_arg(),
            out.buffer_arg(),
            problem.scale(),
            (heads / problem.kv_heads()) as u32,
            q.dtype().elem_type(),
        );
    }
    Ok(out)
}

/// Grid: x = rows, y = query head, z = batch. A unit has a row.
#[cube(launch_unchecked, address_type = "dynamic")]
fn smoothed_kernel<F: Float, N: Size>(
    q: &Tensor<Vector<F, N>>,
    mean: &[f32], // [B, Hkv, 1, D]
    lse: &[f32],
    out: &mut [f32],
    scale: f32,
    group: u32,
    #[define(F)] _dtype: ElemType,
) {
    let (batch, head) = (CUBE_POS_Z as usize, CUBE_POS_Y as usize);
    let (heads, len, dim) = (q.shape(1), q.shape(2), q.shape(3));
    let row = CUBE_POS_X * CUBE_DIM + UNIT_POS;
    if row < len as u32 {
        let from = RowRange::new::<F, N>(q, batch, head, row, len as u32);
        let index = batch * heads + head;
        // Batches have whole groups of heads.
        let means = index / group as usize * dim;
        let size = q.vector_size();
        let mut sum = 0.0f32;
        for at in 0..dim / size {
            let x = q[(from.base + at * size * from.col_stride) / size];
            #[unroll]
            for e in 0..size {
                sum += f32::cast_from(x.extract(e)) * mean[means + at * size + e];
            }
        }
        let at = index * len + row as usize;
        out[at] = lse[at] - scale * sum;
    }
}
