//! The linear branch of a warpgroup's rows, in registers.

use cubecl::prelude::*;
use cubesla_kernels::linear::{FeatureMap, feature};

use crate::forward::config::WgmmaTile;
use crate::forward::softmax::{quad_max, quad_sum};
use crate::ptx::linear::pass_columns;
use crate::ptx::wgmma::Products;
use crate::ptx::{linear, math, wgmma};

/// Replaces the queries by `phi(Q)`, rounded; returns `phi(Q) . Z` of the unit's upper and lower
/// row.
#[cube]
pub(crate) fn map_queries(
    z: &[f32],
    start: usize,
    #[comptime] tile: WgmmaTile,
    #[comptime] phi: FeatureMap,
) -> Vector<f32, Const<2>> {
    let products = comptime!(tile.products());
    let format = comptime!(products.format());
    let dim = comptime!(tile.head_dim);
    let steps = comptime!(products.head_dim / 16);
    let softmax = comptime!(phi == FeatureMap::Softmax);
    // Element 8 s + 2 i + e is half e of register i of step s.
    let mut x = Array::<f32>::new(comptime!(8 * steps));
    let mut upper_max = f32::new(-3.0e38);
    let mut lower_max = f32::new(-3.0e38);
    #[unroll]
    for step in 0..steps {
        let words = linear::read_query_step(step);
        #[unroll]
        for i in 0..4usize {
            let pair = math::unpack(words.extract(i), format);
            #[unroll]
            for e in 0..2usize {
                let element = pair.extract(e);
                x[comptime!(8 * step + 2 * i + e)] = element;
                // Columns past D are none of the row's.
                if comptime!(softmax && 16 * step + i / 2 * 8 < dim) {
                    if comptime!(i % 2 == 0) {
                        upper_max = max(upper_max, element);
                    } else {
                        lower_max = max(lower_max, element);
                    }
                }
            }
        }
    }
    let mut upper_factor = f32::new(1.0);
    let mut lower_factor = f32::new(1.0);
    let mut upper_shift = f32::new(0.0);
    let mut lower_shift = f32::new(0.0);
    if softmax {
        upper_shift = quad_max(upper_max) * std::f32::consts::LOG2_E;
        lower_shift = quad_max(lower_max) * std::f32::consts::LOG2_E;
        upper_factor = 0.0f32.runtime();
        lower_factor = 0.0f32.runtime();
    }
    #[unroll]
    for at in 0..comptime!(8 * steps) {
        let upper = comptime!(at / 2 % 2 == 0);
        if comptime!(at / 8 * 16 + at / 4 % 2 * 8 < dim) {
            if softmax {
                let shift = if upper { upper_shift } else { lower_shift };
                let y = math::exp2(fma(x[at], std::f32::consts::LOG2_E, -shift));
                x[at] = y;
                if upper {
                    upper_factor += y;
                } else {
                    lower_factor += y;
                }
            } else {
                x[at] = feature(x[at], phi);
            }
        } else {
            x[at] = f32::new(0.0);
        }
    }
    if softmax {
        upper_factor = 1.0 / quad_sum(upper_factor);
        lower_factor = 1.0 / quad_sum(lower_factor);
    }
    let mut upper_dot = f32::new(0.0);
    let mut lower_dot = f32::new(0.0);
    let first = start + UNIT_POS as usize % 4 * 2;
    #[unroll]
    for step in 0..steps {
        let mut words = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for half in 0..2usize {
            let column = comptime!(16 * step + 8 * half);
            let at = comptime!(8 * step + 4 * half);
            let u0 = x[at] * upper_factor;
            let u1 = x[comptime!(at + 1)] * upper_factor;
            let l0 = x[comptime!(at + 2)] * lower_factor;
            let l1 = x[comptime!(at + 3)] * lower_factor;
            if comptime!(column < dim) {
                let z0 = z[first + column];
                let z1 = z[first + column + 1];
                upper_dot = fma(u0, z0, fma(u1, z1, upper_dot));
                lower_dot = fma(l0, z0, fma(l1, z1, lower_dot));
            }
            words.insert(comptime!(2 * half), math::pack(u0, u1, format));
            words.insert(comptime!(2 * half + 1), math::pack(l0, l1, format));
        }
        linear::write_query_step(words, step);
    }
    let mut dots = Vector::<f32, Const<2>>::empty();
    dots.insert(0usize, quad_sum(upper_dot));
    dots.insert(1usize, quad_sum(lower_dot));
    dots
}

/// Rounds the columns of `pass`, divided by the rows' denominators, into the registers of the linear
/// branch.
#[cube]
pub(crate) fn keep_pass(
    upper: f32,
    lower: f32,
    #[comptime] pass: usize,
    #[comptime] products: Products,
) {
    #[unroll]
    for group in 0..comptime!(pass_columns(products) / 16) {
        let words = round_group(upper, lower, group, products);
        linear::write_linear_step(words, comptime!(pass * pass_columns(products) / 16 + group));
    }
}

/// Columns `16 group..16 group + 16` of the pass, divided by the rows' denominators and rounded.
#[cube]
pub(crate) fn round_group(
    upper: f32,
    lower: f32,
    #[comptime] group: usize,
    #[comptime] products: Products,
) -> Vector<u32, Const<4>> {
    let values = wgmma::read_score_step(0usize, group);
    let mut words = Vector::<u32, Const<4>>::empty();
    #[unroll]
    for i in 0..4usize {
        let factor = if comptime!(i % 2 == 0) { upper } else { lower };
        let low = values.extract(comptime!(2 * i)) * factor;
        let high = values.extract(comptime!(2 * i + 1)) * factor;
        words.insert(i, math::pack(low, high, comptime!(products.format())));
    }
    words
}
