//! `dQ` on Hopper: each query block walks its own list, with the forward's producer.
//!
//! Queries and output gradients stay in registers; keys and values come through the ring. With weights
//! of blocks each warp also writes the sum of its part of each tile's `dS`.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use cubesla_kernels::block_list::{BlockListView, BlockWeightsView};

use crate::forward::config::{Memory, Place, WgmmaTile, next_note};
use crate::forward::epilogue::{begin_staging, end_stores, stage_accumulator, store_staged};
use crate::forward::kernel::{ForwardConfig, ForwardScalars, Item, Work, init_barriers};
use crate::forward::producer::{Producer, Source, read_bias, read_keys};
use crate::ptx::{backward, barrier, math, wgmma};

/// As for the forward, with more for the consumers, who hold output gradients too.
fn registers(tile: WgmmaTile) -> Option<(u32, u32)> {
    // Tiles of 32 keys do with an even share, and ptxas ignores `setmaxnreg` there.
    (tile.consumers == 2 && tile.head_dim > 64 && tile.keys > 32).then_some((24, 240))
}

/// Shared addresses of the output gradients.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct GradMemory {
    grads: u32,
    full: u32,
    empty: u32,
}

/// Items and cubes are those of the forward.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn query_gradients_wgmma<F: Float>(
    q: &TensorMap<F, Tiled>,        // [B, Hq, Lq, D]
    k: &TensorMap<F, Tiled>,        // [B, Hkv, Lk, D]
    v: &TensorMap<F, Tiled>,        // [B, Hkv, Lk, D]
    grad_out: &TensorMap<F, Tiled>, // [B, Hq, Lq, D]
    dq: &TensorMap<F, Tiled>,       // [B, Hq, Lq, D]
    list: &BlockListView,
    weights: &BlockWeightsView, // [B, Hq, M, N], not read if blocks have none
    lse: &[f32],                // [B, Hq, Lq]
    delta: &[f32],              // [B, Hq, Lq]
    sums: &mut [f32], // [B, Hq, M, N, tiles of a block, warps], written if blocks have weights
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
    #[define(F)] _dtype: ElemType,
) {
    let tile = comptime!(config.tile);
    let grads = Shared::<[u32]>::new_aligned_slice(comptime!(tile.query_bytes() / 4), 1024usize);
    let barriers = Shared::<[u64]>::new_aligned_slice(2usize, 16usize);
    let at = generic_to_shared::<u64>(barriers.as_ptr());
    let extra = GradMemory {
        grads: generic_to_shared::<u32>(grads.as_ptr()),
        full: at,
        empty: at + 8,
    };
    let memory = Memory::new(tile);
    wgmma::declare_registers(tile.products());
    backward::declare(tile.products(), false);
    let consumers = comptime!(tile.consumers as u32);
    if UNIT_POS == 0 {
        init_barriers(memory, tile);
        barrier::init(extra.full, 1);
        barrier::init(extra.empty, consumers * 4);
        barrier::fence_init();
    }
    sync_cube();

    if UNIT_POS >= consumers * 128 {
        if comptime!(registers(tile).is_some()) {
            wgmma::shrink_registers(comptime!(registers(tile).unwrap().0));
        }
        if UNIT_POS == consumers * 128 {
            let grad_out = tensor_map_address(grad_out);
            let mut producer = Producer::new(q, k, v, config);
            let mut parity = 0u32;
            let mut index = CUBE_POS_X;
            while index < scalars.items {
                let work = Work::new(list, index, scalars, config);
                let item = work.item;
                producer.load_queries(item, memory);
                barrier::wait(extra.empty, parity ^ 1);
                parity ^= 1;
                barrier::arrive_expect(extra.full, comptime!(tile.query_bytes() as u32));
                let source = Source {
                    head: item.head,
                    batch: item.batch,
                };
                let first = item.first_query;
                source.load(
                    extra.grads,
                    grad_out,
                    extra.full,
                    first,
                    tile.rows(),
                    tile.head_dim,
                );
                if config.weighted {
                    producer.load_weighted_tiles(list, weights, 1.0, work, memory, scalars);
                } else {
                    producer.load_tiles(list, work, memory, scalars);
                }
                index += CUBE_COUNT_X;
            }
        }
    } else {
        if comptime!(registers(tile).is_some()) {
            wgmma::grow_registers(comptime!(registers(tile).unwrap().1));
        }
        let dq = tensor_map_address(dq);
        let mut keys = Place::first(tile.stages);
        let mut parity = 0u32;
        let mut note = 0u32;
        let mut index = CUBE_POS_X;
        while index < scalars.items {
            load_rows(memory, extra, parity, config);
            let item = Item::read(memory, note);
            note = next_note(note);
            parity ^= 1;
            let head_index = (item.batch * scalars.heads + item.head) as usize;
            let first = head_index * scalars.query_len as usize;
            let own_sums = OwnSums::new(weights, head_index, item, config);
            let row = item.first_query + UNIT_POS / 32 * 16 + UNIT_POS % 32 / 4;
            let upper = RowStatistics::new(lse, delta, first, row, scalars.query_len);
            let lower = RowStatistics::new(lse, delta, first, row + 8, scalars.query_len);
            wgmma::clear_accumulator(tile.products());
            for t in 0..item.tiles {
                add_tile(
                    &mut keys,
                    t,
                    memory,
                    upper,
                    lower,
                    sums,
                    own_sums,
                    scalars.scale,
                    config,
                );
            }
            wgmma::wait(0u32);
            if item.tiles > 0 {
                release_last(&keys, memory, config);
            }
            let staging = begin_staging(memory, config);
            stage_accumulator(staging, scalars.scale, scalars.scale, config);
            store_staged(dq, staging, item, config);
            index += CUBE_COUNT_X;
        }
        end_stores();
    }
}

/// What the softmax of one row left behind.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct RowStatistics {
    /// Log-sum-exp, base 2.
    lse: f32,
    delta: f32,
}

#[cube]
impl RowStatistics {
    fn new(lse: &[f32], delta: &[f32], first: usize, row: u32, len: u32) -> RowStatistics {
        // A row that does not exist has zero queries and gradients; its weights only must be finite.
        let mut statistics = RowStatistics {
            lse: 0.0,
            delta: 0.0,
        };
        if row < len {
            statistics.lse = lse[first + row as usize] * std::f32::consts::LOG2_E;
            statistics.delta = delta[first + row as usize];
        }
        statistics
    }

    /// The probability of a score.
    fn weight(self, score: f32, scale_log2: f32) -> f32 {
        math::exp2(fma(score, scale_log2, -self.lse))
    }
}

/// `L - log2(m)`, which makes weights of scores. A row whose blocks all have a weight of 0 has an `L` of
/// negative infinity, as its scores have.
#[cube]
pub(super) fn weighted_lse(lse: f32, bias: f32) -> f32 {
    let lowest = f32::new(-1.0e38);
    select(lse < lowest, lowest, lse) - bias
}

/// Where a warp's sums of the tiles of an item go: that of the keys `tile.keys t..` to
/// `start + step t`.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct OwnSums {
    start: usize,
    #[cube(comptime)]
    step: usize,
}

#[cube]
impl OwnSums {
    fn new(
        weights: &BlockWeightsView,
        head_index: usize,
        item: Item,
        #[comptime] config: ForwardConfig,
    ) -> OwnSums {
        let warps = comptime!(4 * config.tile.consumers);
        let query_block = item.first_query / comptime!(config.tile.rows() as u32);
        let row = head_index * weights.query_blocks as usize + query_block as usize;
        let tiles = weights.key_blocks as usize * comptime!(config.block_k / config.tile.keys);
        OwnSums {
            start: row * tiles * warps + UNIT_POS as usize / 32,
            step: warps,
        }
    }
}

/// Brings the next item's queries and output gradients into their registers.
#[cube]
fn load_rows(memory: Memory, extra: GradMemory, parity: u32, #[comptime] config: ForwardConfig) {
    let tile = comptime!(config.tile);
    let warp_rows = UNIT_POS / 32 * comptime!(16 * 128u32);
    barrier::wait(memory.query_full(0u32), parity);
    wgmma::load_queries(memory.queries + warp_rows, tile.rows(), tile.products());
    barrier::wait(extra.full, parity);
    backward::load_gradients(extra.grads + warp_rows, tile.rows(), tile.products());
    sync_plane();
    if UNIT_POS % 32 == 0 {
        barrier::arrive(memory.query_empty(0u32));
        barrier::arrive(extra.empty);
    }
}

/// Adds a tile's `dS K`, and stores the sum of the warp's `dS` if blocks have weights. The product with
/// the keys of the tile before it is in flight meanwhile.
#[cube]
fn add_tile(
    place: &mut Place,
    t: u32,
    memory: Memory,
    upper: RowStatistics,
    lower: RowStatistics,
    sums: &mut [f32],
    own_sums: OwnSums,
    scale: f32,
    #[comptime] config: ForwardConfig,
) {
    let tile = comptime!(config.tile);
    let products = comptime!(tile.products());
    let keys = memory.keys + place.stage * comptime!(tile.key_bytes() as u32);
    let values = memory.values + place.stage * comptime!(tile.value_bytes() as u32);
    barrier::wait(memory.key_full(place.stage), place.parity);
    wgmma::fence();
    wgmma::scores(wgmma::descriptor(keys), 0usize, products);
    wgmma::commit();
    barrier::wait(memory.value_full(place.stage), place.parity);
    wgmma::fence();
    backward::probability_gradients(wgmma::descriptor(values), products);
    wgmma::commit();
    wgmma::wait(1u32);
    // The product of the tile before is done too.
    if t > 0 {
        release_last(&*place, memory, config);
    }
    let mut upper = upper;
    let mut lower = lower;
    if config.weighted {
        let bias = read_bias(memory, place.stage);
        upper.lse = weighted_lse(upper.lse, bias);
        lower.lse = weighted_lse(lower.lse, bias);
    }
    // Weights are made while their gradients are being multiplied.
    let scale_log2 = scale * std::f32::consts::LOG2_E;
    let mut bits = 0u32.runtime();
    let mut weights = Array::<f32>::new(comptime!(tile.keys / 2));
    #[unroll]
    for step in 0..comptime!(tile.keys / 16) {
        let scores = wgmma::read_score_step(0usize, step);
        #[unroll]
        for i in 0..8usize {
            let row = if comptime!(i / 2 % 2 == 0) {
                upper
            } else {
                lower
            };
            let p = row.weight(scores.extract(i), scale_log2);
            bits |= u32::reinterpret(p);
            weights[comptime!(8 * step + i)] = p;
        }
    }
    if config.weighted {
        // Keys that do not exist are zeros for the product, but the sum would have their weights.
        let count = read_keys(memory, place.stage).count;
        if count < comptime!(tile.keys as u32) {
            #[unroll]
            for i in 0..comptime!(tile.keys / 2) {
                let at = comptime!((i / 4 * 8 + i % 2) as u32) + UNIT_POS % 4 * 2;
                weights[i] = select(at < count, weights[i], 0.0);
            }
        }
    }
    wgmma::compute_before(bits);
    wgmma::wait(0u32);
    let mut sum = 0.0f32.runtime();
    #[unroll]
    for step in 0..comptime!(tile.keys / 16) {
        let gradients = backward::read_gradient_step(step);
        let mut words = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            let row = if comptime!(i % 2 == 0) { upper } else { lower };
            let (at, next) = comptime!((2 * i, 2 * i + 1));
            let low = weights[comptime!(8 * step + at)] * (gradients.extract(at) - row.delta);
            let high = weights[comptime!(8 * step + next)] * (gradients.extract(next) - row.delta);
            if config.weighted {
                sum += low + high;
            }
            words.insert(i, math::pack(low, high, comptime!(products.format())));
        }
        wgmma::write_probability_step(words, 0usize, step);
    }
    // The producer may write the next note when the product is done.
    let mut first_key = 0u32.runtime();
    if config.weighted {
        first_key = read_keys(memory, place.stage).first;
    }
    wgmma::fence();
    wgmma::accumulate(
        wgmma::descriptor_transposed(keys, tile.keys),
        false,
        0usize,
        products,
    );
    wgmma::commit();
    if config.weighted {
        let sum = plane_sum(sum);
        if UNIT_POS % 32 == 0 {
            let tile = first_key as usize / comptime!(tile.keys);
            sums[own_sums.start + tile * own_sums.step] = sum;
        }
    }
    place.advance();
}

/// Hands the stage before `place` back to the producer.
#[cube]
fn release_last(place: &Place, memory: Memory, #[comptime] config: ForwardConfig) {
    let stages = comptime!(config.tile.stages as u32);
    let last = (place.stage + stages - 1) % stages;
    if UNIT_POS % 128 == 0 {
        barrier::arrive(memory.key_empty(last));
        barrier::arrive(memory.value_empty(last));
    }
}
