//! Queries to 8 bits, in registers: they are never written to memory.
//!
//! An idle warp of the producer's warpgroup loads an item's queries while the item before it is computed, and
//! finds their scale; consumers convert what they take, and multiply it by the mean key.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use cubesla_kernels::block_list::BlockListView;
use cubesla_kernels::quantize::{reciprocal_of_scale, scale_of};

use super::config::LowBitConfig;
use super::rows::{bound, codes};
use super::scratch::Scratch;
use crate::forward::config::Memory;
use crate::forward::kernel::ForwardScalars;
use crate::forward::producer::Source;
use crate::forward::softmax::quad_sum;
use crate::ptx::low_bit::clamp_magnitude;
use crate::ptx::tma::L2;
use crate::ptx::{barrier, low_bit, math, wgmma};

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
    let leads = math::elected();
    let mut parity = 0u32;
    let mut index = CUBE_POS_X;
    while index < scalars.items {
        let rows = comptime!(config.forward.tile.rows());
        let first_query = index % list.query_blocks * comptime!(rows as u32);
        let head_index = index / list.query_blocks;
        let full = memory.query_full(0u32);
        // The phase before a barrier's first counts as complete, so the first wait passes.
        barrier::wait_long(memory.query_empty(0u32), parity ^ 1);
        if leads {
            let source = Source {
                head: head_index % scalars.heads,
                batch: head_index / scalars.heads,
            };
            let (to, width) = (memory.queries, comptime!(config.head_dim()));
            // No other item reads them: the L2 cache is left to keys and values.
            source.load_through(to, q, full, first_query, rows, width, L2::EvictFirst);
        }
        // Query heads of all batches come in groups too.
        copy_mean(mean, head_index / scalars.group, scratch, config);
        sync_plane();
        if leads {
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
        if leads {
            scratch.write_scale(scale, reciprocal_of_scale(scale), infinite);
            barrier::arrive(memory.measured());
        }
        index += scalars.stride;
    }
}

/// Brings the mean key to shared memory. Columns past the width are zeros, as those of queries are.
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
        // Not unrolled further: there are 24 registers.
        at = wgmma::here(at + 1024);
    }
    let largest = low_bit::max_halves(largest, other);
    max(largest & 0xFFFF, largest >> 16)
}

/// Brings the unit's share of its warpgroup's queries in 8 bits to its registers, and returns their scale. What
/// smoothing takes from scores of their rows, not yet scaled, is written to the item's `note`.
#[cube]
pub(super) fn take_queries(
    memory: Memory,
    scratch: Scratch,
    note: u32,
    #[comptime] config: LowBitConfig,
) -> f32 {
    let warp_rows = memory.queries + UNIT_POS / 32 * comptime!(16 * 128u32);
    let words = scratch.read_scale();
    let scale = f32::reinterpret(words.extract(0usize));
    let reciprocal = f32::reinterpret(words.extract(1usize));
    if words.extract(2usize) == 0 {
        convert(warp_rows, scale, reciprocal, scratch, note, false, config);
    } else {
        convert(warp_rows, scale, reciprocal, scratch, note, true, config);
    }
    scale
}

#[cube]
fn convert(
    warp_rows: u32,
    scale: f32,
    reciprocal: f32,
    scratch: Scratch,
    note: u32,
    #[comptime] infinite: bool,
    #[comptime] config: LowBitConfig,
) {
    let lane = UNIT_POS % 32;
    let (row, quarter) = (lane / 4, lane % 4);
    let base = warp_rows + row * 128 + quarter % 2 * 8;
    let first = wgmma::here((quarter / 2) ^ row);
    let bound = bound(scale, config.scores());
    let mut upper = f32::new(0.0);
    let mut lower = f32::new(0.0);
    #[unroll]
    for group in 0..comptime!(config.products().head_dim / 32) {
        let mut made = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            // Four columns, of the upper and of the lower row, then 16 columns further.
            let half = comptime!((group % 2 * 2 + i / 2) as u32);
            let rows = comptime!((group / 2 * config.forward.tile.rows() + i % 2 * 8) as u32);
            let at = base + comptime!(rows * 128) + (first ^ comptime!(half * 2)) * 16;
            let words = math::load_pair(at);
            let column = comptime!((32 * group + i / 2 * 16) as u32) + quarter * 4;
            let mean = math::load_chunk(scratch.mean(column));
            let mut values = Array::<f32>::new(4usize);
            let mut shift = if comptime!(i % 2 == 0) { upper } else { lower };
            #[unroll]
            for word in 0..2usize {
                let pair = math::widen(words.extract(word), config.products_format());
                #[unroll]
                for e in 0..2usize {
                    let value = pair.extract(e);
                    let mean = f32::reinterpret(mean.extract(comptime!(2 * word + e)));
                    shift = fma(value, mean, shift);
                    values[comptime!(2 * word + e)] = if infinite {
                        clamp_magnitude(value, bound)
                    } else {
                        value
                    };
                }
            }
            if comptime!(i % 2 == 0) {
                upper = shift;
            } else {
                lower = shift;
            }
            made.insert(i, codes(&values, 0usize, reciprocal, true, config.scores()));
        }
        low_bit::write_queries(made, group);
    }
    let upper = quad_sum(upper);
    let lower = quad_sum(lower);
    if quarter == 0 {
        let row = UNIT_POS / 32 * 16 + row;
        scratch.write_shift(note, row, upper);
        scratch.write_shift(note, row + 8, lower);
    }
}
