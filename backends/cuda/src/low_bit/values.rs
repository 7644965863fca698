//! Values to FP8, transposed: each element is read once.

use cubecl::prelude::*;
use cubesla_kernels::quantize::Format;
use cubesla_kernels::{DType, DeviceTensor};

use super::LOAD;
use super::columns::ValueScales;
use super::rows::bound;
use crate::ptx::low_bit::{clamp_magnitude, pack_e4m3};

/// Units of a cube.
const UNITS: usize = 256;
/// Keys of a cube.
const KEYS: usize = 128;

/// Words of `v [B, H, L, Dv]` in FP8 with scales `of_columns`: `[B, H, Dv, L' / 4]`, where `L'`
/// is L up to the next multiple of 32, with zeros past the end. Four keys to a word, in the order that
/// [`crate::ptx::low_bit`] wants.
pub(super) fn transpose_values(
    client: &Client,
    v: &DeviceTensor<4>,
    of_columns: &ValueScales,
) -> DeviceTensor<4> {
    let [batch, heads, len, dim] = v.shape();
    let words = len.div_ceil(32) * 8;
    let transposed = DeviceTensor::empty(client, [batch, heads, dim, words], DType::F32);
    // SAFETY: a cube writes the words of its own keys; keys past the end are zeros.
    unsafe {
        transpose_values_kernel::launch_unchecked(
            client,
            CubeCount::Static(len.div_ceil(KEYS) as u32, heads as u32, batch as u32),
            CubeDim::new_1d(UNITS as u32),
            AddressType::U32,
            LOAD,
            v.tensor_arg(),
            of_columns.scales.buffer_arg(),
            of_columns.inverses.buffer_arg(),
            transposed.buffer_arg(),
            words as u32,
            dim,
            v.dtype().elem_type(),
        );
    }
    transposed
}

/// A unit turns four keys of eight columns; a plane, 32 keys of 32 columns.
///
/// Grid: x = keys, y = head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
fn transpose_values_kernel<F: Float, N: Size>(
    v: &Tensor<Vector<F, N>>, // [B, H, L, Dv]
    scales: &[f32],           // [B, H, Dv]
    inverses: &[f32],         // [B, H, Dv]
    words: &mut [u32],        // [B, H, Dv, per_row]
    per_row: u32,
    #[comptime] dim: usize,
    #[define(F)] _dtype: ElemType,
) {
    let len = v.shape(2) as u32;
    let head = (CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y) as usize;
    let base = CUBE_POS_Z as usize * v.stride(0) + CUBE_POS_Y as usize * v.stride(1);
    let lane = UNIT_POS % 32;
    let word = lane % 8;
    let planes = comptime!((UNITS / 32) as u32);
    let groups = comptime!((KEYS / 32) as u32);
    #[unroll]
    for step in 0..comptime!((KEYS / 32 * dim.div_ceil(32)).div_ceil(UNITS / 32)) {
        let tile = comptime!(step as u32) * planes + UNIT_POS / 32;
        let first = CUBE_POS_X * comptime!(KEYS as u32) + tile % groups * 32;
        let column = (tile / groups * 32 + lane / 8 * comptime!(LOAD as u32)) as usize;
        if column < dim && first < len {
            // See `key_of_slot`.
            let key = first + word / 4 * 16 + word % 4 * 2;
            let mut values = Array::<f32>::new(comptime!(4 * LOAD));
            #[unroll]
            for i in 0..4usize {
                let key = key + comptime!((i / 2 * 8 + i % 2) as u32);
                let at = base + min(key, len - 1) as usize * v.stride(2) + column;
                let vector = Vector::<f32, N>::cast_from(v[at / LOAD]);
                #[unroll]
                for e in 0..LOAD {
                    values[comptime!(i * LOAD + e)] = select(key < len, vector.extract(e), 0.0);
                }
            }
            #[unroll]
            for e in 0..LOAD {
                let of_column = head * dim + column + e;
                let (inverse, scale) = (inverses[of_column], scales[of_column]);
                let to = of_column * per_row as usize + (first / 4 + word) as usize;
                let bound = bound(scale, Format::Fp8);
                let mut four = Array::<f32>::new(4usize);
                #[unroll]
                for i in 0..4usize {
                    let value = clamp_magnitude(values[comptime!(i * LOAD + e)], bound);
                    four[i] = quotient(value, scale, inverse);
                }
                words[to] = pack_e4m3(four[0], four[1], four[2], four[3]);
            }
        }
    }
}

/// `x / scale` of a finite `x`, rounded once: the quotient by the rounded reciprocal, corrected by its exact
/// remainder.
#[cube]
fn quotient(x: f32, scale: f32, inverse: f32) -> f32 {
    let quotient = x * inverse;
    fma(fma(-quotient, scale, x), inverse, quotient)
}
