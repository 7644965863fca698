//! The Hopper kernel of SLA and SLA2: block-sparse attention whose epilogue is the linear branch.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::{generic_to_shared, tensor_map_address};
use cubesla_kernels::block_list::BlockListView;
use cubesla_kernels::linear::FeatureMap;

use super::epilogue::{Epilogue, finish};
use crate::forward::config::{Memory, next_note, tile_bytes};
use crate::forward::consumer::Consumer;
use crate::forward::epilogue::end_stores;
use crate::forward::kernel::{ForwardConfig, ForwardScalars, Item, Work, init_barriers};
use crate::forward::producer::{Producer, Source};
use crate::forward::softmax::RowPair;
use crate::linear::branch::map_queries;
use crate::ptx::{barrier, linear, wgmma};

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SlaConfig {
    pub forward: ForwardConfig,
    pub phi: FeatureMap,
    /// Whether states belong to query blocks, rather than to heads.
    pub per_block: bool,
    /// SLA's projection, rather than SLA2's weight.
    pub projects: bool,
    /// Whether the sparse branch is read, in tiles of 64 rows, and not computed.
    pub given: bool,
    /// Whether the branches and the log-sum-exp are written too, those that are computed.
    pub save: bool,
}

impl SlaConfig {
    /// Bytes of a tile of states.
    pub fn state_bytes(&self) -> usize {
        let products = self.forward.tile.products();
        tile_bytes(products.head_dim, products.value_dim)
    }

    /// Bytes of the projection.
    pub fn weight_bytes(&self) -> usize {
        let dv = self.forward.tile.products().value_dim;
        if self.projects { tile_bytes(dv, dv) } else { 0 }
    }

    /// As of the forward, whose loop needs them.
    pub fn registers(&self) -> Option<(u32, u32)> {
        let tile = self.forward.tile;
        if !self.given {
            return tile.registers();
        }
        let products = tile.products();
        let linear = if self.projects {
            products.value_dim / 4
        } else {
            0
        };
        let named = products.value_dim / 2 + products.head_dim / 4 + products.keys / 2 + linear;
        (tile.consumers == 2 && named > 150).then_some((24, 216))
    }

    /// Bytes of shared memory.
    pub fn shared_memory(&self) -> usize {
        self.forward.tile.shared_memory() + self.state_bytes() + self.weight_bytes() + 3 * 8
    }
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct SlaScalars {
    pub forward: ForwardScalars,
    /// Distances between the logits of neighbouring heads and query blocks; 0 if they share one.
    pub logit_head: u32,
    pub logit_block: u32,
}

/// Shared addresses of the linear branch.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct LinearMemory {
    /// `H`, a tile of D rows.
    pub states: u32,
    /// `Wl^T`, a tile of Dv rows.
    pub weights: u32,
    barriers: u32,
}

#[cube]
impl LinearMemory {
    /// Completes when an item's states have arrived.
    pub fn state_full(&self) -> u32 {
        self.barriers
    }

    /// Completes when every consumer has used them.
    pub fn state_empty(&self) -> u32 {
        self.barriers + 8
    }

    /// Completes once, when the projection has arrived.
    pub fn weights_full(&self) -> u32 {
        self.barriers + 16
    }
}

/// Where an item's states are: `H` at `(head, batch)` of its map, `Z` from `start` on.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct StatePlace {
    pub head: u32,
    pub batch: u32,
    pub start: usize,
}

#[cube]
impl StatePlace {
    pub fn new(
        list: &BlockListView,
        item: Item,
        scalars: ForwardScalars,
        #[comptime] config: SlaConfig,
    ) -> StatePlace {
        let rows = comptime!(config.forward.tile.rows() as u32);
        let mut head = item.head / scalars.group;
        let mut batch = item.batch;
        let mut heads = scalars.heads / scalars.group;
        if config.per_block {
            head = item.first_query / rows;
            batch = item.batch * scalars.heads + item.head;
            heads = list.query_blocks;
        }
        let dim = comptime!(config.forward.tile.head_dim);
        StatePlace {
            head,
            batch,
            start: (batch as usize * heads as usize + head as usize) * dim,
        }
    }
}

/// SLA and SLA2, forward. Cubes and items are those of the forward of block-sparse attention.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn sla_forward_wgmma<F: Float>(
    q: &TensorMap<F, Tiled>,          // [B, Hq, Lq, D]
    k: &TensorMap<F, Tiled>,          // [B, Hkv, Lk, D]
    v: &TensorMap<F, Tiled>,          // [B, Hkv, Lk, Dv]
    h: &TensorMap<F, Tiled>,          // [B, Hkv, D, Dv], or of each query block [B Hq, M, D, Dv]
    wl: &TensorMap<F, Tiled>,         // Wl^T [1, 1, Dv, Dv]; not read by SLA2
    out: &TensorMap<F, Tiled>,        // [B, Hq, Lq, Dv]
    sparse: &TensorMap<F, Tiled>,     // the same, written if saved, read if given
    linear_out: &TensorMap<F, Tiled>, // the same
    z: &[f32],                        // as h, without Dv
    weights: &[f32],                  // bl [Dv] of SLA, logits of SLA2
    list: &BlockListView,             // [B, Hq, M, N]
    lse: &mut [f32],                  // [B, Hq, Lq], written if saved
    scalars: SlaScalars,
    #[comptime] config: SlaConfig,
    #[define(F)] _dtype: ElemType,
) {
    let forward = comptime!(config.forward);
    let tile = comptime!(forward.tile);
    let states = Shared::<[u32]>::new_aligned_slice(comptime!(config.state_bytes() / 4), 1024usize);
    let projection = Shared::<[u32]>::new_aligned_slice(
        comptime!((config.weight_bytes() / 4).max(1)),
        1024usize,
    );
    let barriers = Shared::<[u64]>::new_aligned_slice(3usize, 16usize);
    let extra = LinearMemory {
        states: generic_to_shared::<u32>(states.as_ptr()),
        weights: generic_to_shared::<u32>(projection.as_ptr()),
        barriers: generic_to_shared::<u64>(barriers.as_ptr()),
    };
    let memory = Memory::new(tile);
    wgmma::declare_registers(tile.products());
    if config.projects {
        linear::declare_linear(tile.products());
    }

    let consumers = comptime!(tile.consumers as u32);
    if UNIT_POS == 0 {
        init_barriers(memory, tile);
        barrier::init(extra.state_full(), 1);
        barrier::init(extra.state_empty(), consumers);
        barrier::init(extra.weights_full(), 1);
        barrier::fence_init();
    }
    sync_cube();

    let items = scalars.forward;
    if UNIT_POS >= consumers * 128 {
        if comptime!(config.registers().is_some()) {
            wgmma::shrink_registers(comptime!(config.registers().unwrap().0));
        }
        if UNIT_POS == consumers * 128 {
            let products = comptime!(tile.products());
            let mut producer = Producer::new(q, k, v, forward);
            let h = tensor_map_address(h);
            let mut parity = 0u32;
            if config.projects {
                let source = Source { head: 0, batch: 0 };
                let full = extra.weights_full();
                barrier::arrive_expect(full, comptime!(config.weight_bytes() as u32));
                let wl = tensor_map_address(wl);
                source.load(
                    extra.weights,
                    wl,
                    full,
                    0,
                    products.value_dim,
                    products.value_dim,
                );
            }
            let mut index = CUBE_POS_X;
            while index < items.items {
                let work = Work::new(list, index, items, forward).never_empty();
                let item = work.item;
                producer.load_queries(item, memory);
                if config.given {
                    producer.load_rows(tensor_map_address(sparse), item, memory);
                } else {
                    producer.load_tiles(list, work, memory, items);
                }
                let place = StatePlace::new(list, item, items, config);
                let source = Source {
                    head: place.head,
                    batch: place.batch,
                };
                barrier::wait(extra.state_empty(), parity ^ 1);
                parity ^= 1;
                let full = extra.state_full();
                barrier::arrive_expect(full, comptime!(config.state_bytes() as u32));
                source.load(
                    extra.states,
                    h,
                    full,
                    0,
                    products.head_dim,
                    products.value_dim,
                );
                index += CUBE_COUNT_X;
            }
        }
    } else {
        if comptime!(config.registers().is_some()) {
            wgmma::grow_registers(comptime!(config.registers().unwrap().1));
        }
        let mut consumer = Consumer::new(forward);
        let mut epilogue = Epilogue {
            out: tensor_map_address(out),
            sparse: tensor_map_address(sparse),
            linear: tensor_map_address(linear_out),
            parity: 0,
            config,
        };
        let mut index = CUBE_POS_X;
        while index < items.items {
            if config.given {
                consumer.take_queries(true, memory);
            } else {
                consumer.begin(true, memory);
            }
            let item = Item::read(memory, consumer.note);
            consumer.note = next_note(consumer.note);
            let place = StatePlace::new(list, item, items, config);
            let mut rows = RowPair::new(item.first_query);
            if !config.given {
                consumer.attend(&mut rows, item.tiles, memory, items);
                wgmma::wait(0u32);
                consumer.release_values(memory);
            }
            let denominators = map_queries(z, place.start, tile, config.phi);
            if config.given {
                // Not before: rows beside what becomes `phi(Q)` in f32 are more than there are registers.
                consumer.take_rows(memory);
            }
            finish(
                &mut epilogue,
                denominators,
                weights,
                lse,
                memory,
                extra,
                item,
                &rows,
                scalars,
            );
            index += CUBE_COUNT_X;
        }
        end_stores();
    }
}
