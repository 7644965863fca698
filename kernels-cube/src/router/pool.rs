//! Means over blocks of rows.

use cubecl::prelude::*;

use crate::limits::{expect_dtype, expect_loop_budget, grid};
use crate::rows::RowRange;
use crate::{DType, DeviceTensor, ProblemError};

/// Units of a cube.
const UNITS: usize = 256;

/// Means of each `block` rows of `x [B, H, L, D]`, f32 `[B, H, ceil(L / block), D]`; a last short
/// block divides by the rows it has. Sums are f32.
///
/// # Errors
/// [`ProblemError`] for a type that the device lacks, an empty axis, a `block` of 0, or a width that
/// is no multiple of 8 up to 256.
pub fn mean_pool(
    client: &Client,
    x: &DeviceTensor<4>,
    block: usize,
) -> Result<DeviceTensor<4>, ProblemError> {
    pooled(client, "x", x, block)
}

/// [`mean_pool`] of the tensor that a caller knows as `argument`.
pub(crate) fn pooled(
    client: &Client,
    argument: &'static str,
    x: &DeviceTensor<4>,
    block: usize,
) -> Result<DeviceTensor<4>, ProblemError> {
    let [batch, heads, len, dim] = x.shape();
    if x.is_empty() {
        return Err(ProblemError::ZeroSize {
            argument,
            shape: x.shape().to_vec(),
        });
    }
    if dim > 256 || !dim.is_multiple_of(8) {
        return Err(ProblemError::HeadDim { argument, dim });
    }
    if block == 0 {
        return Err(ProblemError::Count {
            argument: "block",
            found: 0,
            limit: len,
        });
    }
    let device = client.properties();
    expect_dtype(device, x.dtype())?;
    let vector = vector_size(client, x);
    let lanes = UNITS / (dim / vector);
    expect_loop_budget(device, "pooling", block.div_ceil(lanes) + lanes)?;
    let blocks = len.div_ceil(block);
    let pooled = DeviceTensor::empty(client, [batch, heads, blocks, dim], DType::F32);
    // SAFETY: rows past the length are not read; each cube writes the means of its own block.
    unsafe {
        mean_pool_kernel::launch_unchecked(
            client,
            grid(device, [("blocks", blocks), ("H", heads), ("B", batch)])?,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(x.extent()),
            vector,
            x.tensor_arg(),
            pooled.buffer_arg(),
            block as u32,
            dim,
            x.dtype().elem_type(),
        );
    }
    Ok(pooled)
}

/// The widest vector of up to 16 bytes that a row of `x` can be read in.
fn vector_size(client: &Client, x: &DeviceTensor<4>) -> usize {
    if !x.is_aligned() {
        return 1;
    }
    let widest = client.properties().hardware.max_vector_size;
    widest.min(16 / x.dtype().size())
}

/// One cube to a block: each unit sums every `lanes`-th row of a vector of columns, and the lanes'
/// sums are added in order.
///
/// Grid: x = block, y = head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
fn mean_pool_kernel<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    pooled: &mut [f32],
    block: u32,
    #[comptime] dim: usize,
    #[define(F)] _dtype: ElemType,
) {
    let size = x.vector_size();
    let vectors = comptime!(dim / size);
    let lanes = comptime!(UNITS / vectors);
    let mut sums = Shared::<[f32]>::new_slice(comptime!(lanes * dim));

    let first = CUBE_POS_X * block;
    let end = min(first + block, x.shape(2) as u32);
    let rows = RowRange::new::<F, N>(x, CUBE_POS_Z as usize, CUBE_POS_Y as usize, first, end);
    let vector = UNIT_POS as usize % vectors;
    let lane = UNIT_POS as usize / vectors;
    if lane < lanes {
        let mut sum = Vector::<f32, N>::new(0.0f32);
        for step in 0..rows.len.div_ceil(comptime!(lanes as u32)) {
            let row = step as usize * lanes + lane;
            if (row as u32) < rows.len {
                let at = rows.base + row * rows.row_stride + vector * size * rows.col_stride;
                sum += Vector::cast_from(x[at / size]);
            }
        }
        #[unroll]
        for e in 0..size {
            sums[lane * dim + vector * size + e] = sum.extract(e);
        }
    }
    sync_cube();
    let column = UNIT_POS as usize;
    if column < dim {
        let mut sum = 0.0f32;
        for lane in 0..lanes {
            sum += sums[lane * dim + column];
        }
        let head = (CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) as usize;
        let row = head * CUBE_COUNT_X as usize + CUBE_POS_X as usize;
        pooled[row * dim + column] = sum / f32::cast_from(rows.len);
    }
}

/// Takes the mean over all rows away from block means `pooled [B, H, N, D]` of `len` rows, in place:
/// pooling keys after smoothing them is the same as smoothing pooled keys.
pub(crate) fn smooth_pooled(
    client: &Client,
    pooled: &DeviceTensor<4>,
    block: usize,
    len: usize,
) -> Result<(), ProblemError> {
    let [batch, heads, blocks, dim] = pooled.shape();
    let device = client.properties();
    expect_loop_budget(device, "smoothing", 2 * blocks.div_ceil(LANES) + LANES)?;
    // SAFETY: one cube to some columns of a head, which reads and writes those means only.
    unsafe {
        smooth_kernel::launch_unchecked(
            client,
            grid(
                device,
                [
                    ("columns", dim.div_ceil(COLUMNS)),
                    ("B * H", batch * heads),
                    ("", 1),
                ],
            )?,
            CubeDim::new_1d(UNITS as u32),
            pooled.buffer_arg(),
            blocks as u32,
            block as u32,
            len as u32,
            dim as u32,
        );
    }
    Ok(())
}

/// Columns of a cube that smooths: few, so that many units share a column's blocks.
const COLUMNS: usize = 8;
/// Units that share a column.
const LANES: usize = UNITS / COLUMNS;

/// Grid: x = columns, y = (batch, head).
#[cube(launch_unchecked)]
fn smooth_kernel(pooled: &mut [f32], blocks: u32, block: u32, len: u32, dim: u32) {
    let mut sums = Shared::<[f32]>::new_slice(UNITS);
    let start = CUBE_POS_Y as usize * blocks as usize * dim as usize;
    let own = UNIT_POS as usize % COLUMNS;
    let column = CUBE_POS_X as usize * COLUMNS + own;
    let lane = UNIT_POS as usize / COLUMNS;
    let steps = blocks.div_ceil(comptime!(LANES as u32));
    let mut sum = 0.0f32;
    for step in 0..steps {
        let j = step * comptime!(LANES as u32) + lane as u32;
        if j < blocks {
            let rows = min(block, len - j * block);
            let mean = pooled[start + j as usize * dim as usize + column];
            // A block with a NaN or an infinity loses its own scores, not those of its head.
            let finite = mean.abs() <= f32::max_value();
            sum += select(finite, mean * f32::cast_from(rows), 0.0);
        }
    }
    sums[UNIT_POS as usize] = sum;
    sync_cube();
    let mut mean = 0.0f32;
    for other in 0..LANES {
        mean += sums[other * COLUMNS + own];
    }
    mean /= f32::cast_from(len);
    for step in 0..steps {
        let j = step * comptime!(LANES as u32) + lane as u32;
        if j < blocks {
            pooled[start + j as usize * dim as usize + column] -= mean;
        }
    }
}
