//! The backward of block-sparse attention on Hopper.
//!
//! Supported: f16 and bf16; D = Dv up to 128; query blocks of 64 or 128 rows, key blocks of 64 or 128;
//! grouped heads; any lengths; weights of blocks, with their gradient; gradients in the inputs' type;
//! inputs whose rows are contiguous and 16-byte aligned.
//! Rejected by [`WgmmaBackwardPlan::new`], with the reason; the portable engines take those problems.

mod key;
mod query;
mod walk;
mod weight;

use std::fmt;

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;
use cubesla_kernels::attention::{BackwardInputs, BackwardOutputs, row_dots};
use cubesla_kernels::block_list::weights_arg;
use cubesla_kernels::{
    AttentionProblem, Causal, DType, DeviceTensor, InverseBlockList, ProblemError,
};
use key::{KeyConfig, KeyScalarsLaunch, key_gradients_wgmma};
use query::query_gradients_wgmma;
use weight::weight_gradients;

use crate::forward::config::WgmmaTile;
use crate::forward::kernel::ForwardConfig;
use crate::forward::{scalars, tensor_map};
use crate::hopper::{expect_hopper, multiprocessors};

/// How the Hopper backward is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WgmmaBackwardPlan {
    /// Of the queries' gradient.
    tile: WgmmaTile,
    /// Cubes of the queries' gradient, one to a multiprocessor.
    cubes: usize,
    /// Of the keys' and values' gradients.
    key: KeyConfig,
}

impl WgmmaBackwardPlan {
    /// The plan for `problem`.
    ///
    /// # Errors
    /// Why the problem is not one for these kernels, in a few words.
    pub fn new(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Self, &'static str> {
        let dim = problem.head_dim();
        expect_hopper(problem, device)?;
        if dim > 128 || problem.value_dim() != dim {
            return Err("both accumulators fit the registers for D = Dv up to 128");
        }
        if !matches!(problem.block_q(), 64 | 128) || !matches!(problem.block_k(), 64 | 128) {
            return Err("a warpgroup computes 64 rows of one block");
        }
        if problem.causal() != Causal::None {
            return Err("causal masks are the portable engines'");
        }
        let bf16 = problem.dtype() == DType::BF16;
        let consumers = problem.block_q() / 64;
        let items = problem.batch() * problem.query_heads() * problem.query_blocks();
        Ok(Self {
            tile: WgmmaTile {
                head_dim: dim,
                value_dim: dim,
                bf16,
                consumers,
                streams: 1,
                keys: query_tile_keys(dim, consumers),
                stages: 3,
                ahead: false,
            },
            cubes: items.min(multiprocessors(device)),
            key: KeyConfig {
                dim,
                bf16,
                consumers,
                block_k: problem.block_k(),
                query_stages: 3,
                grad_stages: 2,
                weighted: false,
            },
        })
    }

    /// Whether these tensors are what bulk copies can read and write.
    pub fn takes(inputs: &BackwardInputs<'_>, outputs: &BackwardOutputs<'_>) -> bool {
        inputs.grad_out.is_aligned() && outputs.dq.dtype() == inputs.q.dtype()
    }
}

/// Keys of a tile of the queries' gradient.
///
/// Not as many as the width that products have: ptxas of CUDA 13.0 then gives `dS` the registers of the
/// output's gradient, which the next tile needs, without a warning. And 32 where two warpgroups need
/// more than 168 registers for 64, but so few more that ptxas ignores `setmaxnreg`.
fn query_tile_keys(dim: usize, consumers: usize) -> usize {
    match dim.next_multiple_of(16) {
        64 => 32,
        80 | 96 if consumers == 2 => 32,
        _ => 64,
    }
}

impl fmt::Display for WgmmaBackwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (tile, key) = (self.tile, self.key);
        write!(
            f,
            "wgmma dq {}x{}, {} stages",
            tile.rows(),
            tile.keys,
            tile.stages
        )?;
        write!(f, "; dk dv 64x{}, {} stages", key.rows(), key.query_stages)
    }
}

/// An error unless `len` sums fit a buffer, and 32 bits count them.
fn expect_sums(client: &Client, len: usize) -> Result<(), ProblemError> {
    let bytes = len * DType::F32.size();
    let limit = (client.properties().memory.max_page_size as usize).min(u32::MAX as usize * 4);
    if bytes <= limit {
        return Ok(());
    }
    Err(ProblemError::BufferTooLarge {
        what: "the sums of the weights' gradient",
        bytes,
        limit,
    })
}

/// Computes the gradients as `plan` says, with `weights` of blocks those of
/// [`launch_backward_weighted`](cubesla_kernels::attention::launch_backward_weighted): the weights, and
/// where their gradients go. The caller has checked the arguments against `problem`, and that the plan
/// [takes](WgmmaBackwardPlan::takes) them.
///
/// # Errors
/// A [`ProblemError`] if the inverse list, or what the weights' gradient is summed from, does not fit the
/// device.
pub fn launch_backward_wgmma(
    client: &Client,
    problem: &AttentionProblem,
    plan: &WgmmaBackwardPlan,
    inputs: BackwardInputs<'_>,
    weights: Option<[&DeviceTensor<4>; 2]>,
    outputs: BackwardOutputs<'_>,
) -> Result<(), ProblemError> {
    let BackwardInputs {
        q, k, v, grad_out, ..
    } = inputs;
    let (tile, mut key) = (plan.tile, plan.key);
    key.weighted = weights.is_some();
    let dtype = problem.dtype().elem_type();
    let heads = problem.query_heads();
    let group = heads / problem.kv_heads();
    let items = problem.batch() * heads * problem.query_blocks();
    // Of each warp and tile of a pair of blocks.
    let parts = 4 * tile.consumers * (problem.block_k() / tile.keys);
    let pairs = if weights.is_some() {
        items * problem.key_blocks()
    } else {
        0
    };
    expect_sums(client, pairs * parts)?;
    let inverse = InverseBlockList::new(client, inputs.list)?;
    let delta = row_dots(client, inputs.out, inputs.grad_out)?;
    let sums = DeviceTensor::empty(client, [(pairs * parts).max(1)], DType::F32);
    // SAFETY: bulk copies stay inside the tensors by themselves; lists hold valid blocks; statistics
    // are read for rows below `query_len` only.
    unsafe {
        query_gradients_wgmma::launch_unchecked(
            client,
            CubeCount::Static(plan.cubes as u32, 1, 1),
            CubeDim::new_1d(tile.units() as u32),
            AddressType::U32,
            tensor_map(q, tile.rows()),
            tensor_map(k, tile.keys),
            tensor_map(v, tile.keys),
            tensor_map(grad_out, tile.rows()),
            tensor_map(outputs.dq, 64),
            inputs.list.launch_arg(),
            weights_arg(weights.map(|[weights, _]| weights), inputs.list),
            inputs.lse.buffer_arg(),
            delta.buffer_arg(),
            sums.buffer_arg(),
            scalars(problem, plan.cubes),
            ForwardConfig {
                tile,
                block_k: problem.block_k(),
                causal: false,
                weighted: weights.is_some(),
            },
            dtype,
        );
        key_gradients_wgmma::launch_unchecked(
            client,
            CubeCount::Static(
                problem.key_len().div_ceil(64) as u32,
                problem.kv_heads() as u32,
                problem.batch() as u32,
            ),
            CubeDim::new_1d(key.units() as u32),
            AddressType::U32,
            tensor_map(q, key.rows()),
            tensor_map(k, 64),
            tensor_map(v, 64),
            tensor_map(grad_out, key.rows()),
            tensor_map(outputs.dk, 64),
            tensor_map(outputs.dv, 64),
            inverse.launch_arg(),
            weights_arg(weights.map(|[weights, _]| weights), inputs.list),
            inputs.lse.buffer_arg(),
            delta.buffer_arg(),
            KeyScalarsLaunch::new(
                heads as u32,
                group as u32,
                problem.query_len() as u32,
                problem.scale(),
            ),
            key,
            dtype,
        );
        if let Some([weights, grad]) = weights {
            let entries = items * inputs.list.width();
            weight_gradients::launch_unchecked(
                client,
                CubeCount::Static(entries.div_ceil(weight::UNITS) as u32, 1, 1),
                CubeDim::new_1d(weight::UNITS as u32),
                AddressType::from_len(sums.len()),
                sums.buffer_arg(),
                inputs.list.launch_arg(),
                weights_arg(Some(weights), inputs.list),
                grad.buffer_arg(),
                parts,
            );
        }
    }
    Ok(())
}
