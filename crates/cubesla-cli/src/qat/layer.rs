//! An attention layer with learned projections, on the host but for its attention.
//!
//! ```text
//! Q = X Wq    K = X Wk    V = X Wv    Y = attention(Q, K, V) Wo
//! ```

use super::attention::{Attention, Backward, Branches};
use super::{BATCH, CHANNELS, DIM, HEADS, LEN, OUTLIER, Random};
use crate::error::Error;

/// Rows of inputs and outputs.
const ROWS: usize = BATCH * LEN;

/// Wq, Wk, Wv and Wo, each `[CHANNELS, CHANNELS]`, with the moments of Adam (arXiv 1412.6980).
#[derive(Clone)]
pub struct Layer {
    weights: [Vec<f32>; 4],
    moments: [Vec<[f32; 2]>; 4],
    steps: i32,
}

impl Layer {
    /// Random projections whose heads have a column of queries that is `OUTLIER` times as large as the
    /// others, beside keys as many times smaller, and another with queries and keys exchanged.
    /// Scores have no outliers.
    pub fn with_outliers(noise: &mut Random) -> Self {
        let scale = (CHANNELS as f32).sqrt().recip();
        let mut weights = [1.5, 1.5, 1.0, 1.0].map(|gain| {
            let random = || gain * scale * noise.normal();
            std::iter::repeat_with(random)
                .take(CHANNELS * CHANNELS)
                .collect::<Vec<f32>>()
        });
        for head in 0..HEADS {
            for row in 0..CHANNELS {
                let at = row * CHANNELS + head * DIM;
                weights[0][at] *= OUTLIER;
                weights[1][at] /= OUTLIER;
                weights[1][at + 1] *= OUTLIER;
                weights[0][at + 1] /= OUTLIER;
            }
        }
        Self::new(weights)
    }

    fn new(weights: [Vec<f32>; 4]) -> Self {
        Self {
            weights,
            moments: [(); 4].map(|()| vec![[0.0; 2]; CHANNELS * CHANNELS]),
            steps: 0,
        }
    }

    /// The same layer with each weight off by about that share of itself, untrained.
    pub fn disturbed(&self, share: f32, noise: &mut Random) -> Self {
        let weights = self.weights.clone();
        Self::new(weights.map(|w| {
            w.into_iter()
                .map(|w| w * (1.0 + share * noise.normal()))
                .collect()
        }))
    }

    /// The same weights, with moments of zero.
    pub fn rested(&self) -> Self {
        Self::new(self.weights.clone())
    }

    /// `Y [ROWS, CHANNELS]` of `x`, and what the gradients need.
    pub fn forward(
        &self,
        x: &[f32],
        attention: &Attention,
        low: bool,
    ) -> Result<(Vec<f32>, Branches), Error> {
        let [q, k, v] = [0, 1, 2].map(|i: usize| heads(&product(x, &self.weights[i])));
        let branches = attention.forward([q, k, v], low)?;
        let y = product(&rows(&branches.out), &self.weights[3]);
        Ok((y, branches))
    }

    /// A step of Adam down the gradient of a loss, whose gradient with respect to `Y` is `grad`.
    pub fn step(
        &mut self,
        x: &[f32],
        branches: &Branches,
        grad: &[f32],
        (attention, backward): (&Attention, Backward),
        rate: f32,
    ) -> Result<(), Error> {
        let grad_out = heads(&transposed_product(grad, &self.weights[3]));
        let grads = attention.backward(branches, &grad_out, backward)?;
        let mut grads = grads.map(|grad| outer(x, &rows(&grad))).to_vec();
        grads.push(outer(&rows(&branches.out), grad));
        self.steps += 1;
        for ((weights, moments), grads) in self.weights.iter_mut().zip(&mut self.moments).zip(grads)
        {
            adam(weights, moments, &grads, self.steps, rate);
        }
        Ok(())
    }
}

fn adam(weights: &mut [f32], moments: &mut [[f32; 2]], grads: &[f32], step: i32, rate: f32) {
    const BETAS: [f32; 2] = [0.9, 0.99];
    let correction = BETAS.map(|beta| 1.0 - beta.powi(step));
    for ((weight, moments), &g) in weights.iter_mut().zip(moments).zip(grads) {
        for ((moment, beta), g) in moments.iter_mut().zip(BETAS).zip([g, g * g]) {
            *moment += (1.0 - beta) * (g - *moment);
        }
        let [mean, square] = [moments[0] / correction[0], moments[1] / correction[1]];
        *weight -= rate * mean / (square.sqrt() + 1e-8);
    }
}

/// `[ROWS, CHANNELS]` as `[BATCH, HEADS, LEN, DIM]`.
fn heads(x: &[f32]) -> Vec<f32> {
    let at = |i: usize| {
        let [b, h, l, d] = [
            i / (DIM * LEN * HEADS),
            i / (DIM * LEN) % HEADS,
            i / DIM % LEN,
            i % DIM,
        ];
        x[(b * LEN + l) * CHANNELS + h * DIM + d]
    };
    (0..x.len()).map(at).collect()
}

/// `[BATCH, HEADS, LEN, DIM]` as `[ROWS, CHANNELS]`.
fn rows(x: &[f32]) -> Vec<f32> {
    let at = |i: usize| {
        let [row, h, d] = [i / CHANNELS, i % CHANNELS / DIM, i % DIM];
        let [b, l] = [row / LEN, row % LEN];
        x[((b * HEADS + h) * LEN + l) * DIM + d]
    };
    (0..x.len()).map(at).collect()
}

/// `x w`.
fn product(x: &[f32], w: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; ROWS * CHANNELS];
    for (y, x) in y.chunks_exact_mut(CHANNELS).zip(x.chunks_exact(CHANNELS)) {
        for (x, w) in x.iter().zip(w.chunks_exact(CHANNELS)) {
            for (y, w) in y.iter_mut().zip(w) {
                *y += x * w;
            }
        }
    }
    y
}

/// `y w^T`.
fn transposed_product(y: &[f32], w: &[f32]) -> Vec<f32> {
    let mut turned = vec![0.0; w.len()];
    for i in 0..CHANNELS {
        for j in 0..CHANNELS {
            turned[j * CHANNELS + i] = w[i * CHANNELS + j];
        }
    }
    product(y, &turned)
}

/// `x^T y`.
fn outer(x: &[f32], y: &[f32]) -> Vec<f32> {
    let mut w = vec![0.0; CHANNELS * CHANNELS];
    for (x, y) in x.chunks_exact(CHANNELS).zip(y.chunks_exact(CHANNELS)) {
        for (x, w) in x.iter().zip(w.chunks_exact_mut(CHANNELS)) {
            for (y, w) in y.iter().zip(w) {
                *w += x * y;
            }
        }
    }
    w
}
