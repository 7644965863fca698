//! A consumer: a warpgroup that computes 64 rows of each of its cube's query blocks.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use cubesla_kernels::block_list::BlockListView;

use super::config::{Memory, Place};
use super::epilogue::{load_accumulator, store};
use super::kernel::{ForwardConfig, ForwardScalars, Item};
use super::softmax::{RowPair, softmax};
use crate::ptx::{barrier, wgmma};

/// The loop over items. In each, `S_t = Q K_t^T` and `O += P_{t-1} V_{t-1}` are in flight together;
/// the softmax that turns `S_t` into `P_t` runs while the second is still being multiplied.
#[cube]
pub(crate) fn consume<F: Float>(
    out: &TensorMap<F, Tiled>,
    list: &BlockListView,
    lse: &mut [f32],
    memory: Memory,
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
) {
    let out = tensor_map_address(out);
    let mut consumer = Consumer::new(config);
    let mut index = CUBE_POS_X;
    while index < scalars.items {
        let item = Item::new(list, index, scalars, config);
        let mut rows = RowPair::new(item.first_query);
        consumer.attend(&mut rows, list, item, memory, scalars);
        store(out, lse, memory, item, &rows, scalars, config);
        index += CUBE_COUNT_X;
    }
}

/// Where a warpgroup stands in what the producer loads.
#[derive(CubeType)]
pub(crate) struct Consumer {
    keys: Place,
    values: Place,
    query_parity: u32,
    #[cube(comptime)]
    config: ForwardConfig,
}

#[cube]
impl Consumer {
    pub fn new(#[comptime] config: ForwardConfig) -> Consumer {
        Consumer {
            keys: Place::first(config.tile.stages),
            values: Place::first(config.tile.stages),
            query_parity: 0,
            config,
        }
    }

    /// Brings `O`, not yet divided by the rows' sums, into the accumulator, and leaves the queries in
    /// their registers.
    pub fn attend(
        &mut self,
        rows: &mut RowPair,
        list: &BlockListView,
        item: Item,
        memory: Memory,
        scalars: ForwardScalars,
    ) {
        let config = comptime!(self.config);
        let tile = comptime!(config.tile);
        let products = comptime!(tile.products());
        self.take_queries(memory);

        if item.tiles > 0 {
            barrier::wait(memory.key_full(self.keys.stage), self.keys.parity);
            wgmma::fence();
            begin_scores(memory, &self.keys, config);
            wgmma::wait(0u32);
            release(memory.key_empty(self.keys.stage));
            self.keys.advance();
            let weights = softmax(rows, item.walk.tile(list, 0), scalars, config);
            write_weights(&weights, tile.keys);
            wgmma::clear_accumulator(products);

            for t in 1..item.tiles {
                barrier::wait(memory.key_full(self.keys.stage), self.keys.parity);
                wgmma::fence();
                begin_scores(memory, &self.keys, config);
                barrier::wait(memory.value_full(self.values.stage), self.values.parity);
                wgmma::fence();
                begin_accumulate(memory, &self.values, config);
                wgmma::wait(1u32);
                release(memory.key_empty(self.keys.stage));
                self.keys.advance();

                let weights = softmax(rows, item.walk.tile(list, t), scalars, config);
                wgmma::compute_before(rows.upper.sum + rows.lower.sum);
                wgmma::wait(0u32);
                release(memory.value_empty(self.values.stage));
                self.values.advance();
                // Most tiles leave the maximum in use as it is: see `softmax`.
                if plane_any(rows.upper.correction != 1.0 || rows.lower.correction != 1.0) {
                    wgmma::scale_accumulator(
                        rows.upper.correction,
                        rows.lower.correction,
                        products,
                    );
                }
                write_weights(&weights, tile.keys);
            }

            barrier::wait(memory.value_full(self.values.stage), self.values.parity);
            wgmma::fence();
            begin_accumulate(memory, &self.values, config);
            wgmma::wait(0u32);
            release(memory.value_empty(self.values.stage));
            self.values.advance();
        } else {
            wgmma::clear_accumulator(products);
        }
    }
}

#[cube]
impl Consumer {
    /// Brings an item's queries into their registers.
    pub fn take_queries(&mut self, memory: Memory) {
        let tile = comptime!(self.config.tile);
        barrier::wait(memory.query_full(), self.query_parity);
        self.query_parity ^= 1;
        let warp_rows = memory.queries + UNIT_POS / 32 * comptime!(16 * 128u32);
        wgmma::load_queries(warp_rows, tile.rows(), tile.products());
        sync_plane();
        if UNIT_POS_PLANE == 0 {
            barrier::arrive(memory.query_empty());
        }
    }

    /// Brings rows that come in the place of values, a tile to each warpgroup, into the accumulator.
    pub fn take_rows(&mut self, memory: Memory) {
        let config = comptime!(self.config);
        let warpgroup = UNIT_POS / 128;
        #[unroll]
        for owner in 0..comptime!(config.tile.consumers as u32) {
            barrier::wait(memory.value_full(self.values.stage), self.values.parity);
            if warpgroup == owner {
                let value_bytes = comptime!(config.tile.value_bytes() as u32);
                load_accumulator(memory.values + self.values.stage * value_bytes, config);
                barrier::sync_named(warpgroup + 1, 128u32);
            }
            release(memory.value_empty(self.values.stage));
            self.values.advance();
        }
    }
}

/// Begins `S = Q K^T` with the keys at `place`.
#[cube]
fn begin_scores(memory: Memory, place: &Place, #[comptime] config: ForwardConfig) {
    let at = memory.keys + place.stage * comptime!(config.tile.key_bytes() as u32);
    wgmma::scores(wgmma::descriptor(at), comptime!(config.tile.products()));
    wgmma::commit();
}

/// Begins `O += P V` with the values at `place`.
#[cube]
fn begin_accumulate(memory: Memory, place: &Place, #[comptime] config: ForwardConfig) {
    let at = memory.values + place.stage * comptime!(config.tile.value_bytes() as u32);
    let values = wgmma::descriptor_transposed(at, config.tile.keys);
    wgmma::accumulate(values, comptime!(config.tile.products()));
    wgmma::commit();
}

/// Hands a stage back to the producer, once for the warpgroup.
#[cube]
pub(crate) fn release(empty: u32) {
    if UNIT_POS % 128 == 0 {
        barrier::arrive(empty);
    }
}

/// Makes the packed weights of a tile the left side of the next product.
#[cube]
fn write_weights(weights: &Array<u32>, #[comptime] keys: usize) {
    #[unroll]
    for step in 0..comptime!(keys / 16) {
        let mut words = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            words.insert(i, weights[comptime!(4 * step + i)]);
        }
        wgmma::write_probability_step(words, step);
    }
}
