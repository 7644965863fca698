//! Block-sparse attention with 8-bit scores, and values in 16 bits or FP8, on Hopper.
//!
//! What it computes: `cubesla_kernels::attention`'s low-bit forward. Supported: what [`crate::forward`]
//! supports, with D a multiple of 16, and with FP8 values, key blocks that are multiples of 32.
//! Rejected by [`WgmmaLowBitPlan::new`], with the reason; the portable engine takes those problems.
//!
//! What it does beyond the 16-bit kernel, and why:
//! - Products of 8-bit operands run at twice the rate, and tiles are half as large.
//! - Both operands of such a product are K-major, so values are transposed when they are quantized, and
//!   their keys ordered as a unit holds its weights: weights never leave their registers.
//! - FP8 products add up with fewer bits than f32 has. Each tile's product is added to the f32
//!   accumulator by an FMA, which rescales it on the way.
//! - Quantization reads each element as seldom as it can: queries once, in the kernel itself; keys once, and a
//!   sample of them before, for their mean; values, in FP8, twice.

mod columns;
mod config;
mod consumer;
mod epilogue;
mod kernel;
mod producer;
mod queries;
mod rows;
mod scratch;
mod softmax;
mod values;

use std::fmt;

use columns::{ValueScales, mean_key};
use config::LowBitConfig;
use cubecl::ir::{DeviceProperties, ElemType, UIntKind};
use cubecl::prelude::*;
use cubesla_kernels::attention::{
    ForwardInputs, ForwardOutputs, LowBitFormats, LowBitScores, LowBitValues,
};
use cubesla_kernels::{AttentionProblem, Causal, DeviceTensor};
use kernel::{ScalesLaunch, low_bit_forward_wgmma};
use rows::quantize_keys;
use values::transpose_values;

use crate::forward::kernel::ForwardConfig;
use crate::forward::{WgmmaPlan, scalars, tensor_map};

/// 16-bit elements that a unit loads at once.
const LOAD: usize = 8;

/// How low-bit attention is run on Hopper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WgmmaLowBitPlan {
    forward: WgmmaPlan,
    formats: LowBitFormats,
}

impl WgmmaLowBitPlan {
    /// The plan for `problem`.
    ///
    /// # Errors
    /// Why the problem is not one for this kernel, in a few words.
    pub fn new(
        problem: &AttentionProblem,
        device: &DeviceProperties,
        formats: LowBitFormats,
    ) -> Result<Self, &'static str> {
        let mut forward = WgmmaPlan::of_one_item(problem, device)?;
        if !problem.head_dim().is_multiple_of(16) {
            return Err("bulk copies need rows of 8-bit elements that are multiples of 16 bytes");
        }
        if formats.values == LowBitValues::Fp8 && forward.tile.keys < 32 {
            return Err("products of 8-bit weights and values contract 32 keys at a time");
        }
        // Pairs of 8-bit elements.
        forward.tile.head_dim = problem.head_dim() / 2;
        // Tiles are smaller, so that there is room for one more.
        forward.tile.stages = 5;
        Ok(Self { forward, formats })
    }

    fn config(&self, problem: &AttentionProblem) -> LowBitConfig {
        LowBitConfig {
            forward: ForwardConfig {
                tile: self.forward.tile,
                block_k: problem.block_k(),
                causal: problem.causal() != Causal::None,
                weighted: false,
            },
            int8: self.formats.scores == LowBitScores::Int8,
            fp8: self.formats.values == LowBitValues::Fp8,
        }
    }
}

impl fmt::Display for WgmmaLowBitPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.forward)
    }
}

/// Runs low-bit attention as `plan` says. The caller has checked lists and outputs against `problem`.
pub fn launch_low_bit_wgmma(
    client: &Client,
    problem: &AttentionProblem,
    plan: &WgmmaLowBitPlan,
    inputs: ForwardInputs<'_>,
    outputs: ForwardOutputs<'_>,
) {
    let ForwardInputs { q, k, v, list } = inputs;
    let config = plan.config(problem);
    let tile = config.forward.tile;
    let format = plan.formats.scores.format();
    let mean = mean_key(client, problem, k);
    let keys = quantize_keys(client, k, &mean, problem.block_k(), format);
    let fp8_values = config.fp8.then(|| {
        let scales = ValueScales::new(client, v);
        (transpose_values(client, v, &scales), scales)
    });
    let word = ElemType::UInt(UIntKind::U32);
    let (values, value_type) = match &fp8_values {
        Some((words, _)) => {
            let rows = config.products().value_dim;
            let swizzle = if tile.keys == 64 {
                TensorMapSwizzle::B64
            } else {
                TensorMapSwizzle::B32
            };
            (word_map(words, rows, tile.keys / 4, swizzle), word)
        }
        None => (tensor_map(v, tile.keys), problem.dtype().elem_type()),
    };
    // SAFETY: bulk copies stay inside the tensors by themselves; lists hold valid key blocks; the
    // log-sum-exp is written for rows below `query_len` only.
    unsafe {
        low_bit_forward_wgmma::launch_unchecked(
            client,
            CubeCount::Static(plan.forward.cubes as u32, 1, 1),
            CubeDim::new_1d(tile.units() as u32),
            AddressType::U32,
            tensor_map(q, tile.rows()),
            word_map(&keys.words, tile.keys, 32, TensorMapSwizzle::B128),
            values,
            tensor_map(outputs.out, 64),
            list.launch_arg(),
            ScalesLaunch::new(
                keys.scales.buffer_arg(),
                // Not read unless values are FP8.
                fp8_values
                    .as_ref()
                    .map_or(&mean, |(_, of_values)| &of_values.scales)
                    .buffer_arg(),
                mean.buffer_arg(),
            ),
            outputs.lse.buffer_arg(),
            scalars(problem, plan.forward.cubes),
            config,
            problem.dtype().elem_type(),
            value_type,
        );
    }
}

/// A map of words in boxes of `rows` rows and `columns` words.
fn word_map(
    words: &DeviceTensor<4>,
    rows: usize,
    columns: usize,
    swizzle: TensorMapSwizzle,
) -> TensorMapArg<Tiled> {
    TensorMapArg::new(
        TiledArgs {
            tile_size: [1, 1, rows, columns].into(),
        },
        words.tensor_arg(),
        ElemType::UInt(UIntKind::U32),
    )
    .with_swizzle(swizzle)
}
