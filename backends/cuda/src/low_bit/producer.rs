//! The producer: as in [`crate::forward`], with tiles of 8-bit elements.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use cubesla_kernels::block_list::BlockListView;

use super::config::LowBitConfig;
use super::kernel::Scales;
use super::softmax::short_factor;
use crate::forward::config::{Memory, Place, next_note};
use crate::forward::kernel::{ForwardScalars, Work};
use crate::forward::producer::{Keys, Source};
use crate::ptx::tma::L2;
use crate::ptx::{barrier, math, tma, value};

/// Loads the queries of each item and the keys and values of each tile as soon as there is room.
#[cube]
pub(super) fn produce<V: Numeric>(
    q: &TensorMap<u32, Tiled>,
    k: &TensorMap<u32, Tiled>,
    v: &TensorMap<V, Tiled>,
    list: &BlockListView,
    scales: &Scales,
    memory: Memory,
    scalars: ForwardScalars,
    #[comptime] config: LowBitConfig,
) {
    let q = tensor_map_address(q);
    let k = tensor_map_address(k);
    let v = tensor_map_address(v);
    let tile = comptime!(config.forward.tile);
    let mut place = Place::first(tile.stages);
    // The phase before a barrier's first counts as complete, so the first waits pass.
    let mut query_parity = 1u32;
    let mut note = 0u32;
    let mut index = CUBE_POS_X;
    while index < scalars.items {
        let work = Work::new(list, index, scalars, config.forward).never_empty();
        let item = work.item;
        barrier::wait(memory.query_empty(0u32), query_parity);
        query_parity ^= 1;
        item.write(memory, note);
        note = next_note(note);
        let full = memory.query_full(0u32);
        barrier::arrive_expect(full, comptime!(tile.query_bytes() as u32));
        tma::load(
            memory.queries,
            q,
            full,
            0u32,
            item.first_query,
            item.head,
            item.batch,
            L2::Normal,
        );
        let source = Source {
            head: item.head / scalars.group,
            batch: item.batch,
        };
        let key_blocks = scalars
            .key_len
            .div_ceil(comptime!(config.forward.block_k as u32));
        let heads = scalars.heads / scalars.group;
        let first_scale = (source.batch * heads + source.head) * key_blocks;
        let queries = scalars.scale * std::f32::consts::LOG2_E * scales.queries[index as usize];
        for t in 0..item.tiles {
            let keys = work.tile(list, t);
            barrier::wait(memory.key_empty(place.stage), place.parity ^ 1);
            let block = keys.first / comptime!(config.forward.block_k as u32);
            let mut scale = f32::new(0.0);
            if block < key_blocks {
                scale = scales.keys[(first_scale + block) as usize];
            }
            // Positive, also where it would underflow, so that it leaves masked scores below all others.
            let factor = short_factor(queries * scale + 1.0e-37);
            write_keys(memory, place.stage, Keys::new(keys), factor, t == 0);
            let full = memory.key_full(place.stage);
            barrier::arrive_expect(full, comptime!(tile.key_bytes() as u32));
            let to = memory.keys + place.stage * comptime!(tile.key_bytes() as u32);
            tma::load(
                to,
                k,
                full,
                0u32,
                keys.first,
                source.head,
                source.batch,
                L2::Normal,
            );

            barrier::wait(memory.value_empty(place.stage), place.parity ^ 1);
            let full = memory.value_full(place.stage);
            barrier::arrive_expect(full, comptime!(config.value_bytes() as u32));
            let to = memory.values + place.stage * comptime!(config.value_bytes() as u32);
            if comptime!(config.fp8) {
                let column = keys.first / 4;
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
                source.load(to, v, full, keys.first, tile.keys, tile.value_dim);
            }
            place.advance();
        }
        index += CUBE_COUNT_X;
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

    /// Takes those of a stage that have arrived.
    pub fn read(&mut self, memory: Memory, stage: u32) {
        let words = math::load_chunk(memory.key_note(stage));
        self.factor = f32::reinterpret(words.extract(0usize));
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

/// Tells consumers which keys are in a stage.
#[cube]
fn write_keys(memory: Memory, stage: u32, keys: Keys, factor: f32, first: bool) {
    let mut words = Vector::<u32, Const<4>>::empty();
    words.insert(0usize, u32::reinterpret(factor));
    words.insert(1usize, select(first, 0, keys.count));
    words.insert(2usize, keys.first);
    words.insert(3usize, keys.count);
    math::store_chunk(memory.key_note(stage), words);
}
