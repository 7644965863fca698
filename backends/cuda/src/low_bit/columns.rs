//! Means of keys and scales of values, both by columns of a head.

use cubecl::prelude::*;
use cubesla_kernels::attention::smoothing_sample;
use cubesla_kernels::quantize::{Format, scale_of};
use cubesla_kernels::{AttentionProblem, DType, DeviceTensor};

use super::LOAD;

/// Units of a cube.
const UNITS: usize = 256;
/// Rows of a cube.
const CHUNK: usize = 128;

/// By columns of a head, f32.
pub(super) struct Columns {
    /// Of keys, `[B, Hkv, D]`.
    pub mean: DeviceTensor<3>,
    /// FP8 scales of values and their reciprocals, `[B, Hkv, Dv]`; undefined unless they were asked
    /// for.
    pub scales: DeviceTensor<3>,
    pub inverses: DeviceTensor<3>,
}

impl Columns {
    /// Those of `k`, and of `v` if `fp8` says that it will be FP8.
    pub fn new(
        client: &Client,
        problem: &AttentionProblem,
        k: &DeviceTensor<4>,
        v: &DeviceTensor<4>,
        fp8: bool,
    ) -> Self {
        let (batch, heads) = (problem.batch(), problem.kv_heads());
        let (d, dv) = (problem.head_dim(), problem.value_dim());
        let sample = smoothing_sample(k);
        let sums = scan(client, &sample, false);
        let largest = fp8.then(|| scan(client, v, true));
        let empty = |width| DeviceTensor::<3>::empty(client, [batch, heads, width], DType::F32);
        let columns = Self {
            mean: empty(d),
            scales: empty(dv),
            inverses: empty(dv),
        };
        let tensors = if fp8 { 2 } else { 1 };
        let widest = d.max(dv).div_ceil(COLUMNS) as u32;
        // Not read unless there are two tensors.
        let largest = largest.as_ref().unwrap_or(&sums);
        // SAFETY: a cube writes what is of its own columns.
        unsafe {
            finish_columns::launch_unchecked(
                client,
                CubeCount::Static(widest, (batch * heads) as u32, tensors),
                CubeDim::new_1d(UNITS as u32),
                sums.buffer_arg(),
                largest.buffer_arg(),
                columns.mean.buffer_arg(),
                columns.scales.buffer_arg(),
                columns.inverses.buffer_arg(),
                sums.shape()[1] as u32,
                largest.shape()[1] as u32,
                sample.shape()[2] as u32,
                [d, dv],
            );
        }
        columns
    }
}

/// Sums of the columns of each chunk of the rows of `x [B, H, L, D]`, or the largest finite `magnitudes`:
/// `[B H, chunks, D]`.
fn scan(client: &Client, x: &DeviceTensor<4>, magnitudes: bool) -> DeviceTensor<3> {
    let [batch, heads, len, width] = x.shape();
    let chunks = len.div_ceil(CHUNK);
    let found = DeviceTensor::empty(client, [batch * heads, chunks, width], DType::F32);
    // SAFETY: a cube writes what it found of its own chunk; rows past the end are counted as zeros.
    unsafe {
        scan_columns::launch_unchecked(
            client,
            CubeCount::Static(chunks as u32, (batch * heads) as u32, 1),
            CubeDim::new_1d(UNITS as u32),
            AddressType::U32,
            LOAD,
            x.tensor_arg(),
            found.buffer_arg(),
            heads as u32,
            width,
            magnitudes,
            x.dtype().elem_type(),
        );
    }
    found
}

/// Each unit goes over every so many rows of a vector of columns; what they found is put together in
/// order.
///
/// Grid: x = chunk, y = (batch, head).
#[cube(launch_unchecked, address_type = "dynamic")]
fn scan_columns<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>, // [B, H, L, D]
    found: &mut [f32],        // [B H, chunks, D]
    heads: u32,
    #[comptime] width: usize,
    #[comptime] magnitudes: bool,
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
        let inside = row < rows;
        #[unroll]
        for e in 0..LOAD {
            let value = values.extract(e);
            if magnitudes {
                let size = u32::reinterpret(value) & 0x7FFF_FFFF;
                let counts = inside && size < 0x7F80_0000;
                partial[e] = max(partial[e], select(counts, f32::reinterpret(size), 0.0));
            } else {
                partial[e] += select(inside, value, 0.0);
            }
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
        let mut total = 0.0f32;
        for lane in 0..lanes {
            total = combined(total, shared[lane * width + unit], magnitudes);
        }
        let chunk = (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) as usize;
        found[chunk * width + unit] = total;
    }
}

#[cube]
fn combined(a: f32, b: f32, #[comptime] magnitudes: bool) -> f32 {
    if comptime!(magnitudes) {
        max(a, b)
    } else {
        a + b
    }
}

/// Columns of a cube that finishes: few, so that many units share a column's chunks.
const COLUMNS: usize = 8;
/// Units that share a column.
const LANES: usize = UNITS / COLUMNS;

/// Puts the chunks of a head together.
///
/// Grid: x = columns, y = (batch, head), z = 0 for keys, 1 for values.
#[cube(launch_unchecked)]
fn finish_columns(
    sums: &[f32],
    largest: &[f32],
    mean: &mut [f32],
    scales: &mut [f32],
    inverses: &mut [f32],
    sum_chunks: u32,
    largest_chunks: u32,
    len: u32,
    #[comptime] widths: [usize; 2],
) {
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    if CUBE_POS_Z == 0 {
        let width = comptime!(widths[0]);
        let (total, at, writes) = finish_column(sums, &mut shared, sum_chunks, width, false);
        if writes {
            mean[at] = total / f32::cast_from(len);
        }
    } else {
        let width = comptime!(widths[1]);
        let (total, at, writes) = finish_column(largest, &mut shared, largest_chunks, width, true);
        if writes {
            let scale = scale_of(u32::reinterpret(total), Format::Fp8);
            scales[at] = scale;
            inverses[at] = 1.0 / scale;
        }
    }
}

/// What was found of the unit's column, where it goes, and whether this unit writes it.
#[cube]
fn finish_column(
    found: &[f32],
    shared: &mut Shared<[f32]>,
    chunks: u32,
    #[comptime] width: usize,
    #[comptime] magnitudes: bool,
) -> (f32, usize, bool) {
    let own = UNIT_POS as usize % COLUMNS;
    let lane = UNIT_POS as usize / COLUMNS;
    let column = CUBE_POS_X as usize * COLUMNS + own;
    let start = CUBE_POS_Y as usize * chunks as usize * width;
    let mut total = 0.0f32;
    if column < width {
        let mut chunk = lane;
        while chunk < chunks as usize {
            total = combined(total, found[start + chunk * width + column], magnitudes);
            chunk += LANES;
        }
    }
    shared[UNIT_POS as usize] = total;
    sync_cube();
    let mut total = 0.0f32;
    for other in 0..LANES {
        total = combined(total, shared[other * COLUMNS + own], magnitudes);
    }
    let writes = lane == 0 && column < width;
    (total, CUBE_POS_Y as usize * width + column, writes)
}
