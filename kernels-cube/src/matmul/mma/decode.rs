//! Low-bit weights as 16-bit numbers, two at once where the format allows it.

use cubecl::prelude::*;

use super::{MmaConfig, Pair};
use crate::quantize::Format;

/// How weights are decoded.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// As the lowest bits of a pair of 16-bit numbers that are large enough to have whole numbers
    /// there: 128 in bf16, whose lowest 7 bits do, and 1024 in f16, 10 bits.
    Pair,
    /// As the lowest bits of 2^23 in f32.
    Single,
    /// As 16-bit numbers with the bits of e4m3 where they have theirs, which differ by a power of two: by
    /// 2^120 in bf16 and 2^8 in f16.
    Shifted,
}

impl MmaConfig {
    fn way(self) -> Way {
        match self.format {
            Format::Int4 => Way::Pair,
            Format::Int8 if self.bf16 => Way::Single,
            Format::Int8 => Way::Pair,
            Format::Fp8 => Way::Shifted,
        }
    }

    /// The number whose lowest bits are replaced, or what shifted numbers are multiplied by.
    fn base(self) -> f32 {
        match self.way() {
            Way::Single => 8_388_608.0,
            Way::Shifted if self.bf16 => 2f32.powi(120),
            Way::Shifted => 256.0,
            _ if self.bf16 => 128.0,
            _ => 1024.0,
        }
    }

    /// The bits of that number, with the sign bit of the weights if they are in two's complement:
    /// flipping it adds half the range.
    pub(super) fn flip(self) -> u32 {
        let sign = if self.zero_point {
            0
        } else {
            1 << (self.format.bits() - 1)
        };
        match self.way() {
            Way::Single => 0x4b00_0000 | sign,
            _ if self.bf16 => (0x4300 | sign) * 0x1_0001,
            _ => (0x6400 | sign) * 0x1_0001,
        }
    }

    /// What has to be subtracted, less the zero point.
    fn origin(self) -> f32 {
        let half = (1u32 << (self.format.bits() - 1)) as f32;
        self.base() + if self.zero_point { 0.0 } else { half }
    }
}

/// What is subtracted from the weights under one scale, or what they are multiplied by if they are shifted.
#[derive(CubeType)]
pub(super) struct Origin<F: Float> {
    pair: Pair<F>,
    single: f32,
}

#[cube]
impl<F: Float> Origin<F> {
    pub fn new(zero: f32, #[comptime] config: MmaConfig) -> Origin<F> {
        let origin = comptime!(config.origin());
        if comptime!(config.way() == Way::Shifted) {
            let factor = comptime!(config.base());
            Origin::<F> {
                pair: Pair::<F>::new(F::new(factor)),
                single: f32::new(factor),
            }
        } else if comptime!(config.zero_point) {
            let single = zero + origin;
            Origin::<F> {
                pair: Pair::<F>::new(F::cast_from(single)),
                single,
            }
        } else {
            Origin::<F> {
                pair: Pair::<F>::new(F::new(origin)),
                single: f32::new(origin),
            }
        }
    }
}

/// Elements `e` and `e + per_word / 2` of a word, less the zero point.
#[cube]
pub(super) fn decode_pair<F: Float>(
    word: u32,
    origin: &Origin<F>,
    flip: u32,
    #[comptime] e: usize,
    #[comptime] config: MmaConfig,
) -> Pair<F> {
    let half = comptime!(config.format.per_word() / 2);
    let bits = comptime!(config.format.bits() as u32);
    if comptime!(config.way() == Way::Pair) {
        let mask = comptime!(((1u32 << bits) - 1) * 0x1_0001);
        let numbers = ((word >> comptime!(e as u32 * bits)) & mask) ^ flip;
        Pair::<F>::reinterpret(numbers) - origin.pair
    } else if comptime!(config.way() == Way::Shifted) {
        let codes = word >> comptime!(e as u32 * bits);
        let numbers = shifted(codes, comptime!(config.bf16));
        Pair::<F>::reinterpret(numbers) * origin.pair
    } else {
        let mut pair = Vector::<f32, Const<2>>::empty();
        #[unroll]
        for i in 0..2usize {
            let e = comptime!((e + i * half) as u32);
            let mask = comptime!((1u32 << bits) - 1);
            let number = f32::reinterpret(((word >> comptime!(e * bits)) & mask) ^ flip);
            pair.insert(i, number - origin.single);
        }
        Pair::<F>::cast_from(pair)
    }
}

/// Two e4m3 codes, in the lowest bytes of the halves of a word, as 16-bit numbers that are too small by a
/// power of two; NaN is NaN.
#[cube]
fn shifted(codes: u32, #[comptime] bf16: bool) -> u32 {
    let sign = (codes & 0x0080_0080) << 8;
    let size = codes & 0x007F_007F;
    // The largest size alone carries into the bit above: all bits of its exponent are set then.
    let nan = (size + 0x0001_0001) & 0x0080_0080;
    if comptime!(bf16) {
        (size << 4) | sign | (nan * 0xF0)
    } else {
        (size << 7) | sign | (nan << 7)
    }
}
