//! A consumer: as in [`crate::forward`], with 8-bit products.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use cubesla_kernels::block_list::{BlockListView, KeyTile};

use super::config::LowBitConfig;
use super::epilogue::store;
use super::kernel::Scales;
use super::softmax::{read_scores, softmax, write_weights};
use crate::forward::config::{Memory, Place};
use crate::forward::consumer::release;
use crate::forward::kernel::{ForwardScalars, Item};
use crate::forward::softmax::RowPair;
use crate::ptx::{barrier, low_bit, value, wgmma};

/// The loop over items. Beside the softmax of a tile, the scores of the next one and the product of the
/// one before with its values are in flight: 8-bit products are short, and waiting for them would
/// cost more than they do.
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
    fn of(&self, scales: &Scales, keys: KeyTile) -> f32 {
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
            self.begin_scores(memory);
            wgmma::wait(0u32);
            self.release_keys(memory);
            let mut scores = read_scores(config);
            let last = item.tiles - 1;
            if last == 0 {
                let weights = softmax(rows, &mut scores, keys, factor, scalars, config);
                write_weights(&weights, config);
            } else {
                if comptime!(config.ahead()) {
                    self.begin_scores(memory);
                }
                let weights = softmax(rows, &mut scores, keys, factor, scalars, config);
                wgmma::compute_before(rows.upper.sum + rows.lower.sum);
                self.finish_scores(memory);
                write_weights(&weights, config);
                for t in 1..last {
                    let keys = item.walk.tile(list, t);
                    let factor = factors.of(scales, keys);
                    self.begin_values(memory);
                    let mut scores = read_scores(config);
                    if comptime!(config.ahead()) {
                        self.begin_scores(memory);
                    }
                    self.finish_tile(rows, &mut scores, keys, factor, memory, scalars);
                    self.finish_scores(memory);
                }
                let keys = item.walk.tile(list, last);
                let factor = factors.of(scales, keys);
                self.begin_values(memory);
                let mut scores = read_scores(config);
                self.finish_tile(rows, &mut scores, keys, factor, memory, scalars);
            }

            self.begin_values(memory);
            wgmma::wait(0u32);
            self.release_values(memory);
            if config.fp8 {
                low_bit::promote(rows.upper.correction, rows.lower.correction, products);
            }
        }
    }

    /// Turns a tile's scores into the next weights, beside the products in flight, which are finished
    /// when it returns.
    fn finish_tile(
        &mut self,
        rows: &mut RowPair,
        scores: &mut Array<f32>,
        keys: KeyTile,
        factor: f32,
        memory: Memory,
        scalars: ForwardScalars,
    ) {
        let config = comptime!(self.config);
        let products = comptime!(config.products());
        // The product with values is relative to the maximum before this tile's.
        let upper = value::<f32>(rows.upper.correction);
        let lower = value::<f32>(rows.lower.correction);
        let weights = softmax(rows, scores, keys, factor, scalars, config);
        wgmma::compute_before(rows.upper.sum + rows.lower.sum);
        wgmma::wait(0u32);
        self.release_values(memory);
        if comptime!(config.fp8) {
            low_bit::promote(upper, lower, products);
        } else if plane_any(rows.upper.correction != 1.0 || rows.lower.correction != 1.0) {
            low_bit::scale_accumulator(rows.upper.correction, rows.lower.correction, products);
        }
        write_weights(&weights, config);
    }

    /// Begins `S = Q K^T` with the next keys.
    fn begin_scores(&self, memory: Memory) {
        let config = comptime!(self.config);
        barrier::wait(memory.key_full(self.keys.stage), self.keys.parity);
        let key_bytes = comptime!(config.forward.tile.key_bytes() as u32);
        let at = memory.keys + self.keys.stage * key_bytes;
        wgmma::fence();
        low_bit::scores(wgmma::descriptor(at), comptime!(config.products()));
        wgmma::commit();
    }

    /// Waits for the next scores, which are begun here where they could not be before.
    fn finish_scores(&mut self, memory: Memory) {
        if comptime!(!self.config.ahead()) {
            self.begin_scores(memory);
        }
        wgmma::wait(0u32);
        self.release_keys(memory);
    }

    /// Begins `P V`, or `O += P V` in 16 bits, with the next values.
    fn begin_values(&self, memory: Memory) {
        let config = comptime!(self.config);
        let keys = comptime!(config.forward.tile.keys);
        barrier::wait(memory.value_full(self.values.stage), self.values.parity);
        let value_bytes = comptime!(config.value_bytes() as u32);
        let at = memory.values + self.values.stage * value_bytes;
        wgmma::fence();
        if comptime!(config.fp8) {
            let values = low_bit::descriptor_values(at, keys);
            low_bit::multiply_values(values, comptime!(config.products()));
        } else {
            let values = wgmma::descriptor_transposed(at, keys);
            low_bit::accumulate(values, comptime!(config.products()));
        }
        wgmma::commit();
    }

    /// Hands the keys that were multiplied back to the producer.
    fn release_keys(&mut self, memory: Memory) {
        release(memory.key_empty(self.keys.stage));
        self.keys.advance();
    }

    /// Hands the values that were multiplied back to the producer.
    fn release_values(&mut self, memory: Memory) {
        release(memory.value_empty(self.values.stage));
        self.values.advance();
    }
}
