//! Online softmax on scores of codes.
//!
//! As in [`crate::forward`], but that each tile of keys has a scale of its own, so maxima are those of
//! scaled scores, and that FP8 weights are relative to the largest score so far, as they saturate.

use cubecl::prelude::*;
use cubesla_kernels::block_list::Span;

use super::config::LowBitConfig;
use crate::forward::kernel::ForwardScalars;
use crate::forward::softmax::{Row, RowPair, mask, quad_max};
use crate::ptx::{low_bit, math};

/// Powers of two by which scores may exceed the maximum in use.
const SLACK: f32 = 8.0;

/// log2(448): FP8 weights are up to 448.
pub(super) const FP8_SHIFT: f32 = 8.807_355;

/// Turns the scores in registers `sco`, times `factor`, into weights `2^(S - m)`, 448 times that in
/// FP8, packed, and brings the rows up to date.
#[cube]
pub(super) fn softmax(
    rows: &mut RowPair,
    keys: Span,
    factor: f32,
    scalars: ForwardScalars,
    #[comptime] config: LowBitConfig,
) -> Array<u32> {
    let products = comptime!(config.products());
    let count = comptime!(products.keys / 2);
    let mut scores = Array::<f32>::new(count);
    #[unroll]
    for step in 0..comptime!(count / 8) {
        let some = low_bit::read_scores(step, products);
        #[unroll]
        for i in 0..8usize {
            scores[comptime!(8 * step + i)] = some.extract(i);
        }
    }
    let lowest = f32::reinterpret(0xFF80_0000u32);
    mask(&mut scores, &*rows, keys, lowest, scalars, config.forward);

    let mut upper_max = lowest;
    let mut lower_max = lowest;
    #[unroll]
    for i in 0..comptime!(count / 4) {
        #[unroll]
        for j in 0..2usize {
            upper_max = max(upper_max, scores[comptime!(4 * i + j)]);
            lower_max = max(lower_max, scores[comptime!(4 * i + 2 + j)]);
        }
    }
    raise(&mut rows.upper, upper_max, factor, config);
    raise(&mut rows.lower, lower_max, factor, config);

    let top = comptime!(if config.fp8 { FP8_SHIFT } else { 0.0 });
    let upper_shift = top - rows.upper.max;
    let lower_shift = top - rows.lower.max;
    #[unroll]
    for i in 0..count {
        if comptime!(i / 2 % 2 == 0) {
            scores[i] = math::exp2(fma(scores[i], factor, upper_shift));
            rows.upper.sum += scores[i];
        } else {
            scores[i] = math::exp2(fma(scores[i], factor, lower_shift));
            rows.lower.sum += scores[i];
        }
    }
    pack(&scores, config)
}

/// Takes the unit's largest score of a tile into account.
#[cube]
fn raise(row: &mut Row, tile_max: f32, factor: f32, #[comptime] config: LowBitConfig) {
    let tile_max = quad_max(tile_max) * factor;
    let mut new_max = max(row.max, tile_max);
    if comptime!(!config.fp8) {
        new_max = select(tile_max - row.max > SLACK, tile_max, row.max);
    }
    row.correction = math::exp2(row.max - new_max);
    row.sum *= row.correction;
    row.max = new_max;
}

/// The weights as the left side of a product.
#[cube]
fn pack(weights: &Array<f32>, #[comptime] config: LowBitConfig) -> Array<u32> {
    let count = comptime!(config.products().keys / 2);
    let words = comptime!(if config.fp8 { count / 4 } else { count / 2 });
    let mut packed = Array::<u32>::new(words);
    #[unroll]
    for i in 0..words {
        if comptime!(config.fp8) {
            // Two scores of a row and the two 8 keys further.
            let first = comptime!(i / 2 * 8 + i % 2 * 2);
            packed[i] = low_bit::pack_e4m3(
                weights[first],
                weights[comptime!(first + 1)],
                weights[comptime!(first + 4)],
                weights[comptime!(first + 5)],
            );
        } else {
            packed[i] = math::pack(
                weights[comptime!(2 * i)],
                weights[comptime!(2 * i + 1)],
                comptime!(config.products().format.unwrap()),
            );
        }
    }
    packed
}

/// Makes the packed weights of a tile the left side of the next product.
#[cube]
pub(super) fn write_weights(weights: &Array<u32>, #[comptime] config: LowBitConfig) {
    let keys = comptime!(config.products().keys);
    let words = comptime!(if config.fp8 { keys / 8 } else { keys / 4 });
    #[unroll]
    for step in 0..comptime!(words / 4) {
        let mut four = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            four.insert(i, weights[comptime!(4 * step + i)]);
        }
        low_bit::write_weights(four, step);
    }
}
