//! The producer: as in [`crate::forward`], with tiles of 8-bit elements.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use cubesla_kernels::block_list::{BlockListView, Span};

use super::config::LowBitConfig;
use super::kernel::Scales;
use super::scratch::Scratch;
use super::softmax::short_factor;
use crate::forward::config::{ITEM_NOTES, Memory, Place};
use crate::forward::kernel::{ForwardScalars, Work};
use crate::forward::producer::{Keys, Source};
use crate::ptx::tma::L2;
use crate::ptx::{barrier, math, tma, value, wgmma};

/// Loads the keys and values of each tile as soon as there is room. Another warp loads queries.
#[cube]
pub(super) fn produce<V: Numeric>(
    k: &TensorMap<u32, Tiled>,
    v: &TensorMap<V, Tiled>,
    list: &BlockListView,
    scales: &Scales,
    scratch: Scratch,
    memory: Memory,
    scalars: ForwardScalars,
    #[comptime] config: LowBitConfig,
) {
    let k = tensor_map_address(k);
    let v = tensor_map_address(v);
    let tile = comptime!(config.forward.tile);
    comptime!(assert!(tile.stages + 2 <= ITEM_NOTES));
    let leads = math::elected();
    let mut place = Place::first(tile.stages);
    // Index and note follow from it: there are 24 registers.
    let mut done = 0u32;
    while CUBE_POS_X + done * scalars.stride < scalars.items {
        let index = CUBE_POS_X + done * scalars.stride;
        let work = Work::new(list, index, scalars, config.forward).never_empty();
        let item = work.item;
        if leads {
            // No consumer is behind by more tiles than there are stages, nor by more items: two more notes are
            // those of the item it finishes and of this one.
            item.write(memory, done % comptime!(ITEM_NOTES as u32));
        }
        let source = Source {
            head: item.head / scalars.group,
            batch: item.batch,
        };
        let mut first = 0u32;
        while first < item.tiles {
            // A tile to each unit: the latency of lists and scales comes once in 32 tiles.
            let own = first + UNIT_POS % 32;
            look_up(
                work.tile(list, min(own, item.tiles - 1)),
                own == 0,
                scratch.lookup(UNIT_POS % 32),
                source,
                scales,
                scalars,
                config,
            );
            sync_plane();
            if leads {
                let count = min(item.tiles - first, 32);
                load_tiles(k, v, source, count, &mut place, scratch, memory, config);
            }
            // They have been read.
            sync_plane();
            first += 32;
        }
        done += 1;
    }
}

/// Loads the keys and values of as many tiles as were looked up, each as soon as there is room. By one unit.
#[cube]
fn load_tiles(
    k: u64,
    v: u64,
    source: Source,
    count: u32,
    place: &mut Place,
    scratch: Scratch,
    memory: Memory,
    #[comptime] config: LowBitConfig,
) {
    let tile = comptime!(config.forward.tile);
    let mut t = 0u32;
    while t < count {
        let stage = place.stage;
        let words = math::load_chunk(scratch.lookup(t));
        // The phase before a barrier's first counts as complete, so the first waits pass.
        barrier::wait(memory.key_empty(stage), place.parity ^ 1);
        math::store_chunk(memory.key_note(stage), words);
        let first = words.extract(2usize);
        // The keys' barrier for both: consumers wait once, when loads are far ahead of them.
        let full = memory.key_full(stage);
        barrier::arrive_expect(
            full,
            comptime!((tile.key_bytes() + config.value_bytes()) as u32),
        );
        let to = memory.keys + stage * comptime!(tile.key_bytes() as u32);
        tma::load(
            to,
            k,
            full,
            0u32,
            first,
            source.head,
            source.batch,
            L2::Normal,
        );
        barrier::wait(memory.value_empty(stage), place.parity ^ 1);
        let to = memory.values + stage * comptime!(config.value_bytes() as u32);
        if comptime!(config.fp8) {
            tma::load(
                to,
                v,
                full,
                first / 4,
                0u32,
                source.head,
                source.batch,
                L2::Normal,
            );
        } else {
            source.load(to, v, full, first, tile.keys, tile.value_dim);
        }
        place.advance();
        // Not unrolled: there are 24 registers.
        t = wgmma::here(t + 1);
    }
}

/// Leaves at shared address `to` what is to be known of the tile that has these keys, as [`ScaledKeys::read`]
/// finds it, and whether it is its item's first.
#[cube]
fn look_up(
    span: Span,
    is_first: bool,
    to: u32,
    source: Source,
    scales: &Scales,
    scalars: ForwardScalars,
    #[comptime] config: LowBitConfig,
) {
    let keys = Keys::new(span);
    let block_k = comptime!(config.forward.block_k as u32);
    let key_blocks = scalars.key_len.div_ceil(block_k);
    let block = keys.first / block_k;
    // Of the keys' codes, times that of scores.
    let mut scale = f32::new(0.0);
    if block < key_blocks {
        let head = source.batch * (scalars.heads / scalars.group) + source.head;
        scale = scales.keys[(head * key_blocks + block) as usize] * scalars.scale;
    }
    let mut words = Vector::<u32, Const<4>>::empty();
    words.insert(0usize, u32::reinterpret(scale));
    words.insert(1usize, select(is_first, 0, keys.count));
    words.insert(2usize, keys.first);
    words.insert(3usize, keys.count);
    math::store_chunk(to, words);
}

/// Keys of a stage, and what turns products of codes with them into base-2 scores.
#[derive(CubeType)]
pub(super) struct ScaledKeys {
    pub keys: Keys,
    pub factor: f32,
    /// The number of keys, or 0 of an item's first tile, for consumers to find it by the same comparison as
    /// tiles that are not full.
    pub mark: u32,
}

#[cube]
impl ScaledKeys {
    /// Of no tile.
    pub fn none() -> ScaledKeys {
        ScaledKeys {
            keys: Keys { first: 0, count: 0 },
            factor: 0.0,
            mark: 0,
        }
    }

    /// Takes those of a stage that have arrived, for queries of this scale.
    pub fn read(&mut self, memory: Memory, stage: u32, query_scale: f32) {
        let words = math::load_chunk(memory.key_note(stage));
        let scale = f32::reinterpret(words.extract(0usize));
        // Positive, also where it would underflow, so that it leaves masked scores below all others.
        self.factor = short_factor(fma(scale, query_scale, 1.0e-37));
        self.mark = words.extract(1usize);
        self.keys.first = words.extract(2usize);
        self.keys.count = words.extract(3usize);
    }

    /// As they are now: a variable that holds them may change.
    pub fn copy(&self) -> ScaledKeys {
        ScaledKeys {
            keys: self.keys.copy(),
            factor: value::<f32>(self.factor),
            mark: value::<u32>(self.mark),
        }
    }
}
