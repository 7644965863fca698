//! Linear attention on Hopper, and the states that the SLA operations share with it.
//!
//! Supported: f16 and bf16; D and Dv up to 128; grouped heads; any lengths; every feature map; inputs
//! whose rows are contiguous and 16-byte aligned.
//! Rejected by [`supports`], with the reason; the portable engines take those problems, and the causal
//! form.

pub(crate) mod branch;
mod output;
mod phi;
pub(crate) mod ring;
pub(crate) mod states;

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;
use cubesla_kernels::linear::{FeatureMap, States, add_chunks, state_scale};
use cubesla_kernels::{AttentionProblem, DType, DeviceTensor, ProblemError};
use output::{OutputConfig, OutputScalarsLaunch, linear_output_wgmma};
use ring::StateTile;
use states::{ChunkConfig, chunk_states_wgmma};

use crate::forward::config::WgmmaTile;
use crate::forward::tensor_map;
use crate::hopper::{expect_hopper, multiprocessors};

/// Keys of a tile of the states' kernel; what a unit maps of it is written for them.
const KEYS: usize = 64;

/// An error unless these kernels can run linear attention for `problem`: why not, in a few words.
///
/// # Errors
/// The reason.
pub fn supports(problem: &AttentionProblem, device: &DeviceProperties) -> Result<(), &'static str> {
    expect_hopper(problem, device)?;
    if problem.head_dim() > 128 || problem.value_dim() > 128 {
        return Err("accumulators of more than 128 columns do not fit the registers");
    }
    Ok(())
}

/// Linear attention over all keys: [`cubesla_kernels::linear::linear_attention`], not causal.
///
/// # Errors
/// A [`ProblemError`] if a tensor does not fit the device.
pub fn launch_linear_wgmma(
    client: &Client,
    problem: &AttentionProblem,
    [q, k, v]: [&DeviceTensor<4>; 3],
    phi: FeatureMap,
) -> Result<DeviceTensor<4>, ProblemError> {
    let (states, _) = total_states(client, [k, v], phi, problem.dtype(), false)?;
    let out = DeviceTensor::empty(client, problem.out_shape(), problem.dtype());
    let tile = WgmmaTile {
        head_dim: problem.head_dim(),
        value_dim: problem.value_dim(),
        bf16: problem.dtype() == DType::BF16,
        consumers: 2,
        streams: 1,
        keys: 64,
        stages: 1,
        ahead: false,
    };
    let tiles = problem.query_len().div_ceil(tile.rows());
    let items = tiles * problem.query_heads() * problem.batch();
    let products = tile.products();
    // SAFETY: bulk copies stay inside the tensors by themselves.
    unsafe {
        linear_output_wgmma::launch_unchecked(
            client,
            CubeCount::Static(items.min(multiprocessors(client.properties())) as u32, 1, 1),
            CubeDim::new_1d(tile.units() as u32),
            AddressType::U32,
            tensor_map(q, tile.rows()),
            tensor_map(&states.h, products.head_dim),
            tensor_map(&out, 64),
            states.z.buffer_arg(),
            OutputScalarsLaunch::new(
                items as u32,
                tiles as u32,
                problem.query_heads() as u32,
                (problem.query_heads() / problem.kv_heads()) as u32,
            ),
            OutputConfig { tile, phi },
            problem.dtype().elem_type(),
        );
    }
    Ok(out)
}

/// States of all keys, `h` rounded to `dtype`, and with `keep` also `phi(K)`, from one pass over K and
/// V.
pub(crate) fn total_states(
    client: &Client,
    [k, v]: [&DeviceTensor<4>; 2],
    phi: FeatureMap,
    dtype: DType,
    keep: bool,
) -> Result<(States, Option<DeviceTensor<4>>), ProblemError> {
    let [batch, heads, len, head_dim] = k.shape();
    let value_dim = v.shape()[3];
    let tile = StateTile {
        head_dim,
        value_dim,
        bf16: k.dtype() == DType::BF16,
        keys: KEYS,
        stages: 6,
    };
    // One to a multiprocessor, which is what the registers of phi allow.
    let cubes = multiprocessors(client.properties());
    let chunk = (len * batch * heads).div_ceil(cubes).next_multiple_of(KEYS);
    let count = len.div_ceil(chunk);
    let partial = States {
        h: DeviceTensor::empty(
            client,
            [count * batch, heads, head_dim, value_dim],
            DType::F32,
        ),
        z: DeviceTensor::empty(client, [count * batch, heads, head_dim, 1], DType::F32),
    };
    let phi_k = keep.then(|| DeviceTensor::empty(client, k.shape(), k.dtype()));
    // SAFETY: bulk copies stay inside the tensors by themselves; each cube writes the state of its
    // own chunk and head.
    unsafe {
        chunk_states_wgmma::launch_unchecked(
            client,
            CubeCount::Static(count as u32, heads as u32, batch as u32),
            CubeDim::new_1d(tile.units() as u32),
            AddressType::U32,
            tensor_map(k, KEYS),
            tensor_map(v, KEYS),
            tensor_map(phi_k.as_ref().unwrap_or(k), KEYS),
            partial.h.buffer_arg(),
            partial.z.buffer_arg(),
            len as u32,
            chunk as u32,
            ChunkConfig { tile, phi, keep },
            k.dtype().elem_type(),
        );
    }
    let total = States {
        h: DeviceTensor::empty(client, [batch, heads, head_dim, value_dim], dtype),
        z: DeviceTensor::empty(client, [batch, heads, head_dim, 1], DType::F32),
    };
    let scale = state_scale(len);
    add_chunks(client, &partial.h, &total.h, count, scale, false)?;
    add_chunks(client, &partial.z, &total.z, count, scale, false)?;
    Ok((total, phi_k))
}
