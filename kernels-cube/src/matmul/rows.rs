//! A few rows of activations by low-bit weights: bound by reading the weights, once.

use cubecl::prelude::*;

use super::{Product, UNITS};
use crate::limits::{expect_loop_budget, line_grid};
use crate::quantize::{Format, Regions, number};
use crate::{DeviceTensor, ProblemError};

/// Rows from which tiles are better.
pub(super) const MAX_ROWS: usize = 4;
/// Units that share a column of the result.
const LANES: usize = 32;
/// Columns of a cube.
const COLUMNS: usize = UNITS / LANES;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct RowsConfig {
    /// Rows of the activations.
    rows: usize,
    format: Format,
    zero_point: bool,
    bias: bool,
}

pub(super) fn launch(
    client: &Client,
    x: &DeviceTensor<2>,
    product: Product<'_>,
) -> Result<(), ProblemError> {
    let [rows, columns, len] = product.size;
    let w = product.w;
    let device = client.properties();
    let steps = w.words_per_row().div_ceil(LANES);
    let iterations = steps * (1 + w.format().per_word() / 4) + 8;
    expect_loop_budget(device, "a product with low-bit weights", iterations)?;
    let vector = if x.is_aligned() && len.is_multiple_of(4) {
        4
    } else {
        1
    };
    // SAFETY: elements past a row's end are not read, and results past the last column not stored.
    unsafe {
        rows_matmul::launch_unchecked(
            client,
            line_grid(device, "columns", columns.div_ceil(COLUMNS))?,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(x.extent().max(columns * w.words_per_row())),
            vector,
            x.tensor_arg(),
            w.words_arg(),
            w.scales().buffer_arg(),
            w.zeros_arg(),
            product.bias_arg(),
            product.out,
            w.regions(),
            columns as u32,
            len as u32,
            w.words_per_row() as u32,
            RowsConfig {
                rows,
                format: w.format(),
                zero_point: w.zeros().is_some(),
                bias: product.bias.is_some(),
            },
            x.dtype().elem_type(),
            product.dtype.elem_type(),
        );
    }
    Ok(())
}

/// Four neighbouring activations; those past the end are 0.
#[cube]
fn read_four<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    row: usize,
    first: u32,
    len: u32,
) -> Array<f32> {
    let mut values = Array::<f32>::new(4usize);
    let start = row * x.stride(0);
    if x.vector_size() == 4 {
        let mut four = Vector::<f32, N>::new(0.0f32);
        if first < len {
            four = Vector::cast_from(x[(start + first as usize) / 4]);
        }
        #[unroll]
        for e in 0..4usize {
            values[e] = four.extract(e);
        }
    } else {
        #[unroll]
        for e in 0..4usize {
            let at = first + comptime!(e as u32);
            values[e] = 0.0;
            if at < len {
                values[e] = f32::cast_from(x[start + at as usize * x.stride(1)].extract(0usize));
            }
        }
    }
    values
}

/// 32 units share a column of the result, and neighbours read neighbouring words of its weights.
#[cube(launch_unchecked, address_type = "dynamic")]
fn rows_matmul<F: Float, N: Size, O: Float>(
    x: &Tensor<Vector<F, N>>,
    w: &[u32],
    scales: &[f32],
    zeros: &[f32],
    bias: &[f32],
    out: &mut [O],
    regions: Regions,
    columns: u32,
    len: u32,
    pitch: u32,
    #[comptime] config: RowsConfig,
    #[define(F)] _dtype: ElemType,
    #[define(O)] _out_dtype: ElemType,
) {
    let per_word = comptime!(config.format.per_word());
    let cube = CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X;
    let lane = UNIT_POS % comptime!(LANES as u32);
    let column = cube * comptime!(COLUMNS as u32) + UNIT_POS / comptime!(LANES as u32);
    let mut sums = Array::<f32>::new(config.rows);
    #[unroll]
    for r in 0..config.rows {
        sums[r] = 0.0;
    }
    if column < columns {
        for step in 0..pitch.div_ceil(comptime!(LANES as u32)) {
            let word = step * comptime!(LANES as u32) + lane;
            let first = word * per_word as u32;
            if first < len {
                let bits = w[column as usize * pitch as usize + word as usize];
                let region = regions.index(column, first);
                let mut zero = 0.0f32.runtime();
                if config.zero_point {
                    zero = zeros[region];
                }
                let scale = scales[region];
                #[unroll]
                for quad in 0..comptime!(per_word / 4) {
                    let mut weights = Array::<f32>::new(4usize);
                    #[unroll]
                    for e in 0..4usize {
                        let at = comptime!((4 * quad + e) as u32);
                        weights[e] =
                            number(bits, at, zero, config.format, config.zero_point) * scale;
                    }
                    #[unroll]
                    for r in 0..config.rows {
                        let from = first + comptime!(4 * quad as u32);
                        let values = read_four::<F, N>(x, r, from, len);
                        #[unroll]
                        for e in 0..4usize {
                            sums[r] = fma(weights[e], values[e], sums[r]);
                        }
                    }
                }
            }
        }
    }
    let unit = UNIT_POS as usize;
    let mut shared = Shared::<[f32]>::new_slice(comptime!(config.rows * UNITS));
    #[unroll]
    for r in 0..config.rows {
        shared[comptime!(r * UNITS) + unit] = sums[r];
    }
    #[unroll]
    for step in 0..comptime!(LANES.ilog2() as usize) {
        let half = comptime!(LANES >> (step + 1));
        sync_cube();
        if (lane as usize) < half {
            #[unroll]
            for r in 0..config.rows {
                let at = comptime!(r * UNITS) + unit;
                let other = shared[at + half];
                shared[at] += other;
            }
        }
    }
    if lane == 0 && column < columns {
        #[unroll]
        for r in 0..config.rows {
            let mut sum = shared[comptime!(r * UNITS) + unit];
            if config.bias {
                sum += bias[column as usize];
            }
            out[r * columns as usize + column as usize] = O::cast_from(sum);
        }
    }
}
