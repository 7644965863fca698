//! The formulas in Burn's operations, with element masks.

use burn_core::tensor::{Bool, Device, Tensor, TensorData, activation};
use cubesla_burn::{FeatureMap, HostBlockList};

/// Queries and keys of a block.
pub const BLOCK: [usize; 2] = [32, 16];

/// Which of `[B, Hq, Lq, Lk]` a list of blocks of [`BLOCK`] selects.
pub fn element_mask(list: &HostBlockList, lens: [usize; 2], device: &Device) -> Tensor<4, Bool> {
    let [batch, heads, query_blocks, key_blocks] = list.shape();
    let blocks = list.to_mask();
    let mut mask = Vec::new();
    for at in 0..batch * heads {
        for i in 0..lens[0] {
            for j in 0..lens[1] {
                let row = at * query_blocks + i / BLOCK[0];
                mask.push(blocks[row * key_blocks + j / BLOCK[1]]);
            }
        }
    }
    let data = TensorData::new(mask, [batch, heads, lens[0], lens[1]]);
    Tensor::from_data(data, device)
}

/// Key heads repeated for the query heads that share them.
pub fn repeat_heads(x: Tensor<4>, query_heads: usize) -> Tensor<4> {
    let [batch, heads, len, dim] = x.dims();
    let group = query_heads / heads;
    x.reshape([batch, heads, 1, len * dim])
        .repeat_dim(2, group)
        .reshape([batch, query_heads, len, dim])
}

/// Softmax attention over the elements of `mask`, every row of which has one.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Tensor<4, Bool>) -> Tensor<4> {
    let [_, heads, _, dim] = q.dims();
    let (k, v) = (repeat_heads(k, heads), repeat_heads(v, heads));
    let scores = q.matmul(k.transpose()) / (dim as f64).sqrt();
    let scores = scores.mask_fill(mask.bool_not(), -1e30);
    activation::softmax(scores, 3).matmul(v)
}

pub fn features(x: Tensor<4>, phi: FeatureMap) -> Tensor<4> {
    match phi {
        FeatureMap::Softmax => activation::softmax(x, 3),
        FeatureMap::EluPlusOne => {
            let positive = x.clone().greater_scalar(0.0);
            x.clone().exp().mask_where(positive, x + 1.0)
        }
        FeatureMap::Relu => activation::relu(x),
        FeatureMap::Identity => x,
    }
}

/// Linear attention over the elements of `mask`; a row of none is 0.
pub fn linear(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    phi: FeatureMap,
    mask: Tensor<4, Bool>,
) -> Tensor<4> {
    let heads = q.dims()[1];
    let (k, v) = (repeat_heads(k, heads), repeat_heads(v, heads));
    let weights = features(q, phi).matmul(features(k, phi).transpose());
    let weights = weights.mask_fill(mask.bool_not(), 0.0);
    let sums = weights.clone().sum_dim(3);
    let empty = sums.clone().equal_scalar(0.0);
    weights.matmul(v) / sums.mask_fill(empty, 1.0)
}
