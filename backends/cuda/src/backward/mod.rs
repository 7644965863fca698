//! The backward of block-sparse attention on Hopper.
//!
//! Supported: f16 and bf16; D = Dv up to 128, with query blocks of 128 rows not from 33 to 63; query
//! blocks of 64 or 128 rows, key blocks of 64 or 128;
//! grouped heads; any lengths; gradients in the inputs' type; inputs whose rows are contiguous and
//! 16-byte aligned.
//! Rejected by [`WgmmaBackwardPlan::new`], with the reason; the portable engines take those problems.

mod key;
mod query;
mod walk;

use std::fmt;

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;
use cubesla_kernels::attention::{BackwardInputs, BackwardOutputs, row_dots};
use cubesla_kernels::{AttentionProblem, Causal, DType, InverseBlockList, ProblemError};
use key::{KeyConfig, KeyScalarsLaunch, key_gradients_wgmma};
use query::query_gradients_wgmma;

use crate::forward::config::WgmmaTile;
use crate::forward::kernel::{ForwardConfig, ForwardScalarsLaunch};
use crate::forward::tensor_map;
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
        if problem.block_q() == 128 && (33..64).contains(&dim) {
            return Err(
                "tiles of keys that fit the registers are known for D up to 32, and from 64",
            );
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
/// Two warpgroups have no more than an even share of the registers up to D = 64, 168 a unit, as ptxas
/// ignores `setmaxnreg` there. Tiles of 64 keys need more at D = 64, and ptxas of CUDA 13.0 then lets
/// operands share registers: without a warning, results are wrong.
fn query_tile_keys(dim: usize, consumers: usize) -> usize {
    if dim == 64 && consumers == 2 { 32 } else { 64 }
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

/// Computes the gradients as `plan` says. The caller has checked the arguments against `problem`, and
/// that the plan [takes](WgmmaBackwardPlan::takes) them.
///
/// # Errors
/// A [`ProblemError`] if the inverse list does not fit the device.
pub fn launch_backward_wgmma(
    client: &Client,
    problem: &AttentionProblem,
    plan: &WgmmaBackwardPlan,
    inputs: BackwardInputs<'_>,
    outputs: BackwardOutputs<'_>,
) -> Result<(), ProblemError> {
    let inverse = InverseBlockList::new(client, inputs.list)?;
    let delta = row_dots(client, inputs.out, inputs.grad_out)?;
    let BackwardInputs {
        q, k, v, grad_out, ..
    } = inputs;
    let (tile, key) = (plan.tile, plan.key);
    let dtype = problem.dtype().elem_type();
    let heads = problem.query_heads();
    let group = heads / problem.kv_heads();
    let items = problem.batch() * heads * problem.query_blocks();
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
            inputs.lse.buffer_arg(),
            delta.buffer_arg(),
            ForwardScalarsLaunch::new(
                items as u32,
                heads as u32,
                group as u32,
                problem.query_len() as u32,
                problem.key_len() as u32,
                problem.scale(),
                0,
            ),
            ForwardConfig {
                tile,
                block_k: problem.block_k(),
                causal: false,
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
    }
    Ok(())
}
