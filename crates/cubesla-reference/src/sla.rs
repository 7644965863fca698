//! The two branches together.
//!
//! ```text
//! SLA   O = O^s + O^l Wl^T + bl            (arXiv 2509.24006)
//! SLA2  O = a O^s + (1 - a) O^l            (arXiv 2602.12675), a = sigmoid(logit) per query block
//! ```

use crate::Tensor;
use crate::router::project;
use crate::tensor::{axpy, dot};

/// `O^s + O^l Wl^T + bl`, with `wl` `[1, 1, Dv, Dv]` and `bl` `[1, 1, 1, Dv]`.
pub fn combine_sla(sparse: &Tensor, linear: &Tensor, wl: &Tensor, bl: &Tensor) -> Tensor {
    let projected = project(linear, wl);
    Tensor::from_fn(sparse.shape(), |[b, h, i, d]| {
        sparse[[b, h, i, d]] + projected[[b, h, i, d]] + bl[[0, 0, 0, d]]
    })
}

/// `a O^s + (1 - a) O^l`, with `alpha` the weight `a` of each (head, query block), `[1, Hq, M, 1]`.
pub fn combine_sla2(sparse: &Tensor, linear: &Tensor, alpha: &Tensor, block_q: usize) -> Tensor {
    Tensor::from_fn(sparse.shape(), |[b, h, i, d]| {
        let a = alpha[[0, h, i / block_q, 0]];
        a * sparse[[b, h, i, d]] + (1.0 - a) * linear[[b, h, i, d]]
    })
}

/// What [`combine_sla_backward`] returns.
#[derive(Clone, Debug)]
pub struct SlaGradients {
    /// `dO^s`.
    pub sparse: Tensor,
    /// `dO^l`.
    pub linear: Tensor,
    /// `dWl [1, 1, Dv, Dv]`.
    pub wl: Tensor,
    /// `dbl [1, 1, 1, Dv]`.
    pub bl: Tensor,
}

/// Gradients of [`combine_sla`]: `dO^s = dO`, `dO^l = dO Wl`, `dWl = sum dO^T O^l`, `dbl = sum dO`.
pub fn combine_sla_backward(linear: &Tensor, wl: &Tensor, dout: &Tensor) -> SlaGradients {
    let [batch, heads, len, dim] = dout.shape();
    let mut grads = SlaGradients {
        sparse: dout.clone(),
        linear: Tensor::zeros(dout.shape()),
        wl: Tensor::zeros([1, 1, dim, dim]),
        bl: Tensor::zeros([1, 1, 1, dim]),
    };
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..len {
                let grad = dout.row(b, h, i);
                axpy(grads.bl.row_mut(0, 0, 0), 1.0, grad);
                for (e, &g) in grad.iter().enumerate() {
                    axpy(grads.linear.row_mut(b, h, i), g, wl.row(0, 0, e));
                    axpy(grads.wl.row_mut(0, 0, e), g, linear.row(b, h, i));
                }
            }
        }
    }
    grads
}

/// What [`combine_sla2_backward`] returns.
#[derive(Clone, Debug)]
pub struct Sla2Gradients {
    /// `dO^s`.
    pub sparse: Tensor,
    /// `dO^l`.
    pub linear: Tensor,
    /// Gradient of the logits of `alpha`, `[1, Hq, M, 1]`; a logit that several share sums theirs.
    pub logits: Tensor,
}

/// Gradients of [`combine_sla2`] with `a = sigmoid(logit)`: `dO^s = a dO`, `dO^l = (1 - a) dO`,
/// `dlogit = a (1 - a) sum over batches and the block of dO . (O^s - O^l)`.
pub fn combine_sla2_backward(
    sparse: &Tensor,
    linear: &Tensor,
    alpha: &Tensor,
    block_q: usize,
    dout: &Tensor,
) -> Sla2Gradients {
    let [batch, heads, len, _] = dout.shape();
    let scaled = |factor: &dyn Fn(f64) -> f64| {
        Tensor::from_fn(dout.shape(), |[b, h, i, d]| {
            factor(alpha[[0, h, i / block_q, 0]]) * dout[[b, h, i, d]]
        })
    };
    let mut logits = Tensor::zeros(alpha.shape());
    for b in 0..batch {
        for h in 0..heads {
            for i in 0..len {
                let a = alpha[[0, h, i / block_q, 0]];
                let grad = dout.row(b, h, i);
                let difference = dot(grad, sparse.row(b, h, i)) - dot(grad, linear.row(b, h, i));
                logits[[0, h, i / block_q, 0]] += a * (1.0 - a) * difference;
            }
        }
    }
    Sla2Gradients {
        sparse: scaled(&|a| a),
        linear: scaled(&|a| 1.0 - a),
        logits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::differences;

    fn noise(shape: [usize; 4], seed: usize) -> Tensor {
        Tensor::from_fn(shape, |[b, h, i, d]| {
            ((b * 31 + h * 17 + i * 7 + d * 3 + seed) % 13) as f64 * 0.2 - 1.1
        })
    }

    #[test]
    fn backward_of_sla_is_its_gradient() {
        let shape = [2, 2, 5, 3];
        let mut inputs = [
            noise(shape, 1),
            noise(shape, 2),
            noise([1, 1, 3, 3], 3),
            noise([1, 1, 1, 3], 4),
        ];
        let dout = noise(shape, 5);
        let grads = combine_sla_backward(&inputs[1], &inputs[2], &dout);
        let exact = [grads.sparse, grads.linear, grads.wl, grads.bl];
        for (at, exact) in exact.iter().enumerate() {
            let numeric = differences(&mut inputs, at, |[s, l, wl, bl]| {
                dot(combine_sla(s, l, wl, bl).data(), dout.data())
            });
            let error = crate::relative_error(numeric.data(), exact.data());
            assert!(error < 1e-7, "{at}: {error:e}");
        }
    }

    #[test]
    fn backward_of_sla2_is_its_gradient() {
        let shape = [2, 2, 5, 3];
        let mut inputs = [noise(shape, 1), noise(shape, 2), noise([1, 2, 3, 1], 3)];
        let dout = noise(shape, 5);
        let alpha = |logits: &Tensor| logits.map(|x| 1.0 / (1.0 + (-x).exp()));
        let grads = combine_sla2_backward(&inputs[0], &inputs[1], &alpha(&inputs[2]), 2, &dout);
        let exact = [grads.sparse, grads.linear, grads.logits];
        for (at, exact) in exact.iter().enumerate() {
            let numeric = differences(&mut inputs, at, |[s, l, logits]| {
                dot(combine_sla2(s, l, &alpha(logits), 2).data(), dout.data())
            });
            let error = crate::relative_error(numeric.data(), exact.data());
            assert!(error < 1e-7, "{at}: {error:e}");
        }
    }
    use crate::attention::{self, Causal};
    use crate::blocks::BlockWeights;

    /// With the softmax mass of the selected blocks as `a` and softmax attention over the rest as
    /// the other branch, SLA2 is full attention.
    #[test]
    fn the_exact_weights_give_full_attention() {
        let noise = |shape, seed: usize| {
            Tensor::from_fn(shape, |[b, h, i, d]| {
                ((b * 31 + h * 17 + i * 7 + d * 3 + seed) % 13) as f64 * 0.2 - 1.1
            })
        };
        let (q, k, v) = (
            noise([1, 2, 6, 4], 1),
            noise([1, 2, 8, 4], 2),
            noise([1, 2, 8, 3], 3),
        );
        let part = |wanted: bool| {
            // One query row to a block, so that `a` is exact for every row.
            BlockWeights::from_fn([1, 2, 6, 8], 1, 2, |at| {
                f64::from(((at[1] + at[2] + at[3]) % 3 == 0) == wanted)
            })
        };
        let run =
            |weights: &BlockWeights| attention::forward(&q, &k, &v, weights, 0.7, Causal::None);
        let full = run(&BlockWeights::dense([1, 2, 6, 8], 1, 2));
        let (selected, rest) = (run(&part(true)), run(&part(false)));
        let alpha = Tensor::from_fn([1, 2, 6, 1], |[_, h, i, _]| {
            (selected.lse[[0, h, i, 0]] - full.lse[[0, h, i, 0]]).exp()
        });
        let combined = combine_sla2(&selected.out, &rest.out, &alpha, 1);
        assert!(crate::relative_error(combined.data(), full.out.data()) < 1e-12);
    }

    #[test]
    fn a_zero_projection_leaves_the_sparse_branch() {
        let sparse = Tensor::full([1, 1, 2, 3], 5.0);
        let linear = Tensor::full([1, 1, 2, 3], 7.0);
        let zero = Tensor::zeros([1, 1, 3, 3]);
        let bias = Tensor::zeros([1, 1, 1, 3]);
        assert_eq!(combine_sla(&sparse, &linear, &zero, &bias), sparse);
        let mut identity = zero.clone();
        for e in 0..3 {
            identity[[0, 0, e, e]] = 1.0;
        }
        let mut expected = sparse.clone();
        axpy(expected.row_mut(0, 0, 0), 1.0, linear.row(0, 0, 0));
        axpy(expected.row_mut(0, 0, 1), 1.0, linear.row(0, 0, 1));
        assert_eq!(combine_sla(&sparse, &linear, &identity, &bias), expected);
    }
}
