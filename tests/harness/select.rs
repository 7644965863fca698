//! Rows to rank, with everything that makes ranking hard.

use crate::Rng;

/// `count` values, many of them equal, some zeros of either sign, infinite or NaN.
pub fn hard_row(rng: &mut Rng, count: usize) -> Vec<f32> {
    (0..count)
        .map(|_| match rng.below(12) {
            0 => f32::NAN,
            1 => f32::INFINITY,
            2 => f32::NEG_INFINITY,
            3 => 0.0,
            4 => -0.0,
            5..=7 => (rng.below(5) as f32) - 2.0,
            _ => rng.normal() as f32,
        })
        .collect()
}
