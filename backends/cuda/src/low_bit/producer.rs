//! The producer: as in [`crate::forward`], with tiles of 8-bit elements.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use cubesla_kernels::block_list::{BlockListView, Walk, WalkExpand};

use super::config::LowBitConfig;
use crate::forward::config::{Memory, Place};
use crate::forward::kernel::{ForwardScalars, Item};
use crate::forward::producer::Source;
use crate::ptx::{barrier, tma};

/// Loads the queries of each item and the keys and values of each tile as soon as there is room.
#[cube]
pub(super) fn produce<V: Numeric>(
    q: &TensorMap<u32, Tiled>,
    k: &TensorMap<u32, Tiled>,
    v: &TensorMap<V, Tiled>,
    list: &BlockListView,
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
    let mut index = CUBE_POS_X;
    while index < scalars.items {
        let item = Item::new(list, index, scalars, config.forward);
        barrier::wait(memory.query_empty(), query_parity);
        query_parity ^= 1;
        let full = memory.query_full();
        barrier::arrive_expect(full, comptime!(tile.query_bytes() as u32));
        tma::load(
            memory.queries,
            q,
            full,
            0u32,
            item.first_query,
            item.head,
            item.batch,
        );
        let source = Source {
            head: item.head / scalars.group,
            batch: item.batch,
        };
        for t in 0..item.tiles {
            let keys = item.walk.tile(list, t);
            barrier::wait(memory.key_empty(place.stage), place.parity ^ 1);
            let full = memory.key_full(place.stage);
            barrier::arrive_expect(full, comptime!(tile.key_bytes() as u32));
            let to = memory.keys + place.stage * comptime!(tile.key_bytes() as u32);
            tma::load(to, k, full, 0u32, keys.first, source.head, source.batch);

            barrier::wait(memory.value_empty(place.stage), place.parity ^ 1);
            let full = memory.value_full(place.stage);
            barrier::arrive_expect(full, comptime!(config.value_bytes() as u32));
            let to = memory.values + place.stage * comptime!(config.value_bytes() as u32);
            if comptime!(config.fp8) {
                let column = keys.first / 4;
                tma::load(to, v, full, column, 0u32, source.head, source.batch);
            } else {
                source.load(to, v, full, keys.first, tile.keys, tile.value_dim);
            }
            place.advance();
        }
        index += CUBE_COUNT_X;
    }
}
