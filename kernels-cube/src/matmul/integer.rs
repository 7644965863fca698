//! INT8 by INT8, in integers.

use cubecl::prelude::*;

use super::{Product, SIDE, TileConfig, UNITS};
use crate::limits::expect_loop_budget;
use crate::quantize::{QuantizedTensor, Regions};
use crate::{DType, ProblemError};

/// Words of a row that a tile holds.
const WORDS: usize = 8;
/// Products of 127 by 127 that surely fit an i32.
const MAX_SUM: usize = i32::MAX as usize / (127 * 127);

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct IntegerScalars {
    /// M.
    rows: u32,
    /// N.
    columns: u32,
    /// Words of a row of either operand.
    pitch: u32,
    /// Tiles of words that share their scales.
    tiles: u32,
    /// How often scales change along a row, plus one.
    steps: u32,
}

/// Products under one pair of scales, of rows of `len` whose scales reach so far.
pub(super) fn step(x: usize, w: usize, len: usize) -> Result<usize, ProblemError> {
    // Both are powers of two from 32, or at least the whole row.
    let step = x.min(w).min(len);
    if step > MAX_SUM {
        return Err(ProblemError::NotSupported {
            what: format!("a sum of {step} INT8 products"),
            why: "it could overflow 32 bits: quantize in groups or blocks along K",
        });
    }
    Ok(step)
}

pub(super) fn launch<const R: usize>(
    client: &Client,
    x: &QuantizedTensor<R>,
    product: Product<'_>,
) -> Result<(), ProblemError> {
    let [rows, columns, len] = product.size;
    let w = product.w;
    let config = TileConfig::new([rows, columns], product.bias.is_some());
    let step = step(x.scale_len(), w.scale_len(), len)?;
    let (tiles, steps) = (step.div_ceil(4 * WORDS), len.div_ceil(step));
    let device = client.properties();
    let loads = (config.rows() + config.columns()) * WORDS / UNITS;
    expect_loop_budget(
        device,
        "an INT8 product",
        steps * (1 + tiles * (WORDS + 2 + loads)),
    )?;
    let grid = product.grid(device, [config.rows(), config.columns()])?;
    // SAFETY: words past the ends read as 0, and results past them are not stored.
    unsafe {
        integer_matmul::launch_unchecked(
            client,
            grid,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len((rows * columns).max(rows.max(columns) * w.words_per_row())),
            x.words_arg(),
            x.scales().buffer_arg(),
            w.words_arg(),
            w.scales().buffer_arg(),
            product.bias_arg(),
            product.out,
            x.regions(),
            w.regions(),
            IntegerScalarsLaunch::new(
                rows as u32,
                columns as u32,
                w.words_per_row() as u32,
                tiles as u32,
                steps as u32,
            ),
            config,
            DType::elem_type(product.dtype),
        );
    }
    Ok(())
}

/// Copies words `first_word..` of rows `first_row..` to shared memory, `[word, row]`: units read
/// neighbouring words, and later neighbouring rows.
#[cube]
fn load(
    tile: &mut Shared<[u32]>,
    words: &[u32],
    first_row: u32,
    rows: u32,
    first_word: u32,
    pitch: u32,
    #[comptime] tile_rows: usize,
) {
    for step in 0..comptime!((tile_rows * WORDS).div_ceil(UNITS)) {
        let at = step * UNITS + UNIT_POS as usize;
        if at < comptime!(tile_rows * WORDS) {
            let row = at / WORDS;
            let word = at % WORDS;
            let (global_row, global_word) = (first_row + row as u32, first_word + word as u32);
            let mut value = 0u32.runtime();
            if global_row < rows && global_word < pitch {
                value = words[global_row as usize * pitch as usize + global_word as usize];
            }
            tile[word * comptime!(tile_rows + 1) + row] = value;
        }
    }
}

/// One cube computes a tile of the result, a unit every 16th of its rows and columns. Sums of products
/// under one pair of scales are integers.
///
/// Grid: x = tiles of columns, y = tiles of rows.
#[cube(launch_unchecked, address_type = "dynamic")]
fn integer_matmul<F: Float>(
    x: &[u32],
    x_scales: &[f32],
    w: &[u32],
    w_scales: &[f32],
    bias: &[f32],
    out: &mut [F],
    x_regions: Regions,
    w_regions: Regions,
    scalars: IntegerScalars,
    #[comptime] config: TileConfig,
    #[define(F)] _dtype: ElemType,
) {
    let (tile_rows, tile_columns) = (comptime!(config.rows()), comptime!(config.columns()));
    let (unit_rows, unit_columns) = (config.unit_rows, config.unit_columns);
    let mut x_tile = Shared::<[u32]>::new_slice(comptime!(WORDS * (tile_rows + 1)));
    let mut w_tile = Shared::<[u32]>::new_slice(comptime!(WORDS * (tile_columns + 1)));
    let mut sums = Array::<f32>::new(comptime!(unit_rows * unit_columns));
    let mut exact = Array::<i32>::new(comptime!(unit_rows * unit_columns));
    #[unroll]
    for i in 0..comptime!(unit_rows * unit_columns) {
        sums[i] = 0.0;
    }
    let first_row = CUBE_POS_Y * comptime!(tile_rows as u32);
    let first_column = CUBE_POS_X * comptime!(tile_columns as u32);
    let unit_row = UNIT_POS as usize / SIDE;
    let unit_column = UNIT_POS as usize % SIDE;

    for step in 0..scalars.steps {
        #[unroll]
        for i in 0..comptime!(unit_rows * unit_columns) {
            exact[i] = 0;
        }
        for t in 0..scalars.tiles {
            let word = (step * scalars.tiles + t) * comptime!(WORDS as u32);
            sync_cube();
            load(
                &mut x_tile,
                x,
                first_row,
                scalars.rows,
                word,
                scalars.pitch,
                tile_rows,
            );
            load(
                &mut w_tile,
                w,
                first_column,
                scalars.columns,
                word,
                scalars.pitch,
                tile_columns,
            );
            sync_cube();
            for k in 0..WORDS {
                let mut right = Array::<i32>::new(unit_columns);
                #[unroll]
                for c in 0..unit_columns {
                    let at = k * comptime!(tile_columns + 1) + comptime!(c * SIDE) + unit_column;
                    right[c] = i32::reinterpret(w_tile[at]);
                }
                #[unroll]
                for r in 0..unit_rows {
                    let at = k * comptime!(tile_rows + 1) + comptime!(r * SIDE) + unit_row;
                    let left = i32::reinterpret(x_tile[at]);
                    #[unroll]
                    for c in 0..unit_columns {
                        let i = comptime!(r * unit_columns + c);
                        exact[i] = dp4a(left, right[c], exact[i]);
                    }
                }
            }
        }
        let element = step * scalars.tiles * comptime!(4 * WORDS as u32);
        #[unroll]
        for r in 0..unit_rows {
            // Rows past the end have a scale of some other row, and are not stored.
            let row = min(
                first_row + (comptime!(r * SIDE) + unit_row) as u32,
                scalars.rows - 1,
            );
            let x_scale = x_scales[x_regions.index(row, element)];
            #[unroll]
            for c in 0..unit_columns {
                let column = first_column + (comptime!(c * SIDE) + unit_column) as u32;
                let column = min(column, scalars.columns - 1);
                let scale = x_scale * w_scales[w_regions.index(column, element)];
                let i = comptime!(r * unit_columns + c);
                sums[i] += f32::cast_from(exact[i]) * scale;
            }
        }
    }
    store::<F>(
        out,
        bias,
        &sums,
        first_row,
        first_column,
        scalars.rows,
        scalars.columns,
        config,
    );
}

/// Writes the results of a unit that exist, with the bias.
#[cube]
pub(super) fn store<F: Float>(
    out: &mut [F],
    bias: &[f32],
    sums: &Array<f32>,
    first_row: u32,
    first_column: u32,
    rows: u32,
    columns: u32,
    #[comptime] config: TileConfig,
) {
    let (unit_rows, unit_columns) = (config.unit_rows, config.unit_columns);
    #[unroll]
    for r in 0..unit_rows {
        let row = first_row + comptime!((r * SIDE) as u32) + UNIT_POS / comptime!(SIDE as u32);
        #[unroll]
        for c in 0..unit_columns {
            let inner = comptime!((c * SIDE) as u32) + UNIT_POS % comptime!(SIDE as u32);
            let column = first_column + inner;
            if row < rows && column < columns {
                let mut sum = sums[comptime!(r * unit_columns + c)];
                if config.bias {
                    sum += bias[column as usize];
                }
                out[row as usize * columns as usize + column as usize] = F::cast_from(sum);
            }
        }
    }
}
