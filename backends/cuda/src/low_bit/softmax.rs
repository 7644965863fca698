//! Online softmax on scores of codes.
//!
//! As in [`crate::forward`], but that each tile of keys has a scale of its own, so maxima are those of
//! scaled scores, that FP8 weights saturate, and that an item begins with the maxima of the one before it:
//! as they only have to keep exponentials in range, those mostly do.

use cubecl::prelude::*;

use super::config::LowBitConfig;
use super::producer::ScaledKeys;
use crate::forward::kernel::ForwardScalars;
use crate::forward::producer::Keys;
use crate::forward::softmax::{
    FLOOR, LARGEST, RowPair, Tops, Weights, mask_if_partial, read_scores, unit_is_partial,
};
use crate::ptx::low_bit::SCORE_BIAS;
use crate::ptx::{low_bit, math};

/// log2 of the FP8 weight of a score that is the maximum in use. A unit's 16 of a row add up to 215, less
/// than the limit, and as maxima are rounded up, weights of less than 2^-9 of the largest may lose bits, of
/// the 2^-15 that e4m3 could hold beside it.
pub(super) const FP8_SHIFT: f32 = 3.75;

/// The largest FP8 weight, 448: where e4m3 saturates.
const FP8_LARGEST: f32 = 448.0;

/// The least sum of a unit's 16 weights of a row in an item's first tile: there maxima that are too large for
/// the row are found out.
const LEAST: f32 = 0.0625;

/// What scores in registers have added to them.
fn bias(config: LowBitConfig) -> f32 {
    if config.int8 { SCORE_BIAS } else { 0.0 }
}

/// A factor of scores without the bits that its product with [`SCORE_BIAS`] has no room for.
#[cube]
pub(super) fn short_factor(factor: f32) -> f32 {
    f32::reinterpret(u32::reinterpret(factor) & 0xFFFF_FFFC)
}

/// The largest of `scores`, times `factor`, up to the next integer: differences between maxima and biases
/// times factors are exact then, but for extremes.
#[cube]
fn top_scores(scores: &Array<f32>, factor: f32, #[comptime] config: LowBitConfig) -> Tops {
    let bias = comptime!(bias(config));
    let mut tops = Tops::new(scores, lowest(), comptime!(config.products().keys));
    tops.upper = ((tops.upper - bias) * factor).ceil();
    tops.lower = ((tops.lower - bias) * factor).ceil();
    tops
}

/// Below all scores.
#[cube]
fn lowest() -> f32 {
    f32::reinterpret(0xFF80_0000u32)
}

/// Makes the weights `2^(S factor - m)` of `scores` with the maxima in use; in FP8 times
/// `2^FP8_SHIFT`.
#[cube]
fn make_weights(
    weights: &mut Weights,
    rows: &RowPair,
    scores: &Array<f32>,
    factor: f32,
    #[comptime] config: LowBitConfig,
) {
    let upper_shift = shift(rows.upper.max, factor, config);
    let lower_shift = shift(rows.lower.max, factor, config);
    let fp8 = config.fp8;
    let words = comptime!(config.weight_words());
    #[unroll]
    for i in 0..words {
        // Of a row: two neighbouring scores, and in FP8 the two 8 keys further.
        let upper = comptime!(i % 2 == 0);
        let shift = if upper { upper_shift } else { lower_shift };
        let first = comptime!(if fp8 { i / 2 * 8 + i % 2 * 2 } else { 2 * i });
        let a = math::exp2(fma(scores[first], factor, shift));
        let b = math::exp2(fma(scores[comptime!(first + 1)], factor, shift));
        let mut sum = a + b;
        if fp8 {
            let c = math::exp2(fma(scores[comptime!(first + 4)], factor, shift));
            let d = math::exp2(fma(scores[comptime!(first + 5)], factor, shift));
            sum += c + d;
            weights.packed[i] = low_bit::pack_e4m3(a, b, c, d);
        } else {
            weights.packed[i] = math::pack(a, b, comptime!(config.products().format.unwrap()));
        }
        weights.count(sum, i);
    }
}

/// What is added to scores times `factor` of a row with this maximum in use.
#[cube]
fn shift(max: f32, factor: f32, #[comptime] config: LowBitConfig) -> f32 {
    let mut shift = -max;
    if comptime!(config.fp8) {
        shift += FP8_SHIFT;
    }
    if comptime!(config.int8) {
        shift = fma(comptime!(-bias(config)), factor, shift);
    }
    shift
}

/// Makes the weights of the scores in `buffer`, and adds them to the rows' sums: as in [`crate::forward`],
/// with the maxima in use before it is known whether those must change.
#[cube]
pub(super) fn make_tile_weights(
    weights: &mut Weights,
    rows: &mut RowPair,
    tile: &ScaledKeys,
    scalars: ForwardScalars,
    #[comptime] buffer: usize,
    #[comptime] config: LowBitConfig,
) {
    let scores = read_scores(buffer, comptime!(config.products().keys));
    make_weights(weights, &*rows, &scores, tile.factor, config);
    let marked = Keys {
        first: tile.keys.first,
        count: tile.mark,
    };
    rows.raised = math::any(unit_is_wrong(&*weights, &*rows, marked, scalars, config));
    if rows.raised {
        check_weights(weights, rows, tile, scalars, buffer, config);
    } else if comptime!(config.fp8) {
        rows.upper.correction = 1.0;
        rows.lower.correction = 1.0;
    }
    rows.add(&*weights);
}

/// Whether the unit has weights of keys to mask, or some that may be too large.
#[cube]
fn unit_is_wrong(
    weights: &Weights,
    rows: &RowPair,
    keys: Keys,
    scalars: ForwardScalars,
    #[comptime] config: LowBitConfig,
) -> bool {
    let largest = comptime!(if config.fp8 { FP8_LARGEST } else { LARGEST });
    unit_is_partial(rows, keys, scalars, config.forward) || weights.exceed(largest)
}

/// Makes weights again that are too large, or of keys to mask, or in an item's first tile too small.
#[cube]
fn check_weights(
    weights: &mut Weights,
    rows: &mut RowPair,
    tile: &ScaledKeys,
    scalars: ForwardScalars,
    #[comptime] buffer: usize,
    #[comptime] config: LowBitConfig,
) {
    let mut again = true.runtime();
    if tile.mark == 0 {
        let wrong = unit_is_wrong(&*weights, &*rows, tile.keys.copy(), scalars, config);
        // Not a number is not enough.
        let enough = weights.upper_sum >= LEAST && weights.lower_sum >= LEAST;
        again = math::any(wrong || !enough);
        if again {
            rows.upper.max = FLOOR;
            rows.lower.max = FLOOR;
        }
    }
    if again {
        let mut scores = read_scores(buffer, comptime!(config.products().keys));
        mask_if_partial(
            &mut scores,
            &*rows,
            tile.keys.copy(),
            lowest(),
            scalars,
            config.forward,
        );
        rows.raise(&top_scores(&scores, tile.factor, config));
        make_weights(weights, &*rows, &scores, tile.factor, config);
        weights.make_before();
    }
}

/// Makes the packed weights of a tile those of `buffer`.
#[cube]
pub(super) fn write_weights(
    weights: &Array<u32>,
    #[comptime] buffer: usize,
    #[comptime] config: LowBitConfig,
) {
    let words = comptime!(config.weight_words());
    #[unroll]
    for step in 0..comptime!(words / 4) {
        let mut four = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            four.insert(i, weights[comptime!(4 * step + i)]);
        }
        low_bit::write_weights(four, buffer, step);
    }
}
