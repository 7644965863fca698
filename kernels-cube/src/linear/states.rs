//! The states of linear attention: `H = sum_j phi(K_j)^T V_j` and `Z = sum_j phi(K_j)`.
//!
//! Keys are cut into chunks, each a cube's; a second kernel adds the chunks' sums in order, or turns
//! them into the sums of all earlier chunks. States are multiplied by [`state_scale`], which
//! cancels in `phi(Q) H / (phi(Q) . Z)` and keeps them in the range of f16.

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;

use super::{FeatureMap, add_chunks};
use crate::engine::*;
use crate::limits::{expect_buffer, expect_loop_budget, grid};
use crate::rows::{RowRange, RowTarget, store_rows};
use crate::{DType, DeviceTensor, FactorType, ProblemError};

/// States of each (batch, key head).
#[derive(Clone, Debug)]
pub struct States {
    /// `[chunks * B, Hkv, D, Dv]`; one chunk unless they are prefixes.
    pub h: DeviceTensor<4>,
    /// f32 `[chunks * B, Hkv, D, 1]`.
    pub z: DeviceTensor<4>,
}

/// Which sums are made of the chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunks {
    /// One sum over all keys.
    Total,
    /// For each chunk of so many keys, the sum over the chunks before it.
    Prefix(usize),
}

/// Power of two near `1 / sqrt(len)`: sums of `len` features stay within f16 for feature maps of
/// order 1 as well as of order `1 / D`.
pub fn state_scale(len: usize) -> f32 {
    (-(len as f32).log2() / 2.0).round().exp2()
}

/// Engine and sizes of the states' tile program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StatesPlan {
    engine: EngineKind,
    tile: Tile,
    /// Columns of values that a cube takes.
    width: usize,
}

impl StatesPlan {
    /// The fastest engine that can.
    pub fn new(
        device: &DeviceProperties,
        factors: FactorType,
        head_dim: usize,
        value_dim: usize,
    ) -> Result<Self, ProblemError> {
        let widest = |most: usize| {
            (1..=most / 8)
                .rev()
                .map(|n| 8 * n)
                .find(|width| value_dim.is_multiple_of(*width))
                .unwrap_or(8)
        };
        match mma_supported(factors, device) {
            Ok(()) => {
                let rows = head_dim.next_multiple_of(16);
                return Ok(Self {
                    engine: EngineKind::mma(factors),
                    tile: Tile {
                        rows,
                        // Fewer waits for loads, where two cubes still share a multiprocessor.
                        cols: if head_dim > 128 { 32 } else { 64 },
                        units: 2 * rows,
                        stages: 1,
                    },
                    width: widest(if head_dim > 128 { 64 } else { 128 }),
                });
            }
            Err(reason) => expect_simt(factors, reason, device)?,
        }
        // Four rows of the states to a unit, or eight where cubes would be too large.
        let per_unit = if head_dim > 128 { 8 } else { 4 };
        for (cols, most) in [(32, 64), (16, 64), (16, 32), (8, 32), (8, 8)] {
            let tile = Tile {
                rows: head_dim,
                cols,
                units: head_dim * 8 / per_unit,
                stages: 1,
            };
            let needs = TileNeeds {
                owned: vec![],
                streamed: vec![head_dim, widest(most)],
                accumulators: vec![],
                lefts: 0,
                max_rows: head_dim,
                max_cols: cols,
                max_stages: 1,
                unit_bytes: 0,
            };
            // Sums of columns take what is counted for reductions along rows; weights of rows are more.
            let bytes = simt_shared_memory(&needs, tile) + 4 * cols;
            if bytes <= device.hardware.max_shared_memory_size
                && tile.units <= device.hardware.max_units_per_cube as usize
            {
                return Ok(Self {
                    engine: EngineKind::Simt,
                    tile,
                    width: widest(most),
                });
            }
        }
        Err(ProblemError::NoPlan {
            device: device.identity.name.clone(),
            reason: "no tile of these head dimensions fits the shared memory".into(),
        })
    }
}

/// `sum a^T b` over all rows, f32 `[D, Dv]`, and the sum of the rows of `a`, f32 `[D]`, of
/// `a [B, H, L, D]` and `b [B, H, L, Dv]`.
pub(crate) fn outer_sums(
    client: &Client,
    a: &DeviceTensor<4>,
    b: &DeviceTensor<4>,
    factors: FactorType,
) -> Result<(DeviceTensor<2>, DeviceTensor<1>), ProblemError> {
    let (phi, chunks) = (FeatureMap::Identity, Chunks::Total);
    let (partial, _) = partial_states(client, a, b, phi, chunks, None, factors)?;
    let [parts, heads, rows, columns] = partial.h.shape();
    let h = DeviceTensor::empty(client, [1, 1, rows, columns], DType::F32);
    let z = DeviceTensor::empty(client, [1, 1, rows, 1], DType::F32);
    add_chunks(client, &partial.h, &h, parts * heads, 1.0, false)?;
    add_chunks(client, &partial.z, &z, parts * heads, 1.0, false)?;
    let (h, z) = (h.handle().clone(), z.handle().clone());
    Ok((
        DeviceTensor::new(h, [rows, columns], [columns, 1], DType::F32)?,
        DeviceTensor::new(z, [rows], [1], DType::F32)?,
    ))
}

/// Makes the states of `k [B, Hkv, Lk, D]` and `v [B, Hkv, Lk, Dv]`, products of `factors` summed in
/// f32, `h` rounded to their type.
///
/// # Errors
/// A [`ProblemError`] if no tile fits the device, or the states no buffer.
pub fn states(
    client: &Client,
    k: &DeviceTensor<4>,
    v: &DeviceTensor<4>,
    phi: FeatureMap,
    chunks: Chunks,
    factors: FactorType,
) -> Result<States, ProblemError> {
    let [batch, heads, len, head_dim] = k.shape();
    let value_dim = v.shape()[3];
    let (partial, count) = partial_states(client, k, v, phi, chunks, None, factors)?;
    let prefix = matches!(chunks, Chunks::Prefix(_));
    let kept = if prefix { count } else { 1 };
    let total = States {
        h: DeviceTensor::empty(
            client,
            [kept * batch, heads, head_dim, value_dim],
            k.dtype(),
        ),
        z: DeviceTensor::empty(client, [kept * batch, heads, head_dim, 1], DType::F32),
    };
    let scale = state_scale(len);
    add_chunks(client, &partial.h, &total.h, count, scale, prefix)?;
    add_chunks(client, &partial.z, &total.z, count, scale, prefix)?;
    Ok(total)
}

/// By what rows are divided before they are added up, and their weights in the sum `z`.
#[derive(Clone, Copy)]
pub(crate) struct Normalised<'a> {
    /// Vectors whose products with `phi` of the rows divide them, f32 `[B, Hkv, D, 1]`.
    pub z: &'a DeviceTensor<4>,
    /// f32 `[B, Hq, Lq]`.
    pub weights: &'a DeviceTensor<3>,
}

/// With `y_i = phi(Q_i) / (phi(Q_i) . z)`: `h = sum y_i^T dO_i` and `z = sum w_i y_i` over the rows of
/// all query heads of a key head, both times [`state_scale`] of their number; `q [B, Hq, Lq, D]` and
/// `grad [B, Hq, Lq, Dv]`, any strides.
pub(crate) fn gradient_states(
    client: &Client,
    q: &DeviceTensor<4>,
    grad: &DeviceTensor<4>,
    phi: FeatureMap,
    by: Normalised<'_>,
    factors: FactorType,
) -> Result<States, ProblemError> {
    let [batch, heads, len, head_dim] = q.shape();
    let kv_heads = by.z.shape()[1];
    let (partial, count) = partial_states(client, q, grad, phi, Chunks::Total, Some(by), factors)?;
    let total = States {
        h: DeviceTensor::empty(
            client,
            [batch, kv_heads, head_dim, grad.shape()[3]],
            q.dtype(),
        ),
        z: DeviceTensor::empty(client, [batch, kv_heads, head_dim, 1], DType::F32),
    };
    let scale = state_scale(len * heads / kv_heads);
    add_chunks(client, &partial.h, &total.h, count, scale, false)?;
    add_chunks(client, &partial.z, &total.z, count, scale, false)?;
    Ok(total)
}

/// The states of each chunk alone, f32 and not scaled, and the number of chunks. Rows that are
/// normalised are those of all query heads of a key head, and chunks are of one head.
fn partial_states(
    client: &Client,
    k: &DeviceTensor<4>,
    v: &DeviceTensor<4>,
    phi: FeatureMap,
    chunks: Chunks,
    normalised: Option<Normalised<'_>>,
    factors: FactorType,
) -> Result<(States, usize), ProblemError> {
    let device = client.properties();
    let [batch, all_heads, len, head_dim] = k.shape();
    let heads = normalised.map_or(all_heads, |by| by.z.shape()[1]);
    let group = all_heads / heads;
    let value_dim = v.shape()[3];
    let plan = StatesPlan::new(device, factors, head_dim, value_dim)?;
    let chunk = match chunks {
        Chunks::Prefix(chunk) => chunk,
        // Some cubes to each multiprocessor, and few enough sums to add.
        Chunks::Total => (len * batch * all_heads / 1024)
            .next_power_of_two()
            .clamp(128, 4096),
    };
    let count = len.div_ceil(chunk) * group;
    let per_tile =
        plan.tile.cols + 2 * (plan.tile.cols * head_dim / 4).div_ceil(plan.tile.units) + 8;
    let tiles = chunk.div_ceil(plan.tile.cols);
    expect_loop_budget(
        device,
        "linear states",
        tiles * per_tile + 2 * tiles * plan.tile.cols,
    )?;
    expect_buffer(
        device,
        "states of linear attention",
        count * batch * heads * head_dim * value_dim * 4,
    )?;

    let shape = [count * batch, heads, head_dim, value_dim];
    let partial = States {
        h: DeviceTensor::empty(client, shape, DType::F32),
        z: DeviceTensor::empty(client, [count * batch, heads, head_dim, 1], DType::F32),
    };
    let job = StatesJob {
        k,
        v,
        partial: &partial,
        plan,
        phi,
        chunk,
        count,
        group,
        normalised,
    };
    match plan.engine {
        EngineKind::Simt => job.launch::<Simt>(client, [4, 4])?,
        EngineKind::Mma => job.launch::<Mma>(client, [8, 2])?,
        EngineKind::MmaTf32 => job.launch::<MmaTf32>(client, [4, 2])?,
    }
    Ok((partial, count))
}

struct StatesJob<'a> {
    k: &'a DeviceTensor<4>,
    v: &'a DeviceTensor<4>,
    partial: &'a States,
    plan: StatesPlan,
    phi: FeatureMap,
    chunk: usize,
    count: usize,
    /// Heads of rows to a state.
    group: usize,
    normalised: Option<Normalised<'a>>,
}

impl StatesJob<'_> {
    fn launch<E: TileEngine<states_kernel::F>>(
        &self,
        client: &Client,
        [load, store]: [usize; 2],
    ) -> Result<(), ProblemError> {
        let [batch, heads, _, head_dim] = self.k.shape();
        let value_dim = self.v.shape()[3];
        // Arguments that the other variant does not read.
        let nothing = || self.partial.z.buffer_arg();
        let (divisors, weights) = match self.normalised {
            Some(by) => (by.z.buffer_arg(), by.weights.buffer_arg()),
            None => (nothing(), nothing()),
        };
        let aligned = self.k.is_aligned() && self.v.is_aligned();
        let extent = self.k.extent().max(self.v.extent());
        // SAFETY: keys past the length read as zeros and add nothing; each cube writes the states of
        // its own chunk, head and columns.
        unsafe {
            states_kernel::launch_unchecked::<E>(
                client,
                grid(
                    client.properties(),
                    [
                        ("chunks of keys", self.count),
                        ("columns of values", value_dim / self.plan.width),
                        ("B * Hkv", batch * heads / self.group),
                    ],
                )?,
                CubeDim::new_1d(self.plan.tile.units as u32),
                AddressType::from_len(extent),
                if aligned { load } else { 1 },
                store,
                self.k.tensor_arg(),
                self.v.tensor_arg(),
                self.partial.h.buffer_arg(),
                self.partial.z.buffer_arg(),
                divisors,
                weights,
                self.chunk as u32,
                self.group as u32,
                StatesConfig {
                    tile: self.plan.tile,
                    head_dim,
                    value_dim,
                    width: self.plan.width,
                    phi: self.phi,
                    normalised: self.normalised.is_some(),
                },
                self.k.dtype().elem_type(),
            );
        }
        Ok(())
    }
}

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct StatesConfig {
    tile: Tile,
    head_dim: usize,
    value_dim: usize,
    width: usize,
    phi: FeatureMap,
    /// Whether rows are divided, and weighted in the sum `z`.
    normalised: bool,
}

/// One cube adds up a chunk of keys for some columns of the states.
///
/// Grid: x = (chunk, head of the group), y = columns of values, z = (batch, key head).
#[cube(launch_unchecked, address_type = "dynamic")]
fn states_kernel<E: TileEngine<F>, F: Float, N: Size, V: Size>(
    k: &Tensor<Vector<F, N>>,
    v: &Tensor<Vector<F, N>>,
    h: &mut [Vector<f32, V>],
    z: &mut [f32],
    divisors: &[f32], // [B, Hkv, D], not read if nothing is normalised
    weights: &[f32],  // [B, Hq, Lq], likewise
    chunk: u32,
    group: u32,
    #[comptime] config: StatesConfig,
    #[define(F)] _dtype: ElemType,
) {
    let tile = comptime!(config.tile);
    let kv_heads = k.shape(1) / group as usize;
    let batch = CUBE_POS_Z as usize / kv_heads;
    let head = CUBE_POS_Z as usize % kv_heads * group as usize + (CUBE_POS_X % group) as usize;
    let first = CUBE_POS_X / group * chunk;
    let end = min(first + chunk, k.shape(2) as u32);
    let first_column = CUBE_POS_Y * comptime!(config.width as u32);

    let mut keys = E::operand(tile.cols, config.head_dim, tile);
    let mut values = E::operand(tile.cols, config.width, tile);
    let mut acc = E::accumulator(config.width, tile);
    let size = E::vector_len();
    let mut sums = Array::<f32>::new(size);
    #[unroll]
    for e in 0..size {
        sums[e] = 0.0;
    }
    // As many units to a vector of columns as there are, which take turns in rows.
    let vectors = comptime!(config.head_dim / size);
    let shares = comptime!(tile.units / vectors);
    let (own, share) = (UNIT_POS as usize % vectors, UNIT_POS as usize / vectors);
    let adds = share < shares && CUBE_POS_Y == 0;
    let mut row_weights = Shared::<[f32]>::new_slice(comptime!(tile.cols));
    let unit = UNIT_POS as usize;
    if unit < comptime!(tile.cols) {
        row_weights[unit] = 1.0;
    }
    let weights_start = (batch * k.shape(1) + head) * k.shape(2);
    let divisor = CUBE_POS_Z as usize * config.head_dim;

    let mut at = first;
    while at < end {
        let rows = RowRange::new::<F, N>(
            k,
            batch,
            head,
            at,
            min(at + comptime!(tile.cols as u32), end),
        );
        E::begin_load::<N>(&mut keys, k, rows, tile);
        let value_rows = RowRange::new::<F, N>(
            v,
            batch,
            head,
            at,
            min(at + comptime!(tile.cols as u32), end),
        );
        E::begin_load::<N>(&mut values, v, value_rows.at_column(first_column), tile);
        if config.normalised {
            if unit < comptime!(tile.cols) {
                let mut weight = f32::new(0.0);
                if (unit as u32) < rows.len {
                    weight = weights[weights_start + at as usize + unit];
                }
                row_weights[unit] = weight;
            }
        }
        E::await_loads(1usize);
        if config.normalised {
            let divisors = &divisors[divisor..divisor + config.head_dim];
            E::apply_normalised(&mut keys, rows.len, divisors, config.phi, tile);
        } else {
            E::apply_feature_map(&mut keys, rows.len, config.phi, tile);
        }
        E::await_loads(0usize);
        E::mul_tn(&mut acc, &keys, &values);
        if adds {
            E::add_column_sums(&mut sums, &keys, &row_weights, own, share, shares);
        }
        // The tiles are filled again.
        sync_cube();
        at += comptime!(tile.cols as u32);
    }

    let state = (CUBE_POS_X * CUBE_COUNT_Z + CUBE_POS_Z) as usize * config.head_dim;
    let target = RowTarget {
        first_row: state,
        len: comptime!(config.head_dim as u32),
        first_column,
        end_column: first_column + comptime!(config.width as u32),
    };
    store_rows::<f32, V, E::Fragment>(h, &acc, target, config.value_dim);
    let mut partial = Shared::<[f32]>::new_slice(comptime!(shares * config.head_dim));
    if adds {
        #[unroll]
        for e in 0..size {
            partial[(share * vectors + own) * size + e] = sums[e];
        }
    }
    sync_cube();
    if unit < config.head_dim && CUBE_POS_Y == 0 {
        let mut sum = 0.0f32;
        #[unroll]
        for i in 0..shares {
            sum += partial[i * config.head_dim + unit];
        }
        z[state + unit] = sum;
    }
}
