//! Activations by low-bit weights, which are decoded into shared memory.

use cubecl::prelude::*;

use super::integer::store;
use super::{Product, SIDE, TileConfig, UNITS};
use crate::limits::expect_loop_budget;
use crate::quantize::{Format, Regions, number};
use crate::{DeviceTensor, ProblemError};

/// Summands of a tile.
const DEPTH: usize = 16;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct DecodedConfig {
    tile: TileConfig,
    format: Format,
    zero_point: bool,
    /// Whether the sum is over the rows of the weights, for the gradient.
    transposed: bool,
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct DecodedScalars {
    /// Columns of the result.
    columns: u32,
    /// Summands.
    len: u32,
    /// Words of a row of the weights.
    pitch: u32,
}

pub(super) fn launch(
    client: &Client,
    x: &DeviceTensor<2>,
    product: Product<'_>,
    transposed: bool,
) -> Result<(), ProblemError> {
    let [rows, columns, len] = product.size;
    let w = product.w;
    let tile = TileConfig::new([rows, columns], product.bias.is_some());
    let device = client.properties();
    let loads = (tile.rows() + tile.columns()) * DEPTH / UNITS + 1;
    let iterations = len.div_ceil(DEPTH) * (1 + DEPTH + 8 * loads);
    expect_loop_budget(device, "a product with low-bit weights", iterations)?;
    let grid = product.grid(device, [tile.rows(), tile.columns()])?;
    // SAFETY: elements past the ends read as 0, and results past them are not stored.
    unsafe {
        decoded_matmul::launch_unchecked(
            client,
            grid,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(x.extent().max(rows * columns).max(w.bytes() / 4)),
            x.tensor_arg(),
            w.words_arg(),
            w.scales().buffer_arg(),
            w.zeros_arg(),
            product.bias_arg(),
            product.out,
            w.regions(),
            DecodedScalarsLaunch::new(columns as u32, len as u32, w.words_per_row() as u32),
            DecodedConfig {
                tile,
                format: w.format(),
                zero_point: w.zeros().is_some(),
                transposed,
            },
            x.dtype().elem_type(),
            product.dtype.elem_type(),
        );
    }
    Ok(())
}

/// Copies a tile of activations to shared memory, `[summand, row]`.
#[cube]
fn load_rows<F: Float>(
    tile: &mut Shared<[f32]>,
    x: &Tensor<F>,
    first_row: u32,
    first: u32,
    #[comptime] tile_rows: usize,
) {
    for step in 0..comptime!(tile_rows * DEPTH / UNITS) {
        let at = step * UNITS + UNIT_POS as usize;
        let (row, k) = (at / DEPTH, at % DEPTH);
        let (global_row, global_k) = (first_row as usize + row, first as usize + k);
        let mut value = 0.0f32.runtime();
        if global_row < x.shape(0) && global_k < x.shape(1) {
            value = f32::cast_from(x[global_row * x.stride(0) + global_k * x.stride(1)]);
        }
        tile[k * comptime!(tile_rows + 1) + row] = value;
    }
}

/// Decodes a tile of weights to shared memory, `[summand, column]`, a word to a unit. A word's elements
/// are summands, or columns if the product is transposed.
#[cube]
fn load_weights(
    tile: &mut Shared<[f32]>,
    words: &[u32],
    scales: &[f32],
    zeros: &[f32],
    regions: Regions,
    first_column: u32,
    first: u32,
    scalars: DecodedScalars,
    #[comptime] config: DecodedConfig,
) {
    let per_word = comptime!(config.format.per_word());
    let tile_columns = comptime!(config.tile.columns());
    let across = comptime!(
        (if config.transposed {
            tile_columns
        } else {
            DEPTH
        }) / per_word
    );
    let total = comptime!(tile_columns * DEPTH / per_word);
    let (first_row, first_word, rows) = if comptime!(config.transposed) {
        (first, first_column / per_word as u32, scalars.len)
    } else {
        (first_column, first / per_word as u32, scalars.columns)
    };
    for step in 0..comptime!(total.div_ceil(UNITS)) {
        let at = step * UNITS + UNIT_POS as usize;
        if at < total {
            let (row, word) = (at / across, at % across);
            let (global_row, global_word) = (first_row + row as u32, first_word + word as u32);
            let mut bits = 0u32.runtime();
            let mut scale = 0.0f32.runtime();
            let mut zero = 0.0f32.runtime();
            // Elements past a row's end are decoded too, but meet activations that are 0 or columns
            // that are not stored.
            if global_row < rows && global_word < scalars.pitch {
                bits = words[global_row as usize * scalars.pitch as usize + global_word as usize];
                let last = min(
                    global_word * per_word as u32,
                    scalars.last_element(config.transposed),
                );
                let region = regions.index(global_row, last);
                scale = scales[region];
                if config.zero_point {
                    zero = zeros[region];
                }
            }
            for e in 0..per_word {
                let value = number(bits, e as u32, zero, config.format, config.zero_point) * scale;
                let inner = word * per_word + e;
                let (k, column) = if comptime!(config.transposed) {
                    (row, inner)
                } else {
                    (inner, row)
                };
                tile[k * comptime!(tile_columns + 1) + column] = value;
            }
        }
    }
}

#[cube]
impl DecodedScalars {
    /// The last element of a row of the weights: padding has its scale.
    fn last_element(self, #[comptime] transposed: bool) -> u32 {
        if comptime!(transposed) {
            self.columns - 1
        } else {
            self.len - 1
        }
    }
}

/// One cube computes a tile of the result, a unit every 16th of its rows and columns.
///
/// Grid: x = tiles of columns, y = tiles of rows.
#[cube(launch_unchecked, address_type = "dynamic")]
fn decoded_matmul<F: Float, O: Float>(
    x: &Tensor<F>,
    w: &[u32],
    scales: &[f32],
    zeros: &[f32],
    bias: &[f32],
    out: &mut [O],
    regions: Regions,
    scalars: DecodedScalars,
    #[comptime] config: DecodedConfig,
    #[define(F)] _dtype: ElemType,
    #[define(O)] _out_dtype: ElemType,
) {
    let (tile_rows, tile_columns) = (
        comptime!(config.tile.rows()),
        comptime!(config.tile.columns()),
    );
    let (unit_rows, unit_columns) = (config.tile.unit_rows, config.tile.unit_columns);
    let mut x_tile = Shared::<[f32]>::new_slice(comptime!(DEPTH * (tile_rows + 1)));
    let mut w_tile = Shared::<[f32]>::new_slice(comptime!(DEPTH * (tile_columns + 1)));
    let mut sums = Array::<f32>::new(comptime!(unit_rows * unit_columns));
    #[unroll]
    for i in 0..comptime!(unit_rows * unit_columns) {
        sums[i] = 0.0;
    }
    let first_row = CUBE_POS_Y * comptime!(tile_rows as u32);
    let first_column = CUBE_POS_X * comptime!(tile_columns as u32);
    let unit_row = UNIT_POS as usize / SIDE;
    let unit_column = UNIT_POS as usize % SIDE;

    for t in 0..scalars.len.div_ceil(comptime!(DEPTH as u32)) {
        let first = t * comptime!(DEPTH as u32);
        sync_cube();
        load_rows::<F>(&mut x_tile, x, first_row, first, tile_rows);
        load_weights(
            &mut w_tile,
            w,
            scales,
            zeros,
            regions,
            first_column,
            first,
            scalars,
            config,
        );
        sync_cube();
        for k in 0..DEPTH {
            let mut right = Array::<f32>::new(unit_columns);
            #[unroll]
            for c in 0..unit_columns {
                let at = k * comptime!(tile_columns + 1) + comptime!(c * SIDE) + unit_column;
                right[c] = w_tile[at];
            }
            #[unroll]
            for r in 0..unit_rows {
                let left = x_tile[k * comptime!(tile_rows + 1) + comptime!(r * SIDE) + unit_row];
                #[unroll]
                for c in 0..unit_columns {
                    let i = comptime!(r * unit_columns + c);
                    sums[i] = fma(left, right[c], sums[i]);
                }
            }
        }
    }
    let rows = x.shape(0) as u32;
    store::<O>(
        out,
        bias,
        &sums,
        first_row,
        first_column,
        rows,
        scalars.columns,
        config.tile,
    );
}
