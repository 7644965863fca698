//! Block-sparse attention, in full precision and in low bits.

use burn_core::backend::Dispatch;
use burn_core::tensor::Tensor;
use cubesla::plan::{BackwardPlan, ForwardPlan};
use cubesla::{AttentionOptions, LowBitFormats, expect_low_bit};

use crate::error::unwrap;
use crate::ops::SlaOps;
use crate::{BlockList, Error, convert};

/// What [`try_block_sparse_attention`] and [`try_low_bit_attention`] return.
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
    attend(q, k, v, list, options, None)
}

fn attend(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    list: &BlockList,
    options: &AttentionOptions,
    formats: Option<LowBitFormats>,
) -> Result<AttentionOutput, Error> {
    let (problem, client) = convert::problem(&q, &k, &v, options)?;
    list.expect(&problem, &q.device())?;
    match formats {
        None => ForwardPlan::new(&problem, client.properties()).map(drop)?,
        Some(_) => expect_low_bit(&problem)?,
    }
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
        formats,
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

/// [`try_block_sparse_attention`] with scores in INT8 or FP8, and values in their own type or in FP8.
///
/// Arguments and results are those; gradients, in the inputs' type, are those at the inputs as they were
/// rounded, straight through the rounding: quantization-aware training. Source: SageAttention2++
/// (arXiv 2505.21136), SLA2 (arXiv 2602.12675); see [`cubesla::low_bit_attention`] and
/// [`cubesla::low_bit_attention_backward`].
///
/// # Errors
/// [`Error`] for an argument that is refused, before anything is launched.
///
/// # Panics
/// As for [`try_block_sparse_attention`].
pub fn try_low_bit_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    list: &BlockList,
    options: &AttentionOptions,
    formats: LowBitFormats,
) -> Result<AttentionOutput, Error> {
    attend(q, k, v, list, options, Some(formats))
}

/// The output of [`try_low_bit_attention`].
///
/// # Panics
/// Where that returns an error, with the error's message.
#[track_caller]
pub fn low_bit_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    list: &BlockList,
    options: &AttentionOptions,
    formats: LowBitFormats,
) -> Tensor<4> {
    let result = try_low_bit_attention(q, k, v, list, options, formats);
    unwrap("low_bit_attention", result).out
}
