//! A consumer: a warpgroup that computes 64 rows of each of its cube's tiles of the result.

use cubecl::prelude::*;

use super::config::{COLUMNS, MatmulTile, Memory};
use super::epilogue::store;
use super::kernel::{Item, MatmulScalars, first_item, item_stride};
use crate::forward::config::Place;
use crate::ptx::{barrier, matmul, tma, value, wgmma};

/// The loop over items.
#[cube]
pub(crate) fn consume(
    out: u64,
    x_scales: &[f32],
    w_scales: &[f32],
    bias: &[f32],
    memory: Memory,
    scalars: MatmulScalars,
    #[comptime] tile: MatmulTile,
) {
    let mut place = Place::first(comptime!(tile.stages()));
    let mut index = first_item(tile);
    while index < scalars.row_tiles * scalars.column_tiles {
        let item = Item::new(index, scalars, tile);
        if comptime!(tile.pairs()) {
            sum_pairs(&mut place, memory, scalars, tile);
        } else if comptime!(tile.sums().has_totals()) {
            sum_steps(&mut place, x_scales, w_scales, item, memory, scalars, tile);
        } else {
            sum_all(&mut place, memory, scalars, tile);
        }
        store(out, x_scales, w_scales, bias, item, memory, scalars, tile);
        index += item_stride(tile);
    }
    if UNIT_POS % 128 == 0 {
        tma::wait_stores_read();
    }
}

/// Sums of all of K where the products leave them, with a product always in flight.
#[cube]
fn sum_all(
    place: &mut Place,
    memory: Memory,
    scalars: MatmulScalars,
    #[comptime] tile: MatmulTile,
) {
    let mut last = place.stage;
    for step in 0..scalars.steps {
        barrier::wait(memory.full(place.stage), place.parity);
        wgmma::fence();
        multiply(place.stage, step, 0usize, memory, tile);
        wgmma::commit();
        if step > 0 {
            wgmma::wait(1u32);
            memory.release(last, tile);
        }
        last = place.stage;
        place.advance();
    }
    wgmma::wait(0u32);
    memory.release(last, tile);
}

/// Sums of each step, added to totals in f32 while the other warpgroup multiplies.
#[cube]
fn sum_steps(
    place: &mut Place,
    x_scales: &[f32],
    w_scales: &[f32],
    item: Item,
    memory: Memory,
    scalars: MatmulScalars,
    #[comptime] tile: MatmulTile,
) {
    let row = item.row + unit_row();
    let (x_order, w_order) = (scalars.x_scales, scalars.w_scales);
    let x_upper = x_order.first(min(row, scalars.last_row));
    let x_lower = x_order.first(min(row + 8, scalars.last_row));
    // 128 columns share a scale.
    let w_left = w_order.first(item.column);
    let w_right = w_order.first(min(item.column + 128, scalars.last_column));
    matmul::clear_totals();
    for step in 0..scalars.steps {
        let mut upper = 1.0f32;
        let mut lower = 1.0f32;
        if tile.steps {
            let offset = x_order.offset(step);
            upper = x_scales[(x_upper + offset) as usize];
            lower = x_scales[(x_lower + offset) as usize];
        }
        barrier::wait(memory.full(place.stage), place.parity);
        #[unroll]
        for half in 0..2usize {
            let mut scale = 1.0f32;
            if tile.w_steps {
                let first = if comptime!(half == 0) {
                    w_left
                } else {
                    w_right
                };
                scale = w_scales[(first + w_order.offset(step)) as usize];
            }
            wgmma::fence();
            multiply(place.stage, 0u32, half, memory, tile);
            wgmma::commit();
            wgmma::wait(0u32);
            if comptime!(half == 1) {
                memory.release(place.stage, tile);
            }
            if comptime!(tile.steps) {
                matmul::scale_to_totals(upper * scale, lower * scale, half, tile.sums());
            } else {
                matmul::add_to_totals(half);
            }
        }
        place.advance();
    }
}

/// Sums of pairs of steps, added to totals in f32 while the other warpgroup multiplies.
///
/// The halves take turns in an order that needs no more stages: the second half of columns over steps
/// 0 and 1, the first over 1 and 2, the second over 2 and 3. Step 0 of the first half is a pair's rest.
#[cube]
fn sum_pairs(
    place: &mut Place,
    memory: Memory,
    scalars: MatmulScalars,
    #[comptime] tile: MatmulTile,
) {
    matmul::clear_totals();
    barrier::wait(memory.full(place.stage), place.parity);
    wgmma::fence();
    multiply(place.stage, 0u32, 0usize, memory, tile);
    wgmma::commit();
    wgmma::wait(0u32);
    matmul::add_to_totals(0usize);
    let mut left = scalars.steps;
    while left > 0 {
        left -= 1;
        sum_pair(place, left > 0, 1usize, memory, tile);
        if left > 0 {
            left -= 1;
            sum_pair(place, left > 0, 0usize, memory, tile);
        }
    }
}

/// Adds the `half`-th columns over this step, and the next if there is one, and finishes this one.
#[cube]
fn sum_pair(
    place: &mut Place,
    more: bool,
    #[comptime] half: usize,
    memory: Memory,
    #[comptime] tile: MatmulTile,
) {
    let stage = value::<u32>(place.stage);
    wgmma::fence();
    multiply(stage, 0u32, half, memory, tile);
    wgmma::commit();
    place.advance();
    if more {
        barrier::wait(memory.full(place.stage), place.parity);
        multiply(place.stage, 1u32, half, memory, tile);
        wgmma::commit();
        wgmma::wait(1u32);
    } else {
        wgmma::wait(0u32);
    }
    memory.release(stage, tile);
    wgmma::wait(0u32);
    matmul::add_to_totals(half);
}

/// The unit's upper row among those of the cube's tile; its lower one is 8 further.
#[cube]
pub(crate) fn unit_row() -> u32 {
    UNIT_POS / 32 * 16 + UNIT_POS % 32 / 4
}

/// Begins the product of a stage's rows of this warpgroup with its `half`-th columns.
#[cube]
fn multiply(
    stage: u32,
    add: u32,
    #[comptime] half: usize,
    memory: Memory,
    #[comptime] tile: MatmulTile,
) {
    let x = memory.x
        + stage * comptime!(tile.x_bytes() as u32)
        + UNIT_POS / 128 * comptime!((tile.x_bytes() / 2) as u32);
    let w = memory.w
        + stage * comptime!(tile.w_bytes() as u32)
        + comptime!((half * tile.w_bytes() * 128 / COLUMNS) as u32);
    matmul::multiply(
        wgmma::descriptor(x),
        wgmma::descriptor(w),
        add,
        comptime!(tile.sums()),
    );
}
