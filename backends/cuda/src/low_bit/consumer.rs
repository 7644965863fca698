//! A consumer: as in [`crate::forward`], with 8-bit products.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use cubesla_kernels::block_list::{BlockListView, Span, Walk, WalkExpand};

use super::config::LowBitConfig;
use super::epilogue::store;
use super::kernel::Scales;
use super::softmax::{softmax, write_weights};
use crate::forward::config::{Memory, Place};
use crate::forward::consumer::release;
use crate::forward::kernel::{ForwardScalars, Item};
use crate::forward::softmax::RowPair;
use crate::ptx::{barrier, low_bit, value, wgmma};

/// The loop over items: `S_t = Q K_t^T` and the product of the tile before with its values are in
/// flight together, and the softmax of the one runs beside the other.
#[cube]
pub(super) fn consume<F: Float>(
    out: &TensorMap<F, Tiled>,
    list: &BlockListView,
    scales: &Scales,
    lse: &mut [f32],
    memory: Memory,
    scalars: ForwardScalars,
    #[comptime] config: LowBitConfig,
) {
    let out = tensor_map_address(out);
    let mut consumer = Consumer {
        keys: Place::first(config.forward.tile.stages),
        values: Place::first(config.forward.tile.stages),
        query_parity: 0,
        config,
    };
    let mut index = CUBE_POS_X;
    while index < scalars.items {
        let item = Item::new(list, index, scalars, config.forward);
        let factors = Factors::new(scales, item, index, scalars, config);
        let mut rows = RowPair::new(item.first_query);
        consumer.attend(&mut rows, list, scales, item, factors, memory, scalars);
        let at = index / list.query_blocks;
        store(
            out, lse, scales, memory, item, at, &rows, factors, scalars, config,
        );
        index += CUBE_COUNT_X;
    }
}

/// Where an item's scales are.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Factors {
    /// Of the item's queries, with the scale of scores, for base-2 exponentials.
    pub queries: f32,
    /// Of the head's first block of keys.
    pub keys: u32,
    /// (batch, key head).
    pub kv_index: u32,
    #[cube(comptime)]
    block_k: usize,
}

#[cube]
impl Factors {
    fn new(
        scales: &Scales,
        item: Item,
        index: u32,
        scalars: ForwardScalars,
        #[comptime] config: LowBitConfig,
    ) -> Factors {
        let heads = scalars.heads / scalars.group;
        let kv_index = item.batch * heads + item.head / scalars.group;
        let block_k = comptime!(config.forward.block_k);
        Factors {
            queries: scalars.scale * std::f32::consts::LOG2_E * scales.queries[index as usize],
            keys: kv_index * scalars.key_len.div_ceil(comptime!(block_k as u32)),
            kv_index,
            block_k,
        }
    }

    /// What turns products of codes with `keys` into base-2 scores: positive, also where it would
    /// underflow, so that it leaves masked scores below all others.
    fn of(&self, scales: &Scales, keys: Span) -> f32 {
        let block = keys.first / comptime!(self.block_k as u32);
        self.queries * scales.keys[(self.keys + block) as usize] + 1.0e-37
    }
}

/// Where a warpgroup stands in what the producer loads.
#[derive(CubeType)]
struct Consumer {
    keys: Place,
    values: Place,
    query_parity: u32,
    #[cube(comptime)]
    config: LowBitConfig,
}

#[cube]
impl Consumer {
    /// Brings `O`, not yet divided by the rows' sums, into the accumulator.
    fn attend(
        &mut self,
        rows: &mut RowPair,
        list: &BlockListView,
        scales: &Scales,
        item: Item,
        factors: Factors,
        memory: Memory,
        scalars: ForwardScalars,
    ) {
        let config = comptime!(self.config);
        let tile = comptime!(config.forward.tile);
        let products = comptime!(config.products());
        barrier::wait(memory.query_full(), self.query_parity);
        self.query_parity ^= 1;
        let warp_rows = memory.queries + UNIT_POS / 32 * comptime!(16 * 128u32);
        low_bit::load_queries(warp_rows, tile.rows(), products);
        sync_plane();
        if UNIT_POS_PLANE == 0 {
            barrier::arrive(memory.query_empty());
        }
        low_bit::clear_accumulator(products);

        if item.tiles > 0 {
            let keys = item.walk.tile(list, 0);
            let factor = factors.of(scales, keys);
            barrier::wait(memory.key_full(self.keys.stage), self.keys.parity);
            wgmma::fence();
            begin_scores(memory, &self.keys, config);
            let next = item.walk.tile(list, min(1, item.tiles - 1));
            let mut next_first = next.first;
            let mut next_end = next.end;
            let mut next_factor = factors.of(scales, next);
            wgmma::wait(0u32);
            release(memory.key_empty(self.keys.stage));
            self.keys.advance();
            let weights = softmax(rows, keys, factor, scalars, config);
            write_weights(&weights, config);
            // Corrections that belong to the product in registers `par`: zeros to begin with.
            let mut upper = f32::new(0.0);
            let mut lower = f32::new(0.0);
            if config.fp8 {
                low_bit::clear_product(products);
            }

            for t in 1..item.tiles {
                let keys = Span {
                    first: value::<u32>(next_first),
                    end: value::<u32>(next_end),
                };
                let factor = value::<f32>(next_factor);
                barrier::wait(memory.key_full(self.keys.stage), self.keys.parity);
                wgmma::fence();
                begin_scores(memory, &self.keys, config);
                if config.fp8 {
                    // Beside the product that was begun, as is the look ahead below.
                    low_bit::promote(upper, lower, products);
                    upper = value::<f32>(rows.upper.correction);
                    lower = value::<f32>(rows.lower.correction);
                }
                barrier::wait(memory.value_full(self.values.stage), self.values.parity);
                wgmma::fence();
                begin_values(memory, &self.values, config);
                let next = item.walk.tile(list, min(t + 1, item.tiles - 1));
                next_first = next.first;
                next_end = next.end;
                next_factor = factors.of(scales, next);
                wgmma::wait(1u32);
                release(memory.key_empty(self.keys.stage));
                self.keys.advance();

                let weights = softmax(rows, keys, factor, scalars, config);
                wgmma::compute_before(rows.upper.sum + rows.lower.sum);
                wgmma::wait(0u32);
                release(memory.value_empty(self.values.stage));
                self.values.advance();
                if comptime!(!config.fp8) {
                    if plane_any(rows.upper.correction != 1.0 || rows.lower.correction != 1.0) {
                        low_bit::scale_accumulator(
                            rows.upper.correction,
                            rows.lower.correction,
                            products,
                        );
                    }
                }
                write_weights(&weights, config);
            }

            if config.fp8 {
                low_bit::promote(upper, lower, products);
            }
            barrier::wait(memory.value_full(self.values.stage), self.values.parity);
            wgmma::fence();
            begin_values(memory, &self.values, config);
            wgmma::wait(0u32);
            release(memory.value_empty(self.values.stage));
            self.values.advance();
            if config.fp8 {
                low_bit::promote(rows.upper.correction, rows.lower.correction, products);
            }
        }
    }
}

/// Begins `S = Q K^T` with the keys at `place`.
#[cube]
fn begin_scores(memory: Memory, place: &Place, #[comptime] config: LowBitConfig) {
    let at = memory.keys + place.stage * comptime!(config.forward.tile.key_bytes() as u32);
    low_bit::scores(wgmma::descriptor(at), comptime!(config.products()));
    wgmma::commit();
}

/// Begins `P V`, or `O += P V` in 16 bits, with the values at `place`.
#[cube]
fn begin_values(memory: Memory, place: &Place, #[comptime] config: LowBitConfig) {
    let keys = comptime!(config.forward.tile.keys);
    let at = memory.values + place.stage * comptime!(config.value_bytes() as u32);
    if comptime!(config.fp8) {
        let values = low_bit::descriptor_values(at, keys);
        low_bit::multiply_values(values, comptime!(config.products()));
    } else {
        let values = wgmma::descriptor_transposed(at, keys);
        low_bit::accumulate(values, comptime!(config.products()));
    }
    wgmma::commit();
}
