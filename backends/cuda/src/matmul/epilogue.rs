//! From sums to results: scales, bias, rounding and stores.

use cubecl::prelude::*;
use cubesla_kernels::DType;

use super::config::{COLUMNS, MatmulTile, Memory};
use super::consumer::unit_row;
use super::kernel::{Item, MatmulScalars};
use crate::ptx::tma::L2;
use crate::ptx::{barrier, math, matmul, tma};

/// Stores the warpgroup's rows of a tile with bulk copies, which leave out what is past the ends and
/// run on while the warpgroup turns to the next item.
#[cube]
pub(crate) fn store(
    out: u64,
    x_scales: &[f32],
    w_scales: &[f32],
    bias: &[f32],
    item: Item,
    memory: Memory,
    scalars: MatmulScalars,
    #[comptime] tile: MatmulTile,
) {
    let row = item.row + unit_row();
    let mut upper = 1.0f32;
    let mut lower = 1.0f32;
    if !tile.steps {
        upper = x_scales[scalars.x_scales.first(min(row, scalars.last_row)) as usize];
        lower = x_scales[scalars.x_scales.first(min(row + 8, scalars.last_row)) as usize];
    }
    let warpgroup = UNIT_POS / 128;
    let width = comptime!(tile.out_columns());
    #[unroll]
    for number in 0..comptime!(COLUMNS / width) {
        let column = item.column + comptime!((number * width) as u32);
        let columns = Columns::new(w_scales, bias, column, scalars, tile);
        // All but the newest of the boxes stored have been read, so this one is free.
        if UNIT_POS % 128 == 0 {
            tma::wait_stores_read_but_one();
        }
        // Named barrier 0 is the whole cube's.
        barrier::sync_named(warpgroup + 1, 128u32);
        let staging =
            memory.out + (warpgroup * 2 + number as u32 % 2) * comptime!(tile.out_bytes() as u32);
        #[unroll]
        for group in 0..comptime!(width / 16) {
            let sums = matmul::read_sums(comptime!(number * width / 16 + group), tile.sums());
            let values = columns.finish(&sums, upper, lower, group);
            stage(staging, &values, group, tile);
        }
        tma::fence_writes();
        barrier::sync_named(warpgroup + 1, 128u32);
        if UNIT_POS % 128 == 0 {
            let row = item.row + warpgroup * 64;
            tma::store(staging, out, column, row, 0u32, 0u32, L2::Normal);
            tma::commit_stores();
        }
    }
}

/// Scales and biases of the unit's columns of a box.
#[derive(CubeType)]
struct Columns {
    scales: Array<f32>,
    bias: Array<f32>,
    #[cube(comptime)]
    tile: MatmulTile,
}

#[cube]
impl Columns {
    /// Of the box whose first column is `first`.
    fn new(
        w_scales: &[f32],
        bias: &[f32],
        first: u32,
        scalars: MatmulScalars,
        #[comptime] tile: MatmulTile,
    ) -> Columns {
        // Two neighbours of each eight.
        let count = comptime!(tile.out_columns() / 4);
        let mut columns = Columns {
            scales: Array::<f32>::new(count),
            bias: Array::<f32>::new(count),
            tile,
        };
        #[unroll]
        for i in 0..count {
            let inner = comptime!((i / 2 * 8 + i % 2) as u32) + UNIT_POS % 4 * 2;
            let column = min(first + inner, scalars.last_column);
            columns.scales[i] = 1.0;
            columns.bias[i] = 0.0;
            if !tile.w_steps {
                columns.scales[i] = w_scales[scalars.w_scales.first(column) as usize];
            }
            if tile.bias {
                columns.bias[i] = bias[column as usize];
            }
        }
        columns
    }

    /// The results of sums in the 16 columns of `group`.
    fn finish(
        &self,
        sums: &Vector<f32, Const<8>>,
        upper: f32,
        lower: f32,
        #[comptime] group: usize,
    ) -> Array<f32> {
        let mut values = Array::<f32>::new(8usize);
        #[unroll]
        for i in 0..8usize {
            let at = comptime!(4 * group + i / 4 * 2 + i % 2);
            let factor = if comptime!(i / 2 % 2 == 0) {
                upper
            } else {
                lower
            };
            let value = math::rounded_product(sums.extract(i), factor * self.scales[at]);
            values[i] = if comptime!(self.tile.bias) {
                value + self.bias[at]
            } else {
                value
            };
        }
        values
    }
}

/// Writes the 16 columns of `group` to the box at `to`, swizzled.
#[cube]
fn stage(to: u32, values: &Array<f32>, #[comptime] group: usize, #[comptime] tile: MatmulTile) {
    let warp_row = UNIT_POS % 128 / 32 * 16;
    let lane = UNIT_POS % 32;
    if comptime!(tile.dtype == DType::F32) {
        #[unroll]
        for i in 0..4usize {
            let row = warp_row + lane / 4 + comptime!((i % 2 * 8) as u32);
            let column = comptime!((16 * group + i / 2 * 8) as u32) + lane % 4 * 2;
            let at = to + row * 128 + ((column / 4) ^ (row % 8)) * 16 + column % 4 * 4;
            let (low, high) = (values[comptime!(2 * i)], values[comptime!(2 * i + 1)]);
            math::store_pair(at, u32::reinterpret(low), u32::reinterpret(high));
        }
    } else {
        let format = comptime!(if tile.dtype == DType::BF16 {
            "bf16"
        } else {
            "f16"
        });
        let mut words = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            let (low, high) = (values[comptime!(2 * i)], values[comptime!(2 * i + 1)]);
            words.insert(i, math::pack(low, high, format));
        }
        let row = warp_row + lane % 16;
        let chunk = comptime!((group * 2) as u32) + lane / 16;
        math::store_matrices(to + row * 128 + (chunk ^ (row % 8)) * 16, words);
    }
}
