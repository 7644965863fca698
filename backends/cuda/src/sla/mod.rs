//! SLA and SLA2 on Hopper: the block-sparse forward with the linear branch in its epilogue.
//!
//! Supported: what [`crate::forward`] supports.
//! Rejected by [`WgmmaSlaPlan::new`], with the reason; the portable engines take those problems.
//!
//! What it does beyond that kernel, and why:
//! - Queries are in registers already as the left side of a product, so `phi(Q)` is made there, and
//!   `phi(Q) H` comes into the registers that scores no longer need.
//! - Neither branch is written to memory unless it is asked for.
//! - In the complement form each query block has a state of its own, made by `states` without the
//!   queries: half the arithmetic of subtracting `phi(Q) phi(K_j)^T V_j` block by block, and no
//!   registers in the main loop.
//! - A sparse branch in low bits is a kernel of its own: 8-bit queries leave nothing to make `phi(Q)` of.
//!   Its result comes in the place of values.

mod epilogue;
mod kernel;
mod states;

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;
use cubesla_kernels::attention::{ForwardInputs, ForwardOutputs, LowBitFormats};
use cubesla_kernels::linear::{FeatureMap, States, feature_rows, state_scale};
use cubesla_kernels::sla::{
    Combination, LinearMode, SlaInputs, SlaOutput, SlaSaved, lists_the_fewer, logit_strides,
    transposed,
};
use cubesla_kernels::{AttentionProblem, DType, DeviceTensor, ProblemError};
use kernel::{SlaConfig, SlaScalarsLaunch, sla_forward_wgmma};
use states::{StatesConfig, StatesScalarsLaunch, marginal_states_wgmma};

use crate::forward::kernel::ForwardConfig;
use crate::forward::{WgmmaPlan, scalars, tensor_map, tile_keys};
use crate::linear::ring::StateTile;
use crate::linear::total_states;
use crate::low_bit::{WgmmaLowBitPlan, launch_low_bit_wgmma};

/// How the Hopper forward of SLA and SLA2 is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WgmmaSlaPlan {
    /// As for block-sparse attention alone, with as many stages as fit.
    pub forward: WgmmaPlan,
    /// Low-bit attention, if the sparse branch is that: a kernel of its own.
    pub low_bit: Option<WgmmaLowBitPlan>,
}

impl WgmmaSlaPlan {
    /// The plan for `problem`; `projects` for SLA, which needs room for its projection; with `formats`
    /// if the sparse branch is in low bits.
    ///
    /// # Errors
    /// Why the problem is not one for this kernel, in a few words.
    pub fn new(
        problem: &AttentionProblem,
        device: &DeviceProperties,
        projects: bool,
        formats: Option<LowBitFormats>,
    ) -> Result<Self, &'static str> {
        let low_bit = formats
            .map(|formats| WgmmaLowBitPlan::new(problem, device, formats))
            .transpose()?;
        let mut forward = WgmmaPlan::of_one_item(problem, device)?;
        // The linear branch takes the registers of a second tile's scores.
        forward.tile.ahead = false;
        if low_bit.is_some() {
            // A given branch comes in tiles of 64 rows.
            forward.tile.keys = 64;
        }
        let fits = |stages: &usize| {
            let mut config = config(problem, &forward, projects);
            config.forward.tile.stages = *stages;
            config.shared_memory() <= device.hardware.max_shared_memory_size
        };
        forward.tile.stages = (2..=4)
            .rev()
            .find(fits)
            .ok_or("two stages and the linear branch do not fit the shared memory")?;
        Ok(Self { forward, low_bit })
    }
}

fn config(problem: &AttentionProblem, plan: &WgmmaPlan, projects: bool) -> SlaConfig {
    SlaConfig {
        forward: ForwardConfig {
            tile: plan.tile,
            block_k: problem.block_k(),
            causal: false,
            weighted: false,
        },
        phi: FeatureMap::Softmax,
        per_block: false,
        projects,
        given: false,
        save: false,
    }
}

/// Runs the forward as `plan` says. The caller has checked the arguments against `problem`.
///
/// # Errors
/// A [`ProblemError`] if the states do not fit a buffer.
pub fn launch_sla_wgmma(
    client: &Client,
    problem: &AttentionProblem,
    plan: &WgmmaSlaPlan,
    inputs: SlaInputs<'_>,
    combination: Combination<'_>,
    phi: FeatureMap,
    mode: LinearMode,
    save: bool,
) -> Result<SlaOutput, ProblemError> {
    let SlaInputs { q, k, v, .. } = inputs;
    let dtype = problem.dtype();
    let projects = matches!(combination, Combination::Sla { .. });
    let config = SlaConfig {
        phi,
        per_block: mode == LinearMode::Complement,
        given: plan.low_bit.is_some(),
        save,
        ..config(problem, &plan.forward, projects)
    };
    let tile = config.forward.tile;
    let states = match mode {
        LinearMode::Global => total_states(client, [k, v], phi, dtype, false)?.0,
        LinearMode::Complement => marginal_states(client, problem, inputs, phi)?,
    };

    let out = DeviceTensor::empty(client, problem.out_shape(), dtype);
    let empty_branch = || DeviceTensor::empty(client, problem.out_shape(), dtype);
    let empty_lse = || DeviceTensor::empty(client, problem.lse_shape(), DType::F32);
    let given = plan.low_bit.map(|plan| {
        let (sparse, lse) = (empty_branch(), empty_lse());
        let (q, k, v, list) = (q, k, v, inputs.critical);
        let outputs = ForwardOutputs {
            out: &sparse,
            lse: &lse,
        };
        let inputs = ForwardInputs { q, k, v, list };
        launch_low_bit_wgmma(client, problem, &plan, inputs, outputs);
        (sparse, lse)
    });
    let saved = save.then(|| {
        let (sparse, lse) = given
            .clone()
            .unwrap_or_else(|| (empty_branch(), empty_lse()));
        SlaSaved {
            sparse,
            linear: empty_branch(),
            lse,
        }
    });
    let branch = saved.as_ref().map_or(&out, |s| &s.linear);
    let sparse = match (&given, &saved) {
        (Some((sparse, _)), _) => sparse,
        (None, Some(saved)) => &saved.sparse,
        (None, None) => &out,
    };
    let lse = match &saved {
        Some(saved) => saved.lse.clone(),
        None => DeviceTensor::empty(client, [1, 1, 1], DType::F32),
    };
    let (wl, weights, logit_strides) = match combination {
        Combination::Sla { wl, bl } => (transposed(client, wl, dtype), bl.buffer_arg(), [0, 0]),
        Combination::Sla2 { alpha_logit } => {
            let strides = logit_strides(alpha_logit);
            (states.h.clone(), alpha_logit.buffer_arg(), strides)
        }
    };
    let products = tile.products();
    // SAFETY: bulk copies stay inside the tensors by themselves; lists hold valid key blocks; the
    // log-sum-exp is written, if saved, for rows below `query_len` only.
    unsafe {
        sla_forward_wgmma::launch_unchecked(
            client,
            CubeCount::Static(plan.forward.cubes as u32, 1, 1),
            CubeDim::new_1d(tile.units() as u32),
            AddressType::U32,
            tensor_map(q, tile.rows()),
            tensor_map(k, tile.keys),
            tensor_map(v, tile.keys),
            tensor_map(&states.h, products.head_dim),
            tensor_map(&wl, products.value_dim),
            tensor_map(&out, 64),
            tensor_map(sparse, 64),
            tensor_map(branch, 64),
            states.z.buffer_arg(),
            weights,
            inputs.critical.launch_arg(),
            lse.buffer_arg(),
            SlaScalarsLaunch::new(
                scalars(problem, plan.forward.cubes),
                logit_strides[0] as u32,
                logit_strides[1] as u32,
            ),
            config,
            dtype.elem_type(),
        );
    }
    Ok(SlaOutput { out, saved })
}

/// States of the marginal blocks of each query block: `[B Hq, M, D, Dv]` and `[B Hq, M, D, 1]`.
fn marginal_states(
    client: &Client,
    problem: &AttentionProblem,
    inputs: SlaInputs<'_>,
    phi: FeatureMap,
) -> Result<States, ProblemError> {
    let (d, dv, dtype) = (problem.head_dim(), problem.value_dim(), problem.dtype());
    let (heads, blocks) = (problem.query_heads(), problem.query_blocks());
    let subtract = lists_the_fewer(problem, inputs.critical, inputs.negligible);
    let (first, second, all, phi_k) = if subtract {
        let tensors = [inputs.k, inputs.v];
        let (all, phi_k) = total_states(client, tensors, phi, DType::F32, true)?;
        let listed = (inputs.critical.clone(), inputs.negligible.cloned());
        (listed.0, listed.1, all, phi_k.expect("it was kept"))
    } else {
        let marginal = inputs.critical.remaining(client, inputs.negligible)?;
        let nothing = States {
            h: DeviceTensor::empty(client, [1, 1, 1, 8], DType::F32),
            z: DeviceTensor::empty(client, [1, 1, 1, 8], DType::F32),
        };
        (
            marginal,
            None,
            nothing,
            feature_rows(client, inputs.k, phi)?,
        )
    };
    let bh = problem.batch() * heads;
    let states = States {
        h: DeviceTensor::empty(client, [bh, blocks, d, dv], dtype),
        z: DeviceTensor::empty(client, [bh, blocks, d, 1], DType::F32),
    };
    let config = StatesConfig {
        tile: StateTile {
            head_dim: d,
            value_dim: dv,
            bf16: dtype == DType::BF16,
            keys: tile_keys(problem.block_k()),
            // Two cubes share a multiprocessor, so that one's products hide the other's stores.
            stages: 2,
        },
        block_k: problem.block_k(),
        subtract,
        second: second.is_some(),
    };
    // SAFETY: bulk copies stay inside the tensors by themselves; lists hold valid key blocks; rows of
    // `Z` below D are written only.
    unsafe {
        marginal_states_wgmma::launch_unchecked(
            client,
            CubeCount::Static(blocks as u32, heads as u32, problem.batch() as u32),
            CubeDim::new_1d(config.tile.units() as u32),
            AddressType::U32,
            tensor_map(&phi_k, config.tile.keys),
            tensor_map(inputs.v, config.tile.keys),
            tensor_map(&states.h, 64),
            states.z.buffer_arg(),
            all.h.buffer_arg(),
            all.z.buffer_arg(),
            first.launch_arg(),
            second.as_ref().unwrap_or(&first).launch_arg(),
            StatesScalarsLaunch::new(
                heads as u32,
                (heads / problem.kv_heads()) as u32,
                problem.key_len() as u32,
                state_scale(problem.key_len()),
            ),
            config,
            dtype.elem_type(),
        );
    }
    Ok(states)
}
