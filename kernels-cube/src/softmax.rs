//! Online softmax over the fragments of any engine.

use cubecl::prelude::*;

use crate::engine::*;

/// Below every score that can occur, above every masked score: subtracting it from a masked score
/// is still so far below zero that its exponential is 0, and rows that saw nothing keep a sum of 0.
const FLOOR: f32 = -1.0e30;

/// Running maximum and sum of the rows that a unit holds.
#[derive(CubeType)]
pub struct OnlineSoftmax {
    max: Array<f32>,
    /// The unit's own columns only, until [`finish`](Self::finish).
    sum: Array<f32>,
}

#[cube]
impl OnlineSoftmax {
    /// The state before the first tile.
    pub fn new(#[comptime] rows: usize) -> Self {
        let mut max = Array::<f32>::new(rows);
        let mut sum = Array::<f32>::new(rows);
        #[unroll]
        for r in 0..rows {
            max[r] = FLOOR;
            sum[r] = 0.0;
        }
        OnlineSoftmax { max, sum }
    }

    /// Turns the scaled scores of one more tile into `exp(S - m)` and brings `acc` to the new
    /// maximum `m`.
    pub fn step<F: Float, E: TileEngine<F>>(
        &mut self,
        scores: &mut E::Fragment,
        acc: &mut E::Fragment,
        scratch: &mut E::Scratch,
        #[comptime] tile: Tile,
    ) {
        let mut new_max = Array::<f32>::new(scores.rows());
        #[unroll]
        for r in 0..scores.rows() {
            new_max[r] = self.max[r];
            #[unroll]
            for c in 0..scores.cols() {
                new_max[r] = max(new_max[r], scores.get(r, c));
            }
        }
        E::row_max(&mut new_max, scratch, tile);
        #[unroll]
        for r in 0..scores.rows() {
            let correction = (self.max[r] - new_max[r]).exp();
            let mut sum = self.sum[r] * correction;
            #[unroll]
            for c in 0..scores.cols() {
                let p = (scores.get(r, c) - new_max[r]).exp();
                sum += p;
                scores.set(r, c, p);
            }
            #[unroll]
            for c in 0..acc.cols() {
                acc.set(r, c, acc.get(r, c) * correction);
            }
            self.sum[r] = sum;
            self.max[r] = new_max[r];
        }
    }

    /// Divides `acc` by the rows' sums; rows that saw no key become 0. Afterwards
    /// [`lse`](Self::lse) is defined.
    pub fn finish<F: Float, E: TileEngine<F>>(
        &mut self,
        acc: &mut E::Fragment,
        scratch: &mut E::Scratch,
        #[comptime] tile: Tile,
    ) {
        E::row_sum(&mut self.sum, scratch, tile);
        #[unroll]
        for r in 0..acc.rows() {
            // Not `sum > 0`: a row with a NaN must stay NaN.
            let mut inverse = 1.0 / self.sum[r];
            if self.sum[r] == 0.0 {
                inverse = 0.0;
            }
            #[unroll]
            for c in 0..acc.cols() {
                acc.set(r, c, acc.get(r, c) * inverse);
            }
        }
    }

    /// Natural log-sum-exp of row `r`; `-inf` where it saw no key, as `ln(0)` is.
    pub fn lse(&self, #[comptime] r: usize) -> f32 {
        self.max[r] + self.sum[r].ln()
    }
}
