//! Linear attention's output on Hopper: `O = phi(Q) H / (phi(Q) . Z)`.
//!
//! Cubes stay and take one tile of queries after another; a producer loads the next tile while this
//! one is mapped, multiplied and stored.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use cubesla_kernels::linear::FeatureMap;

use super::branch::{keep_pass, map_queries};
use crate::forward::config::{WgmmaTile, tile_bytes};
use crate::forward::epilogue::{inverse, stage_group};
use crate::forward::producer::Source;
use crate::ptx::linear::passes;
use crate::ptx::tma::L2;
use crate::ptx::{barrier, linear, tma, wgmma};

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct OutputConfig {
    /// Two consumers; keys are the columns of a pass.
    pub tile: WgmmaTile,
    pub phi: FeatureMap,
}

impl OutputConfig {
    fn state_bytes(&self) -> usize {
        let products = self.tile.products();
        tile_bytes(products.head_dim, products.value_dim)
    }
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct OutputScalars {
    /// Tiles of queries of all heads.
    pub items: u32,
    /// Tiles of a head.
    pub tiles: u32,
    pub heads: u32,
    /// Query heads to a key head.
    pub group: u32,
}

/// Shared addresses.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Memory {
    queries: u32,
    states: u32,
    out: u32,
    barriers: u32,
}

#[cube]
impl Memory {
    fn query_full(&self) -> u32 {
        self.barriers
    }

    fn query_empty(&self) -> u32 {
        self.barriers + 8
    }

    fn state_full(&self) -> u32 {
        self.barriers + 16
    }

    fn state_empty(&self) -> u32 {
        self.barriers + 24
    }
}

/// Grid: x = cubes that share the items.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn linear_output_wgmma<F: Float>(
    q: &TensorMap<F, Tiled>,   // [B, Hq, Lq, D]
    h: &TensorMap<F, Tiled>,   // [B, Hkv, D, Dv]
    out: &TensorMap<F, Tiled>, // [B, Hq, Lq, Dv]
    z: &[f32],                 // [B, Hkv, D]
    scalars: OutputScalars,
    #[comptime] config: OutputConfig,
    #[define(F)] _dtype: ElemType,
) {
    let tile = config.tile;
    let products = comptime!(tile.products());
    let queries = Shared::<[u32]>::new_aligned_slice(comptime!(tile.query_bytes() / 4), 1024usize);
    let states = Shared::<[u32]>::new_aligned_slice(comptime!(config.state_bytes() / 4), 1024usize);
    let staging = Shared::<[u32]>::new_aligned_slice(
        comptime!(tile.consumers * tile.out_bytes() / 4),
        1024usize,
    );
    let barriers = Shared::<[u64]>::new_aligned_slice(4usize, 16usize);
    let memory = Memory {
        queries: generic_to_shared::<u32>(queries.as_ptr()),
        states: generic_to_shared::<u32>(states.as_ptr()),
        out: generic_to_shared::<u32>(staging.as_ptr()),
        barriers: generic_to_shared::<u64>(barriers.as_ptr()),
    };
    wgmma::declare_registers(products);
    linear::declare_linear(products);
    let consumers = comptime!(tile.consumers as u32);
    if UNIT_POS == 0 {
        barrier::init(memory.query_full(), 1);
        barrier::init(memory.query_empty(), consumers * 4);
        barrier::init(memory.state_full(), 1);
        barrier::init(memory.state_empty(), consumers);
        barrier::fence_init();
    }
    sync_cube();

    let rows = comptime!(tile.rows() as u32);
    let mut parity = 0u32;
    let mut index = CUBE_POS_X;
    if UNIT_POS == consumers * 128 {
        let q = tensor_map_address(q);
        let h = tensor_map_address(h);
        while index < scalars.items {
            let item = Item::new(index, scalars);
            barrier::wait(memory.query_empty(), parity ^ 1);
            let full = memory.query_full();
            barrier::arrive_expect(full, comptime!(tile.query_bytes() as u32));
            let source = Source {
                head: item.head,
                batch: item.batch,
            };
            let first = item.tile * rows;
            source.load(memory.queries, q, full, first, tile.rows(), tile.head_dim);
            barrier::wait(memory.state_empty(), parity ^ 1);
            let full = memory.state_full();
            barrier::arrive_expect(full, comptime!(config.state_bytes() as u32));
            let source = Source {
                head: item.head / scalars.group,
                batch: item.batch,
            };
            source.load(
                memory.states,
                h,
                full,
                0,
                products.head_dim,
                products.value_dim,
            );
            parity ^= 1;
            index += CUBE_COUNT_X;
        }
    } else if UNIT_POS < consumers * 128 {
        let out = tensor_map_address(out);
        let warpgroup = UNIT_POS / 128;
        while index < scalars.items {
            let item = Item::new(index, scalars);
            barrier::wait(memory.query_full(), parity);
            let warp_rows = memory.queries + UNIT_POS / 32 * comptime!(16 * 128u32);
            wgmma::load_queries(warp_rows, tile.rows(), products);
            sync_plane();
            if UNIT_POS % 32 == 0 {
                barrier::arrive(memory.query_empty());
            }
            let heads = scalars.heads / scalars.group;
            let state = (item.batch * heads + item.head / scalars.group) as usize;
            let dots = map_queries(z, state * tile.head_dim, tile, config.phi);
            let upper = inverse(dots.extract(0usize));
            let lower = inverse(dots.extract(1usize));

            barrier::wait(memory.state_full(), parity);
            let state = wgmma::descriptor_transposed(memory.states, products.head_dim);
            #[unroll]
            for pass in 0..comptime!(passes(products)) {
                wgmma::fence();
                linear::state_columns(state, pass, products);
                wgmma::commit();
                wgmma::wait(0u32);
                keep_pass(upper, lower, pass, products);
            }
            if UNIT_POS % 128 == 0 {
                barrier::arrive(memory.state_empty());
                tma::wait_stores_read();
            }
            // Named barrier 0 is the whole cube's.
            barrier::sync_named(warpgroup + 1, 128u32);
            let staging = memory.out + warpgroup * comptime!(tile.out_bytes() as u32);
            #[unroll]
            for group in 0..comptime!(products.value_dim / 16) {
                stage_group(staging, UNIT_POS, linear::read_linear_step(group), group);
            }
            tma::fence_writes();
            barrier::sync_named(warpgroup + 1, 128u32);
            if UNIT_POS % 128 == 0 {
                #[unroll]
                for box_index in 0..comptime!(tile.value_dim.div_ceil(64)) {
                    tma::store(
                        staging + comptime!(box_index as u32 * 64 * 128),
                        out,
                        comptime!(box_index as u32 * 64),
                        item.tile * rows + warpgroup * 64,
                        item.head,
                        item.batch,
                        L2::Normal,
                    );
                }
                tma::commit_stores();
            }
            parity ^= 1;
            index += CUBE_COUNT_X;
        }
        if UNIT_POS % 128 == 0 {
            tma::wait_stores_read();
        }
    }
}

/// One tile of queries of one head.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Item {
    tile: u32,
    head: u32,
    batch: u32,
}

#[cube]
impl Item {
    fn new(index: u32, scalars: OutputScalars) -> Item {
        let head = index / scalars.tiles;
        Item {
            tile: index % scalars.tiles,
            head: head % scalars.heads,
            batch: head / scalars.heads,
        }
    }
}
