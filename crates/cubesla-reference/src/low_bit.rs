//! Attention with scores in INT8 or FP8 and, if asked for, weights and values in FP8.
//!
//! ```text
//! K'   = K - mean(K)                            over a sample of a head's keys, if smoothed
//! Q8   = codes of each block_q rows of Q, scale sQ;  K8 of each block_k rows of K', scale sK;
//!        rne(x r), where r is 1 / sQ or 1 / sK in 13 bits
//! S_ij = scale sQ sK Q8_i . K8_j                P_ij = exp(S_ij - max_l S_il)
//! O_i  = sum_j P_ij V_j / sum_j P_ij            in FP8: fp8(448 P_ij) / 448, V in FP8 by columns
//! L_i  = max_l S_il + ln sum_j P_ij + scale Q_i . mean(K), the last if smoothed
//! ```
//!
//! Sources: SageAttention2++ (arXiv 2505.21136), SLA2 (arXiv 2602.12675). A kernel that goes over the
//! keys tile by tile rounds weights to FP8 relative to the largest score so far, not to that of all.

use crate::attention::{self, Causal, Forward, Gradients};
use crate::blocks::BlockWeights;
use crate::quantize::{Format, decode_e4m3, encode_e4m3, quantize};
use crate::router::mean_pool;
use crate::tensor::{Tensor, axpy, dot};

/// Each head of `x` in a low-bit format, with a scale for each `region` of rows and columns. Codes of rows are
/// those of products with the scale's [`reciprocal`], others of quotients.
fn low_bit(x: &Tensor, format: Format, region: [usize; 2], by_reciprocal: bool) -> Tensor {
    let [batch, heads, rows, columns] = x.shape();
    let mut out = Tensor::zeros(x.shape());
    for b in 0..batch {
        for h in 0..heads {
            let values: Vec<f32> = (0..rows)
                .flat_map(|i| x.row(b, h, i).iter().map(|&x| x as f32))
                .collect();
            let mut head = quantize(&values, [rows, columns], format, region, false);
            if by_reciprocal {
                head.recode(|i, scale| values[i] * reciprocal(scale));
            }
            for i in 0..rows {
                for (j, value) in out.row_mut(b, h, i).iter_mut().enumerate() {
                    *value = head.value(i, j);
                }
            }
        }
    }
    out
}

/// What is in low bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Formats {
    /// Format of queries and keys, INT8 or FP8.
    pub scores: Format,
    /// Whether weights and values are FP8.
    pub fp8_values: bool,
    /// Whether the mean key is taken from the keys first, as the kernels do.
    pub smooth: bool,
}

/// What low-bit attention computes with.
#[derive(Clone, Debug)]
pub struct Rounded {
    /// `Q`, `[B, Hq, Lq, D]`.
    pub q: Tensor,
    /// `K'`, `[B, Hkv, Lk, D]`.
    pub k: Tensor,
    /// `V`, `[B, Hkv, Lk, Dv]`.
    pub v: Tensor,
    /// The mean key that `K'` lacks, `[B, Hkv, 1, D]`.
    pub mean: Tensor,
}

/// Inputs as low-bit attention rounds them; `weights` for the sizes of blocks.
pub fn rounded(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    weights: &BlockWeights,
    formats: Formats,
) -> Rounded {
    let [batch, kv_heads, key_len, dim] = k.shape();
    let mean = if formats.smooth {
        mean_key(k)
    } else {
        Tensor::zeros([batch, kv_heads, 1, dim])
    };
    let smooth = Tensor::from_fn(k.shape(), |[b, h, j, d]| {
        k[[b, h, j, d]] - mean[[b, h, 0, d]]
    });
    Rounded {
        q: low_bit(q, formats.scores, [weights.block_q, dim], true),
        k: low_bit(&smooth, formats.scores, [weights.block_k, dim], true),
        v: if formats.fp8_values {
            low_bit(v, Format::Fp8, [key_len, 1], false)
        } else {
            v.clone()
        },
        mean,
    }
}

/// `1 / scale` in 13 bits, so that its product with a 16-bit number is exact in f32.
fn reciprocal(scale: f32) -> f32 {
    f32::from_bits((1.0 / scale).to_bits() & 0xFFFF_F800)
}

/// The mean of every key of a head, or, of 4096 and more, of every `step`-th, `step` odd: `[B, Hkv, 1, D]`.
fn mean_key(k: &Tensor) -> Tensor {
    let [batch, heads, len, dim] = k.shape();
    let step = (len / 2048) | 1;
    let sample = Tensor::from_fn([batch, heads, len.div_ceil(step), dim], |[b, h, j, d]| {
        k[[b, h, j * step, d]]
    });
    mean_pool(&sample, len.div_ceil(step))
}

/// `scale Q mean(K)^T` of a query.
fn shift(q: &Tensor, mean: &Tensor, [b, h, i]: [usize; 3], scale: f64) -> f64 {
    let kv = h / (q.shape()[1] / mean.shape()[1]);
    scale * dot(q.row(b, h, i), mean.row(b, kv, 0))
}

/// The gradient of [`forward`], whose result is `low`, straight through the rounding: that of attention
/// at the rounded inputs, with `O` and `L` as the low-bit forward has them.
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    weights: &BlockWeights,
    scale: f64,
    causal: Causal,
    formats: Formats,
    low: &Forward,
    dout: &Tensor,
) -> Gradients {
    let at = rounded(q, k, v, weights, formats);
    let low = Forward {
        out: low.out.clone(),
        lse: Tensor::from_fn(low.lse.shape(), |[b, h, i, _]| {
            low.lse[[b, h, i, 0]] - shift(q, &at.mean, [b, h, i], scale)
        }),
    };
    attention::backward(&at.q, &at.k, &at.v, weights, scale, causal, &low, dout)
}

/// Attention over the blocks whose weight is 1.
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    weights: &BlockWeights,
    scale: f64,
    causal: Causal,
    formats: Formats,
) -> Forward {
    let [batch, heads, query_len, _] = q.shape();
    let [_, kv_heads, key_len, value_dim] = v.shape();
    let at = rounded(q, k, v, weights, formats);
    let mut out = Tensor::zeros([batch, heads, query_len, value_dim]);
    let mut lse = Tensor::full([batch, heads, query_len, 1], f64::NEG_INFINITY);
    for b in 0..batch {
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            for i in 0..query_len {
                let scores: Vec<(usize, f64)> = (0..key_len)
                    .filter(|&j| causal.sees(i, j, query_len, key_len))
                    .filter(|&j| weights.at(b, h, i, j) > 0.0)
                    .map(|j| (j, scale * dot(at.q.row(b, h, i), at.k.row(b, kv, j))))
                    .collect();
                let max = scores
                    .iter()
                    .fold(f64::NEG_INFINITY, |max, &(_, s)| max.max(s));
                let sum: f64 = scores.iter().map(|&(_, s)| (s - max).exp()).sum();
                if scores.is_empty() {
                    continue;
                }
                for &(j, s) in &scores {
                    let mut p = (s - max).exp();
                    if formats.fp8_values {
                        p = decode_e4m3(encode_e4m3((448.0 * p) as f32)) / 448.0;
                    }
                    axpy(out.row_mut(b, h, i), p / sum, at.v.row(b, kv, j));
                }
                lse[[b, h, i, 0]] = max + sum.ln() + shift(q, &at.mean, [b, h, i], scale);
            }
        }
    }
    Forward { out, lse }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relative_error;

    /// With values in full the output is attention at the rounded inputs, and so is its gradient.
    #[test]
    fn gradients_are_those_of_attention_at_the_rounded_inputs() {
        let value = |[_, h, i, d]: [usize; 4]| ((h * 7 + i * 13 + d * 29) as f64 * 0.37).sin();
        let q = Tensor::from_fn([1, 2, 20, 16], value);
        let k = Tensor::from_fn([1, 1, 24, 16], |at| value(at) * 1.3 + 5.0);
        let v = Tensor::from_fn([1, 1, 24, 8], value);
        let dout = Tensor::from_fn([1, 2, 20, 8], |at| value(at).cos());
        let dense = BlockWeights::dense([1, 2, 20, 24], 8, 8);
        let mask = Causal::TopLeft;
        let formats = Formats {
            scores: Format::Int8,
            fp8_values: false,
            smooth: true,
        };
        let low = forward(&q, &k, &v, &dense, 0.25, mask, formats);
        let found = backward(&q, &k, &v, &dense, 0.25, mask, formats, &low, &dout);
        let at = rounded(&q, &k, &v, &dense, formats);
        let exact = attention::forward(&at.q, &at.k, &at.v, &dense, 0.25, mask);
        let exact = attention::backward(&at.q, &at.k, &at.v, &dense, 0.25, mask, &exact, &dout);
        for (found, exact) in [
            (&found.dq, &exact.dq),
            (&found.dk, &exact.dk),
            (&found.dv, &exact.dv),
        ] {
            assert!(relative_error(found.data(), exact.data()) < 1e-12);
        }
        // The gradient of the mean that keys lack: no score's change changes a softmax's sum.
        for d in 0..16 {
            let sum: f64 = (0..24).map(|j| found.dk[[0, 0, j, d]]).sum();
            assert!(sum.abs() < 1e-12, "{sum}");
        }
    }

    #[test]
    fn reciprocals_have_exact_products_with_16_bit_numbers() {
        for scale in [1.0f32 / 3.0, 0.017, 4.9e-7, 311.0] {
            let reciprocal = reciprocal(scale);
            assert!((f64::from(reciprocal) * f64::from(scale) - 1.0).abs() < 2.0f64.powi(-12));
            // f16 has the longer mantissa of the two: 11 bits.
            for x in (1024..2048).map(|x| x as f32) {
                assert_eq!(
                    f64::from(x * reciprocal),
                    f64::from(x) * f64::from(reciprocal)
                );
            }
        }
    }

    #[test]
    fn the_mean_of_many_keys_is_that_of_a_sample() {
        let k = Tensor::from_fn([1, 1, 4100, 2], |[_, _, j, d]| (j % 3 * (d + 1)) as f64);
        // Every third key is left, all of which are 0.
        assert_eq!(mean_key(&k).data(), [0.0, 0.0]);
        let few = Tensor::from_fn([1, 1, 300, 2], |[_, _, j, d]| (j % 3 * (d + 1)) as f64);
        assert!(relative_error(mean_key(&few).data(), &[1.0, 2.0]) < 1e-12);
    }

    #[test]
    fn it_is_near_exact_attention_also_for_keys_far_from_zero() {
        let value = |[_, h, i, d]: [usize; 4]| ((h * 7 + i * 13 + d * 29) as f64 * 0.37).sin();
        let q = Tensor::from_fn([1, 2, 20, 16], value);
        let k = Tensor::from_fn([1, 1, 24, 16], |at| value(at) * 1.3 + 20.0);
        let v = Tensor::from_fn([1, 1, 24, 8], value);
        let dense = BlockWeights::dense([1, 2, 20, 24], 8, 8);
        let exact = attention::forward(&q, &k, &v, &dense, 0.25, Causal::TopLeft);
        let smooth = true;
        for (scores, fp8_values, bound) in [
            (Format::Int8, false, 0.02),
            (Format::Int8, true, 0.06),
            (Format::Fp8, true, 0.12),
        ] {
            let formats = Formats {
                scores,
                fp8_values,
                smooth,
            };
            let low = forward(&q, &k, &v, &dense, 0.25, Causal::TopLeft, formats);
            let error = relative_error(low.out.data(), exact.out.data());
            assert!(error > 1e-6 && error < bound, "{error} in {formats:?}");
            assert!(relative_error(low.lse.data(), exact.lse.data()) < 1e-2);
            // Far from zero, little of the keys' differences is left without smoothing, which FP8 values would
            // hide.
            let of_scores = |smooth| {
                let formats = Formats {
                    scores,
                    fp8_values: false,
                    smooth,
                };
                let low = forward(&q, &k, &v, &dense, 0.25, Causal::TopLeft, formats);
                relative_error(low.out.data(), exact.out.data())
            };
            assert!(of_scores(false) > 2.0 * of_scores(true));
        }
    }
}
