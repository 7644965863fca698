//! A consumer: a warpgroup that computes 64 rows of each of its cube's query blocks.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;

use super::config::{Memory, Place, next_note};
use super::epilogue::{end_stores, load_accumulator, store};
use super::kernel::{ForwardConfig, ForwardScalars, Item};
use super::producer::{Keys, read_bias, read_keys};
use super::softmax::{
    LARGEST, RowPair, Weights, begin_maxima, make_tile_weights, make_weights, make_weights_again,
    must_be_made_again, raise_if_needed, read_scores, take_scores,
};
use crate::ptx::{barrier, value, wgmma};

/// The loop over items. The first scores of an item are multiplied while the one before it is being
/// finished and stored.
#[cube]
pub(crate) fn consume<F: Float>(
    out: &TensorMap<F, Tiled>,
    lse: &mut [f32],
    memory: Memory,
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
) {
    let out = tensor_map_address(out);
    let mut consumer = Consumer::new(config);
    let mut index = CUBE_POS_X;
    consumer.begin(true, memory);
    while index < scalars.items {
        let item = Item::read(memory, consumer.note);
        let mut rows = RowPair::new(item.first_query);
        consumer.attend(&mut rows, item.tiles, memory, scalars);
        index += CUBE_COUNT_X;
        consumer.begin(index < scalars.items, memory);
        wgmma::wait(1u32);
        consumer.release_values(memory);
        // Read again: registers are scarce between.
        let item = Item::read(memory, consumer.note);
        consumer.note = next_note(consumer.note);
        store(out, lse, memory, item, &rows, scalars, config);
    }
    wgmma::wait(0u32);
    end_stores();
}

/// The same for one of a cube's streams of items, whose warps have half the registers: queries stay in
/// shared memory, and a tile's weights are made when no product is in flight. The other streams' are.
#[cube]
pub(crate) fn consume_in_streams<F: Float>(
    out: &TensorMap<F, Tiled>,
    lse: &mut [f32],
    stream: u32,
    memory: Memory,
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
) {
    let out = tensor_map_address(out);
    let streams = comptime!(config.tile.streams as u32);
    let mut consumer = Consumer::new(config);
    let mut index = CUBE_POS_X * streams + stream;
    while index < scalars.items {
        consumer.take_query_tile(memory);
        let item = Item::read(memory, consumer.note);
        let mut rows = RowPair::new(item.first_query);
        consumer.begin_scores(true, memory, 0usize);
        consumer.attend(&mut rows, item.tiles, memory, scalars);
        if UNIT_POS % 32 == 0 {
            barrier::arrive(memory.query_empty(consumer.queries.stage));
        }
        consumer.queries.advance();
        wgmma::wait(0u32);
        consumer.release_values(memory);
        let item = Item::read(memory, consumer.note);
        consumer.note = next_note(consumer.note);
        store(out, lse, memory, item, &rows, scalars, config);
        index += scalars.stride;
    }
    end_stores();
}

/// Where a warpgroup stands in what the producer loads.
#[derive(CubeType)]
pub(crate) struct Consumer {
    keys: Place,
    values: Place,
    queries: Place,
    /// Where the warpgroup's queries lie, if they stay in shared memory.
    query_tile: u32,
    /// On the item being computed.
    pub note: u32,
    /// The keys whose scores were begun last.
    begun: Keys,
    /// Of their block, if blocks have weights.
    bias: f32,
    #[cube(comptime)]
    config: ForwardConfig,
}

#[cube]
impl Consumer {
    pub fn new(#[comptime] config: ForwardConfig) -> Consumer {
        Consumer {
            keys: Place::first(config.tile.stages),
            values: Place::first(config.tile.stages),
            queries: Place::first(config.tile.query_tiles()),
            query_tile: 0,
            note: 0,
            begun: Keys { first: 0, count: 0 },
            bias: 0.0,
            config,
        }
    }

    /// Takes the next item: its queries, and the scores of its first tile, which are in flight then.
    ///
    /// If there are no `more` items the scores are of old queries and keys, for no one: ptxas keeps
    /// products in flight only if each path has them.
    pub fn begin(&mut self, more: bool, memory: Memory) {
        self.take_queries(more, memory);
        self.begin_scores(more, memory, 0usize);
    }

    /// Brings `O`, not yet divided by the rows' sums, into the accumulator, and leaves the queries in
    /// their registers. The product with the last values is in flight then.
    pub fn attend(
        &mut self,
        rows: &mut RowPair,
        tiles: u32,
        memory: Memory,
        scalars: ForwardScalars,
    ) {
        wgmma::wait(0u32);
        self.release_keys(memory);
        if comptime!(self.config.tile.streams > 1) {
            self.attend_in_turn(rows, tiles, memory, scalars);
        } else if comptime!(self.config.tile.ahead) {
            attend_ahead::<Consumer>(self, rows, tiles, memory, scalars);
        } else {
            self.attend_plainly(rows, tiles, memory, scalars);
        }
    }

    /// Brings the next item's queries into their registers; old ones if there are no `more`.
    pub fn take_queries(&mut self, more: bool, memory: Memory) {
        let tile = comptime!(self.config.tile);
        if more {
            barrier::wait(memory.query_full(0u32), self.queries.parity);
        }
        self.queries.advance();
        let warp_rows = memory.queries + UNIT_POS / 32 * comptime!(16 * 128u32);
        wgmma::load_queries(warp_rows, tile.rows(), tile.products());
        sync_plane();
        if more && UNIT_POS % 32 == 0 {
            barrier::arrive(memory.query_empty(0u32));
        }
    }

    /// Awaits the next item's queries, which stay in shared memory.
    fn take_query_tile(&mut self, memory: Memory) {
        let tile = comptime!(self.config.tile);
        let consumers = comptime!(tile.consumers as u32);
        barrier::wait(memory.query_full(self.queries.stage), self.queries.parity);
        let at = memory.queries
            + self.queries.stage * comptime!(tile.query_bytes() as u32)
            + UNIT_POS / 128 % consumers * comptime!(64 * 128u32);
        self.query_tile = plane_broadcast(at, 0u32);
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
        tiles: u32,
        memory: Memory,
        scalars: ForwardScalars,
    ) {
        let config = comptime!(self.config);
        let keys = comptime!(config.tile.keys);
        let mut weights = Weights::new(config.tile.weight_words());
        make_tile_weights(
            &mut weights,
            rows,
            self.begun,
            self.bias,
            scalars,
            0usize,
            config,
        );
        write_weights(&weights.packed, 0usize, keys);
        for t in 1..tiles {
            self.begin_scores(true, memory, 0usize);
            self.begin_accumulate(t == 1, memory, 0usize);
            wgmma::wait(1u32);
            self.release_keys(memory);
            make_tile_weights(
                &mut weights,
                rows,
                self.begun,
                self.bias,
                scalars,
                0usize,
                config,
            );
            wgmma::wait(0u32);
            self.release_values(memory);
            rescale(&*rows, config);
            write_weights(&weights.packed, 0usize, keys);
        }
        self.begin_accumulate(tiles == 1, memory, 0usize);
    }

    /// The same with no product in flight during a softmax, in streams: there are no registers for `P_t`
    /// to come into, and waiting costs little beside another stream.
    fn attend_in_turn(
        &mut self,
        rows: &mut RowPair,
        tiles: u32,
        memory: Memory,
        scalars: ForwardScalars,
    ) {
        self.take_weights(rows, scalars, false);
        for t in 1..tiles {
            self.begin_scores(true, memory, 0usize);
            self.begin_accumulate(t == 1, memory, 0usize);
            wgmma::wait(0u32);
            self.release_keys(memory);
            self.release_values(memory);
            self.take_weights(rows, scalars, true);
        }
        self.begin_accumulate(tiles == 1, memory, 0usize);
    }

    /// Turns the scores into the weights of the next product. With `accumulated`, there was one before.
    fn take_weights(
        &self,
        rows: &mut RowPair,
        scalars: ForwardScalars,
        #[comptime] accumulated: bool,
    ) {
        let config = comptime!(self.config);
        let keys = comptime!(config.tile.keys);
        let bias = self.bias;
        let mut weights = Weights::new(config.tile.weight_words());
        if !accumulated {
            begin_maxima(rows, self.begun, bias, scalars, 0usize, config);
        }
        let scores = read_scores(0usize, keys);
        make_weights(&mut weights, &*rows, &scores, bias, scalars, config);
        write_weights(&weights.packed, 0usize, keys);
        if must_be_made_again(&weights, LARGEST, &*rows, self.begun, scalars, config) {
            make_weights_again(
                &mut weights,
                rows,
                self.begun,
                bias,
                scalars,
                0usize,
                config,
            );
            write_weights(&weights.packed, 0usize, keys);
            if accumulated {
                rows.rescale(config);
            }
        }
        rows.add(&weights);
    }

    /// Ends the product before tile `t`, if there is one. With `next`, the scores of the tile after it
    /// remain in flight.
    fn end_product(&mut self, t: u32, memory: Memory, #[comptime] next: bool) {
        wgmma::wait(comptime!(u32::from(next)));
        if t > 0 {
            self.release_values(memory);
        }
    }

    /// Begins `S = Q K^T` with the next keys, into the registers of `buffer`; with old ones if there are
    /// no `more`.
    fn begin_scores(&mut self, more: bool, memory: Memory, #[comptime] buffer: usize) {
        let tile = comptime!(self.config.tile);
        if more {
            barrier::wait(memory.key_full(self.keys.stage), self.keys.parity);
        }
        let keys = read_keys(memory, self.keys.stage);
        self.begun.first = keys.first;
        self.begun.count = keys.count;
        if comptime!(self.config.weighted) {
            self.bias = read_bias(memory, self.keys.stage);
        }
        let at = memory.keys + self.keys.stage * comptime!(tile.key_bytes() as u32);
        wgmma::fence();
        if comptime!(tile.streams > 1) {
            let queries = wgmma::descriptor(self.query_tile);
            wgmma::scores_of_shared(queries, wgmma::descriptor(at), tile.products());
        } else {
            wgmma::scores(wgmma::descriptor(at), buffer, tile.products());
        }
        wgmma::commit();
    }

    /// Begins `O += P V` with the weights in `buffer` and the next values; `O = P V` with `anew`.
    fn begin_accumulate(&self, anew: bool, memory: Memory, #[comptime] buffer: usize) {
        let tile = comptime!(self.config.tile);
        barrier::wait(memory.value_full(self.values.stage), self.values.parity);
        let at = memory.values + self.values.stage * comptime!(tile.value_bytes() as u32);
        wgmma::fence();
        let values = wgmma::descriptor_transposed(at, tile.keys);
        wgmma::accumulate(values, anew, buffer, tile.products());
        wgmma::commit();
    }

    /// Hands the keys' stage back to the producer.
    fn release_keys(&mut self, memory: Memory) {
        release(memory.key_empty(self.keys.stage));
        self.keys.advance();
    }

    /// Hands the values' stage back to the producer.
    pub fn release_values(&mut self, memory: Memory) {
        release(memory.value_empty(self.values.stage));
        self.values.advance();
    }
}

#[cube]
impl LookAhead for Consumer {
    fn add_tile(
        &mut self,
        rows: &mut RowPair,
        t: u32,
        memory: Memory,
        scalars: ForwardScalars,
        #[comptime] buffer: usize,
        #[comptime] next: bool,
    ) {
        let config = comptime!(self.config);
        let keys = self.begun.copy();
        let bias = value::<f32>(self.bias);
        if next {
            self.begin_scores(true, memory, comptime!(1 - buffer));
        }
        let mut weights = Weights::new(config.tile.weight_words());
        let two = comptime!(config.tile.two_weights());
        if two {
            make_tile_weights(&mut weights, rows, keys, bias, scalars, buffer, config);
            self.end_product(t, memory, next);
        } else {
            // Registers for one tile's weights: exponentials wait for the product that reads them, so
            // what they need is found before.
            let scores = take_scores(&*rows, keys, scalars, buffer, config);
            raise_if_needed(rows, &scores, bias, scalars, config);
            self.end_product(t, memory, next);
            make_weights(&mut weights, &*rows, &scores, bias, scalars, config);
            rows.add(&weights);
        }
        if t > 0 {
            rescale(&*rows, config);
        }
        let to = comptime!(if two { buffer } else { 0 });
        write_weights(&weights.packed, to, config.tile.keys);
        self.begin_accumulate(t == 0, memory, to);
        if next {
            wgmma::wait(1u32);
            self.release_keys(memory);
        }
    }
}

/// An item's tiles with the scores of two in registers.
#[cube]
pub(crate) trait LookAhead: CubeType + Sized {
    /// Adds tile `t`, whose scores are in the registers of `buffer`. With `next`, those of the tile
    /// after it begin to come into the other buffer first, and are there at the end; the product with
    /// the values of tile `t` is then in flight.
    fn add_tile(
        &mut self,
        rows: &mut RowPair,
        t: u32,
        memory: Memory,
        scalars: ForwardScalars,
        #[comptime] buffer: usize,
        #[comptime] next: bool,
    );
}

/// The tiles of an item; the scores of the first are there. While the softmax turns `S_t` into `P_t`, both
/// `O += P_{t-1} V_{t-1}` and `S_{t+1} = Q K_{t+1}^T` are in flight, so that the tensor cores wait for
/// nothing but the softmax.
#[cube]
pub(crate) fn attend_ahead<C: LookAhead>(
    consumer: &mut C,
    rows: &mut RowPair,
    tiles: u32,
    memory: Memory,
    scalars: ForwardScalars,
) {
    let mut t = 0u32;
    while t + 2 < tiles {
        consumer.add_tile(rows, t, memory, scalars, 0usize, true);
        consumer.add_tile(rows, t + 1, memory, scalars, 1usize, true);
        t += 2;
    }
    if t + 1 < tiles {
        consumer.add_tile(rows, t, memory, scalars, 0usize, true);
        consumer.add_tile(rows, t + 1, memory, scalars, 1usize, false);
    } else {
        consumer.add_tile(rows, t, memory, scalars, 0usize, false);
    }
}

/// Hands a stage back to the producer, once for the warpgroup.
#[cube]
pub(crate) fn release(empty: u32) {
    if UNIT_POS % 128 == 0 {
        barrier::arrive(empty);
    }
}

/// Brings the accumulator to the rows' maxima, if the last tile raised any.
#[cube]
fn rescale(rows: &RowPair, #[comptime] config: ForwardConfig) {
    if rows.raised {
        rows.rescale(config);
    }
}

/// Makes packed weights the left side of the next product.
#[cube]
fn write_weights(weights: &Array<u32>, #[comptime] buffer: usize, #[comptime] keys: usize) {
    #[unroll]
    for step in 0..comptime!(keys / 16) {
        let mut words = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            words.insert(i, weights[comptime!(4 * step + i)]);
        }
        wgmma::write_probability_step(words, buffer, step);
    }
}
