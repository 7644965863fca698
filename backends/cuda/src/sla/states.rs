//! States of the marginal blocks of each query block, on Hopper.
//!
//! `H_i = sum phi(K_j)^T V_j` and `Z_i = sum phi(K_j)` over the marginal `j` of query block `i`: the
//! sums over all keys less those over the listed blocks, or the sums over listed marginal blocks
//! where those are the fewer. Sums are f32; what the kernel writes is rounded once.
//!
//! This is half the arithmetic of the portable form, which multiplies `phi(Q) phi(K_j)^T V_j` for
//! each listed block: here the queries come in once, at the end.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use cubesla_kernels::block_list::{BlockListView, KeyWalk, Walk, WalkExpand};

use crate::forward::config::{Place, tile_bytes};
use crate::forward::epilogue::stage_group;
use crate::forward::producer::Source;
use crate::linear::ring::{Ring, StateTile};
use crate::linear::states::add_tiles;
use crate::ptx::tma::L2;
use crate::ptx::{barrier, linear, math, tma, wgmma};

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StatesConfig {
    pub tile: StateTile,
    pub block_k: usize,
    /// Whether listed blocks are taken from the sums over all keys, rather than added up.
    pub subtract: bool,
    /// Whether there is a second list.
    pub second: bool,
}

impl StatesConfig {
    fn out_bytes(&self) -> usize {
        tile_bytes(64, self.tile.value_dim)
    }
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct StatesScalars {
    pub heads: u32,
    /// Query heads to a key head.
    pub group: u32,
    pub key_len: u32,
    /// What states are multiplied by; those over all keys have been.
    pub scale: f32,
}

/// States of one query block of one head: grid x = query block, y = query head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn marginal_states_wgmma<F: Float>(
    phi_k: &TensorMap<F, Tiled>, // [B, Hkv, Lk, D]
    v: &TensorMap<F, Tiled>,     // [B, Hkv, Lk, Dv]
    h: &TensorMap<F, Tiled>,     // [B Hq, M, D, Dv]
    z: &mut [f32],               // [B Hq, M, D]
    all_h: &[f32],               // [B, Hkv, D, Dv]; not read unless listed blocks are subtracted
    all_z: &[f32],               // [B, Hkv, D]
    first: &BlockListView,
    second: &BlockListView,
    scalars: StatesScalars,
    #[comptime] config: StatesConfig,
    #[define(F)] _dtype: ElemType,
) {
    let tile = config.tile;
    let ring = Ring::new(tile);
    let staging = Shared::<[u32]>::new_aligned_slice(
        comptime!(tile.consumers() * config.out_bytes() / 4),
        1024usize,
    );
    let out = generic_to_shared::<u32>(staging.as_ptr());
    wgmma::declare_registers(tile.products());
    linear::declare_sums();
    sync_cube();

    let consumers = comptime!(tile.consumers() as u32);
    let batch = CUBE_POS_Z;
    let head = CUBE_POS_Y;
    let head_index = batch * scalars.heads + head;
    let kv_head = head / scalars.group;
    let source = Source {
        head: kv_head,
        batch,
    };
    let first_walk = walk(first, head_index, scalars, config);
    let second_walk = walk(second, head_index, scalars, config);
    let mut listed = first_walk.row.count;
    let mut tiles = first_walk.tiles();
    if config.second {
        listed += second_walk.row.count;
        tiles += second_walk.tiles();
    }

    if UNIT_POS >= consumers * 128 {
        if UNIT_POS == consumers * 128 {
            let mut producer = Loader {
                phi_k: tensor_map_address(phi_k),
                v: tensor_map_address(v),
                place: Place::first(tile.stages),
                config,
            };
            producer.load(first, first_walk, source, ring);
            if config.second {
                producer.load(second, second_walk, source, ring);
            }
        }
    } else {
        add_tiles(tiles, ring, tile);
        let state = (batch * (scalars.heads / scalars.group) + kv_head) as usize;
        // Without a marginal block the subtraction leaves rounding errors, not zeros.
        let key_blocks = scalars.key_len.div_ceil(comptime!(config.block_k as u32));
        let mut kept = f32::new(1.0);
        if config.subtract {
            kept = select(listed < key_blocks, 1.0f32, 0.0f32);
        }
        let totals = Totals {
            h: state * comptime!(tile.head_dim * tile.value_dim),
            z: state * comptime!(tile.head_dim),
            scale: scalars.scale,
            kept,
        };
        let block = head_index * first.query_blocks + CUBE_POS_X;
        let target = StateTarget {
            map: tensor_map_address(h),
            head_index,
            block,
        };
        store_state(z, all_h, all_z, totals, target, out, config);
    }
}

#[cube]
fn walk(
    list: &BlockListView,
    head_index: u32,
    scalars: StatesScalars,
    #[comptime] config: StatesConfig,
) -> KeyWalk {
    KeyWalk {
        row: list.row(head_index, CUBE_POS_X),
        key_len: scalars.key_len,
        block_k: config.block_k,
        cols: config.tile.keys,
    }
}

/// The producer.
#[derive(CubeType)]
struct Loader {
    phi_k: u64,
    v: u64,
    place: Place,
    #[cube(comptime)]
    config: StatesConfig,
}

#[cube]
impl Loader {
    fn load(&mut self, list: &BlockListView, walk: KeyWalk, source: Source, ring: Ring) {
        let tile = comptime!(self.config.tile);
        let key_bytes = comptime!(tile.key_bytes() as u32);
        let value_bytes = comptime!(tile.value_bytes() as u32);
        for t in 0..walk.tiles() {
            let rows = walk.tile(list, t);
            let stage = self.place.stage;
            barrier::wait(ring.empty(stage), self.place.parity ^ 1);
            let full = ring.full(stage);
            barrier::arrive_expect(full, key_bytes + value_bytes);
            let to = ring.keys + stage * key_bytes;
            source.load(to, self.phi_k, full, rows.first, tile.keys, tile.head_dim);
            let to = ring.values + stage * value_bytes;
            source.load(to, self.v, full, rows.first, tile.keys, tile.value_dim);
            self.place.advance();
        }
    }
}

/// Where the sums over all keys are, what those over listed blocks are multiplied by, and what the
/// result is.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Totals {
    h: usize,
    z: usize,
    scale: f32,
    kept: f32,
}

/// Where the result goes.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct StateTarget {
    map: u64,
    head_index: u32,
    /// Query block of all.
    block: u32,
}

/// Brings the sums to their final form and stores them.
#[cube]
fn store_state(
    z: &mut [f32],
    all_h: &[f32],
    all_z: &[f32],
    totals: Totals,
    target: StateTarget,
    out: u32,
    #[comptime] config: StatesConfig,
) {
    let tile = config.tile;
    let products = comptime!(tile.products());
    let dim = comptime!(tile.head_dim as u32);
    let width = comptime!(tile.value_dim as u32);
    let warpgroup = UNIT_POS / 128;
    let row = UNIT_POS / 32 * 16 + UNIT_POS % 32 / 4;
    let column = UNIT_POS % 32 % 4 * 2;
    let staging = out + warpgroup * comptime!(config.out_bytes() as u32);
    #[unroll]
    for group in 0..comptime!(products.value_dim / 16) {
        let sums = wgmma::read_accumulator(group);
        let mut words = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            let row = row + comptime!((i % 2 * 8) as u32);
            let column = column + comptime!((16 * group + i / 2 * 8) as u32);
            let mut low = sums.extract(comptime!(2 * i)) * totals.scale;
            let mut high = sums.extract(comptime!(2 * i + 1)) * totals.scale;
            if config.subtract {
                if row < dim && column < width {
                    let at = totals.h + (row * width + column) as usize;
                    low = all_h[at] - low;
                    high = all_h[at + 1] - high;
                }
            }
            let format = comptime!(products.format());
            words.insert(i, math::pack(low * totals.kept, high * totals.kept, format));
        }
        stage_group(staging, UNIT_POS, words, group);
    }
    tma::fence_writes();
    // Named barrier 0 is the whole cube's.
    barrier::sync_named(warpgroup + 1, 128u32);
    if UNIT_POS % 128 == 0 {
        #[unroll]
        for box_index in 0..comptime!(tile.value_dim.div_ceil(64)) {
            tma::store(
                staging + comptime!(box_index as u32 * 64 * 128),
                target.map,
                comptime!(box_index as u32 * 64),
                warpgroup * 64,
                CUBE_POS_X,
                target.head_index,
                L2::Normal,
            );
        }
        tma::commit_stores();
    }
    if column == 0 {
        let sums = linear::read_sums();
        #[unroll]
        for i in 0..2usize {
            let row = row + comptime!(i as u32 * 8);
            if row < dim {
                let mut sum = sums.extract(i) * totals.scale;
                if config.subtract {
                    sum = all_z[totals.z + row as usize] - sum;
                }
                z[(target.block * dim + row) as usize] = sum * totals.kept;
            }
        }
    }
    if UNIT_POS % 128 == 0 {
        tma::wait_stores_read();
    }
}
