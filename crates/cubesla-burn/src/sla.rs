//! SLA and SLA2.

use burn_core::backend::Dispatch;
use burn_core::tensor::Tensor;
use cubesla::plan::BackwardPlan;
use cubesla::{
    AttentionOptions, Causal, FeatureMap, LinearMode, Precision, ProblemError, SlaBackwardOptions,
    expect_low_bit,
};

use crate::error::unwrap;
use crate::ops::{Combination, SlaOps};
use crate::{Blocks, Error, convert};

/// What a caller chooses about [`sla`] and [`sla2`]. The defaults are the papers': blocks of 128
/// queries by 64 keys, softmax features, the linear branch over marginal blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SlaOptions {
    /// Blocks and scale; causal masks are refused.
    pub attention: AttentionOptions,
    /// phi of the linear branch.
    pub phi: FeatureMap,
    /// The keys that the linear branch sums over.
    pub linear: LinearMode,
    /// Arithmetic of the sparse branch. In low bits gradients are computed in the inputs' type, at the
    /// inputs as they were rounded, straight through the rounding: quantization-aware training.
    pub precision: Precision,
}

/// SLA: `O = O^s + O^l W + b`, with softmax attention `O^s` over the critical blocks and linear
/// attention `O^l` over the marginal ones.
///
/// | argument | shape | type |
/// |---|---|---|
/// | `q`, `k`, `v` | as for [`try_block_sparse_attention`](crate::try_block_sparse_attention) | f32, f16 or bf16 |
/// | `weight` | `[Dv, Dv]`, `[d_in, d_out]` as in Burn's `Linear`: the paper's `Wl` transposed | any float, used as f32 |
/// | `bias` | `[Dv]` | any float, used as f32 |
/// | `blocks` | `[B, Hq, M, N]` | |
///
/// Differentiable in all tensors but the lists.
///
/// Source: SLA (arXiv 2509.24006); see [`cubesla::sla_forward`].
///
/// # Errors
/// [`Error`] for an argument that is refused, before anything is launched.
///
/// # Panics
/// Where only a launch can tell; with fusion that is when the result is read.
pub fn try_sla(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    weight: Tensor<2>,
    bias: Tensor<1>,
    blocks: &Blocks,
    options: &SlaOptions,
) -> Result<Tensor<4>, Error> {
    let devices = [
        ("q", q.device()),
        ("weight", weight.device()),
        ("bias", bias.device()),
    ];
    convert::expect_device(&devices)?;
    let dim = v.dims()[3];
    convert::expect_shape("weight", &weight, [dim, dim])?;
    convert::expect_shape("bias", &bias, [dim])?;
    let tracked = weight.is_tracked() || bias.is_tracked();
    let combination = Combination::Sla {
        wl: convert::to_f32(weight).transpose().into_dispatch(),
        bl: convert::to_f32(bias).into_dispatch(),
    };
    combine(q, k, v, combination, tracked, blocks, options)
}

/// SLA2: `O = a O^s + (1 - a) O^l` with `a = sigmoid(alpha_logit)` per query block.
///
/// | argument | shape | type |
/// |---|---|---|
/// | `q`, `k`, `v` | as for [`try_block_sparse_attention`](crate::try_block_sparse_attention) | f32, f16 or bf16 |
/// | `alpha_logit` | `[1, 1]`, `[Hq, 1]` or `[Hq, M]` | any float, used as f32 |
/// | `blocks` | `[B, Hq, M, N]` | |
///
/// Differentiable in all tensors but the lists.
///
/// Source: SLA2 (arXiv 2602.12675); see [`cubesla::sla2_forward`].
///
/// # Errors
/// [`Error`] for an argument that is refused, before anything is launched.
///
/// # Panics
/// Where only a launch can tell; with fusion that is when the result is read.
pub fn try_sla2(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    alpha_logit: Tensor<2>,
    blocks: &Blocks,
    options: &SlaOptions,
) -> Result<Tensor<4>, Error> {
    let devices = [("q", q.device()), ("alpha_logit", alpha_logit.device())];
    convert::expect_device(&devices)?;
    let rows = q.dims()[2].div_ceil(options.attention.block_q.max(1));
    convert::expect_logits(&alpha_logit, q.dims()[1], rows)?;
    let tracked = alpha_logit.is_tracked();
    let combination = Combination::Sla2 {
        alpha_logit: convert::to_f32(alpha_logit).into_dispatch(),
    };
    combine(q, k, v, combination, tracked, blocks, options)
}

/// [`try_sla`] that panics with the message of its error.
///
/// # Panics
/// Where [`try_sla`] returns an error.
#[track_caller]
pub fn sla(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    weight: Tensor<2>,
    bias: Tensor<1>,
    blocks: &Blocks,
    options: &SlaOptions,
) -> Tensor<4> {
    unwrap("sla", try_sla(q, k, v, weight, bias, blocks, options))
}

/// [`try_sla2`] that panics with the message of its error.
///
/// # Panics
/// Where [`try_sla2`] returns an error.
#[track_caller]
pub fn sla2(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    alpha_logit: Tensor<2>,
    blocks: &Blocks,
    options: &SlaOptions,
) -> Tensor<4> {
    unwrap("sla2", try_sla2(q, k, v, alpha_logit, blocks, options))
}

fn combine(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    combination: Combination<Dispatch>,
    tracked: bool,
    blocks: &Blocks,
    options: &SlaOptions,
) -> Result<Tensor<4>, Error> {
    let (problem, client) = convert::problem(&q, &k, &v, &options.attention)?;
    refuse_causal(options.attention.causal)?;
    blocks.expect(&problem, &q.device())?;
    if options.precision != Precision::Full {
        expect_low_bit(&problem)?;
    }
    if tracked || [&q, &k, &v].into_iter().any(Tensor::is_tracked) {
        BackwardPlan::new(&problem, client.properties())?;
    }
    let out = Dispatch::cubesla_sla(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        combination,
        blocks.to_dispatch(),
        SlaBackwardOptions {
            attention: options.attention,
            phi: options.phi,
            linear: options.linear,
            precision: options.precision,
        },
    );
    Ok(Tensor::from_dispatch(out))
}

/// An error for a causal mask, which routers and the SLA operations do not have.
pub(crate) fn refuse_causal(causal: Causal) -> Result<(), Error> {
    match causal {
        Causal::None => Ok(()),
        causal => Err(ProblemError::NotSupported {
            what: format!("a {causal} causal mask in the router and the SLA operations"),
            why: "they pool and sum whole blocks; block_sparse_attention has causal masks",
        }
        .into()),
    }
}
