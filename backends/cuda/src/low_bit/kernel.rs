//! The kernel: the producer and consumers of [`crate::forward`], with 8-bit products.
//!
//! Behind the consumers' warpgroups comes one of four warps: the first loads keys and values, the second loads
//! queries and finds their scales.

use cubecl::prelude::*;
use cubesla_kernels::block_list::BlockListView;

use super::config::LowBitConfig;
use super::consumer::consume;
use super::producer::produce;
use super::queries::produce_queries;
use super::scratch::Scratch;
use crate::forward::config::Memory;
use crate::forward::kernel::{ForwardScalars, init_barriers};
use crate::ptx::{barrier, low_bit, wgmma};

/// Block-sparse attention on 8-bit queries and keys. Grid: as of the 16-bit kernel.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn low_bit_forward_wgmma<F: Float, V: Numeric>(
    q: &TensorMap<F, Tiled>,   // [B, Hq, Lq, D]
    k: &TensorMap<u32, Tiled>, // [B, Hkv, Lk, D / 4]
    v: &TensorMap<V, Tiled>,   // [B, Hkv, Lk, Dv], or words of FP8 [B, Hkv, Dv, Lk / 4]
    out: &TensorMap<F, Tiled>, // [B, Hq, Lq, Dv]
    list: &BlockListView,      // [B, Hq, M, N]
    scales: &Scales,
    lse: &mut [f32], // [B, Hq, Lq]
    scalars: ForwardScalars,
    #[comptime] config: LowBitConfig,
    #[define(F)] _dtype: ElemType,
    #[define(V)] _value_type: ElemType,
) {
    let tile = comptime!(config.forward.tile);
    let memory = Memory::with_tiles(
        tile,
        comptime!(config.query_bytes()),
        comptime!(config.value_bytes()),
    );
    let scratch = Scratch::new(config);
    low_bit::declare_registers(config.products());

    let consumers = comptime!(tile.consumers as u32);
    if UNIT_POS == 0 {
        scratch.init();
        init_barriers(memory, tile);
        barrier::init(memory.measured(), 1);
        barrier::fence_init();
    }
    sync_cube();

    if UNIT_POS >= consumers * 128 {
        if comptime!(config.registers().is_some()) {
            wgmma::shrink_registers(comptime!(config.registers().unwrap().0));
        }
        let warp = UNIT_POS / 32 - consumers * 4;
        if warp == 1 {
            produce_queries::<F>(q, list, &scales.mean, memory, scratch, scalars, config);
        } else if warp == 0 {
            produce::<V>(k, v, list, scales, scratch, memory, scalars, config);
        }
    } else {
        if comptime!(config.registers().is_some()) {
            wgmma::grow_registers(comptime!(config.registers().unwrap().1));
            if comptime!(tile.products().value_dim < 128) {
                wgmma::claim_registers();
            }
        }
        consume::<F>(out, scales, lse, scratch, memory, scalars, config);
    }
}

/// What turns products of codes into scores and outputs.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Scales {
    /// Of blocks of keys, `[B, Hkv, N]`.
    pub keys: Box<[f32]>,
    /// Of columns of FP8 values, `[B, Hkv, Dv]`.
    pub values: Box<[f32]>,
    /// What smoothing took from all keys of a head, `[B, Hkv, D]`.
    pub mean: Box<[f32]>,
}
