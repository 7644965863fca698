//! Linear attention: `O_i = sum_j u_ij V_j / sum_j u_ij` with `u_ij = w_ij phi(Q_i) . phi(K_j)`.
//!
//! `w_ij` is 1 for the keys that take part: those of marginal blocks (the papers), all of them, or
//! those up to `i` (causal). A row whose weights sum to 0 is 0.

use crate::attention::{Causal, Gradients};
use crate::blocks::BlockWeights;
use crate::tensor::{Tensor, axpy, dot};

/// phi, applied to each row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureMap {
    /// Softmax over the row.
    Softmax,
    /// `elu(x) + 1`.
    EluPlusOne,
    /// `max(x, 0)`.
    Relu,
    /// `x` itself.
    Identity,
}

impl FeatureMap {
    /// Every map.
    pub const ALL: [FeatureMap; 4] = [
        FeatureMap::Softmax,
        FeatureMap::EluPlusOne,
        FeatureMap::Relu,
        FeatureMap::Identity,
    ];

    /// phi of a row.
    pub fn apply(self, row: &[f64]) -> Vec<f64> {
        match self {
            FeatureMap::Softmax => {
                let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let exps: Vec<f64> = row.iter().map(|x| (x - max).exp()).collect();
                let sum: f64 = exps.iter().sum();
                exps.into_iter().map(|e| e / sum).collect()
            }
            FeatureMap::EluPlusOne => row
                .iter()
                .map(|&x| if x > 0.0 { x + 1.0 } else { x.exp() })
                .collect(),
            FeatureMap::Relu => row.iter().map(|&x| x.max(0.0)).collect(),
            FeatureMap::Identity => row.to_vec(),
        }
    }

    /// The gradient of a row `x` for the gradient `grad` of [`apply`](Self::apply).
    pub fn backward(self, x: &[f64], grad: &[f64]) -> Vec<f64> {
        let y = self.apply(x);
        let mean = match self {
            FeatureMap::Softmax => dot(&y, grad),
            _ => 0.0,
        };
        let slope = |at: usize| match self {
            FeatureMap::Softmax => y[at],
            FeatureMap::EluPlusOne => {
                if x[at] > 0.0 {
                    1.0
                } else {
                    x[at].exp()
                }
            }
            FeatureMap::Relu => f64::from(x[at] > 0.0),
            FeatureMap::Identity => 1.0,
        };
        (0..x.len())
            .map(|at| slope(at) * (grad[at] - mean))
            .collect()
    }

    /// [`backward`](Self::backward) of every row.
    pub fn backward_all(self, x: &Tensor, grad: &Tensor) -> Tensor {
        let mut out = grad.clone();
        let [batch, heads, len, _] = x.shape();
        for b in 0..batch {
            for h in 0..heads {
                for i in 0..len {
                    out.row_mut(b, h, i)
                        .copy_from_slice(&self.backward(x.row(b, h, i), grad.row(b, h, i)));
                }
            }
        }
        out
    }

    /// phi of every row.
    pub fn apply_all(self, x: &Tensor) -> Tensor {
        let mut out = x.clone();
        let [batch, heads, len, _] = x.shape();
        for b in 0..batch {
            for h in 0..heads {
                for i in 0..len {
                    out.row_mut(b, h, i)
                        .copy_from_slice(&self.apply(x.row(b, h, i)));
                }
            }
        }
        out
    }
}

/// Linear attention of `q [B, Hq, Lq, D]` over the keys that `weights` gives a weight above 0.
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    phi: FeatureMap,
    weights: &BlockWeights,
    causal: Causal,
) -> Tensor {
    let [batch, heads, query_len, _] = q.shape();
    let [_, kv_heads, key_len, value_dim] = v.shape();
    let (phi_q, phi_k) = (phi.apply_all(q), phi.apply_all(k));
    let mut out = Tensor::zeros([batch, heads, query_len, value_dim]);
    for b in 0..batch {
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            for i in 0..query_len {
                let mut sum = 0.0;
                let mut row = vec![0.0; value_dim];
                for j in 0..key_len {
                    let weight = weights.at(b, h, i, j);
                    if weight == 0.0 || !causal.sees(i, j, query_len, key_len) {
                        continue;
                    }
                    let u = weight * dot(phi_q.row(b, h, i), phi_k.row(b, kv, j));
                    sum += u;
                    axpy(&mut row, u, v.row(b, kv, j));
                }
                if sum != 0.0 {
                    axpy(out.row_mut(b, h, i), 1.0 / sum, &row);
                }
            }
        }
    }
    out
}

/// Gradients of [`forward`] for the incoming `dout [B, Hq, Lq, Dv]`, `out` being what it returned.
///
/// ```text
/// n_i = sum_j u_ij           p_ij = u_ij / n_i        du_ij = (dO_i . V_j - dO_i . O_i) / n_i
/// dphi(Q_i) = sum_j du_ij w_ij phi(K_j)               dphi(K_j) = sum_i du_ij w_ij phi(Q_i)
/// dV_j = sum_i p_ij dO_i     dw(block) = sum over the block of du_ij phi(Q_i) . phi(K_j)
/// ```
///
/// A row whose `n_i` is 0 passes nothing on.
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    phi: FeatureMap,
    weights: &BlockWeights,
    causal: Causal,
    out: &Tensor,
    dout: &Tensor,
) -> Gradients {
    let [batch, heads, query_len, _] = q.shape();
    let [_, kv_heads, key_len, _] = v.shape();
    let (phi_q, phi_k) = (phi.apply_all(q), phi.apply_all(k));
    let mut grads = Gradients {
        dq: Tensor::zeros(q.shape()),
        dk: Tensor::zeros(k.shape()),
        dv: Tensor::zeros(v.shape()),
        dweights: Tensor::zeros(weights.weights.shape()),
    };
    for b in 0..batch {
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            for i in 0..query_len {
                let products: Vec<(usize, f64, f64)> = (0..key_len)
                    .filter(|&j| causal.sees(i, j, query_len, key_len))
                    .map(|j| (j, weights.at(b, h, i, j)))
                    .filter(|&(_, w)| w != 0.0)
                    .map(|(j, w)| (j, w, dot(phi_q.row(b, h, i), phi_k.row(b, kv, j))))
                    .collect();
                let n: f64 = products.iter().map(|(_, w, x)| w * x).sum();
                if n == 0.0 {
                    continue;
                }
                let grad = dout.row(b, h, i);
                let delta = dot(grad, out.row(b, h, i));
                for (j, w, x) in products {
                    let du = (dot(grad, v.row(b, kv, j)) - delta) / n;
                    axpy(grads.dv.row_mut(b, kv, j), w * x / n, grad);
                    axpy(grads.dq.row_mut(b, h, i), du * w, phi_k.row(b, kv, j));
                    axpy(grads.dk.row_mut(b, kv, j), du * w, phi_q.row(b, h, i));
                    grads.dweights[[b, h, i / weights.block_q, j / weights.block_k]] += du * x;
                }
            }
        }
    }
    Gradients {
        dq: phi.backward_all(q, &grads.dq),
        dk: phi.backward_all(k, &grads.dk),
        ..grads
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::differences;

    /// Fixed values in [-1, 1] that lie away from the kinks of the feature maps.
    fn noise(shape: [usize; 4], seed: usize) -> Tensor {
        Tensor::from_fn(shape, |[b, h, i, d]| {
            ((b * 31 + h * 17 + i * 7 + d * 3 + seed) % 13) as f64 * 0.15 - 0.87
        })
    }

    #[test]
    fn backward_is_the_gradient_of_forward() {
        let (lq, lk, d, dv) = (5, 7, 4, 3);
        let soft =
            |at: [usize; 4]| 0.1 + 0.2 * ((at[0] + 2 * at[1] + 3 * at[2] + at[3]) % 5) as f64;
        let hard = |at: [usize; 4]| f64::from(!(at[1] + at[2] * 2 + at[3]).is_multiple_of(3));
        for phi in FeatureMap::ALL {
            for weight in [soft, hard] {
                for causal in [Causal::None, Causal::TopLeft] {
                    // The identity needs positive features, or denominators pass through 0.
                    let base = if phi == FeatureMap::Identity {
                        1.0
                    } else {
                        0.0
                    };
                    let mut inputs = [
                        noise([2, 4, lq, d], 1).map(|x| x + base),
                        noise([2, 2, lk, d], 2).map(|x| x + base),
                        noise([2, 2, lk, dv], 3),
                        BlockWeights::from_fn([2, 4, lq, lk], 2, 3, weight).weights,
                    ];
                    let dout = noise([2, 4, lq, dv], 4);
                    let blocks = |weights: &Tensor| BlockWeights {
                        block_q: 2,
                        block_k: 3,
                        weights: weights.clone(),
                    };
                    let run =
                        |[q, k, v, w]: &[Tensor; 4]| forward(q, k, v, phi, &blocks(w), causal);
                    let out = run(&inputs);
                    let [q, k, v, w] = &inputs;
                    let grads = backward(q, k, v, phi, &blocks(w), causal, &out, &dout);
                    let mut exact = vec![grads.dq, grads.dk, grads.dv];
                    if weight([0; 4]) != 0.0 {
                        exact.push(grads.dweights);
                    }
                    for (at, exact) in exact.iter().enumerate() {
                        let numeric = differences(&mut inputs, at, |inputs| {
                            dot(run(inputs).data(), dout.data())
                        });
                        let error = crate::relative_error(numeric.data(), exact.data());
                        assert!(error < 1e-6, "{phi:?} {causal:?} {at}: {error:e}");
                    }
                }
            }
        }
    }

    #[test]
    fn weights_of_exp_make_it_softmax_attention() {
        // With one feature, u_ij = q_i k_j: weights are the keys' own values.
        let q = Tensor::full([1, 1, 2, 1], 2.0);
        let k = Tensor::new([1, 1, 3, 1], vec![1.0, 2.0, 5.0]);
        let v = Tensor::new([1, 1, 3, 1], vec![8.0, 4.0, 2.0]);
        let dense = BlockWeights::dense([1, 1, 2, 3], 1, 1);
        let out = forward(&q, &k, &v, FeatureMap::Identity, &dense, Causal::None);
        assert!((out[[0, 0, 0, 0]] - (8.0 + 8.0 + 10.0) / 8.0).abs() < 1e-12);
        let causal = forward(&q, &k, &v, FeatureMap::Identity, &dense, Causal::TopLeft);
        assert!((causal[[0, 0, 1, 0]] - (8.0 + 8.0) / 3.0).abs() < 1e-12);
    }

    #[test]
    fn a_row_without_weight_is_zero() {
        let q = Tensor::full([1, 1, 1, 2], -1.0);
        let k = Tensor::full([1, 1, 3, 2], 1.0);
        let dense = BlockWeights::dense([1, 1, 1, 3], 1, 1);
        let out = forward(&q, &k, &k, FeatureMap::Relu, &dense, Causal::None);
        assert_eq!(out.data(), [0.0, 0.0]);
        let nothing = BlockWeights::from_fn([1, 1, 1, 3], 1, 1, |_| 0.0);
        let out = forward(&q, &k, &k, FeatureMap::Softmax, &nothing, Causal::None);
        assert_eq!(out.data(), [0.0, 0.0]);
    }

    #[test]
    fn softmax_features_sum_to_one() {
        let row = FeatureMap::Softmax.apply(&[1000.0, 999.0, -3.0]);
        assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}
