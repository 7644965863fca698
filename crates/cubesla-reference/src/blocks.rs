//! Block weights: which blocks a query block sees, and how much.

use crate::Tensor;

/// The weight `m` of each (query block, key block) pair, `[B, Hq, M, N]` in [0, 1].
///
/// A weight of 1 is a critical block (exact attention) and 0 one that the sparse branch skips; what
/// lies between is the soft mask of SLA2's first training stage. With weights of 0 and 1 alone the
/// weighted formulas are the hard ones, so one reference serves both.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockWeights {
    /// Query rows per block.
    pub block_q: usize,
    /// Keys per block.
    pub block_k: usize,
    /// The weights, `[B, Hq, M, N]`.
    pub weights: Tensor,
}

impl BlockWeights {
    /// Every block, for lengths `query_len` and `key_len`: dense attention.
    pub fn dense(
        [batch, heads, query_len, key_len]: [usize; 4],
        block_q: usize,
        block_k: usize,
    ) -> Self {
        Self::from_fn([batch, heads, query_len, key_len], block_q, block_k, |_| {
            1.0
        })
    }

    /// Weights computed from `[b, h, query block, key block]`.
    pub fn from_fn(
        [batch, heads, query_len, key_len]: [usize; 4],
        block_q: usize,
        block_k: usize,
        weight: impl FnMut([usize; 4]) -> f64,
    ) -> Self {
        let shape = [
            batch,
            heads,
            query_len.div_ceil(block_q),
            key_len.div_ceil(block_k),
        ];
        Self {
            block_q,
            block_k,
            weights: Tensor::from_fn(shape, weight),
        }
    }

    /// The weight of key `j` for query `i`.
    pub fn at(&self, b: usize, h: usize, i: usize, j: usize) -> f64 {
        self.weights[[b, h, i / self.block_q, j / self.block_k]]
    }
}
