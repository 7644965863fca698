//! States over chunks of keys, on Hopper: `H = sum phi(K_j)^T V_j` and `Z = sum phi(K_j)`.
//!
//! One pass over K and V: bulk copies bring tiles into a ring, the consumers apply phi to the keys
//! where they lie, and `wgmma` multiplies both from shared memory. The mapped keys may be written out
//! on the way. A second kernel adds up the chunks in order.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;
use cubesla_kernels::linear::FeatureMap;

use super::phi::map_keys;
use super::ring::{Ring, StateTile};
use crate::forward::config::Place;
use crate::forward::producer::Source;
use crate::ptx::tma::L2;
use crate::ptx::{barrier, linear, tma, wgmma};

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ChunkConfig {
    pub tile: StateTile,
    pub phi: FeatureMap,
    /// Whether `phi(K)` is written out.
    pub keep: bool,
}

/// Grid: x = chunk, y = key head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn chunk_states_wgmma<F: Float>(
    k: &TensorMap<F, Tiled>,     // [B, Hkv, Lk, D]
    v: &TensorMap<F, Tiled>,     // [B, Hkv, Lk, Dv]
    phi_k: &TensorMap<F, Tiled>, // as k, written if kept
    h: &mut [f32],               // [chunks, B, Hkv, D, Dv]
    z: &mut [f32],               // [chunks, B, Hkv, D]
    key_len: u32,
    /* keys of a chunk, whole tiles */ chunk: u32,
    #[comptime] config: ChunkConfig,
    #[define(F)] _dtype: ElemType,
) {
    let tile = config.tile;
    let ring = Ring::new(tile);
    wgmma::declare_registers(tile.products());
    linear::declare_sums();
    sync_cube();

    let keys = comptime!(tile.keys as u32);
    let first = CUBE_POS_X * chunk;
    let end = min(first + chunk, key_len);
    let tiles = (end - first).div_ceil(keys);
    let source = Source {
        head: CUBE_POS_Y,
        batch: CUBE_POS_Z,
    };
    if UNIT_POS >= comptime!(tile.consumers() as u32 * 128) {
        if UNIT_POS == comptime!(tile.consumers() as u32 * 128) {
            load_tiles(
                tensor_map_address(k),
                tensor_map_address(v),
                source,
                first,
                tiles,
                ring,
                tile,
            );
        }
    } else {
        if comptime!(config.phi == FeatureMap::Identity && !config.keep) {
            add_tiles(tiles, ring, tile);
        } else {
            map_and_add_tiles(tensor_map_address(phi_k), source, first, end, ring, config);
        }
        let state = (CUBE_POS_X * CUBE_COUNT_Z + CUBE_POS_Z) * CUBE_COUNT_Y + CUBE_POS_Y;
        store_sums(h, z, state as usize, tile);
    }
}

#[cube]
fn load_tiles(
    k: u64,
    v: u64,
    source: Source,
    first: u32,
    tiles: u32,
    ring: Ring,
    #[comptime] tile: StateTile,
) {
    let key_bytes = comptime!(tile.key_bytes() as u32);
    let value_bytes = comptime!(tile.value_bytes() as u32);
    let mut place = Place::first(tile.stages);
    for t in 0..tiles {
        let row = first + t * comptime!(tile.keys as u32);
        barrier::wait(ring.empty(place.stage), place.parity ^ 1);
        let full = ring.full(place.stage);
        barrier::arrive_expect(full, key_bytes + value_bytes);
        let to = ring.keys + place.stage * key_bytes;
        source.load(to, k, full, row, tile.keys, tile.head_dim);
        let to = ring.values + place.stage * value_bytes;
        source.load(to, v, full, row, tile.keys, tile.value_dim);
        place.advance();
    }
}

/// Adds up `K^T V` and the rows of `K` over all tiles, a product behind the loads.
#[cube]
pub(crate) fn add_tiles(tiles: u32, ring: Ring, #[comptime] tile: StateTile) {
    let mut place = Place::first(tile.stages);
    let mut done = Place::first(tile.stages);
    wgmma::clear_accumulator(tile.products());
    linear::clear_sums();
    for t in 0..tiles {
        barrier::wait(ring.full(place.stage), place.parity);
        begin_product(place.stage, ring, tile);
        place.advance();
        if t > 0 {
            wgmma::wait(1u32);
            ring.release(done.stage);
            done.advance();
        }
    }
    wgmma::wait(0u32);
}

/// The same with `phi(K)`, which takes the place of `K` while the tile before it is multiplied.
#[cube]
fn map_and_add_tiles(
    phi_k: u64,
    source: Source,
    first: u32,
    end: u32,
    ring: Ring,
    #[comptime] config: ChunkConfig,
) {
    let tile = config.tile;
    let keys = comptime!(tile.keys as u32);
    let mut place = Place::first(tile.stages);
    let mut done = Place::first(tile.stages);
    wgmma::clear_accumulator(tile.products());
    linear::clear_sums();
    let mut row = first;
    while row < end {
        barrier::wait(ring.full(place.stage), place.parity);
        let at = ring.keys + place.stage * comptime!(tile.key_bytes() as u32);
        map_keys(at, end - row, tile, config.phi);
        tma::fence_writes();
        // Named barrier 0 is the whole cube's.
        barrier::sync_named(1, comptime!(tile.consumers() as u32 * 128));
        begin_product(place.stage, ring, tile);
        if config.keep {
            if UNIT_POS == 0 {
                #[unroll]
                for box_index in 0..comptime!(tile.head_dim.div_ceil(64)) {
                    tma::store(
                        at + comptime!(box_index as u32) * keys * 128,
                        phi_k,
                        comptime!(box_index as u32 * 64),
                        row,
                        source.head,
                        source.batch,
                        L2::Normal,
                    );
                }
                tma::commit_stores();
            }
        }
        place.advance();
        if row > first {
            wgmma::wait(1u32);
            if config.keep {
                // All but the newest store have read their tiles.
                if UNIT_POS == 0 {
                    tma::wait_stores_read_but_one();
                }
            }
            ring.release(done.stage);
            done.advance();
        }
        row += keys;
    }
    wgmma::wait(0u32);
    if config.keep {
        if UNIT_POS == 0 {
            tma::wait_stores_read();
        }
    }
}

#[cube]
fn begin_product(stage: u32, ring: Ring, #[comptime] tile: StateTile) {
    let keys = ring.keys
        + stage * comptime!(tile.key_bytes() as u32)
        + UNIT_POS / 128 * comptime!((tile.keys * 128) as u32);
    let values = ring.values + stage * comptime!(tile.value_bytes() as u32);
    wgmma::fence();
    linear::add_state(
        wgmma::descriptor_transposed(keys, tile.keys),
        wgmma::descriptor_transposed(values, tile.keys),
        wgmma::descriptor(ring.ones),
        comptime!(tile.products()),
    );
    wgmma::commit();
}

/// Writes the sums of state number `state`.
#[cube]
fn store_sums(h: &mut [f32], z: &mut [f32], state: usize, #[comptime] tile: StateTile) {
    let dim = comptime!(tile.head_dim as u32);
    let row = UNIT_POS / 32 * 16 + UNIT_POS % 32 / 4;
    let column = UNIT_POS % 32 % 4 * 2;
    #[unroll]
    for group in 0..comptime!(tile.products().value_dim / 16) {
        let sums = wgmma::read_accumulator(group);
        #[unroll]
        for i in 0..4usize {
            let row = row + comptime!((i % 2 * 8) as u32);
            let start = comptime!((16 * group + i / 2 * 8) as u32);
            if row < dim && start < comptime!(tile.value_dim as u32) {
                let at = (state * tile.head_dim + row as usize) * tile.value_dim
                    + (column + start) as usize;
                h[at] = sums.extract(comptime!(2 * i));
                h[at + 1] = sums.extract(comptime!(2 * i + 1));
            }
        }
    }
    if column == 0 {
        let sums = linear::read_sums();
        #[unroll]
        for i in 0..2usize {
            let row = row + comptime!(i as u32 * 8);
            if row < dim {
                z[state * tile.head_dim + row as usize] = sums.extract(i);
            }
        }
    }
}
