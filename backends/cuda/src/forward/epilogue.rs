//! What happens to an item's rows when its keys are done.

use cubecl::prelude::*;

use super::config::Memory;
use super::kernel::{ForwardConfig, ForwardScalars, Item};
use super::softmax::{Row, RowPair, quad_sum, upper_query};
use crate::ptx::tma::L2;
use crate::ptx::{barrier, math, tma, wgmma};

/// Normalises the accumulator, and stores it and the log-sum-exp.
#[cube]
pub(crate) fn store(
    out: u64,
    lse: &mut [f32],
    memory: Memory,
    item: Item,
    rows: &RowPair,
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
) {
    let upper_sum = quad_sum(rows.upper.sum);
    let lower_sum = quad_sum(rows.lower.sum);
    let staging = begin_staging(memory, config);
    stage_accumulator(staging, inverse(upper_sum), inverse(lower_sum), config);
    store_staged(out, staging, item, config);
    store_lse(lse, item, rows, upper_sum, lower_sum, scalars);
}

/// The warpgroup's staging tile, free to be written.
#[cube]
pub(crate) fn begin_staging(memory: Memory, #[comptime] config: ForwardConfig) -> u32 {
    let warpgroup = UNIT_POS / 128;
    if UNIT_POS % 128 == 0 {
        tma::wait_stores_read();
    }
    // Named barrier 0 is the whole cube's.
    barrier::sync_named(warpgroup + 1, 128u32);
    let own = warpgroup % comptime!(config.tile.consumers as u32);
    memory.out + own * comptime!(config.tile.out_bytes() as u32)
}

/// Stores the staging tile with bulk copies that run on while the warpgroup turns to other things.
#[cube]
pub(crate) fn store_staged(out: u64, staging: u32, item: Item, #[comptime] config: ForwardConfig) {
    let warpgroup = UNIT_POS / 128;
    tma::fence_writes();
    barrier::sync_named(warpgroup + 1, 128u32);
    if UNIT_POS % 128 == 0 {
        #[unroll]
        for box_index in 0..comptime!(config.tile.value_dim.div_ceil(64)) {
            tma::store(
                staging + comptime!(box_index as u32 * 64 * 128),
                out,
                comptime!(box_index as u32 * 64),
                item.first_query + warpgroup % comptime!(config.tile.consumers as u32) * 64,
                item.head,
                item.batch,
                L2::EvictFirst,
            );
        }
        tma::commit_stores();
    }
}

/// Lets the last stores read their shared memory, which is another cube's when this one has ended.
#[cube]
pub(crate) fn end_stores() {
    if UNIT_POS % 128 == 0 {
        tma::wait_stores_read();
    }
}

/// Stores the log-sum-exp of the unit's rows.
#[cube]
pub(crate) fn store_lse(
    lse: &mut [f32],
    item: Item,
    rows: &RowPair,
    upper_sum: f32,
    lower_sum: f32,
    scalars: ForwardScalars,
) {
    if UNIT_POS % 4 == 0 {
        let head_index = (item.batch * scalars.heads + item.head) as usize;
        let first = head_index * scalars.query_len as usize;
        let query = upper_query(item.first_query);
        store_row_lse(lse, first, query, &rows.upper, upper_sum, scalars);
        store_row_lse(lse, first, query + 8, &rows.lower, lower_sum, scalars);
    }
}

/// `ln(sum)` plus the maximum, which is `-inf` for a row that saw no key.
#[cube]
fn store_row_lse(
    lse: &mut [f32],
    first: usize,
    query: u32,
    row: &Row,
    sum: f32,
    scalars: ForwardScalars,
) {
    if query < scalars.query_len {
        lse[first + query as usize] = (row.max + math::log2(sum)) * std::f32::consts::LN_2;
    }
}

/// 0 for a row that saw no key; NaN stays NaN.
#[cube]
pub(crate) fn inverse(sum: f32) -> f32 {
    select(sum == 0.0, 0.0f32, math::reciprocal(sum))
}

/// Writes the accumulator, scaled and rounded, to the warpgroup's staging tile.
#[cube]
pub(crate) fn stage_accumulator(
    to: u32,
    upper: f32,
    lower: f32,
    #[comptime] config: ForwardConfig,
) {
    let products = comptime!(config.tile.products());
    let unit = wgmma::here(UNIT_POS);
    #[unroll]
    for group in 0..comptime!(products.value_dim / 16) {
        let values = wgmma::read_accumulator(group);
        let mut words = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            let factor = if comptime!(i % 2 == 0) { upper } else { lower };
            let low = values.extract(comptime!(2 * i)) * factor;
            let high = values.extract(comptime!(2 * i + 1)) * factor;
            words.insert(i, math::pack(low, high, comptime!(products.format())));
        }
        stage_group(to, unit, words, group);
    }
}

/// Writes columns `16 group..16 group + 16` of the rows of `unit`, this one, to the staging tile.
#[cube]
pub(crate) fn stage_group(
    to: u32,
    unit: u32,
    words: Vector<u32, Const<4>>,
    #[comptime] group: usize,
) {
    math::store_matrices(group_address(to, unit, group), words);
}

/// Brings a tile of 64 rows, as the staging tile is, into the accumulator.
#[cube]
pub(crate) fn load_accumulator(from: u32, #[comptime] config: ForwardConfig) {
    let products = comptime!(config.tile.products());
    let unit = wgmma::here(UNIT_POS);
    #[unroll]
    for group in 0..comptime!(products.value_dim / 16) {
        let words = math::load_matrices(group_address(from, unit, group));
        let mut values = Vector::<f32, Const<8>>::empty();
        #[unroll]
        for i in 0..4usize {
            let pair = math::unpack(words.extract(i), comptime!(products.format()));
            values.insert(comptime!(2 * i), pair.extract(0usize));
            values.insert(comptime!(2 * i + 1), pair.extract(1usize));
        }
        wgmma::write_accumulator(values, group);
    }
}

/// Where a unit's row of columns `16 group..16 group + 16` lies in a tile of 64 rows.
#[cube]
fn group_address(tile: u32, unit: u32, #[comptime] group: usize) -> u32 {
    let lane = unit % 32;
    let row = unit % 128 / 32 * 16 + lane % 16;
    let chunk = comptime!((group % 4 * 2) as u32) + lane / 16;
    let box_start = comptime!((group / 4 * 64 * 128) as u32);
    tile + box_start + row * 128 + (chunk ^ (row % 8)) * 16
}
