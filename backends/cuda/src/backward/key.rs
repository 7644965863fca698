//! `dK` and `dV` on Hopper: 64 keys of a block walk the query blocks that selected it.
//!
//! Keys and values lie still in shared memory; queries, with their rows' statistics, and output
//! gradients come through rings of their own, as they are needed for different times. Each warpgroup
//! takes 64 rows of every query block, and the second's sums are added to the first's at the end.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use cubesla_kernels::block_list::{BlockWeightsView, InverseListView};

use super::query::weighted_lse;
use super::walk::Walk;
use crate::forward::config::{Place, tile_bytes};
use crate::forward::epilogue::stage_group;
use crate::forward::producer::Source;
use crate::ptx::tma::L2;
use crate::ptx::wgmma::Products;
use crate::ptx::{backward, barrier, math, tma, wgmma};

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct KeyConfig {
    /// D, and Dv.
    pub dim: usize,
    pub bf16: bool,
    /// Warpgroups that compute: a query block has 64 rows for each.
    pub consumers: usize,
    pub block_k: usize,
    /// Query blocks in flight.
    pub query_stages: usize,
    /// Their output gradients in flight.
    pub grad_stages: usize,
    /// Whether blocks have weights.
    pub weighted: bool,
}

impl KeyConfig {
    pub fn rows(&self) -> usize {
        64 * self.consumers
    }

    pub fn units(&self) -> usize {
        128 * (self.consumers + 1)
    }

    fn consumer_units(&self) -> u32 {
        128 * self.consumers as u32
    }

    /// As for the forward; both accumulators are the consumers', and 24 are too few for the producers.
    fn registers(&self) -> Option<(u32, u32)> {
        (self.consumers == 2 && self.dim > 64).then_some((40, 232))
    }

    pub fn products(&self) -> Products {
        let dim = match self.dim.next_multiple_of(16) {
            // ptxas ignores `setmaxnreg` in kernels of these, and then spills and serializes: columns
            // of zeros cost less.
            80 | 96 if self.consumers == 2 => 112,
            dim => dim,
        };
        Products {
            head_dim: dim,
            value_dim: dim,
            keys: 64,
            bf16: self.bf16,
        }
    }

    fn key_bytes(&self) -> usize {
        tile_bytes(64, self.dim)
    }

    pub fn query_bytes(&self) -> usize {
        tile_bytes(self.rows(), self.dim)
    }
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct KeyScalars {
    pub heads: u32,
    /// Query heads to a key head.
    pub group: u32,
    pub query_len: u32,
    pub scale: f32,
}

/// Shared addresses.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct KeyMemory {
    pub keys: u32,
    pub values: u32,
    /// Stages of queries.
    pub queries: u32,
    /// Stages of output gradients.
    pub grads: u32,
    /// Base-2 log-sum-exps, then deltas, of the rows of each stage of queries.
    pub statistics: u32,
    barriers: u32,
}

#[cube]
impl KeyMemory {
    pub fn owned_full(&self) -> u32 {
        self.barriers
    }

    pub fn query_full(&self, stage: u32) -> u32 {
        self.barriers + 16 + stage * 16
    }

    pub fn query_empty(&self, stage: u32) -> u32 {
        self.query_full(stage) + 8
    }

    pub fn grad_full(&self, stage: u32, #[comptime] config: KeyConfig) -> u32 {
        self.query_full(comptime!(config.query_stages as u32) + stage)
    }

    pub fn grad_empty(&self, stage: u32, #[comptime] config: KeyConfig) -> u32 {
        self.grad_full(stage, config) + 8
    }
}

/// Grid: x = 64 keys, y = key head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn key_gradients_wgmma<F: Float>(
    q: &TensorMap<F, Tiled>,        // [B, Hq, Lq, D]
    k: &TensorMap<F, Tiled>,        // [B, Hkv, Lk, D]
    v: &TensorMap<F, Tiled>,        // [B, Hkv, Lk, D]
    grad_out: &TensorMap<F, Tiled>, // [B, Hq, Lq, D]
    dk: &TensorMap<F, Tiled>,       // [B, Hkv, Lk, D]
    dv: &TensorMap<F, Tiled>,       // [B, Hkv, Lk, D]
    inverse: &InverseListView,
    weights: &BlockWeightsView, // [B, Hq, M, N], not read if blocks have none
    lse: &[f32],                // [B, Hq, Lq]
    delta: &[f32],              // [B, Hq, Lq]
    scalars: KeyScalars,
    #[comptime] config: KeyConfig,
    #[define(F)] _dtype: ElemType,
) {
    let (query_stages, grad_stages) = (config.query_stages, config.grad_stages);
    let rows = comptime!(config.rows());
    let products = comptime!(config.products());
    let keys = Shared::<[u32]>::new_aligned_slice(comptime!(config.key_bytes() / 4), 1024usize);
    let values = Shared::<[u32]>::new_aligned_slice(comptime!(config.key_bytes() / 4), 1024usize);
    let mut ring = Shared::<[f32]>::new_aligned_slice(
        comptime!((query_stages + grad_stages) * config.query_bytes() / 4),
        1024usize,
    );
    let mut statistics =
        Shared::<[f32]>::new_aligned_slice(comptime!(query_stages * 2 * rows), 16usize);
    let barriers = Shared::<[u64]>::new_aligned_slice(
        comptime!(2 + 2 * (query_stages + grad_stages)),
        16usize,
    );
    let queries = generic_to_shared::<f32>(ring.as_ptr());
    let memory = KeyMemory {
        keys: generic_to_shared::<u32>(keys.as_ptr()),
        values: generic_to_shared::<u32>(values.as_ptr()),
        queries,
        grads: queries + comptime!((query_stages * config.query_bytes()) as u32),
        statistics: generic_to_shared::<f32>(statistics.as_ptr()),
        barriers: generic_to_shared::<u64>(barriers.as_ptr()),
    };
    wgmma::declare_registers(products);
    backward::declare(products, true);
    let consumers = comptime!(config.consumers as u32);
    if UNIT_POS == 0 {
        barrier::init(memory.owned_full(), 1);
        #[unroll]
        for stage in 0..comptime!(query_stages as u32) {
            // The bulk copies' arrival, and a warp's that writes statistics.
            barrier::init(memory.query_full(stage), 2);
            barrier::init(memory.query_empty(stage), consumers);
        }
        #[unroll]
        for stage in 0..comptime!(grad_stages as u32) {
            barrier::init(memory.grad_full(stage, config), 1);
            barrier::init(memory.grad_empty(stage, config), consumers);
        }
        barrier::fence_init();
    }
    sync_cube();

    let first_key = CUBE_POS_X * 64;
    let key_block = first_key / comptime!(config.block_k as u32);
    let first_head = CUBE_POS_Z * scalars.heads + CUBE_POS_Y * scalars.group;
    // Counted while registers are plenty.
    let mut tiles = 0u32;
    for member in 0..scalars.group {
        tiles += inverse.row(first_head + member, key_block).count;
    }
    if UNIT_POS >= consumers * 128 {
        if comptime!(config.registers().is_some()) {
            wgmma::shrink_registers(comptime!(config.registers().unwrap().0));
        }
        let warp = UNIT_POS / 32 - consumers * 4;
        let mut place = Place::first(query_stages);
        let mut grad_place = Place::first(grad_stages);
        if UNIT_POS == consumers * 128 {
            let source = Source {
                head: CUBE_POS_Y,
                batch: CUBE_POS_Z,
            };
            let full = memory.owned_full();
            barrier::arrive_expect(full, comptime!(2 * config.key_bytes() as u32));
            source.load(
                memory.keys,
                tensor_map_address(k),
                full,
                first_key,
                64usize,
                config.dim,
            );
            source.load(
                memory.values,
                tensor_map_address(v),
                full,
                first_key,
                64usize,
                config.dim,
            );
        }
        if warp < 2 {
            let q = tensor_map_address(q);
            let grad_out = tensor_map_address(grad_out);
            let bytes = comptime!(config.query_bytes() as u32);
            for member in 0..scalars.group {
                let head_index = first_head + member;
                let row = inverse.row(head_index, key_block);
                let source = Source {
                    head: CUBE_POS_Y * scalars.group + member,
                    batch: CUBE_POS_Z,
                };
                for at in 0..row.count {
                    let query_block = inverse.query_block(row, at);
                    let first = query_block * comptime!(rows as u32);
                    let full = memory.query_full(place.stage);
                    barrier::wait(memory.query_empty(place.stage), place.parity ^ 1);
                    if warp == 1 {
                        let start = head_index * scalars.query_len;
                        let mut bias = f32::new(0.0);
                        if config.weighted {
                            let weight = weights.at(head_index as usize, query_block, key_block);
                            bias = math::log2(weight);
                        }
                        #[unroll]
                        for step in 0..comptime!(rows / 32) {
                            let own = comptime!(step as u32 * 32) + UNIT_POS % 32;
                            let query = first + own;
                            // A row that does not exist has zero queries and gradients.
                            let mut row_lse = f32::new(0.0);
                            let mut row_delta = f32::new(0.0);
                            if query < scalars.query_len {
                                let at = (start + query) as usize;
                                row_lse = lse[at] * std::f32::consts::LOG2_E;
                                row_delta = delta[at];
                            }
                            if config.weighted {
                                row_lse = weighted_lse(row_lse, bias);
                            }
                            let to = (place.stage * comptime!(2 * rows as u32) + own) as usize;
                            statistics[to] = row_lse;
                            statistics[to + rows] = row_delta;
                        }
                        sync_plane();
                        if UNIT_POS % 32 == 0 {
                            barrier::arrive(full);
                        }
                    } else if UNIT_POS % 32 == 0 {
                        barrier::arrive_expect(full, bytes);
                        let to = memory.queries + place.stage * bytes;
                        source.load(to, q, full, first, rows, config.dim);
                        let stage = grad_place.stage;
                        barrier::wait(memory.grad_empty(stage, config), grad_place.parity ^ 1);
                        let full = memory.grad_full(stage, config);
                        barrier::arrive_expect(full, bytes);
                        let to = memory.grads + stage * bytes;
                        source.load(to, grad_out, full, first, rows, config.dim);
                    }
                    place.advance();
                    grad_place.advance();
                }
            }
        }
    } else {
        if comptime!(config.registers().is_some()) {
            wgmma::grow_registers(comptime!(config.registers().unwrap().1));
        }
        wgmma::clear_accumulator(products);
        backward::clear_key_gradient(products);
        barrier::wait(memory.owned_full(), 0);
        let mut walk = Walk::new(memory, scalars.scale, config);
        if tiles > 0 {
            walk.begin_scores();
            wgmma::wait(0u32);
            for t in 1..tiles {
                walk.add_tile(t > 1, true);
            }
            walk.add_tile(tiles > 1, false);
            wgmma::wait(0u32);
        }
        // Every product is done, and nothing is loaded any more: the ring and the keys are free.
        barrier::sync_named(1, comptime!(config.consumer_units()));
        if comptime!(config.consumers == 2) {
            share_sums(&mut ring, config);
        }
        if UNIT_POS < 128 {
            stage_sums(&ring, memory, scalars.scale, config);
            tma::fence_writes();
            barrier::sync_named(2, 128u32);
            if UNIT_POS == 0 {
                store(tensor_map_address(dk), memory.keys, first_key, config);
                store(tensor_map_address(dv), memory.values, first_key, config);
                tma::commit_stores();
                tma::wait_stores_read();
            }
        }
    }
}

/// The second warpgroup's sums, in shared memory for the first.
#[cube]
fn share_sums(ring: &mut Shared<[f32]>, #[comptime] config: KeyConfig) {
    let groups = comptime!(config.products().head_dim / 16);
    if UNIT_POS >= 128 {
        #[unroll]
        for group in 0..groups {
            let dv = wgmma::read_accumulator(group);
            let dk = backward::read_key_gradient(group);
            #[unroll]
            for i in 0..8usize {
                let at = comptime!((8 * group + i) * 128) + UNIT_POS as usize - 128;
                ring[at] = dv.extract(i);
                ring[at + comptime!(8 * groups * 128)] = dk.extract(i);
            }
        }
    }
    barrier::sync_named(1, comptime!(config.consumer_units()));
}

/// Writes the sums of all warpgroups, scaled and rounded, over the keys and values.
#[cube]
fn stage_sums(ring: &Shared<[f32]>, memory: KeyMemory, scale: f32, #[comptime] config: KeyConfig) {
    let format = comptime!(config.products().format());
    let groups = comptime!(config.products().head_dim / 16);
    #[unroll]
    for group in 0..groups {
        let dv = wgmma::read_accumulator(group);
        let dk = backward::read_key_gradient(group);
        let mut dv_words = Vector::<u32, Const<4>>::empty();
        let mut dk_words = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            let (a, b) = comptime!((2 * i, 2 * i + 1));
            let mut v0 = dv.extract(a);
            let mut v1 = dv.extract(b);
            let mut k0 = dk.extract(a);
            let mut k1 = dk.extract(b);
            if comptime!(config.consumers == 2) {
                let at = comptime!((8 * group + 2 * i) * 128) + UNIT_POS as usize;
                v0 += ring[at];
                v1 += ring[at + 128];
                k0 += ring[at + comptime!(8 * groups * 128)];
                k1 += ring[at + comptime!((8 * groups + 1) * 128)];
            }
            dv_words.insert(i, math::pack(v0, v1, format));
            dk_words.insert(i, math::pack(k0 * scale, k1 * scale, format));
        }
        stage_group(memory.values, UNIT_POS, dv_words, group);
        stage_group(memory.keys, UNIT_POS, dk_words, group);
    }
}

#[cube]
fn store(map: u64, from: u32, first_key: u32, #[comptime] config: KeyConfig) {
    #[unroll]
    for box_index in 0..comptime!(config.dim.div_ceil(64)) {
        tma::store(
            from + comptime!(box_index as u32 * 64 * 128),
            map,
            comptime!(box_index as u32 * 64),
            first_key,
            CUBE_POS_Y,
            CUBE_POS_Z,
            L2::Normal,
        );
    }
}
