//! Which blocks matter: pooled scores, exact ranking, and the counts taken from it.
//!
//! Source: SLA (arXiv 2509.24006) section 3.1 for the heuristic, SLA2 (arXiv 2602.12675) for the
//! learnable projections.

use crate::Tensor;
use crate::tensor::{axpy, dot};

/// What becomes of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Exact attention.
    Critical,
    /// Linear attention.
    Marginal,
    /// Left out.
    Negligible,
}

/// Mean of each `block` rows, `[B, H, ceil(L / block), D]`; a last short block divides by the rows
/// it has.
pub fn mean_pool(x: &Tensor, block: usize) -> Tensor {
    let [batch, heads, len, dim] = x.shape();
    let mut pooled = Tensor::zeros([batch, heads, len.div_ceil(block), dim]);
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..len {
                let count = block.min(len - i / block * block);
                axpy(
                    pooled.row_mut(b, h, i / block),
                    1.0 / count as f64,
                    x.row(b, h, i),
                );
            }
        }
    }
    pooled
}

/// `k` less its mean over the length, per head: no softmax over keys changes.
pub fn smooth(k: &Tensor) -> Tensor {
    let [batch, heads, len, _] = k.shape();
    let mean = mean_pool(k, len);
    let mut smooth = k.clone();
    for b in 0..batch {
        for h in 0..heads {
            for j in 0..len {
                axpy(smooth.row_mut(b, h, j), -1.0, mean.row(b, h, 0));
            }
        }
    }
    smooth
}

/// `x w^T` for every row of `x [B, H, M, D]`, `w` row-major `[E, D]`.
pub fn project(x: &Tensor, w: &Tensor) -> Tensor {
    let [batch, heads, rows, _] = x.shape();
    let out = w.shape()[2];
    Tensor::from_fn([batch, heads, rows, out], |[b, h, i, e]| {
        dot(x.row(b, h, i), w.row(0, 0, e))
    })
}

/// `Pc = scale Qp Kp^T [B, Hq, M, N]`; query head `h` reads key head `h / (Hq / Hkv)`.
pub fn scores(qp: &Tensor, kp: &Tensor, scale: f64) -> Tensor {
    let [batch, heads, rows, _] = qp.shape();
    let [_, kv_heads, columns, _] = kp.shape();
    Tensor::from_fn([batch, heads, rows, columns], |[b, h, i, j]| {
        scale * dot(qp.row(b, h, i), kp.row(b, h / (heads / kv_heads), j))
    })
}

/// Gradients of [`scores`] of projected means, `scores(project(qp, wq), project(kp, wk), scale)`, for
/// the incoming `grad [B, H, M, N]` with respect to `wq` and `wk`: with `A = Qp Wq^T` and
/// `B = Kp Wk^T`, `dWq = scale sum (dPc B)^T Qp` and `dWk = scale sum (dPc^T A)^T Kp`.
pub fn scores_backward(
    qp: &Tensor,
    kp: &Tensor,
    wq: &Tensor,
    wk: &Tensor,
    scale: f64,
    grad: &Tensor,
) -> [Tensor; 2] {
    let [batch, heads, rows, _] = qp.shape();
    let [_, kv_heads, columns, _] = kp.shape();
    let (a, b_k) = (project(qp, wq), project(kp, wk));
    let (mut dwq, mut dwk) = (Tensor::zeros(wq.shape()), Tensor::zeros(wk.shape()));
    for b in 0..batch {
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            for i in 0..rows {
                for j in 0..columns {
                    let g = scale * grad[[b, h, i, j]];
                    for e in 0..wq.shape()[2] {
                        let (x, y) = (g * b_k[[b, kv, j, e]], g * a[[b, h, i, e]]);
                        axpy(dwq.row_mut(0, 0, e), x, qp.row(b, h, i));
                        axpy(dwk.row_mut(0, 0, e), y, kp.row(b, kv, j));
                    }
                }
            }
        }
    }
    [dwq, dwk]
}

/// Indices from the largest value to the smallest; equal values by rising index, NaN last.
pub fn rank(row: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    // NaN counts as below everything; a stable sort keeps equal values in order.
    let key = |i: usize| if row[i].is_nan() { None } else { Some(row[i]) };
    order.sort_by(|&a, &b| key(b).partial_cmp(&key(a)).expect("no NaN is left"));
    order
}

/// The first `count` of [`rank`], ascending.
pub fn top_k(row: &[f64], count: usize) -> Vec<usize> {
    let mut selected = rank(row);
    selected.truncate(count);
    selected.sort_unstable();
    selected
}

/// How many of the first of [`rank`] hold a softmax mass of at least `p`, between `min` and `max`.
pub fn top_p_count(row: &[f64], p: f64, min: usize, max: usize) -> usize {
    let order = rank(row);
    let largest = row[order[0]];
    let weights: Vec<f64> = order
        .iter()
        .map(|&i| {
            if row[i].is_nan() {
                0.0
            } else {
                (row[i] - largest).exp()
            }
        })
        .collect();
    let total: f64 = weights.iter().sum();
    let mut mass = 0.0;
    let needed = weights
        .iter()
        .take_while(|&&weight| {
            let enough = mass >= p * total;
            mass += weight;
            !enough
        })
        .count();
    needed.clamp(min, max)
}

/// Number of critical blocks for a ratio: `clamp(floor(ratio N), 1, N)`.
pub fn critical_count(ratio: f64, blocks: usize) -> usize {
    ((ratio * blocks as f64).floor() as usize).clamp(1, blocks)
}

/// Number of negligible blocks for a ratio: `min(floor(ratio N), N - critical)`.
pub fn negligible_count(ratio: f64, blocks: usize, critical: usize) -> usize {
    ((ratio * blocks as f64).floor() as usize).min(blocks - critical)
}

/// The map of one row: the first `critical` of [`rank`], the last `negligible`, and the rest.
pub fn map_row(row: &[f64], critical: usize, negligible: usize) -> Vec<Block> {
    let order = rank(row);
    let mut map = vec![Block::Marginal; row.len()];
    for &j in &order[..critical] {
        map[j] = Block::Critical;
    }
    for &j in &order[row.len() - negligible..] {
        map[j] = Block::Negligible;
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::differences;

    #[test]
    fn backward_is_the_gradient_of_the_projections() {
        let noise = |shape, seed: usize| {
            Tensor::from_fn(shape, |[b, h, i, d]| {
                ((b * 31 + h * 17 + i * 7 + d * 3 + seed) % 13) as f64 * 0.2 - 1.1
            })
        };
        let (qp, kp) = (noise([2, 4, 3, 5], 1), noise([2, 2, 4, 5], 2));
        let mut weights = [noise([1, 1, 5, 5], 3), noise([1, 1, 5, 5], 4)];
        let grad = noise([2, 4, 3, 4], 5);
        let exact = scores_backward(&qp, &kp, &weights[0], &weights[1], 0.7, &grad);
        for (at, exact) in exact.iter().enumerate() {
            let numeric = differences(&mut weights, at, |[wq, wk]| {
                let pc = scores(&project(&qp, wq), &project(&kp, wk), 0.7);
                dot(pc.data(), grad.data())
            });
            let error = crate::relative_error(numeric.data(), exact.data());
            assert!(error < 1e-7, "{at}: {error:e}");
        }
    }

    #[test]
    fn ranking_breaks_ties_by_index_and_puts_nan_last() {
        let row = [1.0, f64::NAN, 3.0, 1.0, f64::NEG_INFINITY, 3.0];
        assert_eq!(rank(&row), [2, 5, 0, 3, 4, 1]);
        assert_eq!(top_k(&row, 3), [0, 2, 5]);
    }

    #[test]
    fn counts_are_clamped() {
        assert_eq!(critical_count(0.001, 512), 1);
        assert_eq!(critical_count(0.05, 512), 25);
        assert_eq!(critical_count(1.0, 7), 7);
        assert_eq!(negligible_count(0.1, 512, 25), 51);
        assert_eq!(negligible_count(0.9, 10, 5), 5);
    }

    #[test]
    fn top_p_takes_the_smallest_prefix() {
        let row = [0.0, 10.0, 0.0, 10.0];
        assert_eq!(top_p_count(&row, 0.4, 1, 4), 1);
        assert_eq!(top_p_count(&row, 0.9, 1, 4), 2);
        assert_eq!(top_p_count(&row, 1.0, 1, 4), 4);
        assert_eq!(top_p_count(&row, 1.0, 1, 3), 3);
        assert_eq!(top_p_count(&row, 0.1, 2, 4), 2);
    }

    #[test]
    fn smoothing_shifts_rows_of_scores_by_a_constant() {
        let q = Tensor::from_fn([1, 2, 4, 3], |[_, h, i, d]| {
            (h + 2 * i + 3 * d) as f64 * 0.3
        });
        let k = Tensor::from_fn([1, 1, 6, 3], |[_, _, j, d]| ((j * 7 + d * 5) % 11) as f64);
        let raw = scores(&mean_pool(&q, 2), &mean_pool(&k, 2), 0.5);
        let smoothed = scores(&mean_pool(&q, 2), &mean_pool(&smooth(&k), 2), 0.5);
        for h in 0..2 {
            for i in 0..2 {
                let shift = raw[[0, h, i, 0]] - smoothed[[0, h, i, 0]];
                for j in 0..3 {
                    let found = raw[[0, h, i, j]] - smoothed[[0, h, i, j]];
                    assert!((found - shift).abs() < 1e-12);
                }
            }
        }
    }
}
