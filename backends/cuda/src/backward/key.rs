//! `dK` and `dV` on Hopper: 64 keys of a block walk the query blocks that selected it.
//!
//! Keys and values lie still in shared memory; queries, with their rows' statistics, and output
//! gradients come through rings of their own, as they are needed for different times. Each warpgroup takes 64 rows of every query block, and the second's sums
//! are added to the first's at the end.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use cubesla_kernels::block_list::InverseListView;

use crate::forward::config::{Place, tile_bytes};
use crate::forward::epilogue::stage_group;
use crate::forward::producer::Source;
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

    /// As for the forward; both accumulators are the consumers'.
    fn registers(&self) -> Option<(u32, u32)> {
        (self.consumers == 2 && self.dim > 64).then_some((24, 240))
    }

    fn products(&self) -> Products {
        let dim = self.dim.next_multiple_of(16);
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

    fn query_bytes(&self) -> usize {
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
struct Memory {
    keys: u32,
    values: u32,
    /// Stages of queries.
    queries: u32,
    /// Stages of output gradients.
    grads: u32,
    /// Base-2 log-sum-exps, then deltas, of the rows of each stage of queries.
    statistics: u32,
    barriers: u32,
}

#[cube]
impl Memory {
    fn owned_full(&self) -> u32 {
        self.barriers
    }

    fn query_full(&self, stage: u32) -> u32 {
        self.barriers + 16 + stage * 16
    }

    fn query_empty(&self, stage: u32) -> u32 {
        self.query_full(stage) + 8
    }

    fn grad_full(&self, stage: u32, #[comptime] config: KeyConfig) -> u32 {
        self.query_full(comptime!(config.query_stages as u32) + stage)
    }

    fn grad_empty(&self, stage: u32, #[comptime] config: KeyConfig) -> u32 {
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
    lse: &[f32],   // [B, Hq, Lq]
    delta: &[f32], // [B, Hq, Lq]
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
    let memory = Memory {
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
                    let first = inverse.query_block(row, at) * comptime!(rows as u32);
                    let full = memory.query_full(place.stage);
                    barrier::wait(memory.query_empty(place.stage), place.parity ^ 1);
                    if warp == 1 {
                        let start = head_index as usize * scalars.query_len as usize;
                        #[unroll]
                        for step in 0..comptime!(rows / 32) {
                            let own = comptime!(step as u32 * 32) + UNIT_POS_PLANE;
                            let query = first + own;
                            // A row that does not exist has zero queries and gradients.
                            let mut row_lse = f32::new(0.0);
                            let mut row_delta = f32::new(0.0);
                            if query < scalars.query_len {
                                row_lse = lse[start + query as usize] * std::f32::consts::LOG2_E;
                                row_delta = delta[start + query as usize];
                            }
                            let to = (place.stage * comptime!(2 * rows as u32) + own) as usize;
                            statistics[to] = row_lse;
                            statistics[to + rows] = row_delta;
                        }
                        sync_plane();
                        if UNIT_POS_PLANE == 0 {
                            barrier::arrive(full);
                        }
                    } else if UNIT_POS_PLANE == 0 {
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
        let mut tiles = 0u32;
        for member in 0..scalars.group {
            tiles += inverse.row(first_head + member, key_block).count;
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

/// Where a warpgroup stands in its walk over query blocks, of which it takes 64 rows each.
#[derive(CubeType)]
struct Walk {
    /// The queries whose scores are multiplied next.
    scores: Place,
    /// The queries that are added next, and their output gradients.
    queries: Place,
    grads: Place,
    memory: Memory,
    scale: f32,
    /// Told by one unit of each warp, so that ptxas knows that a warp's addresses are one, and counts
    /// them on its uniform units.
    warpgroup: u32,
    #[cube(comptime)]
    config: KeyConfig,
}

#[cube]
impl Walk {
    fn new(memory: Memory, scale: f32, #[comptime] config: KeyConfig) -> Walk {
        Walk {
            scores: Place::first(config.query_stages),
            queries: Place::first(config.query_stages),
            grads: Place::first(config.grad_stages),
            memory,
            scale,
            warpgroup: plane_broadcast(UNIT_POS / 128, 0u32),
            config,
        }
    }

    /// Address of the warpgroup's rows in a stage of the ring at `ring`.
    fn rows(&self, ring: u32, stage: u32) -> u32 {
        let bytes = comptime!(self.config.query_bytes() as u32);
        ring + stage * bytes + self.warpgroup * comptime!(64 * 128u32)
    }

    /// Begins `S^T = K Q^T` with the next queries.
    fn begin_scores(&mut self) {
        let config = comptime!(self.config);
        let stage = self.scores.stage;
        barrier::wait(self.memory.query_full(stage), self.scores.parity);
        let keys = wgmma::descriptor(self.memory.keys);
        let queries = wgmma::descriptor(self.rows(self.memory.queries, stage));
        wgmma::fence();
        backward::key_scores(keys, queries, config.rows(), config.products());
        wgmma::commit();
        self.scores.advance();
    }

    /// Adds a tile, whose scores are there, to both gradients.
    ///
    /// Scores and the gradients of probabilities take turns in the same registers: with registers of
    /// their own, both accumulators and the packed operands are more than a unit can have, and ptxas
    /// lets no product run beside anything. While weights are made, the keys' product of the tile
    /// before runs; while gradients of scores are made, the values'.
    fn add_tile(&mut self, others_before: bool, #[comptime] next: bool) {
        let config = comptime!(self.config);
        let products = comptime!(config.products());
        let rows = comptime!(config.rows());
        let memory = self.memory;
        let stage = self.queries.stage;
        let queries = self.rows(memory.queries, stage);
        let grads = self.rows(memory.grads, self.grads.stage);
        // Of the unit's first pair of rows.
        let own = self.warpgroup * 64 + UNIT_POS % 4 * 2;
        let log_sums = memory.statistics + (stage * comptime!(2 * rows as u32) + own) * 4;
        let deltas = log_sums + comptime!(4 * rows as u32);

        let weights = make_weights(log_sums, self.scale, config);
        wgmma::wait(0u32);
        if others_before {
            let stages = comptime!(config.query_stages as u32);
            if UNIT_POS % 128 == 0 {
                barrier::arrive(memory.query_empty((stage + stages - 1) % stages));
            }
        }
        write_words(&weights, false);
        let values = wgmma::descriptor(memory.values);
        barrier::wait(
            memory.grad_full(self.grads.stage, config),
            self.grads.parity,
        );
        wgmma::fence();
        backward::key_probability_gradients(values, wgmma::descriptor(grads), rows, products);
        wgmma::commit();
        wgmma::accumulate(wgmma::descriptor_transposed(grads, rows), false, products);
        wgmma::commit();
        wgmma::wait(1u32);
        let gradients = make_score_gradients(&weights, deltas, config);
        write_words(&gradients, true);
        if next {
            self.begin_scores();
        } else {
            wgmma::fence();
        }
        backward::accumulate_key_gradient(wgmma::descriptor_transposed(queries, rows), products);
        wgmma::commit();
        if next {
            wgmma::wait(1u32);
            if UNIT_POS % 128 == 0 {
                barrier::arrive(memory.grad_empty(self.grads.stage, config));
            }
        }
        self.queries.advance();
        self.grads.advance();
    }
}

/// `P^T = exp(scale S^T - L)` of the scores, packed. Word `4 s + 2 h + k`: two neighbouring queries of
/// half `h` of step `s`, of the unit's key `k`.
#[cube]
fn make_weights(log_sums: u32, scale: f32, #[comptime] config: KeyConfig) -> Array<u32> {
    let scale_log2 = scale * std::f32::consts::LOG2_E;
    let mut bits = 0u32.runtime();
    let mut weights = Array::<u32>::new(16usize);
    #[unroll]
    for step in 0..4usize {
        let scores = wgmma::read_score_step(0usize, step);
        #[unroll]
        for half in 0..2usize {
            let pair = math::load_pair(log_sums + comptime!((16 * step + 8 * half) as u32 * 4));
            let lse0 = f32::reinterpret(pair.extract(0usize));
            let lse1 = f32::reinterpret(pair.extract(1usize));
            #[unroll]
            for key in 0..2usize {
                let e = comptime!(4 * half + 2 * key);
                let p0 = math::exp2(fma(scores.extract(e), scale_log2, -lse0));
                let p1 = math::exp2(fma(scores.extract(comptime!(e + 1)), scale_log2, -lse1));
                let pair = math::pack(p0, p1, comptime!(config.products().format()));
                bits |= pair;
                weights[comptime!(4 * step + 2 * half + key)] = pair;
            }
        }
    }
    wgmma::compute_before(bits);
    weights
}

/// `dS^T = P^T (dP^T - delta)`, packed likewise, from the rounded weights, which hold half the
/// registers.
#[cube]
fn make_score_gradients(
    weights: &Array<u32>,
    deltas: u32,
    #[comptime] config: KeyConfig,
) -> Array<u32> {
    let format = comptime!(config.products().format());
    let mut packed = Array::<u32>::new(16usize);
    #[unroll]
    for step in 0..4usize {
        let gradients = wgmma::read_score_step(0usize, step);
        #[unroll]
        for half in 0..2usize {
            let pair = math::load_pair(deltas + comptime!((16 * step + 8 * half) as u32 * 4));
            let delta0 = f32::reinterpret(pair.extract(0usize));
            let delta1 = f32::reinterpret(pair.extract(1usize));
            #[unroll]
            for key in 0..2usize {
                let e = comptime!(4 * half + 2 * key);
                let word = comptime!(4 * step + 2 * half + key);
                let p = math::unpack(weights[word], format);
                let d0 = p.extract(0usize) * (gradients.extract(e) - delta0);
                let d1 = p.extract(1usize) * (gradients.extract(comptime!(e + 1)) - delta1);
                packed[word] = math::pack(d0, d1, format);
            }
        }
    }
    packed
}

/// Makes packed words an A operand: the gradients of scores, or the weights.
#[cube]
fn write_words(packed: &Array<u32>, #[comptime] gradients: bool) {
    #[unroll]
    for step in 0..4usize {
        let mut words = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            words.insert(i, packed[comptime!(4 * step + i)]);
        }
        if gradients {
            backward::write_score_gradient_step(words, step);
        } else {
            wgmma::write_probability_step(words, step);
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
fn stage_sums(ring: &Shared<[f32]>, memory: Memory, scale: f32, #[comptime] config: KeyConfig) {
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
        stage_group(memory.values, dv_words, group);
        stage_group(memory.keys, dk_words, group);
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
        );
    }
}
