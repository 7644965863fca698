//! What an unfused computation in low precision would give, which sets the bounds.
//!
//! Inputs are stored in that precision too: for types of 16 bits they are already, and where f32 is
//! multiplied as tf32 it is what products do to them.

use cubesla_kernels::FactorType;
use cubesla_reference::attention::Causal;
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::linear::FeatureMap;
use cubesla_reference::{Tensor, relative_error};

use crate::backward::epsilon;
use crate::rounded;

/// Attention as a framework does it without a fused kernel: every matrix is stored in `dtype`,
/// products are summed in high precision.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    weights: &BlockWeights,
    scale: f64,
    causal: Causal,
    dtype: impl Into<FactorType>,
) -> Tensor {
    let dtype = dtype.into();
    let [q, k, v] = &[q, k, v].map(|x| stored(x, dtype));
    let [batch, heads, query_len, _] = q.shape();
    let [_, kv_heads, key_len, value_dim] = v.shape();
    let stored = |x: f64| f64::from(rounded(x as f32, dtype));
    let mut out = Tensor::zeros([batch, heads, query_len, value_dim]);
    for b in 0..batch {
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            for i in 0..query_len {
                let scores: Vec<f64> = (0..key_len)
                    .map(|j| {
                        let seen = causal.sees(i, j, query_len, key_len);
                        if !seen || weights.at(b, h, i, j) == 0.0 {
                            return f64::NEG_INFINITY;
                        }
                        let pairs = q.row(b, h, i).iter().zip(k.row(b, kv, j));
                        stored(scale * pairs.map(|(x, y)| x * y).sum::<f64>())
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                if max == f64::NEG_INFINITY {
                    continue;
                }
                let exps = scores.iter().enumerate();
                let exps: Vec<f64> = exps
                    .map(|(j, s)| weights.at(b, h, i, j) * (s - max).exp())
                    .collect();
                let sum: f64 = exps.iter().sum();
                for (j, exp) in exps.into_iter().enumerate() {
                    let p = stored(exp / sum);
                    for (o, x) in out.row_mut(b, h, i).iter_mut().zip(v.row(b, kv, j)) {
                        *o += p * x;
                    }
                }
                out.row_mut(b, h, i)
                    .iter_mut()
                    .for_each(|o| *o = stored(*o));
            }
        }
    }
    out
}

/// Linear attention as a framework does it without a fused kernel: features, states, numerators and
/// denominators are stored in `dtype`, products are summed in high precision.
pub fn linear(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    phi: FeatureMap,
    weights: &BlockWeights,
    causal: Causal,
    dtype: impl Into<FactorType>,
) -> Tensor {
    let dtype = dtype.into();
    let [q, k, v] = &[q, k, v].map(|x| stored(x, dtype));
    let [batch, heads, query_len, dim] = q.shape();
    let [_, kv_heads, key_len, value_dim] = v.shape();
    let round = |x: f64| f64::from(rounded(x as f32, dtype));
    let (phi_q, phi_k) = (
        stored(&phi.apply_all(q), dtype),
        stored(&phi.apply_all(k), dtype),
    );
    // What keeps the states of long sequences in the range of f16.
    let factor = (key_len as f64).sqrt().recip();
    let mut out = Tensor::zeros([batch, heads, query_len, value_dim]);
    for b in 0..batch {
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            for i in 0..query_len {
                // A block has one set of states, and a causal row its own.
                let mut state = vec![0.0; dim * value_dim];
                let mut norm = vec![0.0; dim];
                for j in 0..key_len {
                    let weight = weights.at(b, h, i, j);
                    if weight == 0.0 || !causal.sees(i, j, query_len, key_len) {
                        continue;
                    }
                    for (d, x) in phi_k.row(b, kv, j).iter().enumerate() {
                        let x = weight * x;
                        norm[d] += factor * x;
                        let row = &mut state[d * value_dim..][..value_dim];
                        row.iter_mut()
                            .zip(v.row(b, kv, j))
                            .for_each(|(s, y)| *s += factor * x * y);
                    }
                }
                let query = phi_q.row(b, h, i);
                let sum: f64 = query.iter().zip(&norm).map(|(x, z)| x * round(*z)).sum();
                if sum == 0.0 {
                    continue;
                }
                for (e, o) in out.row_mut(b, h, i).iter_mut().enumerate() {
                    let states = state[e..].iter().step_by(value_dim);
                    let product: f64 = query.iter().zip(states).map(|(x, s)| x * round(*s)).sum();
                    *o = round(round(product) / round(sum));
                }
            }
        }
    }
    out
}

/// The gradients of [`attention`], the block weights' last, as a framework computes them:
/// probabilities, their gradients and the results are stored in `dtype`, products are summed in high precision.
#[allow(clippy::too_many_arguments)] // the operation's own inputs
pub fn attention_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    weights: &BlockWeights,
    scale: f64,
    causal: Causal,
    dout: &Tensor,
    dtype: impl Into<FactorType>,
) -> [Tensor; 4] {
    let dtype = dtype.into();
    let [q, k, v, dout] = &[q, k, v, dout].map(|x| stored(x, dtype));
    let [batch, heads, query_len, _] = q.shape();
    let [_, kv_heads, key_len, _] = v.shape();
    let round = |x: f64| f64::from(rounded(x as f32, dtype));
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let add = |to: &mut [f64], factor: f64, from: &[f64]| {
        to.iter_mut().zip(from).for_each(|(t, x)| *t += factor * x);
    };
    let (mut dq, mut dk, mut dv) = (
        Tensor::zeros(q.shape()),
        Tensor::zeros(k.shape()),
        Tensor::zeros(v.shape()),
    );
    let mut dweights = Tensor::zeros(weights.weights.shape());
    for b in 0..batch {
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            for i in 0..query_len {
                let keys: Vec<usize> = (0..key_len)
                    .filter(|&j| causal.sees(i, j, query_len, key_len))
                    .filter(|&j| weights.at(b, h, i, j) != 0.0)
                    .collect();
                let score = |&j: &usize| round(scale * dot(q.row(b, h, i), k.row(b, kv, j)));
                let scores: Vec<f64> = keys.iter().map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let exps = scores.iter().zip(&keys);
                let exps: Vec<f64> = exps
                    .map(|(s, &j)| weights.at(b, h, i, j) * (s - max).exp())
                    .collect();
                let sum: f64 = exps.iter().sum();
                let p: Vec<f64> = exps.iter().map(|x| round(x / sum)).collect();
                let grad = dout.row(b, h, i);
                let dp: Vec<f64> = keys
                    .iter()
                    .map(|&j| round(dot(grad, v.row(b, kv, j))))
                    .collect();
                let delta = dot(&p, &dp);
                for (at, &j) in keys.iter().enumerate() {
                    let ds = round(p[at] * (dp[at] - delta));
                    dweights[[b, h, i / weights.block_q, j / weights.block_k]] +=
                        ds / weights.at(b, h, i, j);
                    let ds = scale * ds;
                    add(dq.row_mut(b, h, i), ds, k.row(b, kv, j));
                    add(dk.row_mut(b, kv, j), ds, q.row(b, h, i));
                    add(dv.row_mut(b, kv, j), p[at], grad);
                }
            }
        }
    }
    [dq, dk, dv, dweights].map(|x| stored(&x, dtype))
}

/// The gradients of [`linear`], the block weights' last, as a framework computes them: features,
/// weights, their gradients and the results are stored in `dtype`, products are summed in high precision.
pub fn linear_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    phi: FeatureMap,
    weights: &BlockWeights,
    dout: &Tensor,
    dtype: impl Into<FactorType>,
) -> [Tensor; 4] {
    let dtype = dtype.into();
    let [q, k, v, dout] = &[q, k, v, dout].map(|x| stored(x, dtype));
    let [batch, heads, query_len, _] = q.shape();
    let [_, kv_heads, key_len, _] = v.shape();
    let round = |x: f64| f64::from(rounded(x as f32, dtype));
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let add = |to: &mut [f64], factor: f64, from: &[f64]| {
        to.iter_mut().zip(from).for_each(|(t, x)| *t += factor * x);
    };
    let phi_q = stored(&phi.apply_all(q), dtype);
    let phi_k = stored(&phi.apply_all(k), dtype);
    let (mut dq, mut dk, mut dv) = (
        Tensor::zeros(q.shape()),
        Tensor::zeros(k.shape()),
        Tensor::zeros(v.shape()),
    );
    let mut dweights = Tensor::zeros(weights.weights.shape());
    for b in 0..batch {
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            for i in 0..query_len {
                let keys: Vec<usize> = (0..key_len)
                    .filter(|&j| weights.at(b, h, i, j) != 0.0)
                    .collect();
                let products: Vec<f64> = keys
                    .iter()
                    .map(|&j| round(dot(phi_q.row(b, h, i), phi_k.row(b, kv, j))))
                    .collect();
                let terms = products.iter().zip(&keys);
                let n = round(terms.map(|(x, &j)| weights.at(b, h, i, j) * x).sum());
                if n == 0.0 {
                    continue;
                }
                let grad = dout.row(b, h, i);
                let terms = products.iter().zip(&keys);
                let p: Vec<f64> = terms
                    .map(|(x, &j)| round(weights.at(b, h, i, j) * x / n))
                    .collect();
                let dp: Vec<f64> = keys
                    .iter()
                    .map(|&j| round(dot(grad, v.row(b, kv, j))))
                    .collect();
                let delta = round(dot(&p, &dp));
                for (at, &j) in keys.iter().enumerate() {
                    let du = round((dp[at] - delta) / n);
                    dweights[[b, h, i / weights.block_q, j / weights.block_k]] += du * products[at];
                    let du = weights.at(b, h, i, j) * du;
                    add(dq.row_mut(b, h, i), du, phi_k.row(b, kv, j));
                    add(dk.row_mut(b, kv, j), du, phi_q.row(b, h, i));
                    add(dv.row_mut(b, kv, j), p[at], grad);
                }
            }
        }
    }
    [
        stored(&phi.backward_all(q, &stored(&dq, dtype)), dtype),
        stored(&phi.backward_all(k, &stored(&dk, dtype)), dtype),
        stored(&dv, dtype),
        stored(&dweights, dtype),
    ]
}

/// `x` as `dtype` holds it.
pub fn stored(x: &Tensor, dtype: impl Into<FactorType>) -> Tensor {
    let dtype = dtype.into();
    x.map(|x| f64::from(rounded(x as f32, dtype)))
}

/// The relative error that a kernel may have: 1e-5 in f32, in 16 bits and by tf32 twice that of `plain`.
pub fn bound(plain: &Tensor, exact: &Tensor, dtype: impl Into<FactorType>) -> f64 {
    match dtype.into() {
        FactorType::F32 => 1e-5,
        FactorType::Tf32 | FactorType::F16 | FactorType::BF16 => {
            2.0 * relative_error(plain.data(), exact.data())
        }
    }
}

/// The relative error that a gradient may have: 1e-5 in f32, in 16 bits and by tf32 twice that of
/// `plain`, thrice where so few elements leave both to chance, but not less than what rounding four
/// times makes, as luck may leave `plain` with less, nor than in f32, as some gradients are exactly 0.
pub fn gradient_bound(plain: &Tensor, exact: &Tensor, dtype: impl Into<FactorType>) -> f64 {
    let dtype = dtype.into();
    let few = exact.data().len() < 512 && dtype != FactorType::F32;
    let factor = if few { 1.5 } else { 1.0 };
    // Rounding once makes 0.4 of it, in the mean of squares.
    let four_times = 1.5 * epsilon(dtype);
    (factor * bound(plain, exact, dtype))
        .max(four_times)
        .max(1e-5)
}

/// The relative error that a gradient may have whose `terms`, without those subtracted from them,
/// nearly cancel, as those of one key do: what rounding leaves of them. 0 where half of them or
/// less are cancelled.
pub fn cancelled_bound(terms: &Tensor, exact: &Tensor, dtype: impl Into<FactorType>) -> f64 {
    let (terms, exact) = (norm(terms.data()), norm(exact.data()));
    if terms <= 2.0 * exact {
        return 0.0;
    }
    let dtype = dtype.into();
    // Sums of f32 numbers add some errors of their own.
    let factor = if dtype == FactorType::F32 { 16.0 } else { 3.0 };
    // Relative to what `relative_error` is relative to.
    let unit = if exact == 0.0 { 1.0 } else { exact };
    factor * epsilon(dtype) * terms / unit
}

/// The Euclidean norm.
pub fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}
