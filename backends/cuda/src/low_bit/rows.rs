//! Keys to 8 bits, a block of rows to a cube: each element is read once.

use cubecl::prelude::*;
use cubesla_kernels::quantize::{Format, finite_magnitude, reciprocal_of_scale, scale_of};
use cubesla_kernels::{DType, DeviceTensor};

use super::LOAD;
use crate::ptx::low_bit::{clamp_magnitude, max_magnitude, pack_bytes, pack_e4m3};
use crate::ptx::math::rounded_product;

/// Units of a cube.
const UNITS: usize = 256;

/// Rows in 8 bits.
pub(super) struct Quantized {
    /// Four elements to a word, `[B, H, L, D / 4]`.
    pub words: DeviceTensor<4>,
    /// A scale to each block of rows, `[B, H, blocks]`.
    pub scales: DeviceTensor<3>,
}

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct RowsConfig {
    dim: usize,
    block: usize,
    format: Format,
}

/// Keys `k [B, H, L, D]` less their `mean [B, H, D]`.
pub(super) fn quantize_keys(
    client: &Client,
    k: &DeviceTensor<4>,
    mean: &DeviceTensor<3>,
    block: usize,
    format: Format,
) -> Quantized {
    let [batch, heads, len, dim] = k.shape();
    let blocks = len.div_ceil(block);
    let quantized = Quantized {
        words: DeviceTensor::empty(client, [batch, heads, len, dim / 4], DType::F32),
        scales: DeviceTensor::empty(client, [batch, heads, blocks], DType::F32),
    };
    // SAFETY: a cube writes the words and the scale of its own block; rows past the end are skipped.
    unsafe {
        quantize_keys_kernel::launch_unchecked(
            client,
            CubeCount::Static(blocks as u32, heads as u32, batch as u32),
            CubeDim::new_1d(UNITS as u32),
            AddressType::U32,
            LOAD,
            LOAD / 4,
            k.tensor_arg(),
            mean.buffer_arg(),
            quantized.words.buffer_arg(),
            quantized.scales.buffer_arg(),
            RowsConfig { dim, block, format },
            k.dtype().elem_type(),
        );
    }
    quantized
}

/// Grid: x = block, y = head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
fn quantize_keys_kernel<F: Float, N: Size, W: Size>(
    x: &Tensor<Vector<F, N>>,     // [B, H, L, D]
    mean: &[f32],                 // [B, H, D]
    words: &mut [Vector<u32, W>], // [B, H, L, D / 4]
    scales: &mut [f32],           // [B, H, blocks]
    #[comptime] config: RowsConfig,
    #[define(F)] _dtype: ElemType,
) {
    let per_row = comptime!(config.dim / LOAD);
    let count = comptime!((config.block * per_row).div_ceil(UNITS));
    let unit = UNIT_POS as usize;
    let len = x.shape(2);
    let head = (CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) as usize;
    let mean_start = head * comptime!(config.dim);
    let base = CUBE_POS_Z as usize * x.stride(0) + CUBE_POS_Y as usize * x.stride(1);
    let first = CUBE_POS_X as usize * comptime!(config.block);
    let rows = min(len - first, comptime!(config.block));

    let mut values = Array::<f32>::new(comptime!(count * LOAD));
    let mut largest = 0.0f32.runtime();
    #[unroll]
    for i in 0..count {
        // Past the end the last row is read again: it changes no maximum.
        let at = comptime!(i * UNITS) + unit;
        let row = first + min(at / per_row, rows - 1);
        let column = at % per_row * LOAD;
        let vector = Vector::<f32, N>::cast_from(x[(base + row * x.stride(2) + column) / LOAD]);
        #[unroll]
        for e in 0..LOAD {
            let value = vector.extract(e) - mean[mean_start + column + e];
            largest = max_magnitude(largest, value);
            values[comptime!(i * LOAD + e)] = value;
        }
    }
    let mut largest = cube_max(u32::reinterpret(largest));
    if largest >= 0x7F80_0000 {
        // Infinities saturate at the largest of the others.
        let mut finite = 0u32.runtime();
        #[unroll]
        for i in 0..comptime!(count * LOAD) {
            finite = max(finite, finite_magnitude(values[i]));
        }
        sync_cube();
        largest = cube_max(finite);
        let bound = bound(scale_of(largest, config.format), config.format);
        #[unroll]
        for i in 0..comptime!(count * LOAD) {
            values[i] = clamp_magnitude(values[i], bound);
        }
    }
    let scale = scale_of(largest, config.format);
    if unit == 0 {
        scales[head * CUBE_COUNT_X as usize + CUBE_POS_X as usize] = scale;
    }

    let reciprocal = reciprocal_of_scale(scale);
    #[unroll]
    for i in 0..count {
        let at = comptime!(i * UNITS) + unit;
        let row = at / per_row;
        let mut packed = Vector::<u32, W>::empty();
        #[unroll]
        for word in 0..comptime!(LOAD / 4) {
            let start = comptime!(i * LOAD + 4 * word);
            let four = codes(&values, start, reciprocal, false, config.format);
            packed.insert(word, four);
        }
        if row < rows {
            words[(head * len + first + row) * per_row + at % per_row] = packed;
        }
    }
}

/// Largest over the cube, which is synchronised by it.
#[cube]
fn cube_max(x: u32) -> u32 {
    let planes = comptime!(UNITS / 32);
    let mut shared = Shared::<[u32]>::new_slice(planes);
    let of_plane = plane_max(x);
    if UNIT_POS % 32 == 0 {
        shared[UNIT_POS as usize / 32] = of_plane;
    }
    sync_cube();
    let mut largest = shared[0];
    #[unroll]
    for i in 1..planes {
        largest = max(largest, shared[i]);
    }
    largest
}

/// The codes of four numbers by their scale's reciprocal, the first in the lowest byte: of finite numbers, or
/// of such between bounds. Of a NaN there are no codes that matter, as its scale is NaN.
///
/// Products of 16-bit numbers are `exact`: rounding them once, in the sum that gives an integer, is one
/// instruction less and gives the same.
#[cube]
pub(super) fn codes(
    values: &Array<f32>,
    #[comptime] first: usize,
    reciprocal: f32,
    #[comptime] exact: bool,
    #[comptime] format: Format,
) -> u32 {
    let (a, b) = (values[first], values[comptime!(first + 1)]);
    let (c, d) = (values[comptime!(first + 2)], values[comptime!(first + 3)]);
    if comptime!(format == Format::Fp8) {
        pack_e4m3(
            rounded_product(a, reciprocal),
            rounded_product(b, reciprocal),
            rounded_product(c, reciprocal),
            rounded_product(d, reciprocal),
        )
    } else {
        pack_bytes(
            integer(a, reciprocal, exact),
            integer(b, reciprocal, exact),
            integer(c, reciprocal, exact),
            integer(d, reciprocal, exact),
        )
    }
}

/// The nearest integer of `x reciprocal` in the lowest byte, ties to even: 1.5 x 2^23 leaves it there.
#[cube]
fn integer(x: f32, reciprocal: f32, #[comptime] exact: bool) -> u32 {
    if exact {
        u32::reinterpret(fma(x, reciprocal, 12_582_912.0))
    } else {
        u32::reinterpret(rounded_product(x, reciprocal) + 12_582_912.0)
    }
}

/// The largest number that has a code with this scale, which infinities are taken for.
#[cube]
pub(super) fn bound(scale: f32, #[comptime] format: Format) -> f32 {
    min(scale * comptime!(format.top()), f32::max_value())
}
