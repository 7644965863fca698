//! Block-sparse attention.

use burn_core::backend::Dispatch;
use burn_core::tensor::Tensor;
use cubesla::AttentionOptions;
use cubesla::plan::{BackwardPlan, ForwardPlan};

use crate::error::unwrap;
use crate::ops::SlaOps;
use crate::{BlockList, Error, convert};

/// What [`try_block_sparse_attention`] returns.
#[derive(Clone, Debug)]
pub struct AttentionOutput {
    /// `O [B, Hq, Lq, Dv]`, the inputs' type, with gradients for `q`, `k` and `v`.
    pub out: Tensor<4>,
    /// The natural log-sum-exp of each row's scaled scores, f32 `[B, Hq, Lq]`, `-inf` for a row that
    /// saw no key. No gradient flows through it.
    pub lse: Tensor<3>,
}

/// Softmax attention of each query block over the key blocks of its list:
/// `O_i = softmax(scale * Q_i K_j^T) V_j` over the selected `j`.
///
/// | argument | shape | type |
/// |---|---|---|
/// | `q` | `[B, Hq, Lq, D]`, any strides | f32, f16 or bf16 |
/// | `k` | `[B, Hkv, Lk, D]`, any strides | as `q` |
/// | `v` | `[B, Hkv, Lk, Dv]`, any strides | as `q` |
/// | `list` | `[B, Hq, M, N]`, `M = ceil(Lq / block_q)`, `N = ceil(Lk / block_k)` | |
///
/// `D` and `Dv` go from 32 to 256 in steps of 8; `Hq` is a multiple of `Hkv`. Differentiable in `q`,
/// `k` and `v`; the backward keeps `O` and the log-sum-exp, and nothing of size `Lq x Lk`.
///
/// Source: SLA (arXiv 2509.24006), section 3; see [`cubesla::block_sparse_attention`].
///
/// # Errors
/// [`Error`] for an argument that is refused, before anything is launched.
///
/// # Panics
/// Where only a launch can tell, for example that a software device would stop a loop early; with
/// fusion that is when the result is read.
pub fn try_block_sparse_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    list: &BlockList,
    options: &AttentionOptions,
) -> Result<AttentionOutput, Error> {
    let (problem, client) = convert::problem(&q, &k, &v, options)?;
    list.expect(&problem, &q.device())?;
    ForwardPlan::new(&problem, client.properties())?;
    if [&q, &k, &v].into_iter().any(Tensor::is_tracked) {
        BackwardPlan::new(&problem, client.properties())?;
    }
    let (out, lse) = Dispatch::cubesla_attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        list.indices().clone().into_dispatch(),
        list.counts().clone().into_dispatch(),
        *options,
    );
    Ok(AttentionOutput {
        out: Tensor::from_dispatch(out),
        lse: Tensor::from_dispatch(lse),
    })
}

/// The output of [`try_block_sparse_attention`].
///
/// # Panics
/// Where that returns an error, with the error's message.
#[track_caller]
pub fn block_sparse_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    list: &BlockList,
    options: &AttentionOptions,
) -> Tensor<4> {
    let result = try_block_sparse_attention(q, k, v, list, options);
    unwrap("block_sparse_attention", result).out
}
