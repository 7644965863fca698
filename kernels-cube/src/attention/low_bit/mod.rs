//! Block-sparse attention with scores in INT8 or FP8, and values in their own type or in FP8.
//!
//! ```text
//! K' = K - mean(K)                     changes no softmax, and leaves less to quantize; of many keys
//!                                      the mean of a sample
//! S  = scale sQ sK (Q8 K8^T)           a scale to each block of queries and of keys
//! O  = (sV / 448) P8 V8 / rowsum(P)    FP8: P = exp(S - m) times 448, V with a scale to each column
//! ```
//!
//! INT8 products are summed in integers, exactly; those of FP8 in f32.
//!
//! Sources: SageAttention2++ (arXiv 2505.21136), SLA2 (arXiv 2602.12675). The log-sum-exp is that of
//! the smoothed scores plus `scale Q mean(K)^T`, so that it is the one of the scores themselves.
//!
//! Supported: what block-sparse attention supports, on the portable engine; in 16 bits also on warp-level
//! tensor cores, where head dimensions are multiples of 16.
//! Rejected, with a [`ProblemError`]: what [`AttentionProblem`] rejects; a list of another shape; wide
//! heads for which no tile fits the shared memory.

mod forward;
mod prepare;
mod rounded;
mod values;

pub use prepare::smoothing_sample;
pub use rounded::{RoundedInputs, rounded_inputs};

use std::fmt;

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;
use forward::{LowBitConfig, LowBitScalarsLaunch, low_bit_forward};
use prepare::{mean_key, quantize_blocks};
use values::quantize_values;

use crate::engine::{
    CodeEngine, Mma, Simt, Tile, TileNeeds, mma_codes_supported, mma_supported, mma_tile, no_tile,
    simt_tile,
};
use crate::limits::{expect_bindings, expect_loop_budget, grid};
use crate::quantize::Format;
use crate::{AttentionProblem, BlockList, Causal, DType, DeviceTensor, ProblemError};

use super::{ForwardInputs, ForwardOutputs, check_forward};

/// What `Q K^T` is computed in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LowBitScores {
    /// INT8.
    #[default]
    Int8,
    /// FP8 e4m3.
    Fp8,
}

impl LowBitScores {
    /// The format of quantization.
    pub fn format(self) -> Format {
        match self {
            Self::Int8 => Format::Int8,
            Self::Fp8 => Format::Fp8,
        }
    }
}

/// What `P V` is computed in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LowBitValues {
    /// The inputs' type.
    #[default]
    Full,
    /// FP8 e4m3.
    Fp8,
}

/// Formats of low-bit attention; by default those that keep the most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LowBitFormats {
    /// Of queries and keys.
    pub scores: LowBitScores,
    /// Of weights and values.
    pub values: LowBitValues,
}

impl LowBitFormats {
    /// Scores in INT8, weights and values in the inputs' type.
    pub const INT8: Self = Self {
        scores: LowBitScores::Int8,
        values: LowBitValues::Full,
    };
    /// Scores in INT8, weights and values in FP8.
    pub const INT8_FP8: Self = Self {
        scores: LowBitScores::Int8,
        values: LowBitValues::Fp8,
    };
    /// All of them in FP8.
    pub const FP8: Self = Self {
        scores: LowBitScores::Fp8,
        values: LowBitValues::Fp8,
    };
}

/// Low-bit rows and their scales.
struct LowBit {
    /// Four elements to a word, `[B, H, L, D / 4]`.
    words: BufferArg,
    scales: BufferArg,
}

/// An error if low bits are asked of a problem that has none: one whose products are tf32's.
///
/// # Errors
/// [`ProblemError::NotSupported`].
pub fn expect_low_bit(problem: &AttentionProblem) -> Result<(), ProblemError> {
    problem.refuse_tf32("low-bit attention")
}

/// How low-bit attention is run: the engine and its sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LowBitPlan {
    /// The portable engine.
    Simt(Tile),
    /// Warp-level tensor cores.
    Mma(Tile),
}

impl LowBitPlan {
    /// The plan for warp-level tensor cores: INT8 by products of INT8, FP8 by those of 16 bits.
    ///
    /// # Errors
    /// Why they cannot run the problem on the device, in a few words.
    pub fn mma(
        problem: &AttentionProblem,
        device: &DeviceProperties,
        formats: LowBitFormats,
    ) -> Result<Self, &'static str> {
        if problem.dtype() == DType::F32 {
            return Err("it keeps weights and values in 16 bits");
        }
        let factors = problem.factors();
        mma_supported(factors, device)?;
        // Values have codes in FP8 only.
        let coded = match formats.values {
            LowBitValues::Full => vec![problem.head_dim()],
            LowBitValues::Fp8 => vec![problem.head_dim(), problem.value_dim()],
        };
        if coded.iter().any(|width| !width.is_multiple_of(16)) {
            return Err("rows of codes are not whole vectors of 16 bytes");
        }
        if formats.scores == LowBitScores::Int8 {
            mma_codes_supported(Format::Int8, device)?;
        }
        // Codes take half the room of 16 bits.
        mma_tile(&needs(problem, formats, 2), factors, device).map(Self::Mma)
    }

    /// The plan for the portable engine.
    ///
    /// # Errors
    /// Why it cannot run the problem on the device, in a few words.
    pub fn simt(
        problem: &AttentionProblem,
        device: &DeviceProperties,
        formats: LowBitFormats,
    ) -> Result<Self, &'static str> {
        // Codes take a quarter of the room of f32.
        simt_tile(&needs(problem, formats, 4), &device.hardware)
            .map(Self::Simt)
            .ok_or("no tile of these head dimensions fits the shared memory")
    }

    /// The fastest of them.
    ///
    /// # Errors
    /// [`ProblemError::NoPlan`] if none can run the problem.
    pub(crate) fn fastest(
        problem: &AttentionProblem,
        device: &DeviceProperties,
        formats: LowBitFormats,
    ) -> Result<Self, ProblemError> {
        Self::mma(problem, device, formats)
            .or_else(|_| Self::simt(problem, device, formats))
            .map_err(|_| no_tile(device))
    }

    /// An error if the device would leave the loops of this plan early, or binds too few buffers.
    ///
    /// # Errors
    /// A [`ProblemError`] that says so.
    pub(crate) fn expect_device(
        &self,
        client: &Client,
        problem: &AttentionProblem,
        list: &BlockList,
    ) -> Result<(), ProblemError> {
        let device = client.properties();
        expect_bindings(device, "low-bit attention", 13)?;
        let (Self::Simt(tile) | Self::Mma(tile)) = *self;
        let iterations = loop_iterations(problem, tile, list);
        expect_loop_budget(device, "low-bit attention", iterations)?;
        prepare::expect_budget(client, problem)
    }
}

impl fmt::Display for LowBitPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Simt(tile) => write!(f, "simt {tile}"),
            Self::Mma(tile) => write!(f, "mma {tile}"),
        }
    }
}

/// What a tile program needs whose elements have the room of `codes` codes.
fn needs(problem: &AttentionProblem, formats: LowBitFormats, codes: usize) -> TileNeeds {
    let (d, dv) = (problem.head_dim(), problem.value_dim());
    let width = match formats.scores {
        LowBitScores::Int8 => d / codes,
        LowBitScores::Fp8 => d,
    };
    TileNeeds {
        owned: vec![width],
        streamed: vec![width, dv],
        accumulators: vec![dv],
        lefts: 1,
        max_rows: problem.block_q(),
        max_cols: problem.block_k(),
        max_stages: 1,
        unit_bytes: 0,
    }
}

/// Runs low-bit block-sparse attention. Nothing is launched if an argument is refused.
///
/// # Errors
/// The module's refusals.
pub fn launch_low_bit(
    client: &Client,
    problem: &AttentionProblem,
    plan: &LowBitPlan,
    inputs: ForwardInputs<'_>,
    outputs: ForwardOutputs<'_>,
    formats: LowBitFormats,
) -> Result<(), ProblemError> {
    check_forward(client, problem, &inputs, &outputs)?;
    expect_low_bit(problem)?;
    plan.expect_device(client, problem, inputs.list)?;
    match *plan {
        LowBitPlan::Simt(tile) => {
            launch::<Simt>(client, problem, tile, inputs, outputs, formats, [4, 4, 1])
        }
        LowBitPlan::Mma(tile) => {
            launch::<Mma>(client, problem, tile, inputs, outputs, formats, [8, 2, 4])
        }
    }
}

/// Launches the kernel with engine `E`, which loads vectors of `load` elements where rows are
/// aligned, stores vectors of `store`, and loads vectors of `words` words of codes.
fn launch<E: CodeEngine<low_bit_forward::F>>(
    client: &Client,
    problem: &AttentionProblem,
    tile: Tile,
    inputs: ForwardInputs<'_>,
    outputs: ForwardOutputs<'_>,
    formats: LowBitFormats,
    [load, store, words]: [usize; 3],
) -> Result<(), ProblemError> {
    let ForwardInputs { q, k, v, list } = inputs;
    let device = client.properties();
    let tiles = problem.query_blocks() * problem.block_q().div_ceil(tile.rows);
    let grid = grid(
        device,
        [
            ("tiles of query rows", tiles),
            ("Hq", problem.query_heads()),
            ("B", problem.batch()),
        ],
    )?;

    let mean = mean_key(client, k)?;
    let format = formats.scores.format();
    let queries = quantize_blocks(client, q, problem.block_q(), None, format)?;
    let keys = quantize_blocks(client, k, problem.block_k(), Some(&mean), format)?;
    let fp8 = match formats.values {
        LowBitValues::Full => None,
        LowBitValues::Fp8 => Some(quantize_values(client, v)?),
    };
    // Arguments of a variant that does not use them.
    let nothing = || DeviceTensor::<1>::empty(client, [4], DType::F32).buffer_arg();
    let (v_words, v_scales) = match fp8 {
        Some(LowBit { words, scales }) => (words, scales),
        None => (nothing(), nothing()),
    };
    let extent = q.extent().max(v.extent()).max(outputs.out.extent());
    let load = if problem.is_aligned() { load } else { 1 };
    // SAFETY: the problem was validated against the tensors, whose buffers hold their shapes; the
    // kernel masks the rows and keys past the ends.
    unsafe {
        low_bit_forward::launch_unchecked::<E>(
            client,
            grid,
            CubeDim::new_1d(tile.units as u32),
            AddressType::from_len(extent),
            load,
            store,
            words,
            q.tensor_arg(),
            queries.words,
            queries.scales,
            keys.words,
            keys.scales,
            mean.buffer_arg(),
            v.tensor_arg(),
            v_words,
            v_scales,
            list.launch_arg(),
            outputs.out.buffer_arg(),
            outputs.lse.buffer_arg(),
            LowBitScalarsLaunch::new(
                problem.scale(),
                problem.causal_shift(),
                problem.query_blocks() as u32,
                problem.key_blocks() as u32,
            ),
            LowBitConfig {
                tile,
                head_dim: problem.head_dim(),
                value_dim: problem.value_dim(),
                block_q: problem.block_q(),
                block_k: problem.block_k(),
                causal: problem.causal() != Causal::None,
                scores: format,
                fp8: formats.values == LowBitValues::Fp8,
            },
            problem.dtype().elem_type(),
        );
    }
    Ok(())
}

/// Most loop iterations of one invocation of the forward.
fn loop_iterations(problem: &AttentionProblem, tile: Tile, list: &BlockList) -> usize {
    let loads = |rows: usize, words: usize| (rows * words).div_ceil(tile.units);
    let (d, dv) = (problem.head_dim(), problem.value_dim());
    let tiles = list.width() * problem.block_k().div_ceil(tile.cols);
    let per_tile = 1 + loads(tile.cols, d / 4) + loads(tile.cols, dv / 4) + d / 4 + tile.cols;
    loads(tile.rows, d / 4) + d + 32 + tiles * per_tile
}
