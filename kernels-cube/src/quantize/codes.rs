//! Elements to codes and back, with integer arithmetic that every backend has.

use cubecl::prelude::*;

use super::Format;

const NAN: u32 = 0x7FC0_0000;
const INFINITY: u32 = 0x7F80_0000;
/// 1.5 * 2^23: added to a small number it leaves the number, rounded to even, in the lowest bits. As
/// an integer is taken out of the sum's bits, no compiler can cancel the addition.
const ROUNDER: f32 = 12_582_912.0;
const ROUNDER_BITS: u32 = 0x4B40_0000;

/// `x` without its sign, as bits: they order as magnitudes do, then infinity, then NaN.
#[cube]
pub(crate) fn magnitude(x: f32) -> u32 {
    u32::reinterpret(x) & 0x7FFF_FFFF
}

#[cube]
pub(crate) fn is_nan(magnitude: u32) -> bool {
    magnitude > INFINITY
}

#[cube]
pub(crate) fn is_infinite(magnitude: u32) -> bool {
    magnitude == INFINITY
}

/// The magnitude as bits; 0 of an infinity, which saturates.
#[cube]
pub fn finite_magnitude(x: f32) -> u32 {
    let size = magnitude(x);
    select(is_infinite(size), 0, size)
}

/// The scale of a largest magnitude, as bits; NaN if that is NaN.
#[cube]
pub fn scale_of(largest: u32, #[comptime] format: Format) -> f32 {
    let scale = f32::reinterpret(largest) / comptime!(format.top());
    let usable = u32::reinterpret(scale) >= 0x0080_0000;
    f32::reinterpret(select(usable, u32::reinterpret(scale), 0x3F80_0000))
}

/// The nearest integer of `x`, which lies within 2^22 of 0; ties to even.
#[cube]
pub(super) fn nearest(x: f32) -> i32 {
    i32::reinterpret(u32::reinterpret(x + ROUNDER)) - comptime!(ROUNDER_BITS as i32)
}

/// The code of `x`, in the lowest bits of a word.
#[cube]
pub(crate) fn code(
    x: f32,
    scale: f32,
    zero: f32,
    #[comptime] format: Format,
    #[comptime] zero_point: bool,
) -> u32 {
    code_of_quotient(x / scale, scale, zero, format, zero_point)
}

/// `1 / scale` in 13 bits, so that its product with a 16-bit number is exact.
#[cube]
pub fn reciprocal_of_scale(scale: f32) -> f32 {
    f32::reinterpret(u32::reinterpret(1.0 / scale) & 0xFFFF_F800)
}

/// The code of an element whose quotient by the scale is given.
#[cube]
pub(crate) fn code_of_quotient(
    quotient: f32,
    scale: f32,
    zero: f32,
    #[comptime] format: Format,
    #[comptime] zero_point: bool,
) -> u32 {
    if comptime!(format == Format::Fp8) {
        encode_e4m3(quotient)
    } else {
        // Twice the range of the codes: what saturates here saturates below too.
        let quotient = clamp(quotient, -512.0, 512.0);
        let mut integer = nearest(quotient);
        if zero_point {
            let levels = comptime!(format.levels() as i32);
            integer = clamp(integer + i32::cast_from(zero), 0, levels);
        } else {
            let top = comptime!(format.top() as i32);
            integer = clamp(integer, comptime!(-(format.top() as i32)), top);
        }
        let mask = comptime!((1u32 << format.bits()) - 1);
        // Comparisons with NaN are left to compilers in WGSL, those of bits are not.
        let valid = !is_nan(magnitude(scale));
        select(valid, u32::reinterpret(integer) & mask, 0)
    }
}

/// The e4m3 code of `x`: nearest, ties to even, saturating at 448.
#[cube]
fn encode_e4m3(x: f32) -> u32 {
    let sign = (u32::reinterpret(x) >> 24) & 0x80;
    let quotient = magnitude(x);
    // Normal numbers: the mantissa's lowest 20 bits are rounded off, 127 - 7 taken from the exponent.
    let odd = (quotient >> 20) & 1;
    let normal = ((quotient + 0x7_FFFF + odd) >> 20) - 960;
    // Below 2^-6: multiples of 2^-9.
    let sum = f32::reinterpret(quotient) * 512.0 + ROUNDER;
    let subnormal = u32::reinterpret(sum) - ROUNDER_BITS;
    let mut code = select(quotient < 0x3C80_0000, subnormal, normal);
    code = select(quotient >= 0x43E0_0000, 0x7E, code) | sign;
    select(is_nan(magnitude(x)), 0x7F, code)
}

/// `x`, from 0 to 448 or NaN, as its e4m3 code at a scale of 1 stands for it.
#[cube]
pub(crate) fn round_e4m3(x: f32) -> f32 {
    let bits = magnitude(x);
    // As `encode_e4m3` has it, left in place.
    let odd = (bits >> 20) & 1;
    let normal = (bits + 0x7_FFFF + odd) & 0xFFF0_0000;
    let multiple = u32::reinterpret(x * 512.0 + ROUNDER) - ROUNDER_BITS;
    let subnormal = u32::reinterpret(f32::cast_from(multiple) * comptime!(1.0f32 / 512.0));
    let rounded = select(bits < 0x3C80_0000, subnormal, normal);
    f32::reinterpret(select(is_nan(bits), NAN, rounded))
}

/// The value of an e4m3 code.
#[cube]
fn decode_e4m3(code: u32) -> f32 {
    let sign = (code & 0x80) << 24;
    let rest = code & 0x7F;
    let normal = (rest << 20) + comptime!(120u32 << 23);
    let subnormal = u32::reinterpret(f32::cast_from(rest) * comptime!(1.0f32 / 512.0));
    let bits = select(rest < 8, subnormal, normal);
    f32::reinterpret(select(rest == 0x7F, NAN, bits | sign))
}

/// The `e`-th element of a word as a number, before the scale.
#[cube]
pub(crate) fn number(
    word: u32,
    e: u32,
    zero: f32,
    #[comptime] format: Format,
    #[comptime] zero_point: bool,
) -> f32 {
    let bits = comptime!(format.bits() as u32);
    let code = (word >> (e * bits)) & comptime!((1u32 << format.bits()) - 1);
    if comptime!(format == Format::Fp8) {
        decode_e4m3(code)
    } else if comptime!(zero_point) {
        f32::cast_from(code) - zero
    } else {
        // Two's complement: flipping the sign bit adds half the range.
        let half = comptime!(1u32 << (format.bits() - 1));
        f32::cast_from(code ^ half) - comptime!((1u32 << (format.bits() - 1)) as f32)
    }
}
