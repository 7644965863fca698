//! The producer: as in [`crate::forward`], with tiles of 8-bit elements.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use cubesla_kernels::block_list::{BlockListView, Span};

use super::config::LowBitConfig;
use super::kernel::Scales;
use super::softmax::short_factor;
use crate::forward::config::{ITEM_NOTES, Memory, Place, next_note};
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
    memory: Memory,
    scalars: ForwardScalars,
    #[comptime] config: LowBitConfig,
) {
    let k = tensor_map_address(k);
    let v = tensor_map_address(v);
    let tile = comptime!(config.forward.tile);
    comptime!(assert!(tile.stages + 2 <= ITEM_NOTES));
    let leads = UNIT_POS % 32 == 0;
    let mut place = Place::first(tile.stages);
    let mut note = 0u32;
    let mut index = CUBE_POS_X;
    while index < scalars.items {
        let work = Work::new(list, index, scalars, config.forward).never_empty();
        let item = work.item;
        if leads {
            // No consumer is behind by more tiles than there are stages, nor by more items: two more notes are
            // those of the item it finishes and of this one.
            item.write(memory, note);
        }
        note = next_note(note);
        let source = Source {
            head: item.head / scalars.group,
            batch: item.batch,
        };
        let mut own = Lookup {
            first: 0,
            count: 0,
            scale: 0.0,
        };
        let mut t = 0u32;
        while t < item.tiles {
            if t % 32 == 0 {
                let own_tile = min(t + UNIT_POS % 32, item.tiles - 1);
                own.find(work.tile(list, own_tile), source, scales, scalars, config);
            }
            let found = own.of_unit(t % 32);
            let stage = place.stage;
            // The phase before a barrier's first counts as complete, so the first waits pass.
            barrier::wait(memory.key_empty(stage), place.parity ^ 1);
            if leads {
                found.write(memory, stage, t == 0);
                let full = memory.key_full(stage);
                let bytes = comptime!((tile.key_bytes() + config.value_bytes()) as u32);
                barrier::arrive_expect(full, bytes);
                let to = memory.keys + stage * comptime!(tile.key_bytes() as u32);
                tma::load(
                    to,
                    k,
                    full,
                    0u32,
                    found.first,
                    source.head,
                    source.batch,
                    L2::Normal,
                );
            }
            barrier::wait(memory.value_empty(stage), place.parity ^ 1);
            if leads {
                // The keys' barrier: consumers wait once for both, when loads are far ahead of them.
                let full = memory.key_full(stage);
                let to = memory.values + stage * comptime!(config.value_bytes() as u32);
                if comptime!(config.fp8) {
                    let column = found.first / 4;
                    tma::load(
                        to,
                        v,
                        full,
                        column,
                        0u32,
                        source.head,
                        source.batch,
                        L2::Normal,
                    );
                } else {
                    source.load(to, v, full, found.first, tile.keys, tile.value_dim);
                }
            }
            place.advance();
            // Not unrolled: there are 24 registers.
            t = wgmma::here(t + 1);
        }
        index += scalars.stride;
    }
}

/// What the list and the keys' scales say of a tile. Each unit of the warp looks up another tile, so that their
/// latency comes once in 32 tiles.
#[derive(CubeType)]
struct Lookup {
    first: u32,
    count: u32,
    /// Of the keys' codes, times that of scores.
    scale: f32,
}

#[cube]
impl Lookup {
    /// Looks up the tile that has these keys.
    fn find(
        &mut self,
        span: Span,
        source: Source,
        scales: &Scales,
        scalars: ForwardScalars,
        #[comptime] config: LowBitConfig,
    ) {
        let keys = Keys::new(span);
        self.first = keys.first;
        self.count = keys.count;
        let block_k = comptime!(config.forward.block_k as u32);
        let key_blocks = scalars.key_len.div_ceil(block_k);
        let block = keys.first / block_k;
        self.scale = 0.0;
        if block < key_blocks {
            let head = source.batch * (scalars.heads / scalars.group) + source.head;
            self.scale = scales.keys[(head * key_blocks + block) as usize] * scalars.scale;
        }
    }

    /// What another unit looked up.
    fn of_unit(&self, unit: u32) -> Lookup {
        Lookup {
            first: plane_shuffle(self.first, unit),
            count: plane_shuffle(self.count, unit),
            scale: plane_shuffle(self.scale, unit),
        }
    }

    /// Tells consumers.
    fn write(&self, memory: Memory, stage: u32, first: bool) {
        let mut words = Vector::<u32, Const<4>>::empty();
        words.insert(0usize, u32::reinterpret(self.scale));
        words.insert(1usize, select(first, 0, self.count));
        words.insert(2usize, self.first);
        words.insert(3usize, self.count);
        math::store_chunk(memory.key_note(stage), words);
    }
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
