//! Block-sparse attention on Hopper: `wgmma`, bulk tensor copies, a producer and consumers.
//!
//! Supported: f16 and bf16; D and Dv up to 128; query blocks of 64 or 128 rows; any key blocks;
//! grouped heads; any lengths; rows with no block; both causal alignments; weights of blocks; a positive
//! scale; inputs whose rows are contiguous and 16-byte aligned.
//! Rejected by [`WgmmaPlan::new`], with the reason; the portable engines take those problems.
//!
//! What it does, and why:
//! - A producer unit loads tiles with bulk copies into a ring; two warpgroups do nothing but compute.
//! - Queries stay in registers, which halves what `wgmma` reads from shared memory: with keys of 64
//!   that is the difference between bound by shared memory and not.
//! - The product with the values of one tile overlaps the softmax of the next, and so does the product
//!   with the keys of the tile after that, where registers hold the scores of two tiles.
//! - With D and Dv up to 64 that leaves the schedulers idle: a cube then has two such groups, each with
//!   items of its own, and each waits for its products, as the other group does not. Half the registers
//!   do for that, as queries stay in shared memory.
//! - The running maximum is replaced only when it must be, so the accumulator is seldom rescaled.
//! - Cubes stay and take one query block after another: the next block's queries and keys are loaded, and
//!   its first scores multiplied, while the last block is being finished and stored.
//! - The producer alone reads lists. It writes what consumers need of them to shared memory, under the
//!   barriers of what it loads, so that their latency is its own.
//! - Registers move from the producer's warpgroup to the others (`setmaxnreg`).

pub(crate) mod config;
pub(crate) mod consumer;
pub(crate) mod epilogue;
pub(crate) mod kernel;
pub(crate) mod producer;
pub(crate) mod softmax;

pub use config::WgmmaTile;

use std::fmt;

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;
use cubesla_kernels::attention::{ForwardInputs, ForwardOutputs};
use cubesla_kernels::block_list::weights_arg;
use cubesla_kernels::{AttentionProblem, Causal, DType, DeviceTensor};
use kernel::{ForwardConfig, ForwardScalarsLaunch, block_sparse_forward_wgmma};

use crate::hopper::{expect_hopper, multiprocessors};

/// How the Hopper forward is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WgmmaPlan {
    /// Sizes of the kernel.
    pub tile: WgmmaTile,
    /// Cubes, one to a multiprocessor.
    pub cubes: usize,
}

impl WgmmaPlan {
    /// The plan for `problem`.
    ///
    /// # Errors
    /// Why the problem is not one for this kernel, in a few words.
    pub fn new(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Self, &'static str> {
        let plan = Self::of_one_item(problem, device)?;
        let shared = items(problem) > multiprocessors(device);
        // What a causal mask needs would be spilled, of half the registers.
        if !shared || problem.causal() != Causal::None {
            return Ok(plan);
        }
        Ok(Self::of_tile(plan.tile.in_streams(), problem, device))
    }

    /// The plan of a kernel whose cubes compute one item at a time.
    pub(crate) fn of_one_item(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Self, &'static str> {
        let (head_dim, value_dim) = (problem.head_dim(), problem.value_dim());
        expect_hopper(problem, device)?;
        if head_dim > 128 || value_dim > 128 {
            return Err("accumulators of more than 128 columns do not fit the registers");
        }
        if !matches!(problem.block_q(), 64 | 128) {
            return Err("a warpgroup computes 64 rows of one query block");
        }
        if problem.scale() <= 0.0 {
            return Err("the maximum is taken before scaling, which needs a positive scale");
        }
        let tile = WgmmaTile {
            head_dim,
            value_dim,
            bf16: problem.dtype() == DType::BF16,
            consumers: problem.block_q() / 64,
            streams: 1,
            keys: tile_keys(problem.block_k()),
            stages: 4,
            ahead: true,
        };
        Ok(Self::of_tile(tile, problem, device))
    }

    fn of_tile(tile: WgmmaTile, problem: &AttentionProblem, device: &DeviceProperties) -> Self {
        let items = items(problem).div_ceil(tile.streams);
        Self {
            tile,
            cubes: items.min(multiprocessors(device)),
        }
    }
}

impl fmt::Display for WgmmaPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tile = self.tile;
        let (rows, keys, stages) = (tile.rows(), tile.keys, tile.stages);
        let streams = if tile.streams > 1 {
            format!("{} streams, ", tile.streams)
        } else {
            String::new()
        };
        write!(
            f,
            "wgmma {rows}x{keys}, {streams}{stages} stages, {} cubes",
            self.cubes
        )
    }
}

/// The widest tile of 64, 32 or 16 keys that divides a block: `wgmma` contracts 16 keys at a time,
/// and register groups must be powers of two.
pub(crate) fn tile_keys(block_k: usize) -> usize {
    [64, 32]
        .into_iter()
        .find(|keys| block_k.is_multiple_of(*keys))
        .unwrap_or(16)
}

/// Runs block-sparse attention as `plan` says, with a weight for every block if there are `weights`: see
/// [`launch_forward_weighted`](cubesla_kernels::attention::launch_forward_weighted). The caller has
/// checked lists, weights and outputs against `problem`.
pub fn launch_forward_wgmma(
    client: &Client,
    problem: &AttentionProblem,
    plan: &WgmmaPlan,
    inputs: ForwardInputs<'_>,
    weights: Option<&DeviceTensor<4>>,
    outputs: ForwardOutputs<'_>,
) {
    let mut tile = plan.tile;
    if weights.is_some() {
        // Weights of blocks leave no registers for the scores of two tiles, nor to the producers of two
        // streams.
        tile.ahead = false;
        tile.streams = 1;
    }
    // SAFETY: bulk copies stay inside the tensors by themselves; lists hold valid key blocks; the
    // log-sum-exp is written for rows below `query_len` only.
    unsafe {
        block_sparse_forward_wgmma::launch_unchecked(
            client,
            CubeCount::Static(plan.cubes as u32, 1, 1),
            CubeDim::new_1d(tile.units() as u32),
            AddressType::U32,
            tensor_map(inputs.q, tile.rows()),
            tensor_map(inputs.k, tile.keys),
            tensor_map(inputs.v, tile.keys),
            tensor_map(outputs.out, 64),
            inputs.list.launch_arg(),
            weights_arg(weights, inputs.list),
            outputs.lse.buffer_arg(),
            scalars(problem, plan.cubes * tile.streams),
            ForwardConfig {
                tile,
                block_k: problem.block_k(),
                causal: problem.causal() != Causal::None,
                weighted: weights.is_some(),
            },
            problem.dtype().elem_type(),
        );
    }
}

/// Query blocks of all heads.
pub(crate) fn items(problem: &AttentionProblem) -> usize {
    problem.batch() * problem.query_heads() * problem.query_blocks()
}

/// The scalars of a kernel that computes `at_a_time` items.
pub(crate) fn scalars(problem: &AttentionProblem, at_a_time: usize) -> ForwardScalarsLaunch {
    ForwardScalarsLaunch::new(
        items(problem) as u32,
        at_a_time as u32,
        problem.query_heads() as u32,
        (problem.query_heads() / problem.kv_heads()) as u32,
        problem.query_len() as u32,
        problem.key_len() as u32,
        problem.scale(),
        problem.causal_shift(),
    )
}

/// A map of `tensor` in boxes of `rows` rows and 64 columns, swizzled.
pub(crate) fn tensor_map(tensor: &DeviceTensor<4>, rows: usize) -> TensorMapArg<Tiled> {
    TensorMapArg::new(
        TiledArgs {
            tile_size: [1, 1, rows, 64].into(),
        },
        tensor.tensor_arg(),
        tensor.dtype().elem_type(),
    )
    .with_swizzle(TensorMapSwizzle::B128)
}
