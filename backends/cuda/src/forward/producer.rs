//! The producer: one unit that keeps the ring of tiles full.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use cubesla_kernels::block_list::{BlockListView, BlockWeightsView, Span};

use super::config::{Memory, Place, next_note};
use super::kernel::{ForwardConfig, ForwardScalars, Item, Work};
use crate::ptx::tma::L2;
use crate::ptx::{barrier, math, tma, value};

/// Loads the queries of each item and the keys and values of each tile as soon as there is room, so
/// that it runs ahead into the next item while the consumers finish this one.
#[cube]
pub(crate) fn produce<F: Float>(
    q: &TensorMap<F, Tiled>,
    k: &TensorMap<F, Tiled>,
    v: &TensorMap<F, Tiled>,
    list: &BlockListView,
    weights: &BlockWeightsView,
    stream: u32,
    memory: Memory,
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
) {
    let mut producer = Producer::new(q, k, v, config);
    let streams = comptime!(config.tile.streams as u32);
    let mut index = CUBE_POS_X * streams + stream;
    while index < scalars.items {
        let work = Work::new(list, index, scalars, config).never_empty();
        producer.load_queries(work.item, memory);
        if config.weighted {
            // The maxima that biases are added to are of unscaled scores.
            let unit = 1.0 / (scalars.scale * std::f32::consts::LOG2_E);
            producer.load_weighted_tiles(list, weights, unit, work, memory, scalars);
        } else {
            producer.load_tiles(list, work, memory, scalars);
        }
        index += scalars.stride;
    }
}

/// Where the producer stands, and the tensors it loads from.
#[derive(CubeType)]
pub(crate) struct Producer {
    q: u64,
    k: u64,
    v: u64,
    place: Place,
    note: u32,
    #[cube(comptime)]
    config: ForwardConfig,
}

#[cube]
impl Producer {
    pub fn new<F: Float>(
        q: &TensorMap<F, Tiled>,
        k: &TensorMap<F, Tiled>,
        v: &TensorMap<F, Tiled>,
        #[comptime] config: ForwardConfig,
    ) -> Producer {
        Producer {
            q: tensor_map_address(q),
            k: tensor_map_address(k),
            v: tensor_map_address(v),
            place: Place::first(config.tile.stages),
            note: 0,
            config,
        }
    }

    /// Loads an item's queries, and tells consumers which item it is.
    pub fn load_queries(&mut self, item: Item, memory: Memory) {
        let tile = comptime!(self.config.tile);
        let source = Source {
            head: item.head,
            batch: item.batch,
        };
        // There is an even number of notes a slot, so that they tell the phase.
        let slots = comptime!(tile.query_tiles() as u32);
        let slot = self.note % slots;
        let parity = self.note / slots % 2;
        // The phase before a barrier's first counts as complete, so the first waits pass.
        barrier::wait(memory.query_empty(slot), parity ^ 1);
        item.write(memory, self.note);
        let full = memory.query_full(slot);
        let bytes = comptime!(tile.query_bytes() as u32);
        barrier::arrive_expect(full, bytes);
        // No other item reads them: the L2 cache is left to keys and values.
        source.load_through(
            memory.queries + slot * bytes,
            self.q,
            full,
            item.first_query,
            tile.rows(),
            tile.head_dim,
            L2::EvictFirst,
        );
        self.note = next_note(self.note);
    }

    /// Loads the keys and values of an item's tiles, and tells consumers which keys they are.
    pub fn load_tiles(
        &mut self,
        list: &BlockListView,
        work: Work,
        memory: Memory,
        scalars: ForwardScalars,
    ) {
        let source = Source {
            head: work.item.head / scalars.group,
            batch: work.item.batch,
        };
        for t in 0..work.item.tiles {
            let keys = work.tile(list, t);
            self.load_tile(source, keys, 0.0, memory);
        }
    }

    /// The same for blocks with weights: consumers are told `unit log2(m)` too.
    pub fn load_weighted_tiles(
        &mut self,
        list: &BlockListView,
        weights: &BlockWeightsView,
        unit: f32,
        work: Work,
        memory: Memory,
        scalars: ForwardScalars,
    ) {
        let config = comptime!(self.config);
        let item = work.item;
        let head = (item.batch * scalars.heads + item.head) as usize;
        let query_block = item.first_query / comptime!(config.tile.rows() as u32);
        let source = Source {
            head: item.head / scalars.group,
            batch: item.batch,
        };
        for t in 0..item.tiles {
            let keys = work.tile(list, t);
            // The tile of a row with no block lies past the last one.
            let key_block = min(
                keys.first / comptime!(config.block_k as u32),
                weights.key_blocks - 1,
            );
            let bias = math::log2(weights.at(head, query_block, key_block)) * unit;
            self.load_tile(source, keys, bias, memory);
        }
    }

    /// Loads a tile's keys and values. The `bias` is not told if blocks have no weights.
    fn load_tile(&mut self, source: Source, keys: Span, bias: f32, memory: Memory) {
        let tile = comptime!(self.config.tile);
        let key_bytes = comptime!(tile.key_bytes() as u32);
        let value_bytes = comptime!(tile.value_bytes() as u32);
        barrier::wait(memory.key_empty(self.place.stage), self.place.parity ^ 1);
        write_keys(memory, self.place.stage, Keys::new(keys));
        if comptime!(self.config.weighted) {
            write_bias(memory, self.place.stage, bias);
        }
        let full = memory.key_full(self.place.stage);
        barrier::arrive_expect(full, key_bytes);
        let to = memory.keys + self.place.stage * key_bytes;
        source.load(to, self.k, full, keys.first, tile.keys, tile.head_dim);

        barrier::wait(memory.value_empty(self.place.stage), self.place.parity ^ 1);
        let full = memory.value_full(self.place.stage);
        barrier::arrive_expect(full, value_bytes);
        let to = memory.values + self.place.stage * value_bytes;
        source.load(to, self.v, full, keys.first, tile.keys, tile.value_dim);
        self.place.advance();
    }
}

#[cube]
impl Producer {
    /// Loads an item's rows of `map [B, Hq, Lq, Dv]` in the place of values, a tile of 64 rows to each
    /// warpgroup.
    pub fn load_rows(&mut self, map: u64, item: Item, memory: Memory) {
        let tile = comptime!(self.config.tile);
        let value_bytes = comptime!(tile.value_bytes() as u32);
        let source = Source {
            head: item.head,
            batch: item.batch,
        };
        #[unroll]
        for owner in 0..comptime!(tile.consumers as u32) {
            barrier::wait(memory.value_empty(self.place.stage), self.place.parity ^ 1);
            let full = memory.value_full(self.place.stage);
            barrier::arrive_expect(full, value_bytes);
            let to = memory.values + self.place.stage * value_bytes;
            let row = item.first_query + owner * 64;
            source.load(to, map, full, row, tile.keys, tile.value_dim);
            self.place.advance();
        }
    }
}

/// Keys of a tile as consumers know them.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Keys {
    pub first: u32,
    /// How many are visible, at most those of the tile; the rest are another block's, or do not exist.
    pub count: u32,
}

#[cube]
impl Keys {
    pub fn new(tile: Span) -> Keys {
        Keys {
            first: tile.first,
            count: tile.rows(),
        }
    }

    /// The keys as they are now: a variable that holds them may change.
    pub fn copy(&self) -> Keys {
        Keys {
            first: value::<u32>(self.first),
            count: value::<u32>(self.count),
        }
    }
}

/// Tells consumers which keys are in a stage.
#[cube]
fn write_keys(memory: Memory, stage: u32, keys: Keys) {
    math::store_pair(memory.key_note(stage), keys.first, keys.count);
}

/// The keys of a stage that have arrived.
#[cube]
pub(crate) fn read_keys(memory: Memory, stage: u32) -> Keys {
    let words = math::load_pair(memory.key_note(stage));
    Keys {
        first: words.extract(0usize),
        count: words.extract(1usize),
    }
}

/// Tells consumers what the weight of a stage's block adds to scores.
#[cube]
fn write_bias(memory: Memory, stage: u32, bias: f32) {
    math::store_pair(memory.key_note(stage) + 8, u32::reinterpret(bias), 0);
}

/// What the weight of a stage's block adds to scores: 0 of one that is 1, negative infinity of one that
/// is 0.
#[cube]
pub(crate) fn read_bias(memory: Memory, stage: u32) -> f32 {
    let words = math::load_pair(memory.key_note(stage) + 8);
    f32::reinterpret(words.extract(0usize))
}

/// A head of a tensor.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Source {
    pub head: u32,
    pub batch: u32,
}

#[cube]
impl Source {
    /// Begins to load rows `row..row + rows` into the tile at `to`, box after box.
    pub fn load(
        &self,
        to: u32,
        map: u64,
        full: u32,
        row: u32,
        #[comptime] rows: usize,
        #[comptime] width: usize,
    ) {
        self.load_through(to, map, full, row, rows, width, L2::Normal);
    }

    /// The same with another say on what the L2 cache keeps.
    pub fn load_through(
        &self,
        to: u32,
        map: u64,
        full: u32,
        row: u32,
        #[comptime] rows: usize,
        #[comptime] width: usize,
        #[comptime] l2: L2,
    ) {
        #[unroll]
        for box_index in 0..comptime!(width.div_ceil(64)) {
            let column = comptime!(box_index as u32 * 64);
            let to = to + comptime!((box_index * rows * 128) as u32);
            tma::load(to, map, full, column, row, self.head, self.batch, l2);
        }
    }
}
