//! The kernel: the producer and consumers of [`crate::forward`], with 8-bit products.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;
use cubesla_kernels::block_list::BlockListView;

use super::config::LowBitConfig;
use super::consumer::consume;
use super::producer::produce;
use crate::forward::config::Memory;
use crate::forward::kernel::{ForwardScalars, init_barriers};
use crate::ptx::{barrier, low_bit, wgmma};

/// Block-sparse attention on 8-bit queries and keys. Grid: as of the 16-bit kernel.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn low_bit_forward_wgmma<F: Float, V: Numeric>(
    q: &TensorMap<u32, Tiled>, // [B, Hq, Lq, D / 4]
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
    let memory = Memory::with_values(tile, comptime!(config.value_bytes()));
    low_bit::declare_registers(config.products());

    let consumers = comptime!(tile.consumers as u32);
    let bias = Shared::<[u32]>::new_aligned_slice(4usize, 16usize);
    let bias = generic_to_shared::<u32>(bias.as_ptr());
    if UNIT_POS == 0 {
        low_bit::write_bias(bias);
        init_barriers(memory, tile);
        barrier::fence_init();
    }
    sync_cube();

    if UNIT_POS >= consumers * 128 {
        if comptime!(config.registers().is_some()) {
            wgmma::shrink_registers(comptime!(config.registers().unwrap().0));
        }
        if UNIT_POS == consumers * 128 {
            produce::<V>(q, k, v, list, scales, memory, scalars, config);
        }
    } else {
        if comptime!(config.registers().is_some()) {
            wgmma::grow_registers(comptime!(config.registers().unwrap().1));
            if comptime!(tile.products().value_dim < 128) {
                wgmma::claim_registers();
            }
        }
        consume::<F>(out, scales, lse, bias, memory, scalars, config);
    }
}

/// What turns products of codes into scores and outputs.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Scales {
    /// Of blocks of queries, `[B, Hq, M]`.
    pub queries: Box<[f32]>,
    /// Of blocks of keys, `[B, Hkv, N]`.
    pub keys: Box<[f32]>,
    /// Of columns of FP8 values, `[B, Hkv, Dv]`.
    pub values: Box<[f32]>,
    /// `Q mean(K)^T`, which smoothing took from every score of a row, `[B, Hq, Lq]`.
    pub shift: Box<[f32]>,
}
