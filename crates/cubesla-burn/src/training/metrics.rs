//! How close attention comes to full attention, and how well its blocks are chosen.

use burn_core::tensor::{Int, Tensor};
use cubesla::AttentionOptions;

use crate::{BlockList, Error, SparseLinearAttention, convert, try_block_sparse_attention};

/// What [`evaluate`] measures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metrics {
    /// Share of the key blocks left out of exact attention.
    pub sparsity: f32,
    /// Share of the critical blocks that are also among as many of the row's blocks with the most
    /// softmax mass.
    pub agreement: f32,
    /// Mean softmax mass of the critical blocks.
    pub mass: f32,
    /// Distance of the output to full attention; see [`distance`].
    pub error: f32,
}

/// Softmax attention of every query over every key: what the first stage learns from.
///
/// # Errors
/// As for [`try_block_sparse_attention`].
pub fn full_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    attention: &AttentionOptions,
) -> Result<Tensor<4>, Error> {
    let (problem, _) = convert::problem(&q, &k, &v, attention)?;
    let shape = [
        problem.batch(),
        problem.query_heads(),
        problem.query_blocks(),
        problem.key_blocks(),
    ];
    let all = BlockList::dense(shape, &q.device());
    Ok(try_block_sparse_attention(q, k, v, &all, attention)?.out)
}

/// `|x - full| / |full|`; reads the device.
pub fn distance(x: Tensor<4>, full: Tensor<4>) -> f32 {
    let length = |x: Tensor<4>| {
        let squares = convert::to_f32(x).powi_scalar(2).sum();
        squares.into_scalar::<f32>().sqrt()
    };
    length(x - full.clone()) / length(full)
}

/// Key blocks whose mass is found at once: values that name the block of their key are this wide.
const CHUNK: usize = 256;

/// The softmax mass that each block of keys gets from a block of queries, f32 `[B, Hq, M, N]`: what an
/// oracle would choose blocks by. Rows sum to 1.
///
/// `q` is `[B, Hq, Lq, D]` and `k` `[B, Hkv, Lk, D]`, any strides, untracked. It is full attention over
/// values that name the block of their key, 256 blocks at a time: nothing of size `Lq x Lk` is stored.
///
/// # Errors
/// As for [`try_block_sparse_attention`].
pub fn block_mass(
    q: Tensor<4>,
    k: Tensor<4>,
    attention: &AttentionOptions,
) -> Result<Tensor<4>, Error> {
    let (problem, _) = convert::problem(&q, &k, &k, attention)?;
    let (device, dtype) = (q.device(), q.dtype());
    let (keys, blocks) = (problem.key_len(), problem.key_blocks());
    let block_of: Tensor<4, Int> = Tensor::<1, Int>::arange(0..keys as i64, &device)
        .div_scalar(attention.block_k as i64)
        .reshape([1, 1, keys, 1]);
    let mut chunks = Vec::new();
    for first in (0..blocks).step_by(CHUNK) {
        // As many columns as a head may have.
        let width = (blocks - first).min(CHUNK).next_multiple_of(8).max(32);
        let columns = Tensor::<1, Int>::arange(first as i64..(first + width) as i64, &device)
            .reshape([1, 1, 1, width]);
        let shape = [problem.batch(), problem.kv_heads(), keys, width];
        let names = block_of
            .clone()
            .expand(shape)
            .equal(columns.expand(shape))
            .float()
            .cast(dtype);
        let received = full_attention(q.clone(), k.clone(), names, attention)?;
        let kept = (blocks - first).min(CHUNK);
        chunks.push(convert::to_f32(received).narrow(3, 0, kept));
    }
    Ok(mean_rows(Tensor::cat(chunks, 3), attention.block_q))
}

/// Means over blocks of `block` rows, the last of which may be short.
fn mean_rows(x: Tensor<4>, block: usize) -> Tensor<4> {
    let rows = x.dims()[2];
    let means = (0..rows).step_by(block).map(|first| {
        let len = (rows - first).min(block);
        x.clone().narrow(2, first, len).mean_dim(2)
    });
    Tensor::cat(means.collect(), 2)
}

/// How `module` does on these inputs, untracked; reads the device.
///
/// # Errors
/// As for [`SparseLinearAttention::try_forward`] and [`block_mass`].
pub fn evaluate(
    module: &SparseLinearAttention,
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
) -> Result<Metrics, Error> {
    let attention = module.config.attention();
    let blocks = module.try_route(q.clone(), k.clone())?;
    let mass = block_mass(q.clone(), k.clone(), &attention)?;
    let out = module.try_forward_with(q.clone(), k.clone(), v.clone(), &blocks)?;
    let full = full_attention(q, k, v, &attention)?;
    let [sparsity, agreement, mass] = routing(&blocks.critical, mass);
    Ok(Metrics {
        sparsity,
        agreement,
        mass,
        error: distance(out, full),
    })
}

/// Sparsity, agreement and mass of a list.
fn routing(list: &BlockList, mass: Tensor<4>) -> [f32; 3] {
    let numbers = |data: burn_core::tensor::TensorData| -> Vec<i32> {
        let data = data.convert::<i32>();
        data.try_to_vec().expect("the data was converted to i32")
    };
    let mass: Vec<f32> = (mass.into_data().try_to_vec()).expect("masses are f32");
    let indices = numbers(list.indices().clone().into_data());
    let counts = numbers(list.counts().clone().into_data());
    let (mut chosen, mut agreed, mut kept) = (0, 0, 0.0);
    let rows = mass.chunks_exact(list.key_blocks);
    for ((row, indices), &count) in rows.zip(indices.chunks_exact(list.width())).zip(&counts) {
        let indices = &indices[..count as usize];
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let best = &order[..indices.len()];
        chosen += indices.len();
        agreed += indices
            .iter()
            .filter(|&&at| best.contains(&(at as usize)))
            .count();
        kept += indices.iter().map(|&at| row[at as usize]).sum::<f32>();
    }
    [
        1.0 - chosen as f32 / mass.len() as f32,
        agreed as f32 / chosen.max(1) as f32,
        kept / counts.len() as f32,
    ]
}
