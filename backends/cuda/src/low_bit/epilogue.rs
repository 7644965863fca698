//! What happens to an item's rows when its keys are done.

use cubecl::prelude::*;

use super::config::LowBitConfig;
use super::kernel::Scales;
use super::scratch::Scratch;
use super::softmax::FP8_SHIFT;
use crate::forward::config::Memory;
use crate::forward::epilogue::{begin_staging, inverse, stage_group, store_staged};
use crate::forward::kernel::{ForwardScalars, Item};
use crate::forward::softmax::{Row, RowPair, quad_sum, upper_query};
use crate::ptx::{math, wgmma};

/// Normalises the accumulator, and stores it and the log-sum-exp.
#[cube]
pub(super) fn store(
    out: u64,
    lse: &mut [f32],
    scales: &Scales,
    scratch: Scratch,
    note: u32,
    memory: Memory,
    item: Item,
    rows: &RowPair,
    scalars: ForwardScalars,
    #[comptime] config: LowBitConfig,
) {
    let head_index = (item.batch * scalars.heads + item.head) as usize;
    let first_row = head_index * scalars.query_len as usize;
    let query = upper_query(item.first_query);
    let upper_sum = quad_sum(rows.upper.sum);
    let lower_sum = quad_sum(rows.lower.sum);
    let staging = begin_staging(memory, config.forward);
    let kv_index = item.batch * (scalars.heads / scalars.group) + item.head / scalars.group;
    let first_scale = kv_index * comptime!(config.forward.tile.value_dim as u32);
    stage_accumulator(
        staging,
        inverse(upper_sum),
        inverse(lower_sum),
        scales,
        first_scale,
        config,
    );
    store_staged(out, staging, item, config.forward);
    if UNIT_POS % 4 == 0 {
        let at = first_row + query as usize;
        let upper_exists = query < scalars.query_len;
        let lower_exists = query + 8 < scalars.query_len;
        let row = query - item.first_query;
        let upper_shift = scalars.scale * scratch.read_shift(note, row);
        let lower_shift = scalars.scale * scratch.read_shift(note, row + 8);
        store_row_lse(
            lse,
            at,
            upper_exists,
            &rows.upper,
            upper_sum,
            upper_shift,
            config,
        );
        store_row_lse(
            lse,
            at + 8,
            lower_exists,
            &rows.lower,
            lower_sum,
            lower_shift,
            config,
        );
    }
}

/// Of the scores before smoothing, which took `shift` from them; `-inf` for a row that saw no key.
#[cube]
fn store_row_lse(
    lse: &mut [f32],
    at: usize,
    exists: bool,
    row: &Row,
    sum: f32,
    shift: f32,
    #[comptime] config: LowBitConfig,
) {
    if exists {
        let top = comptime!(if config.fp8 { FP8_SHIFT } else { 0.0 });
        let smoothed = (row.max - top + math::log2(sum)) * std::f32::consts::LN_2;
        lse[at] = smoothed + shift;
    }
}

/// Writes the accumulator, scaled and rounded, to the warpgroup's staging tile.
#[cube]
fn stage_accumulator(
    to: u32,
    upper: f32,
    lower: f32,
    scales: &Scales,
    first_scale: u32,
    #[comptime] config: LowBitConfig,
) {
    let products = comptime!(config.forward.tile.products());
    let unit = wgmma::here(UNIT_POS);
    #[unroll]
    for group in 0..comptime!(products.value_dim / 16) {
        let values = wgmma::read_accumulator(group);
        let mut words = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            let row = if comptime!(i % 2 == 0) { upper } else { lower };
            let mut low = values.extract(comptime!(2 * i)) * row;
            let mut high = values.extract(comptime!(2 * i + 1)) * row;
            if comptime!(config.fp8) {
                let column = comptime!((16 * group + i / 2 * 8) as u32) + UNIT_POS % 4 * 2;
                // Columns past the width are not stored.
                let last = comptime!(config.forward.tile.value_dim as u32 - 2);
                let at = (first_scale + min(column, last)) as usize;
                low *= scales.values[at];
                high *= scales.values[at + 1];
            }
            words.insert(i, math::pack(low, high, comptime!(products.format())));
        }
        stage_group(to, unit, words, group);
    }
}
