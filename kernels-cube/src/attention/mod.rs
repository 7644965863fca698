//! Block-sparse attention: each query block attends, exactly, to the key blocks of its list; its
//! gradient, without atomics; and both with weights of blocks.
//!
//! Source: SLA (arXiv 2509.24006), the critical blocks of section 3; FlashAttention-2
//! (arXiv 2307.08691) for the online softmax.
//!
//! Supported: f32, f16 and bf16 with f32 accumulation; D and Dv from 32 to 256 in steps of 8, not
//! necessarily equal; grouped heads; any lengths; rows with no block; both causal alignments;
//! strided inputs.
//! Rejected, with a [`ProblemError`]: what [`AttentionProblem`] rejects; a list or an output of
//! another shape; more cubes than the device's grid holds.

#[allow(missing_docs, reason = "`CubeLaunch` derives a struct of its own")]
mod backward;
mod forward;
#[allow(missing_docs, reason = "`CubeLaunch` derives a struct of its own")]
mod low_bit;

pub use backward::row_dots;
pub use backward::{
    BackwardInputs, BackwardOutputs, BackwardPlan, check_backward, launch_backward,
    launch_backward_weighted,
};
pub(crate) use backward::{WeightJob, WeightTerm};

pub use low_bit::{
    LowBitFormats, LowBitPlan, LowBitScores, LowBitValues, RoundedInputs, expect_low_bit,
    launch_low_bit, rounded_inputs, smoothing_sample,
};

use std::fmt;

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;
use forward::{ForwardConfig, ForwardScalarsLaunch, block_sparse_forward};

use crate::block_list::{expect_weights, weights_arg};
use crate::engine::{
    EngineKind, Mma, MmaTf32, Simt, Tile, TileEngine, TileNeeds, mma_tile, mma_tiles,
    simt_supported, simt_tile, simt_tiles,
};
use crate::limits::{expect_dtype, expect_loop_budget, grid};
use crate::problem::expect_contiguous;
use crate::{AttentionProblem, BlockList, Causal, DType, DeviceTensor, ProblemError};

/// How the forward is run: an engine and the sizes of its tile program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ForwardPlan {
    /// f32 arithmetic on any device.
    Simt(Tile),
    /// Warp-level tensor cores.
    Mma(Tile),
    /// The same with f32 rounded to tf32.
    MmaTf32(Tile),
}

/// Inputs of the forward.
#[derive(Clone, Copy, Debug)]
pub struct ForwardInputs<'a> {
    /// `[B, Hq, Lq, D]`.
    pub q: &'a DeviceTensor<4>,
    /// `[B, Hkv, Lk, D]`.
    pub k: &'a DeviceTensor<4>,
    /// `[B, Hkv, Lk, Dv]`.
    pub v: &'a DeviceTensor<4>,
    /// `[B, Hq, M, N]`.
    pub list: &'a BlockList,
}

/// Outputs of the forward, every element of which is written.
#[derive(Clone, Copy, Debug)]
pub struct ForwardOutputs<'a> {
    /// `[B, Hq, Lq, Dv]`, contiguous, the inputs' type.
    pub out: &'a DeviceTensor<4>,
    /// Natural log-sum-exp of each row's scaled scores, `[B, Hq, Lq]`, contiguous f32; `-inf` for a
    /// row that saw no key.
    pub lse: &'a DeviceTensor<3>,
}

impl ForwardPlan {
    /// The plan for the portable engine.
    ///
    /// # Errors
    /// Why it cannot run the problem on the device, in a few words.
    pub fn simt(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Self, &'static str> {
        simt_supported(problem.factors())?;
        simt_tile(&needs(problem), &device.hardware)
            .map(Self::Simt)
            .ok_or("no tile of these head dimensions fits the shared memory")
    }

    /// The plan for warp-level tensor cores; those of f32 only if the problem's
    /// [`products`](crate::AttentionOptions::products) are of tf32.
    ///
    /// # Errors
    /// Why they cannot run the problem on the device, in a few words.
    pub fn mma(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Self, &'static str> {
        let mut needs = needs(problem);
        // Beside an accumulator of 128 columns, a narrow tile leaves a multiprocessor room for another
        // cube: on an H200 a fifth faster than one of 64 columns.
        if problem.value_dim() >= 128 && needs.max_cols.is_multiple_of(32) {
            needs.max_cols = 32;
        }
        let tile = mma_tile(&needs, problem.factors(), device)?;
        Ok(Self::of(EngineKind::mma(problem.factors()), tile))
    }

    /// The sane plans of this plan's engine for `problem`, itself first: of two, the faster depends on
    /// how long lists are and on what else a multiprocessor holds.
    pub fn choices(&self, problem: &AttentionProblem, device: &DeviceProperties) -> Vec<Self> {
        let needs = needs(problem);
        let others: Vec<Self> = match self {
            Self::Simt(_) => simt_tiles(&needs, &device.hardware)
                .take(3)
                .map(Self::Simt)
                .collect(),
            Self::Mma(tile) | Self::MmaTf32(tile) => {
                let tiles = mma_tiles(&needs, problem.factors(), device).unwrap_or_default();
                let near =
                    |other: &Tile| other.rows >= tile.rows && other.cols >= tile.cols.min(32);
                // One stage leaves room for more cubes.
                let single = Tile { stages: 1, ..*tile };
                let near = tiles.into_iter().filter(near).chain([single]);
                near.map(|tile| Self::of(self.engine(), tile)).collect()
            }
        };
        let others = others.into_iter().filter(|other| other != self);
        [*self].into_iter().chain(others).collect()
    }

    /// The tile program.
    pub fn tile(&self) -> Tile {
        match self {
            Self::Simt(tile) | Self::Mma(tile) | Self::MmaTf32(tile) => *tile,
        }
    }

    fn engine(&self) -> EngineKind {
        match self {
            Self::Simt(_) => EngineKind::Simt,
            Self::Mma(_) => EngineKind::Mma,
            Self::MmaTf32(_) => EngineKind::MmaTf32,
        }
    }

    fn of(engine: EngineKind, tile: Tile) -> Self {
        match engine {
            EngineKind::Simt => Self::Simt(tile),
            EngineKind::Mma => Self::Mma(tile),
            EngineKind::MmaTf32 => Self::MmaTf32(tile),
        }
    }
}

impl fmt::Display for ForwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.engine(), self.tile())
    }
}

fn needs(problem: &AttentionProblem) -> TileNeeds {
    TileNeeds {
        owned: vec![problem.head_dim()],
        streamed: vec![problem.head_dim(), problem.value_dim()],
        accumulators: vec![problem.value_dim()],
        lefts: 1,
        max_rows: problem.block_q(),
        max_cols: problem.block_k(),
        max_stages: 3,
        unit_bytes: 0,
    }
}

/// An error unless inputs and outputs are those of `problem`, in a type that the device has.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn check_forward(
    client: &Client,
    problem: &AttentionProblem,
    inputs: &ForwardInputs<'_>,
    outputs: &ForwardOutputs<'_>,
) -> Result<(), ProblemError> {
    problem.expect_inputs(inputs.q, inputs.k, inputs.v)?;
    inputs.list.expect_problem(problem)?;
    expect_contiguous("out", outputs.out, problem.out_shape(), problem.dtype())?;
    expect_contiguous("lse", outputs.lse, problem.lse_shape(), DType::F32)?;
    expect_dtype(client.properties(), problem.dtype())
}

/// Runs block-sparse attention as `plan` says. Nothing is launched if an argument is refused.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn launch_forward(
    client: &Client,
    problem: &AttentionProblem,
    plan: &ForwardPlan,
    inputs: ForwardInputs<'_>,
    outputs: ForwardOutputs<'_>,
) -> Result<(), ProblemError> {
    launch_forward_weighted(client, problem, plan, inputs, None, outputs)
}

/// [`launch_forward`] with a weight `m >= 0`, f32 `[B, Hq, M, N]` and contiguous, for every block of
/// the list, if there are `weights`: `P = m exp(S) / sum m exp(S)`, `L = ln sum m exp(S)`.
///
/// # Errors
/// A [`ProblemError`] that names the argument at fault.
pub fn launch_forward_weighted(
    client: &Client,
    problem: &AttentionProblem,
    plan: &ForwardPlan,
    inputs: ForwardInputs<'_>,
    weights: Option<&DeviceTensor<4>>,
    outputs: ForwardOutputs<'_>,
) -> Result<(), ProblemError> {
    check_forward(client, problem, &inputs, &outputs)?;
    if let Some(weights) = weights {
        expect_weights(problem, weights)?;
    }
    match plan {
        ForwardPlan::Simt(tile) => {
            let iterations = loop_iterations(problem, *tile, inputs.list.width());
            let operation = "block-sparse attention";
            expect_loop_budget(client.properties(), operation, iterations)?;
            launch::<Simt>(client, problem, *tile, inputs, weights, outputs, [4, 4])
        }
        ForwardPlan::Mma(tile) => {
            launch::<Mma>(client, problem, *tile, inputs, weights, outputs, [8, 2])
        }
        ForwardPlan::MmaTf32(tile) => {
            launch::<MmaTf32>(client, problem, *tile, inputs, weights, outputs, [4, 2])
        }
    }
}

/// Launches the kernel with engine `E`, which loads vectors of `load` elements where rows are
/// aligned and stores vectors of `store`.
fn launch<E: TileEngine<block_sparse_forward::F>>(
    client: &Client,
    problem: &AttentionProblem,
    tile: Tile,
    inputs: ForwardInputs<'_>,
    weights: Option<&DeviceTensor<4>>,
    outputs: ForwardOutputs<'_>,
    [load, store]: [usize; 2],
) -> Result<(), ProblemError> {
    let ForwardInputs { q, k, v, list } = inputs;
    let tiles = problem.query_blocks() * problem.block_q().div_ceil(tile.rows);
    let count = grid(
        client.properties(),
        [
            ("tiles of query rows", tiles),
            ("Hq", problem.query_heads()),
            ("B", problem.batch()),
        ],
    )?;
    let extent = [q, k, v, outputs.out]
        .map(DeviceTensor::extent)
        .into_iter()
        .max();
    let load = if problem.is_aligned() { load } else { 1 };
    // SAFETY: the problem was validated against the tensors, whose buffers hold their shapes; the
    // kernel masks the rows and keys past the ends.
    unsafe {
        block_sparse_forward::launch_unchecked::<E>(
            client,
            count,
            CubeDim::new_1d(tile.units as u32),
            AddressType::from_len(extent.unwrap_or(0)),
            load,
            store,
            q.tensor_arg(),
            k.tensor_arg(),
            v.tensor_arg(),
            list.launch_arg(),
            weights_arg(weights, list),
            outputs.out.buffer_arg(),
            outputs.lse.buffer_arg(),
            ForwardScalarsLaunch::new(problem.scale(), problem.causal_shift()),
            ForwardConfig {
                tile,
                head_dim: problem.head_dim(),
                value_dim: problem.value_dim(),
                block_q: problem.block_q(),
                block_k: problem.block_k(),
                causal: problem.causal() != Causal::None,
                weighted: weights.is_some(),
            },
            problem.dtype().elem_type(),
        );
    }
    Ok(())
}

/// Most loop iterations of one invocation of the portable engine's forward.
fn loop_iterations(problem: &AttentionProblem, tile: Tile, width: usize) -> usize {
    let loads = |rows: usize, width: usize| (rows * width / 4).div_ceil(tile.units);
    let tiles = width * problem.block_k().div_ceil(tile.cols);
    let (d, dv) = (problem.head_dim(), problem.value_dim());
    let per_tile = 1 + loads(tile.cols, d) + loads(tile.cols, dv) + d / 4 + tile.cols;
    loads(tile.rows, d) + 32 + tiles * per_tile
}
