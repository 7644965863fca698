//! Linear attention: `O_i = phi(Q_i) H / (phi(Q_i) . Z)` with `H = sum_j phi(K_j)^T V_j` and
//! `Z = sum_j phi(K_j)`, over all keys or, causal, over those up to `i`.
//!
//! Source: SLA (arXiv 2509.24006) section 3.2, after Katharopoulos et al. (arXiv 2006.16236).
//!
//! Supported: f32, f16, bf16; D and Dv from 32 to 256 in steps of 8; grouped heads; any lengths; the
//! causal form for equal lengths. A row whose denominator is 0 is 0.

mod apply;
#[allow(missing_docs, reason = "`CubeLaunch` derives a struct of its own")]
mod backward;
mod chunks;
#[allow(missing_docs, reason = "`#[cube]` adds a module of its own")]
mod feature_map;
mod output;
mod states;

pub use apply::feature_rows;
pub use backward::Gradients;
pub(crate) use backward::{
    LinearInputs, Taken, global_gradients, linear_gradients, multiply_rows, weighted_by_key,
    weighted_by_query, weighted_output,
};
pub use chunks::add_chunks;
pub use feature_map::{FeatureMap, feature};
pub(crate) use output::{divide_rows, multiply_state};
pub use states::{Chunks, States, state_scale, states};
pub(crate) use states::{Normalised, gradient_states, outer_sums};

use cubecl::prelude::*;
use output::{OutputConfig, linear_output};

use crate::engine::*;
use crate::limits::{expect_dtype, expect_loop_budget, grid};
use crate::{AttentionOptions, AttentionProblem, DeviceTensor, FactorType, ProblemError};

/// Keys of a chunk of the causal form: enough that states are few, few enough that most work is
/// done through them.
const CAUSAL_CHUNK: usize = 128;

/// Linear attention of `q [B, Hq, Lq, D]` over `k [B, Hkv, Lk, D]` and `v [B, Hkv, Lk, Dv]`, any
/// strides. Returns `[B, Hq, Lq, Dv]` in the inputs' type; sums are f32.
///
/// # Errors
/// [`ProblemError`] for shapes that do not fit, a type that the device lacks, or different lengths
/// in the causal form.
pub fn linear_attention(
    client: &Client,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    v: &DeviceTensor<4>,
    phi: FeatureMap,
    causal: bool,
) -> Result<DeviceTensor<4>, ProblemError> {
    let problem = AttentionProblem::new(q, k, v, &AttentionOptions::default())?;
    let device = client.properties();
    expect_dtype(device, problem.dtype())?;
    if causal && problem.query_len() != problem.key_len() {
        return Err(ProblemError::ShapeMismatch {
            argument: "k",
            found: k.shape().to_vec(),
            expected: [
                k.shape()[0],
                k.shape()[1],
                problem.query_len(),
                k.shape()[3],
            ]
            .to_vec(),
        });
    }
    let chunks = if causal {
        Chunks::Prefix(CAUSAL_CHUNK)
    } else {
        Chunks::Total
    };
    let states = states(client, k, v, phi, chunks, problem.factors())?;
    let out = DeviceTensor::empty(client, problem.out_shape(), problem.dtype());

    let (d, dv) = (problem.head_dim(), problem.value_dim());
    let needs = TileNeeds {
        owned: vec![d],
        streamed: vec![d, dv],
        accumulators: vec![dv],
        lefts: 1,
        max_rows: 64,
        max_cols: 64,
        max_stages: 1,
        unit_bytes: 4,
    };
    let (engine, tile) = tile_of(&needs, &[d], problem.factors(), device)?;
    let loads = (tile.cols * d.max(dv) / 4).div_ceil(tile.units);
    let tiles = d.div_ceil(tile.cols)
        + if causal {
            CAUSAL_CHUNK / tile.cols + 8
        } else {
            0
        };
    expect_loop_budget(
        device,
        "linear attention",
        2 * d + tiles * (3 * loads + d + tile.cols),
    )?;
    let config = OutputConfig {
        tile,
        head_dim: d,
        value_dim: dv,
        phi,
        causal_chunk: causal.then_some(CAUSAL_CHUNK),
    };
    let job = OutputJob {
        problem,
        tensors: [q, k, v, &states.h],
        states: &states,
        out: &out,
        config,
    };
    match engine {
        EngineKind::Simt => job.launch::<Simt>(client, [4, 4])?,
        EngineKind::Mma => job.launch::<Mma>(client, [8, 2])?,
        EngineKind::MmaTf32 => job.launch::<MmaTf32>(client, [4, 2])?,
    }
    Ok(out)
}

/// The fastest engine that can run tiles of these needs over states of so many rows, with its sizes.
pub(crate) fn tile_of(
    needs: &TileNeeds,
    rows: &[usize],
    factors: FactorType,
    device: &cubecl::ir::DeviceProperties,
) -> Result<(EngineKind, Tile), ProblemError> {
    // The rows of a state are taken `cols` at a time, out of their number padded to 16.
    let divides = |cols: &usize| {
        needs.max_cols.is_multiple_of(*cols)
            && rows
                .iter()
                .all(|rows| rows.next_multiple_of(16).is_multiple_of(*cols))
    };
    let needs = TileNeeds {
        max_cols: [64, 32, 16].into_iter().find(divides).unwrap_or(16),
        ..needs.clone()
    };
    engine_tile(&needs, factors, device)
}

struct OutputJob<'a> {
    problem: AttentionProblem,
    /// q, k, v, h.
    tensors: [&'a DeviceTensor<4>; 4],
    states: &'a States,
    out: &'a DeviceTensor<4>,
    config: OutputConfig,
}

impl OutputJob<'_> {
    fn launch<E: TileEngine<linear_output::F>>(
        &self,
        client: &Client,
        [load, store]: [usize; 2],
    ) -> Result<(), ProblemError> {
        let problem = &self.problem;
        let [q, k, v, h] = self.tensors;
        let tile = self.config.tile;
        let extent = self.tensors.iter().map(|t| t.extent()).max().unwrap_or(0);
        // SAFETY: rows past the length read as zeros and are not stored.
        unsafe {
            linear_output::launch_unchecked::<E>(
                client,
                grid(
                    client.properties(),
                    [
                        (
                            "tiles of query rows",
                            problem.query_len().div_ceil(tile.rows),
                        ),
                        ("Hq", problem.query_heads()),
                        ("B", problem.batch()),
                    ],
                )?,
                CubeDim::new_1d(tile.units as u32),
                AddressType::from_len(extent),
                if problem.is_aligned() { load } else { 1 },
                store,
                q.tensor_arg(),
                k.tensor_arg(),
                v.tensor_arg(),
                h.tensor_arg(),
                self.states.z.buffer_arg(),
                self.out.buffer_arg(),
                state_scale(problem.key_len()),
                self.config,
                problem.dtype().elem_type(),
            );
        }
        Ok(())
    }
}
