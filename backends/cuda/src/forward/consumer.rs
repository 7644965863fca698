//! A consumer: a warpgroup that computes 64 rows of each of its cube's query blocks.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use cubesla_kernels::block_list::{BlockListView, Walk, WalkExpand};

use super::config::{Memory, Place};
use super::epilogue::{load_accumulator, store};
use super::kernel::{ForwardConfig, ForwardScalars, Item};
use super::softmax::{RowPair, make_weights, take_scores};
use crate::ptx::{barrier, wgmma};

/// The loop over items.
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
        wgmma::clear_accumulator(products);
        if item.tiles > 0 {
            self.begin_scores(memory, 0usize);
            wgmma::wait(0u32);
            self.release_keys(memory);
            if tile.ahead {
                self.attend_ahead(rows, list, item, memory, scalars);
            } else {
                self.attend_plainly(rows, list, item, memory, scalars);
            }
            wgmma::wait(0u32);
            self.release_values(memory);
        }
    }

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
            self.release_values(memory);
        }
    }

    /// The tiles of an item; the scores of the first are there. While the softmax turns `S_t` into
    /// `P_t`, the product `O += P_{t-1} V_{t-1}` is in flight.
    fn attend_plainly(
        &mut self,
        rows: &mut RowPair,
        list: &BlockListView,
        item: Item,
        memory: Memory,
        scalars: ForwardScalars,
    ) {
        let config = comptime!(self.config);
        let scores = take_scores(rows, item.walk.tile(list, 0), scalars, 0usize, config);
        write_weights(
            &make_weights(rows, &scores, scalars, config),
            config.tile.keys,
        );
        for t in 1..item.tiles {
            self.begin_scores(memory, 0usize);
            self.begin_accumulate(memory);
            wgmma::wait(1u32);
            self.release_keys(memory);
            let scores = take_scores(rows, item.walk.tile(list, t), scalars, 0usize, config);
            let weights = make_weights(rows, &scores, scalars, config);
            wgmma::compute_before(rows.upper.sum + rows.lower.sum);
            wgmma::wait(0u32);
            self.release_values(memory);
            rescale(&*rows, config);
            write_weights(&weights, config.tile.keys);
        }
        self.begin_accumulate(memory);
    }

    /// As [`attend_plainly`](Self::attend_plainly); `S_{t+1} = Q K_{t+1}^T` is in flight too, into
    /// other registers, so that the tensor cores wait for nothing but the softmax.
    fn attend_ahead(
        &mut self,
        rows: &mut RowPair,
        list: &BlockListView,
        item: Item,
        memory: Memory,
        scalars: ForwardScalars,
    ) {
        let mut t = 0u32;
        while t + 2 < item.tiles {
            self.add_tile(rows, list, item, t, memory, scalars, 0usize, true);
            self.add_tile(rows, list, item, t + 1, memory, scalars, 1usize, true);
            t += 2;
        }
        if t + 1 < item.tiles {
            self.add_tile(rows, list, item, t, memory, scalars, 0usize, true);
            self.add_tile(rows, list, item, t + 1, memory, scalars, 1usize, false);
        } else {
            self.add_tile(rows, list, item, t, memory, scalars, 0usize, false);
        }
    }

    /// Adds tile `t`, whose scores are in the registers of `buffer`. With `next`, those of the tile
    /// after it begin to come into the other buffer first, and are there at the end; the product with
    /// the values of tile `t` is then in flight.
    fn add_tile(
        &mut self,
        rows: &mut RowPair,
        list: &BlockListView,
        item: Item,
        t: u32,
        memory: Memory,
        scalars: ForwardScalars,
        #[comptime] buffer: usize,
        #[comptime] next: bool,
    ) {
        let config = comptime!(self.config);
        if next {
            self.begin_scores(memory, comptime!(1 - buffer));
        }
        let scores = take_scores(rows, item.walk.tile(list, t), scalars, buffer, config);
        // The weights of the tile before are in use until its product is done: there are no registers
        // to make new ones beside them.
        wgmma::wait(comptime!(u32::from(next)));
        if t > 0 {
            self.release_values(memory);
        }
        rescale(&*rows, config);
        write_weights(
            &make_weights(rows, &scores, scalars, config),
            config.tile.keys,
        );
        self.begin_accumulate(memory);
        if next {
            wgmma::wait(1u32);
            self.release_keys(memory);
        }
    }

    /// Begins `S = Q K^T` with the next keys, into the registers of `buffer`.
    fn begin_scores(&self, memory: Memory, #[comptime] buffer: usize) {
        let tile = comptime!(self.config.tile);
        barrier::wait(memory.key_full(self.keys.stage), self.keys.parity);
        let at = memory.keys + self.keys.stage * comptime!(tile.key_bytes() as u32);
        wgmma::fence();
        wgmma::scores(wgmma::descriptor(at), buffer, tile.products());
        wgmma::commit();
    }

    /// Begins `O += P V` with the next values.
    fn begin_accumulate(&self, memory: Memory) {
        let tile = comptime!(self.config.tile);
        barrier::wait(memory.value_full(self.values.stage), self.values.parity);
        let at = memory.values + self.values.stage * comptime!(tile.value_bytes() as u32);
        wgmma::fence();
        let values = wgmma::descriptor_transposed(at, tile.keys);
        wgmma::accumulate(values, tile.products());
        wgmma::commit();
    }

    /// Hands the keys' stage back to the producer.
    fn release_keys(&mut self, memory: Memory) {
        release(memory.key_empty(self.keys.stage));
        self.keys.advance();
    }

    /// Hands the values' stage back to the producer.
    fn release_values(&mut self, memory: Memory) {
        release(memory.value_empty(self.values.stage));
        self.values.advance();
    }
}

/// Hands a stage back to the producer, once for the warpgroup.
#[cube]
pub(crate) fn release(empty: u32) {
    if UNIT_POS % 128 == 0 {
        barrier::arrive(empty);
    }
}

/// Brings the accumulator to the rows' maxima; most tiles leave those as they are: see `take_scores`.
#[cube]
fn rescale(rows: &RowPair, #[comptime] config: ForwardConfig) {
    if plane_any(rows.upper.correction != 1.0 || rows.lower.correction != 1.0) {
        wgmma::scale_accumulator(
            rows.upper.correction,
            rows.lower.correction,
            config.tile.products(),
        );
    }
}

/// Makes packed weights the left side of the next product.
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
