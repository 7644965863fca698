//! Softmax attention, dense or weighted by blocks, and its gradient.
//!
//! For each query row `i` over the keys `j` that it may see, with `m_ij` the weight of their blocks:
//!
//! ```text
//! S_ij = scale * Q_i . K_j
//! P_ij = m_ij exp(S_ij) / sum_l m_il exp(S_il)
//! O_i  = sum_j P_ij V_j
//! L_i  = ln sum_j m_ij exp(S_ij)
//! ```
//!
//! A row that sees no key has `O_i = 0` and `L_i = -inf`.

use crate::blocks::BlockWeights;
use crate::tensor::{Tensor, axpy, dot};

/// Which keys a query row may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Causal {
    /// All of them.
    None,
    /// Keys `j <= i`: the first query is aligned with the first key.
    TopLeft,
    /// Keys `j <= i + Lk - Lq`: the last query is aligned with the last key.
    BottomRight,
}

impl Causal {
    /// Whether query `i` of `query_len` sees key `j` of `key_len`.
    pub fn sees(self, i: usize, j: usize, query_len: usize, key_len: usize) -> bool {
        match self {
            Causal::None => true,
            Causal::TopLeft => j <= i,
            Causal::BottomRight => j + query_len <= i + key_len,
        }
    }
}

/// What [`forward`] returns.
#[derive(Clone, Debug)]
pub struct Forward {
    /// `O [B, Hq, Lq, Dv]`.
    pub out: Tensor,
    /// `L [B, Hq, Lq, 1]`, natural logarithm.
    pub lse: Tensor,
}

/// What [`backward`] returns.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// `dQ [B, Hq, Lq, D]`.
    pub dq: Tensor,
    /// `dK [B, Hkv, Lk, D]`, summed over the query heads that share a key head.
    pub dk: Tensor,
    /// `dV [B, Hkv, Lk, Dv]`, summed likewise.
    pub dv: Tensor,
    /// Gradient of the block weights, `[B, Hq, M, N]`; infinite or NaN where a weight is 0.
    pub dweights: Tensor,
}

/// The sizes of a problem, read off its inputs.
struct Sizes {
    batch: usize,
    heads: usize,
    group: usize,
    query_len: usize,
    key_len: usize,
}

impl Sizes {
    fn of(q: &Tensor, k: &Tensor) -> Self {
        let [batch, heads, query_len, _] = q.shape();
        let [_, kv_heads, key_len, _] = k.shape();
        assert_eq!(
            heads % kv_heads,
            0,
            "query heads are not a multiple of key heads"
        );
        Self {
            batch,
            heads,
            group: heads / kv_heads,
            query_len,
            key_len,
        }
    }

    /// Every query row: `(b, h, key head, i)`.
    fn rows(&self) -> impl Iterator<Item = (usize, usize, usize, usize)> + use<> {
        let (heads, group, query_len) = (self.heads, self.group, self.query_len);
        (0..self.batch).flat_map(move |b| {
            (0..heads).flat_map(move |h| (0..query_len).map(move |i| (b, h, h / group, i)))
        })
    }

    /// The keys that row `i` sees with a weight above 0, and their weights.
    fn keys(
        &self,
        weights: &BlockWeights,
        causal: Causal,
        b: usize,
        h: usize,
        i: usize,
    ) -> Vec<(usize, f64)> {
        (0..self.key_len)
            .filter(|&j| causal.sees(i, j, self.query_len, self.key_len))
            .map(|j| (j, weights.at(b, h, i, j)))
            .filter(|&(_, weight)| weight > 0.0)
            .collect()
    }
}

/// Attention of `q [B, Hq, Lq, D]` over `k [B, Hkv, Lk, D]` and `v [B, Hkv, Lk, Dv]`.
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    weights: &BlockWeights,
    scale: f64,
    causal: Causal,
) -> Forward {
    let sizes = Sizes::of(q, k);
    let [batch, heads, query_len, _] = q.shape();
    let mut out = Tensor::zeros([batch, heads, query_len, v.shape()[3]]);
    let mut lse = Tensor::full([batch, heads, query_len, 1], f64::NEG_INFINITY);

    for (b, h, kv, i) in sizes.rows() {
        let keys = sizes.keys(weights, causal, b, h, i);
        let scores: Vec<f64> = keys
            .iter()
            .map(|&(j, _)| scale * dot(q.row(b, h, i), k.row(b, kv, j)))
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY && !scores.iter().any(|s| s.is_nan()) {
            continue;
        }
        let unnormalized: Vec<f64> = keys
            .iter()
            .zip(&scores)
            .map(|(&(_, m), s)| m * (s - max).exp())
            .collect();
        let sum: f64 = unnormalized.iter().sum();
        lse[[b, h, i, 0]] = max + sum.ln();
        for (&(j, _), p) in keys.iter().zip(&unnormalized) {
            axpy(out.row_mut(b, h, i), p / sum, v.row(b, kv, j));
        }
    }
    Forward { out, lse }
}

/// Gradients of [`forward`] for the incoming `dout [B, Hq, Lq, Dv]`.
///
/// ```text
/// Ds_i = dO_i . O_i          P_ij = m_ij exp(S_ij - L_i)
/// dP_ij = dO_i . V_j         dS_ij = P_ij (dP_ij - Ds_i)
/// dQ_i = scale sum_j dS_ij K_j,  dK_j = scale sum_i dS_ij Q_i,  dV_j = sum_i P_ij dO_i
/// dm(block) = sum over the block of dS_ij / m_ij
/// ```
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    weights: &BlockWeights,
    scale: f64,
    causal: Causal,
    forward: &Forward,
    dout: &Tensor,
) -> Gradients {
    let sizes = Sizes::of(q, k);
    let mut grads = Gradients {
        dq: Tensor::zeros(q.shape()),
        dk: Tensor::zeros(k.shape()),
        dv: Tensor::zeros(v.shape()),
        dweights: Tensor::zeros(weights.weights.shape()),
    };

    for (b, h, kv, i) in sizes.rows() {
        let (q_i, do_i) = (q.row(b, h, i), dout.row(b, h, i));
        let ds_i = dot(do_i, forward.out.row(b, h, i));
        for (j, m) in sizes.keys(weights, causal, b, h, i) {
            let s = scale * dot(q_i, k.row(b, kv, j));
            let p = m * (s - forward.lse[[b, h, i, 0]]).exp();
            let dp = dot(do_i, v.row(b, kv, j));
            let ds = p * (dp - ds_i);
            axpy(grads.dv.row_mut(b, kv, j), p, do_i);
            axpy(grads.dq.row_mut(b, h, i), scale * ds, k.row(b, kv, j));
            axpy(grads.dk.row_mut(b, kv, j), scale * ds, q_i);
            grads.dweights[[b, h, i / weights.block_q, j / weights.block_k]] += ds / m;
        }
    }
    grads
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A fixed pseudo-random tensor in [-1, 1].
    fn noise(shape: [usize; 4], seed: u64) -> Tensor {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        Tensor::from_fn(shape, |_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
    }

    struct Case {
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weights: BlockWeights,
        causal: Causal,
        dout: Tensor,
    }

    const SCALE: f64 = 0.7;

    impl Case {
        fn new(causal: Causal, weight: impl FnMut([usize; 4]) -> f64) -> Self {
            let (b, hq, hkv, lq, lk, d, dv) = (2, 4, 2, 7, 9, 5, 3);
            Self {
                q: noise([b, hq, lq, d], 1),
                k: noise([b, hkv, lk, d], 2),
                v: noise([b, hkv, lk, dv], 3),
                weights: BlockWeights::from_fn([b, hq, lq, lk], 3, 2, weight),
                causal,
                dout: noise([b, hq, lq, dv], 4),
            }
        }

        fn forward(&self) -> Forward {
            forward(&self.q, &self.k, &self.v, &self.weights, SCALE, self.causal)
        }

        /// `sum(O * dO)`, whose gradient is what `backward` returns.
        fn loss(&self) -> f64 {
            dot(self.forward().out.data(), self.dout.data())
        }

        fn backward(&self) -> Gradients {
            let fwd = self.forward();
            backward(
                &self.q,
                &self.k,
                &self.v,
                &self.weights,
                SCALE,
                self.causal,
                &fwd,
                &self.dout,
            )
        }
    }

    fn soft(at: [usize; 4]) -> f64 {
        0.1 + 0.2 * ((at[0] + 2 * at[1] + 3 * at[2] + at[3]) % 5) as f64
    }

    fn hard(at: [usize; 4]) -> f64 {
        f64::from(!(at[1] + at[2] * 2 + at[3]).is_multiple_of(3))
    }

    /// Central differences of the loss in every element that `at` names.
    fn differences(mut case: Case, tensor: impl Fn(&mut Case) -> &mut Tensor) -> Tensor {
        let shape = tensor(&mut case).shape();
        let step = 1e-6;
        Tensor::from_fn(shape, |at| {
            let x = tensor(&mut case)[at];
            tensor(&mut case)[at] = x + step;
            let up = case.loss();
            tensor(&mut case)[at] = x - step;
            let down = case.loss();
            tensor(&mut case)[at] = x;
            (up - down) / (2.0 * step)
        })
    }

    #[test]
    fn backward_is_the_gradient_of_forward() {
        for causal in [Causal::None, Causal::TopLeft, Causal::BottomRight] {
            for weight in [soft, hard] {
                let case = || Case::new(causal, weight);
                let grads = case().backward();
                let pairs = [
                    (grads.dq, differences(case(), |c| &mut c.q)),
                    (grads.dk, differences(case(), |c| &mut c.k)),
                    (grads.dv, differences(case(), |c| &mut c.v)),
                ];
                for (exact, numeric) in &pairs {
                    let error = crate::relative_error(numeric.data(), exact.data());
                    assert!(error < 1e-7, "{causal:?}: {error:e}");
                }
            }
            let case = || Case::new(causal, soft);
            let numeric = differences(case(), |c| &mut c.weights.weights);
            let error = crate::relative_error(numeric.data(), case().backward().dweights.data());
            assert!(error < 1e-7, "{causal:?}: dweights {error:e}");
        }
    }

    #[test]
    fn rows_that_see_nothing_are_zero_and_minus_infinity() {
        let case = Case::new(Causal::None, |at| f64::from(at[2] != 1));
        let fwd = case.forward();
        for i in 3..6 {
            assert!(fwd.out.row(0, 0, i).iter().all(|&x| x == 0.0));
            assert_eq!(fwd.lse[[0, 0, i, 0]], f64::NEG_INFINITY);
        }
        assert!(case.backward().dq.data().iter().all(|x| x.is_finite()));
    }

    #[test]
    fn one_visible_key_is_copied() {
        let case = Case::new(Causal::TopLeft, |_| 1.0);
        let fwd = case.forward();
        assert_eq!(fwd.out.row(1, 3, 0), case.v.row(1, 1, 0));
    }

    #[test]
    fn the_two_alignments_differ_by_the_length_difference() {
        assert!(Causal::TopLeft.sees(2, 2, 3, 5) && !Causal::TopLeft.sees(2, 3, 3, 5));
        assert!(Causal::BottomRight.sees(0, 2, 3, 5) && !Causal::BottomRight.sees(0, 3, 3, 5));
        assert!(!Causal::BottomRight.sees(0, 0, 5, 3) && Causal::BottomRight.sees(2, 0, 5, 3));
    }
}
