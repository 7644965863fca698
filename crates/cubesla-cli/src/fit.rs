//! Least-squares fits of what SLA and SLA2 learn, against full attention.

use cubesla_reference::Tensor;

/// Ridge of the projection's fit, relative to the mean variance of the linear branch.
const RIDGE: f64 = 1e-4;
/// Beyond it a sigmoid in f32 is 0 or 1.
const MAX_LOGIT: f64 = 20.0;

/// `Wl [Dv, Dv]` and `bl [Dv]`, row-major, with the least squared `full - sparse - linear Wl^T - bl`
/// over all rows of all heads.
pub fn projection(full: &Tensor, sparse: &Tensor, linear: &Tensor) -> (Vec<f64>, Vec<f64>) {
    let dim = linear.shape()[3];
    let residual: Vec<f64> = pairs(full, sparse).map(|(f, s)| f - s).collect();
    let (x, y) = (linear.data(), &residual[..]);
    let (mean_x, mean_y) = (column_means(x, dim), column_means(y, dim));
    let mut gram = vec![0.0; dim * dim];
    let mut cross = vec![0.0; dim * dim];
    for (x, y) in x.chunks_exact(dim).zip(y.chunks_exact(dim)) {
        for i in 0..dim {
            let centred = x[i] - mean_x[i];
            for j in 0..dim {
                gram[i * dim + j] += centred * (x[j] - mean_x[j]);
                cross[i * dim + j] += centred * (y[j] - mean_y[j]);
            }
        }
    }
    let trace: f64 = (0..dim).map(|i| gram[i * dim + i]).sum();
    for i in 0..dim {
        gram[i * dim + i] += RIDGE * trace / dim as f64 + f64::MIN_POSITIVE;
    }
    let solved = solve(gram, cross, dim); // [in, out]
    let wl: Vec<f64> = (0..dim * dim)
        .map(|at| solved[at % dim * dim + at / dim])
        .collect();
    let bl = (0..dim)
        .map(|e| {
            let mapped = (0..dim).map(|d| wl[e * dim + d] * mean_x[d]);
            mean_y[e] - mapped.sum::<f64>()
        })
        .collect();
    (wl, bl)
}

/// The logits `[H, M]` whose sigmoids `a` in [0, 1] have the least squared
/// `full - a sparse - (1 - a) linear` over the rows of their block, in all batches.
pub fn alpha_logits(full: &Tensor, sparse: &Tensor, linear: &Tensor, block_q: usize) -> Vec<f32> {
    let [batch, heads, len, _] = full.shape();
    let mut logits = Vec::new();
    for h in 0..heads {
        for first in (0..len).step_by(block_q) {
            let (mut along, mut square) = (0.0, 0.0);
            for b in 0..batch {
                for i in first..len.min(first + block_q) {
                    let rows = [full, sparse, linear].map(|x| x.row(b, h, i));
                    for ((f, s), l) in rows[0].iter().zip(rows[1]).zip(rows[2]) {
                        along += (f - l) * (s - l);
                        square += (s - l) * (s - l);
                    }
                }
            }
            let a = if square > 0.0 { along / square } else { 1.0 };
            logits.push(logit(a.clamp(0.0, 1.0)) as f32);
        }
    }
    logits
}

fn logit(a: f64) -> f64 {
    (a / (1.0 - a)).ln().clamp(-MAX_LOGIT, MAX_LOGIT)
}

/// The weight that a logit stands for.
pub fn sigmoid(logit: f32) -> f64 {
    1.0 / (1.0 + (-f64::from(logit)).exp())
}

fn pairs<'a>(a: &'a Tensor, b: &'a Tensor) -> impl Iterator<Item = (f64, f64)> + 'a {
    a.data().iter().copied().zip(b.data().iter().copied())
}

fn column_means(x: &[f64], dim: usize) -> Vec<f64> {
    let mut means = vec![0.0; dim];
    for row in x.chunks_exact(dim) {
        for (mean, x) in means.iter_mut().zip(row) {
            *mean += x;
        }
    }
    let rows = (x.len() / dim) as f64;
    means.into_iter().map(|sum| sum / rows).collect()
}

/// `a^-1 b` for a symmetric positive definite `a`, all `[n, n]`, by Cholesky's factors.
fn solve(mut a: Vec<f64>, mut b: Vec<f64>, n: usize) -> Vec<f64> {
    for j in 0..n {
        for i in j..n {
            let done: f64 = (0..j).map(|k| a[i * n + k] * a[j * n + k]).sum();
            let rest = a[i * n + j] - done;
            a[i * n + j] = if i == j {
                rest.max(f64::MIN_POSITIVE).sqrt()
            } else {
                rest / a[j * n + j]
            };
        }
    }
    for column in 0..n {
        for i in 0..n {
            let done: f64 = (0..i).map(|k| a[i * n + k] * b[k * n + column]).sum();
            b[i * n + column] = (b[i * n + column] - done) / a[i * n + i];
        }
        for i in (0..n).rev() {
            let done: f64 = (i + 1..n).map(|k| a[k * n + i] * b[k * n + column]).sum();
            b[i * n + column] = (b[i * n + column] - done) / a[i * n + i];
        }
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(shape: [usize; 4], seed: u64) -> Tensor {
        let mut state = seed;
        Tensor::from_fn(shape, |_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) as f64 / (1u64 << 30) as f64 - 1.0
        })
    }

    #[test]
    fn cholesky_solves() {
        let a = vec![4.0, 2.0, 2.0, 5.0];
        let x = solve(a, vec![8.0, 4.0, 12.0, 10.0], 2);
        // 4 x0 + 2 x1 = (8, 4), 2 x0 + 5 x1 = (12, 10)
        for (x, exact) in x.iter().zip([1.0, 0.0, 2.0, 2.0]) {
            assert!((x - exact).abs() < 1e-12);
        }
    }

    #[test]
    fn a_projection_that_exists_is_found() {
        let shape = [2, 3, 40, 3];
        let (sparse, linear) = (noise(shape, 1), noise(shape, 2));
        let (wl, bl) = (
            [0.5, -1.0, 2.0, 0.0, 1.5, 0.1, 3.0, 0.2, -0.7],
            [1.0, -2.0, 0.3],
        );
        let full = Tensor::from_fn(shape, |[b, h, i, e]| {
            let mapped = (0..3).map(|d| wl[e * 3 + d] * linear[[b, h, i, d]]);
            sparse[[b, h, i, e]] + mapped.sum::<f64>() + bl[e]
        });
        let (found_wl, found_bl) = projection(&full, &sparse, &linear);
        let found = found_wl.iter().chain(&found_bl);
        for (found, exact) in found.zip(wl.iter().chain(&bl)) {
            assert!((found - exact).abs() < 2e-3, "{found} {exact}");
        }
    }

    #[test]
    fn weights_are_found_for_each_head_and_block_and_kept_between_0_and_1() {
        let shape = [2, 2, 10, 4];
        let (sparse, linear) = (noise(shape, 3), noise(shape, 4));
        let exact = |h: usize, i: usize| [[0.25, 0.9, 0.5], [1.7, -0.3, 1.0]][h][i / 4];
        let full = Tensor::from_fn(shape, |[b, h, i, d]| {
            let a = exact(h, i);
            a * sparse[[b, h, i, d]] + (1.0 - a) * linear[[b, h, i, d]]
        });
        let logits = alpha_logits(&full, &sparse, &linear, 4);
        let found: Vec<f64> = logits.iter().map(|&x| sigmoid(x)).collect();
        for (found, exact) in found.iter().zip([0.25, 0.9, 0.5, 1.0, 0.0, 1.0]) {
            assert!((found - exact).abs() < 1e-6, "{found} {exact}");
        }
    }

    #[test]
    fn equal_branches_leave_the_sparse_one() {
        let x = noise([1, 1, 4, 2], 5);
        assert_eq!(alpha_logits(&x, &x, &x, 4), [20.0]);
    }
}
