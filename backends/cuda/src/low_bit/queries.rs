//! Queries to 8 bits, in shared memory: they are never written to the device's.
//!
//! Idle warps of the producer's warpgroup load an item's queries while the item before it is computed, find
//! their scale, and multiply them by the mean key; consumers convert what they take.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use cubesla_kernels::block_list::BlockListView;
use cubesla_kernels::quantize::{reciprocal_of_scale, scale_of};

use super::config::LowBitConfig;
use super::rows::{bound, codes};
use super::scratch::Scratch;
use crate::forward::config::{Memory, next_note};
use crate::forward::kernel::ForwardScalars;
use crate::forward::producer::Source;
use crate::ptx::low_bit::clamp_magnitude;
use crate::ptx::{barrier, low_bit, math, tma, wgmma};

/// The loop over items of the warp that loads queries and finds their scales. It also brings the mean keys
/// of their heads to shared memory.
#[cube]
pub(super) fn produce_queries<F: Float>(
    q: &TensorMap<F, Tiled>,
    list: &BlockListView,
    mean: &[f32],
    memory: Memory,
    scratch: Scratch,
    scalars: ForwardScalars,
    #[comptime] config: LowBitConfig,
) {
    let q = tensor_map_address(q);
    let mut parity = 0u32;
    let mut index = CUBE_POS_X;
    while index < scalars.items {
        let rows = comptime!(config.forward.tile.rows());
        let first_query = index % list.query_blocks * comptime!(rows as u32);
        let head_index = index / list.query_blocks;
        let full = memory.query_full(0u32);
        // The phase before a barrier's first counts as complete, so the first wait passes.
        barrier::wait_long(memory.query_empty(0u32), parity ^ 1);
        if UNIT_POS % 32 == 0 {
            let source = Source {
                head: head_index % scalars.heads,
                batch: head_index / scalars.heads,
            };
            let (to, width) = (memory.queries, comptime!(config.head_dim()));
            source.load(to, q, full, first_query, rows, width);
        }
        // Query heads of all batches come in groups too.
        copy_mean(mean, head_index / scalars.group, scratch, config);
        sync_plane();
        if UNIT_POS % 32 == 0 {
            // Last, so that who waits for queries finds the mean key too.
            barrier::arrive_expect(full, comptime!(config.query_bytes() as u32));
        }
        barrier::wait_long(full, parity);
        parity ^= 1;

        let infinity = comptime!(config.infinity());
        let mut largest = plane_max(largest_half(memory.queries, false, config));
        let infinite = largest == infinity;
        if infinite {
            // Infinities saturate at the largest of the others.
            largest = plane_max(largest_half(memory.queries, true, config));
        }
        let format = comptime!(config.products_format());
        let largest = math::widen(largest, format).extract(0usize);
        let scale = scale_of(u32::reinterpret(largest), comptime!(config.scores()));
        if UNIT_POS % 32 == 0 {
            scratch.write_scale(scale, reciprocal_of_scale(scale), infinite);
            barrier::arrive(memory.measured());
        }
        index += CUBE_COUNT_X;
    }
}

/// Columns past the width are zeros, as those of queries are.
#[cube]
fn copy_mean(mean: &[f32], head: u32, scratch: Scratch, #[comptime] config: LowBitConfig) {
    let width = comptime!(config.head_dim() as u32);
    let mut column = UNIT_POS % 32;
    while column < comptime!(config.boxed_dim() as u32) {
        let mut value = f32::new(0.0);
        if column < width {
            value = mean[(head * width + column) as usize];
        }
        math::store_word(scratch.mean(column), u32::reinterpret(value));
        column = wgmma::here(column + 32);
    }
}

/// The largest magnitude of a unit's share of the queries, as the bits of a 16-bit number.
#[cube]
fn largest_half(queries: u32, #[comptime] finite: bool, #[comptime] config: LowBitConfig) -> u32 {
    let infinity = comptime!(config.infinity());
    let mut largest = 0u32;
    let mut other = 0u32;
    let mut at = queries + UNIT_POS % 32 * 16;
    let end = at + comptime!(config.query_bytes() as u32);
    while at < end {
        let words = math::load_chunk(at);
        let more = math::load_chunk(at + 512);
        #[unroll]
        for i in 0..4usize {
            let (mut word, mut another) = (words.extract(i), more.extract(i));
            if finite {
                word = low_bit::without_halves(word, infinity);
                another = low_bit::without_halves(another, infinity);
            }
            largest = low_bit::max_halves(largest, word);
            other = low_bit::max_halves(other, another);
        }
        // Not unrolled further: there are 40 registers.
        at = wgmma::here(at + 1024);
    }
    let largest = low_bit::max_halves(largest, other);
    max(largest & 0xFFFF, largest >> 16)
}

/// The loop over items of a warp that finds what smoothing takes from every score of 64 rows, not yet scaled.
#[cube]
pub(super) fn produce_shifts(
    warpgroup: u32,
    memory: Memory,
    scratch: Scratch,
    scalars: ForwardScalars,
    #[comptime] config: LowBitConfig,
) {
    let row = warpgroup * 64 + UNIT_POS % 32;
    let mut parity = 0u32;
    let mut note = 0u32;
    let mut index = CUBE_POS_X;
    while index < scalars.items {
        barrier::wait_long(memory.query_full(0u32), parity);
        parity ^= 1;
        let mut upper = f32::new(0.0);
        let mut lower = f32::new(0.0);
        let mut column = 0u32;
        while column < comptime!(config.boxed_dim() as u32) {
            // Four columns of two rows, 32 apart.
            let box_rows = column / 64 * comptime!(config.forward.tile.rows() as u32) + row;
            let chunk = (column / 8 % 8) ^ (row % 8);
            let at = memory.queries + box_rows * 128 + chunk * 16 + column % 8 * 2;
            let mean = math::load_chunk(scratch.mean(column));
            upper = add_products(upper, math::load_pair(at), mean, config);
            lower = add_products(
                lower,
                math::load_pair(at + comptime!(32 * 128u32)),
                mean,
                config,
            );
            column = wgmma::here(column + 4);
        }
        scratch.write_shift(note, row, upper);
        scratch.write_shift(note, row + 32, lower);
        note = next_note(note);
        sync_plane();
        if UNIT_POS % 32 == 0 {
            barrier::arrive(memory.query_empty(0u32));
        }
        index += CUBE_COUNT_X;
    }
}

/// `sum` and the products of four 16-bit numbers and four f32.
#[cube]
fn add_products(
    sum: f32,
    halves: Vector<u32, Const<2>>,
    mean: Vector<u32, Const<4>>,
    #[comptime] config: LowBitConfig,
) -> f32 {
    let mut sum = sum;
    #[unroll]
    for word in 0..2usize {
        let pair = math::widen(halves.extract(word), comptime!(config.products_format()));
        #[unroll]
        for e in 0..2usize {
            let mean = f32::reinterpret(mean.extract(comptime!(2 * word + e)));
            sum = fma(pair.extract(e), mean, sum);
        }
    }
    sum
}

/// Brings the unit's share of its warpgroup's queries in 8 bits to their tile, where products read them, and
/// returns their scale.
#[cube]
pub(super) fn take_queries(
    memory: Memory,
    scratch: Scratch,
    #[comptime] config: LowBitConfig,
) -> f32 {
    let warp_rows = memory.queries + UNIT_POS / 32 * comptime!(16 * 128u32);
    let codes_tile = memory.queries
        + comptime!(config.query_bytes() as u32)
        + UNIT_POS / 32 * comptime!(16 * 128u32);
    let words = scratch.read_scale();
    let scale = f32::reinterpret(words.extract(0usize));
    let reciprocal = f32::reinterpret(words.extract(1usize));
    if words.extract(2usize) == 0 {
        convert(warp_rows, codes_tile, scale, reciprocal, false, config);
    } else {
        convert(warp_rows, codes_tile, scale, reciprocal, true, config);
    }
    tma::fence_writes();
    // Numbered as the warpgroup's staging tile is.
    barrier::sync_named(UNIT_POS / 128 + 1, 128u32);
    scale
}

#[cube]
fn convert(
    warp_rows: u32,
    codes_tile: u32,
    scale: f32,
    reciprocal: f32,
    #[comptime] infinite: bool,
    #[comptime] config: LowBitConfig,
) {
    let lane = UNIT_POS % 32;
    let (row, quarter) = (lane / 4, lane % 4);
    let base = warp_rows + row * 128 + quarter % 2 * 8;
    let first = wgmma::here((quarter / 2) ^ row);
    let tile = codes_tile + row * 128 + quarter * 4;
    let own = wgmma::here(row);
    let bound = bound(scale, config.scores());
    #[unroll]
    for group in 0..comptime!(config.products().head_dim / 32) {
        #[unroll]
        for i in 0..4usize {
            // Four columns, of the upper and of the lower row, then 16 columns further.
            let half = comptime!((group % 2 * 2 + i / 2) as u32);
            let rows = comptime!((group / 2 * config.forward.tile.rows() + i % 2 * 8) as u32);
            let at = base + comptime!(rows * 128) + (first ^ comptime!(half * 2)) * 16;
            let words = math::load_pair(at);
            let mut values = Array::<f32>::new(4usize);
            #[unroll]
            for word in 0..2usize {
                let pair = math::widen(words.extract(word), config.products_format());
                #[unroll]
                for e in 0..2usize {
                    let value = pair.extract(e);
                    values[comptime!(2 * word + e)] = if infinite {
                        clamp_magnitude(value, bound)
                    } else {
                        value
                    };
                }
            }
            let word = codes(&values, 0usize, reciprocal, true, config.scores());
            let chunk = comptime!((2 * group + i / 2) as u32);
            let to = tile + comptime!((i % 2 * 8 * 128) as u32) + (own ^ chunk) * 16;
            math::store_word(to, word);
        }
    }
}
