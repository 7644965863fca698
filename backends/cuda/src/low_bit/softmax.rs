//! Online softmax on scores of codes.
//!
//! As in [`crate::forward`], but that each tile of keys has a scale of its own, so maxima are those of
//! scaled scores, and that FP8 weights saturate.

use crate::forward::producer::Keys;
use cubecl::prelude::*;

use super::config::LowBitConfig;
use crate::forward::kernel::ForwardScalars;
use crate::forward::softmax::{
    LARGEST, RowPair, Tops, Weights, mask_if_partial, must_be_made_again,
};
use crate::ptx::{low_bit, math};

/// log2 of the FP8 weight of a score that is the maximum in use. A unit's 16 of a row add up to 224, less
/// than the limit, and weights of less than 2^-10 of the largest lose bits, of the 2^-15 that e4m3 could
/// hold beside it.
pub(super) const FP8_SHIFT: f32 = 3.807_355;

/// The largest FP8 weight, 448: where e4m3 saturates.
const FP8_LARGEST: f32 = 448.0;

/// The scores in the registers of `buffer`, of codes.
#[cube]
fn read_scores(#[comptime] buffer: usize, #[comptime] config: LowBitConfig) -> Array<f32> {
    let products = comptime!(config.products());
    let count = comptime!(products.keys / 2);
    let mut scores = Array::<f32>::new(count);
    #[unroll]
    for step in 0..comptime!(count / 8) {
        let some = low_bit::read_scores(buffer, step, products);
        #[unroll]
        for i in 0..8usize {
            scores[comptime!(8 * step + i)] = some.extract(i);
        }
    }
    scores
}

/// The largest of `scores`, times `factor`.
#[cube]
fn top_scores(scores: &Array<f32>, factor: f32, #[comptime] config: LowBitConfig) -> Tops {
    let mut tops = Tops::new(scores, lowest(), comptime!(config.products().keys));
    tops.upper *= factor;
    tops.lower *= factor;
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
    let top = comptime!(if config.fp8 { FP8_SHIFT } else { 0.0 });
    let upper_shift = top - rows.upper.max;
    let lower_shift = top - rows.lower.max;
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

/// Makes the weights of the scores in `buffer`, and adds them to the rows' sums: as in [`crate::forward`],
/// with the maxima in use before it is known whether those must rise.
#[cube]
pub(super) fn make_tile_weights(
    weights: &mut Weights,
    rows: &mut RowPair,
    keys: Keys,
    factor: f32,
    scalars: ForwardScalars,
    #[comptime] buffer: usize,
    #[comptime] config: LowBitConfig,
) {
    let scores = read_scores(buffer, config);
    make_weights(weights, &*rows, &scores, factor, config);
    let largest = comptime!(if config.fp8 { FP8_LARGEST } else { LARGEST });
    rows.raised = must_be_made_again(&*weights, largest, &*rows, keys, scalars, config.forward);
    if rows.raised {
        let mut scores = read_scores(buffer, config);
        mask_if_partial(&mut scores, &*rows, keys, lowest(), scalars, config.forward);
        rows.raise(&top_scores(&scores, factor, config));
        make_weights(weights, &*rows, &scores, factor, config);
        weights.make_before();
    } else {
        rows.upper.correction = 1.0;
        rows.lower.correction = 1.0;
    }
    rows.add(&*weights);
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
