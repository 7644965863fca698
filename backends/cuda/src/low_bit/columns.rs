//! Means of keys and scales of values, both by columns of a head.

use cubecl::prelude::*;
use cubesla_kernels::attention::smoothing_sample;
use cubesla_kernels::quantize::{Format, scale_of};
use cubesla_kernels::{AttentionProblem, DType, DeviceTensor};

use super::LOAD;

/// Units of a cube.
const UNITS: usize = 256;
/// Rows that a unit loads at once: with these, the samples of most lengths are loaded in one go.
const AT_ONCE: usize = 9;
/// Rows of values of a cube.
const CHUNK: usize = 256;

/// The mean key of each head of `k [B, H, L, D]`, of its [`smoothing_sample`]: f32, `[B, H, D]`.
pub(super) fn mean_key(
    client: &Client,
    problem: &AttentionProblem,
    k: &DeviceTensor<4>,
) -> DeviceTensor<3> {
    let (batch, heads, width) = (problem.batch(), problem.kv_heads(), problem.head_dim());
    let sample = smoothing_sample(k);
    let mean = DeviceTensor::empty(client, [batch, heads, width], DType::F32);
    // SAFETY: a cube writes the means of its own columns; it reads rows of the sample only.
    unsafe {
        mean_columns::launch_unchecked(
            client,
            CubeCount::Static((width / LOAD) as u32, (batch * heads) as u32, 1),
            CubeDim::new_1d(UNITS as u32),
            AddressType::U32,
            LOAD,
            sample.tensor_arg(),
            mean.buffer_arg(),
            heads as u32,
            width,
            k.dtype().elem_type(),
        );
    }
    mean
}

/// Each unit adds up every so many rows; their sums are put together in order.
///
/// Grid: x = eight columns, y = (batch, head).
#[cube(launch_unchecked, address_type = "dynamic")]
fn mean_columns<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>, // [B, H, L, D]
    mean: &mut [f32],         // [B, H, D]
    heads: u32,
    #[comptime] width: usize,
    #[define(F)] _dtype: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(UNITS * LOAD));
    let unit = UNIT_POS as usize;
    let (batch, head) = (CUBE_POS_Y / heads, CUBE_POS_Y % heads);
    let column = CUBE_POS_X as usize * LOAD;
    let base = batch as usize * x.stride(0) + head as usize * x.stride(1) + column;
    let rows = x.shape(2);
    let mut partial = Array::<f32>::new(LOAD);
    #[unroll]
    for e in 0..LOAD {
        partial[e] = 0.0;
    }
    // Some rows at once, so that their loads are under way together; past the end the last is read again.
    let mut first = 0usize;
    while first < rows {
        #[unroll]
        for step in 0..AT_ONCE {
            let row = first + comptime!(step * UNITS) + unit;
            let at = base + min(row, rows - 1) * x.stride(2);
            let values = Vector::<f32, N>::cast_from(x[at / LOAD]);
            #[unroll]
            for e in 0..LOAD {
                partial[e] += select(row < rows, values.extract(e), 0.0);
            }
        }
        first += comptime!(AT_ONCE * UNITS);
    }
    #[unroll]
    for e in 0..LOAD {
        shared[comptime!(e * UNITS) + unit] = partial[e];
    }
    #[unroll]
    for step in 0..comptime!(UNITS.ilog2() as usize) {
        let half = comptime!(UNITS >> (step + 1));
        sync_cube();
        if unit < half {
            #[unroll]
            for e in 0..LOAD {
                let at = comptime!(e * UNITS) + unit;
                shared[at] += shared[at + half];
            }
        }
    }
    sync_cube();
    if unit < LOAD {
        mean[CUBE_POS_Y as usize * width + column + unit] =
            shared[unit * UNITS] / f32::cast_from(rows as u32);
    }
}

/// FP8 scales of the columns of values and their reciprocals, f32, `[B, H, Dv]`.
pub(super) struct ValueScales {
    pub scales: DeviceTensor<3>,
    pub inverses: DeviceTensor<3>,
}

impl ValueScales {
    /// Those of `v [B, H, L, Dv]`.
    pub fn new(client: &Client, v: &DeviceTensor<4>) -> Self {
        let [batch, heads, len, width] = v.shape();
        let chunks = len.div_ceil(CHUNK);
        let largest = DeviceTensor::<3>::empty(client, [batch * heads, chunks, width], DType::F32);
        let empty = || DeviceTensor::empty(client, [batch, heads, width], DType::F32);
        let found = Self {
            scales: empty(),
            inverses: empty(),
        };
        // SAFETY: a cube writes what it found of its own chunk or columns; rows past the end are counted
        // as zeros.
        unsafe {
            scan_columns::launch_unchecked(
                client,
                CubeCount::Static(chunks as u32, (batch * heads) as u32, 1),
                CubeDim::new_1d(UNITS as u32),
                AddressType::U32,
                LOAD,
                v.tensor_arg(),
                largest.buffer_arg(),
                heads as u32,
                width,
                v.dtype().elem_type(),
            );
            finish_columns::launch_unchecked(
                client,
                CubeCount::Static(width.div_ceil(COLUMNS) as u32, (batch * heads) as u32, 1),
                CubeDim::new_1d(UNITS as u32),
                largest.buffer_arg(),
                found.scales.buffer_arg(),
                found.inverses.buffer_arg(),
                chunks as u32,
                width,
            );
        }
        found
    }
}

/// The largest finite magnitudes of the columns of `x` in a chunk of rows.
///
/// Each unit goes over every so many rows of a vector of columns.
///
/// Grid: x = chunk, y = (batch, head).
#[cube(launch_unchecked, address_type = "dynamic")]
fn scan_columns<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>, // [B, H, L, D]
    largest: &mut [f32],      // [B H, chunks, D]
    heads: u32,
    #[comptime] width: usize,
    #[define(F)] _dtype: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(UNITS * LOAD));
    let vectors = comptime!(width / LOAD);
    let lanes = comptime!(UNITS / vectors);
    let unit = UNIT_POS as usize;
    let (lane, vector) = (unit / vectors, unit % vectors);
    let (batch, head) = (CUBE_POS_Y / heads, CUBE_POS_Y % heads);
    let base = batch as usize * x.stride(0) + head as usize * x.stride(1) + vector * LOAD;
    let first = CUBE_POS_X as usize * CHUNK;
    let rows = min(x.shape(2) - first, CHUNK);
    let mut partial = Array::<f32>::new(LOAD);
    #[unroll]
    for e in 0..LOAD {
        partial[e] = 0.0;
    }
    #[unroll]
    for step in 0..comptime!(CHUNK.div_ceil(lanes)) {
        let row = comptime!(step * lanes) + lane;
        let at = base + (first + min(row, rows - 1)) * x.stride(2);
        let values = Vector::<f32, N>::cast_from(x[at / LOAD]);
        #[unroll]
        for e in 0..LOAD {
            let size = u32::reinterpret(values.extract(e)) & 0x7FFF_FFFF;
            let counts = row < rows && size < 0x7F80_0000;
            partial[e] = max(partial[e], select(counts, f32::reinterpret(size), 0.0));
        }
    }
    if lane < lanes {
        #[unroll]
        for e in 0..LOAD {
            shared[lane * width + vector * LOAD + e] = partial[e];
        }
    }
    sync_cube();
    if unit < width {
        let mut of_chunk = 0.0f32;
        for lane in 0..lanes {
            of_chunk = max(of_chunk, shared[lane * width + unit]);
        }
        let chunk = (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) as usize;
        largest[chunk * width + unit] = of_chunk;
    }
}

/// Columns of a cube that finishes: few, so that many units share a column's chunks.
const COLUMNS: usize = 8;
/// Units that share a column.
const LANES: usize = UNITS / COLUMNS;

/// Puts the chunks of a head together.
///
/// Grid: x = columns, y = (batch, head).
#[cube(launch_unchecked)]
fn finish_columns(
    found: &[f32], // [B H, chunks, D]
    scales: &mut [f32],
    inverses: &mut [f32],
    chunks: u32,
    #[comptime] width: usize,
) {
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let own = UNIT_POS as usize % COLUMNS;
    let lane = UNIT_POS as usize / COLUMNS;
    let column = CUBE_POS_X as usize * COLUMNS + own;
    let start = CUBE_POS_Y as usize * chunks as usize * width;
    let mut largest = 0.0f32;
    if column < width {
        let mut chunk = lane;
        while chunk < chunks as usize {
            largest = max(largest, found[start + chunk * width + column]);
            chunk += LANES;
        }
    }
    shared[UNIT_POS as usize] = largest;
    sync_cube();
    if lane == 0 && column < width {
        let mut largest = 0.0f32;
        for other in 0..LANES {
            largest = max(largest, shared[other * COLUMNS + own]);
        }
        let scale = scale_of(u32::reinterpret(largest), Format::Fp8);
        let at = CUBE_POS_Y as usize * width + column;
        scales[at] = scale;
        inverses[at] = 1.0 / scale;
    }
}
