//! Queries and keys to 8 bits, a block of rows to a cube: each element is read once.

use cubecl::prelude::*;
use cubesla_kernels::quantize::{Format, finite_magnitude, scale_of};
use cubesla_kernels::{DType, DeviceTensor};

use super::LOAD;
use crate::ptx::low_bit::{clamp_magnitude, max_magnitude, pack_bytes, pack_e4m3};

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
    /// Keys lose the mean; else rows are queries, and their products with it are written.
    keys: bool,
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
    // Only queries have a shift: an argument that is not used.
    quantize_rows(client, k, mean, mean, block, true, format)
}

/// Queries `q [B, Hq, L, D]`, and their products with the mean key of `[B, Hkv, D]`, `[B, Hq, L]`.
pub(super) fn quantize_queries(
    client: &Client,
    q: &DeviceTensor<4>,
    mean: &DeviceTensor<3>,
    block: usize,
    format: Format,
) -> (Quantized, DeviceTensor<3>) {
    let [batch, heads, len, _] = q.shape();
    let shift = DeviceTensor::empty(client, [batch, heads, len], DType::F32);
    let rows = quantize_rows(client, q, mean, &shift, block, false, format);
    (rows, shift)
}

fn quantize_rows(
    client: &Client,
    x: &DeviceTensor<4>,
    mean: &DeviceTensor<3>,
    shift: &DeviceTensor<3>,
    block: usize,
    keys: bool,
    format: Format,
) -> Quantized {
    let [batch, heads, len, dim] = x.shape();
    let blocks = len.div_ceil(block);
    let quantized = Quantized {
        words: DeviceTensor::empty(client, [batch, heads, len, dim / 4], DType::F32),
        scales: DeviceTensor::empty(client, [batch, heads, blocks], DType::F32),
    };
    // SAFETY: a cube writes the words, the scale and the products of its own block; rows past the end
    // are skipped.
    unsafe {
        quantize_rows_kernel::launch_unchecked(
            client,
            CubeCount::Static(blocks as u32, heads as u32, batch as u32),
            CubeDim::new_1d(UNITS as u32),
            AddressType::U32,
            LOAD,
            LOAD / 4,
            x.tensor_arg(),
            mean.buffer_arg(),
            quantized.words.buffer_arg(),
            quantized.scales.buffer_arg(),
            shift.buffer_arg(),
            (heads / mean.shape()[1]) as u32,
            RowsConfig {
                dim,
                block,
                keys,
                format,
            },
            x.dtype().elem_type(),
        );
    }
    quantized
}

/// Grid: x = block, y = head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
fn quantize_rows_kernel<F: Float, N: Size, W: Size>(
    x: &Tensor<Vector<F, N>>,     // [B, H, L, D]
    mean: &[f32],                 // [B, Hkv, D]
    words: &mut [Vector<u32, W>], // [B, H, L, D / 4]
    scales: &mut [f32],           // [B, H, blocks]
    shift: &mut [f32],            // [B, H, L]
    group: u32,
    #[comptime] config: RowsConfig,
    #[define(F)] _dtype: ElemType,
) {
    let per_row = comptime!(config.dim / LOAD);
    let count = comptime!((config.block * per_row).div_ceil(UNITS));
    let unit = UNIT_POS as usize;
    let len = x.shape(2);
    let head = (CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) as usize;
    let mean_start = head / group as usize * comptime!(config.dim);
    let base = CUBE_POS_Z as usize * x.stride(0) + CUBE_POS_Y as usize * x.stride(1);
    let first = CUBE_POS_X as usize * comptime!(config.block);
    let rows = min(len - first, comptime!(config.block));

    let mut products = Shared::<[f32]>::new_slice(comptime!(if config.keys {
        1
    } else {
        // One of padding a row, so that rows lie in different banks.
        config.block * (per_row + 1)
    }));
    let mut values = Array::<f32>::new(comptime!(count * LOAD));
    let mut largest = 0.0f32.runtime();
    #[unroll]
    for i in 0..count {
        // Past the end the last row is read again: it changes no maximum.
        let at = comptime!(i * UNITS) + unit;
        let row = first + min(at / per_row, rows - 1);
        let column = at % per_row * LOAD;
        let vector = Vector::<f32, N>::cast_from(x[(base + row * x.stride(2) + column) / LOAD]);
        let mut product = 0.0f32.runtime();
        #[unroll]
        for e in 0..LOAD {
            let mean = mean[mean_start + column + e];
            let mut value = vector.extract(e);
            if comptime!(config.keys) {
                value -= mean;
            } else {
                product = fma(value, mean, product);
            }
            largest = max_magnitude(largest, value);
            values[comptime!(i * LOAD + e)] = value;
        }
        if comptime!(!config.keys) {
            if at < comptime!(config.block * per_row) {
                products[at / per_row * comptime!(per_row + 1) + at % per_row] = product;
            }
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
        let bound = Divisor::new(scale_of(largest, config.format), config.format).bound();
        #[unroll]
        for i in 0..comptime!(count * LOAD) {
            values[i] = clamp_magnitude(values[i], bound);
        }
    }
    let scale = scale_of(largest, config.format);
    if unit == 0 {
        scales[head * CUBE_COUNT_X as usize + CUBE_POS_X as usize] = scale;
    }
    if comptime!(!config.keys) {
        // The maximum synchronised the cube.
        if unit < rows {
            let mut sum = 0.0f32;
            #[unroll]
            for i in 0..per_row {
                sum += products[unit * comptime!(per_row + 1) + i];
            }
            shift[head * len + first + unit] = sum;
        }
    }

    let divisor = Divisor::new(scale, config.format);
    #[unroll]
    for i in 0..count {
        let at = comptime!(i * UNITS) + unit;
        let row = at / per_row;
        let mut packed = Vector::<u32, W>::empty();
        #[unroll]
        for word in 0..comptime!(LOAD / 4) {
            let start = comptime!(i * LOAD + 4 * word);
            let four = divisor.word(
                values[start],
                values[comptime!(start + 1)],
                values[comptime!(start + 2)],
                values[comptime!(start + 3)],
            );
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

/// A scale, prepared for many divisions by it.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Divisor {
    scale: f32,
    inverse: f32,
    #[cube(comptime)]
    format: Format,
}

#[cube]
impl Divisor {
    pub fn new(scale: f32, #[comptime] format: Format) -> Divisor {
        Divisor::with_inverse(scale, 1.0 / scale, format)
    }

    pub fn with_inverse(scale: f32, inverse: f32, #[comptime] format: Format) -> Divisor {
        Divisor {
            scale,
            inverse,
            format,
        }
    }

    /// The largest number that has a code, which infinities are taken for.
    pub fn bound(&self) -> f32 {
        min(self.scale * comptime!(self.format.top()), f32::max_value())
    }

    /// `x / scale` of a finite `x`, rounded once: the quotient by the rounded reciprocal, corrected by
    /// its exact remainder.
    pub fn quotient(&self, x: f32) -> f32 {
        let quotient = x * self.inverse;
        fma(fma(-quotient, self.scale, x), self.inverse, quotient)
    }

    /// The codes of four numbers, the first in the lowest byte.
    fn word(&self, a: f32, b: f32, c: f32, d: f32) -> u32 {
        let (a, b) = (self.quotient(a), self.quotient(b));
        let (c, d) = (self.quotient(c), self.quotient(d));
        if comptime!(self.format == Format::Fp8) {
            pack_e4m3(a, b, c, d)
        } else {
            let word = pack_bytes(rounded(a), rounded(b), rounded(c), rounded(d));
            // A NaN leaves no codes, only a scale.
            let usable = (u32::reinterpret(self.scale) & 0x7FFF_FFFF) <= 0x7F80_0000;
            select(usable, word, 0)
        }
    }
}

/// The nearest integer of `x` in the lowest byte, ties to even: 1.5 x 2^23 leaves it there.
#[cube]
fn rounded(x: f32) -> u32 {
    u32::reinterpret(x + 12_582_912.0)
}
