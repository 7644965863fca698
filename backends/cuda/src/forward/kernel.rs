//! The Hopper forward: a producer that loads, and warpgroups that compute.
//!
//! Its loop is not the shared one of `cubesla_kernels::attention`: there a tile is finished before
//! the next begins, here the softmax of a tile runs while the tensor cores multiply the tile before
//! it, which is where the speed is.

use cubecl::prelude::*;
use cubesla_kernels::block_list::{
    BlockListView, BlockWeightsView, KeyWalk, Span, Walk, WalkExpand,
};

use super::config::{Memory, WgmmaTile};
use super::consumer::{consume, consume_in_streams};
use super::producer::produce;
use crate::ptx::{barrier, math, wgmma};

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ForwardConfig {
    pub tile: WgmmaTile,
    pub block_k: usize,
    pub causal: bool,
    /// Whether blocks have weights.
    pub weighted: bool,
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct ForwardScalars {
    /// Query blocks of all heads.
    pub items: u32,
    /// From one item of a stream to its next: an argument, as the producers have no register to keep what
    /// they could count.
    pub stride: u32,
    pub heads: u32,
    /// Query heads to a key head.
    pub group: u32,
    pub query_len: u32,
    pub key_len: u32,
    pub scale: f32,
    pub causal_shift: i32,
}

/// Block-sparse attention. Each cube takes every `CUBE_COUNT`-th query block; neighbouring cubes
/// work on neighbouring blocks of the same head, whose keys and values then stay in the L2 cache.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn block_sparse_forward_wgmma<F: Float>(
    q: &TensorMap<F, Tiled>,    // [B, Hq, Lq, D]
    k: &TensorMap<F, Tiled>,    // [B, Hkv, Lk, D]
    v: &TensorMap<F, Tiled>,    // [B, Hkv, Lk, Dv]
    out: &TensorMap<F, Tiled>,  // [B, Hq, Lq, Dv]
    list: &BlockListView,       // [B, Hq, M, N]
    weights: &BlockWeightsView, // the same; not read if blocks have none
    lse: &mut [f32],            // [B, Hq, Lq]
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
    #[define(F)] _dtype: ElemType,
) {
    let tile = comptime!(config.tile);
    let all = Memory::new(tile);
    wgmma::declare_registers(tile.products());

    let consumer_units = comptime!(tile.consumer_units() as u32);
    if UNIT_POS == 0 {
        #[unroll]
        for stream in 0..comptime!(tile.streams as u32) {
            init_barriers(all.of_stream(stream, tile), tile);
        }
        barrier::fence_init();
    }
    sync_cube();

    if UNIT_POS >= consumer_units {
        if comptime!(tile.registers().is_some()) {
            wgmma::shrink_registers(comptime!(tile.registers().unwrap().0));
        }
        let warp = (UNIT_POS - consumer_units) / 32;
        if warp < comptime!(tile.streams as u32) && math::elected() {
            let memory = all.of_stream(warp, tile);
            produce::<F>(q, k, v, list, weights, warp, memory, scalars, config);
        }
    } else {
        if comptime!(tile.registers().is_some()) {
            wgmma::grow_registers(comptime!(tile.registers().unwrap().1));
            if comptime!(tile.products().value_dim < 128) {
                wgmma::claim_registers();
            }
        }
        if comptime!(tile.streams > 1) {
            let stream = UNIT_POS / comptime!(tile.consumers as u32 * 128);
            let stream = plane_broadcast(stream, 0u32);
            let memory = all.of_stream(stream, tile);
            consume_in_streams::<F>(out, lse, stream, memory, scalars, config);
        } else {
            consume::<F>(out, lse, all, scalars, config);
        }
    }
}

/// Initialises the barriers of queries and stages.
#[cube]
pub(crate) fn init_barriers(memory: Memory, #[comptime] tile: WgmmaTile) {
    let consumers = comptime!(tile.consumers as u32);
    #[unroll]
    for slot in 0..comptime!(tile.query_tiles() as u32) {
        barrier::init(memory.query_full(slot), 1);
        barrier::init(memory.query_empty(slot), consumers * 4);
    }
    #[unroll]
    for stage in 0..comptime!(tile.stages as u32) {
        barrier::init(memory.key_full(stage), 1);
        barrier::init(memory.key_empty(stage), consumers);
        barrier::init(memory.value_full(stage), 1);
        barrier::init(memory.value_empty(stage), consumers);
    }
}

/// One query block of one head.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Item {
    pub batch: u32,
    pub head: u32,
    pub first_query: u32,
    pub tiles: u32,
}

#[cube]
impl Item {
    /// Tells consumers, who then need not read the list: its latency would be theirs.
    pub fn write(&self, memory: Memory, note: u32) {
        let mut words = Vector::<u32, Const<4>>::empty();
        words.insert(0usize, self.batch);
        words.insert(1usize, self.head);
        words.insert(2usize, self.first_query);
        words.insert(3usize, self.tiles);
        math::store_chunk(memory.item_note(note), words);
    }

    /// The item of a note.
    pub fn read(memory: Memory, note: u32) -> Item {
        let words = math::load_chunk(memory.item_note(note));
        Item {
            batch: words.extract(0usize),
            head: words.extract(1usize),
            first_query: words.extract(2usize),
            tiles: words.extract(3usize),
        }
    }
}

/// An item and the keys it walks over: what a producer loads.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Work {
    pub item: Item,
    pub walk: KeyWalk,
}

#[cube]
impl Work {
    /// The `index`-th of all.
    pub fn new(
        list: &BlockListView,
        index: u32,
        scalars: ForwardScalars,
        #[comptime] config: ForwardConfig,
    ) -> Work {
        let rows = comptime!(config.tile.rows() as u32);
        let query_block = index % list.query_blocks;
        let head_index = index / list.query_blocks;
        let first_query = query_block * rows;
        let mut row = list.row(head_index, query_block);
        if config.causal {
            let end_query = min(first_query + rows, scalars.query_len);
            let visible_keys = max(end_query as i32 + scalars.causal_shift, 0) as u32;
            let visible_blocks = visible_keys.div_ceil(comptime!(config.block_k as u32));
            row.count = list.count_below(row, visible_blocks);
        }
        let walk = KeyWalk {
            row,
            key_len: scalars.key_len,
            block_k: config.block_k,
            cols: config.tile.keys,
        };
        let item = Item {
            batch: head_index / scalars.heads,
            head: head_index % scalars.heads,
            first_query,
            tiles: walk.tiles(),
        };
        Work { item, walk }
    }

    /// The same with a tile at least, that consumers need not tell apart: past the last key, where
    /// copies read zeros and every score is masked.
    pub fn never_empty(self) -> Work {
        Work {
            item: Item {
                batch: self.item.batch,
                head: self.item.head,
                first_query: self.item.first_query,
                tiles: max(self.item.tiles, 1),
            },
            walk: self.walk,
        }
    }

    /// The keys of tile `t`.
    pub fn tile(&self, list: &BlockListView, t: u32) -> Span {
        let len = self.walk.key_len;
        let mut keys = Span {
            first: len.div_ceil(64) * 64,
            end: len,
        };
        if self.walk.row.count > 0 {
            let walked = self.walk.tile(list, t);
            keys.first = walked.first;
            keys.end = walked.end;
        }
        keys
    }
}
