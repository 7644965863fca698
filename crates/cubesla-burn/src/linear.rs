//! Linear attention.

use burn_core::backend::Dispatch;
use burn_core::tensor::{FloatDType, Tensor, activation};
use cubesla::{AttentionOptions, FeatureMap, ProblemError};

use crate::error::unwrap;
use crate::ops::SlaOps;
use crate::{Error, convert};

/// Linear attention: `O_i = phi(Q_i) H / (phi(Q_i) . Z)` with `H = sum_j phi(K_j)^T V_j` and
/// `Z = sum_j phi(K_j)`, over all keys or, causal, over those up to `i`.
///
/// `q` is `[B, Hq, Lq, D]`, `k` `[B, Hkv, Lk, D]`, `v` `[B, Hkv, Lk, Dv]`, any strides, f32, f16 or
/// bf16; the result is `[B, Hq, Lq, Dv]` in their type.
///
/// Under autodiff, where an input is tracked, the form over all keys is computed with Burn's own
/// operations in f32, and so is its gradient; memory stays linear in the lengths.
///
/// Source: SLA (arXiv 2509.24006), section 3.2; see [`cubesla::linear_attention`].
///
/// # Errors
/// [`Error::NotDifferentiable`] for the causal form of a tracked input; [`Error`] for any other
/// argument that is refused, before anything is launched.
///
/// # Panics
/// Where only a launch can tell; with fusion that is when the result is read.
pub fn try_linear_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    phi: FeatureMap,
    causal: bool,
) -> Result<Tensor<4>, Error> {
    let (problem, _) = convert::problem(&q, &k, &v, &AttentionOptions::default())?;
    if causal && problem.query_len() != problem.key_len() {
        let [batch, heads, _, dim] = k.dims();
        return Err(ProblemError::ShapeMismatch {
            argument: "k",
            found: k.dims().to_vec(),
            expected: vec![batch, heads, problem.query_len(), dim],
        }
        .into());
    }
    if causal {
        for (argument, tensor) in [("q", &q), ("k", &k), ("v", &v)] {
            let hint = "the causal form is for inference; use `inner()`, or sum over all keys";
            convert::expect_untracked("causal linear_attention", argument, tensor, hint)?;
        }
    } else if [&q, &k, &v].into_iter().any(Tensor::is_tracked) {
        return Ok(composed(q, k, v, phi));
    }
    let out = Dispatch::cubesla_linear(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        phi,
        causal,
    );
    Ok(Tensor::from_dispatch(out))
}

/// [`try_linear_attention`] that panics with the message of its error.
///
/// # Panics
/// Where [`try_linear_attention`] returns an error.
#[track_caller]
pub fn linear_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    phi: FeatureMap,
    causal: bool,
) -> Tensor<4> {
    let result = try_linear_attention(q, k, v, phi, causal);
    unwrap("linear_attention", result)
}

/// The form over all keys in Burn's operations, for its gradient.
fn composed(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, phi: FeatureMap) -> Tensor<4> {
    let dtype = q.dtype();
    let [batch, query_heads, query_len, dim] = q.dims();
    let [_, heads, _, value_dim] = v.dims();
    let [q, k, v] = [q, k, v].map(convert::to_f32);
    // The heads that share a key head lie together: [B, Hkv, (Hq / Hkv) Lq, D].
    let rows = query_heads / heads * query_len;
    let phi_q = features(q, phi).reshape([batch, heads, rows, dim]);
    let phi_k = features(k, phi);
    let h = phi_k.clone().swap_dims(2, 3).matmul(v); // [B, Hkv, D, Dv]
    let z = phi_k.sum_dim(2).swap_dims(2, 3); // [B, Hkv, D, 1]
    let denominator = phi_q.clone().matmul(z);
    // A row whose denominator is 0 is 0.
    let nothing = denominator.clone().equal_scalar(0.0);
    let denominator = denominator.mask_fill(nothing.clone(), 1.0);
    let out = phi_q.matmul(h) / denominator;
    let out = out.mask_fill(nothing.expand([batch, heads, rows, value_dim]), 0.0);
    let out = out.reshape([batch, query_heads, query_len, value_dim]);
    match FloatDType::from(dtype) {
        FloatDType::F32 => out,
        dtype => out.cast(dtype),
    }
}

fn features(x: Tensor<4>, phi: FeatureMap) -> Tensor<4> {
    match phi {
        FeatureMap::Softmax => activation::softmax(x, 3),
        FeatureMap::EluPlusOne => x.clone().clamp_min(0.0) + x.clamp_max(0.0).exp(),
        FeatureMap::Relu => activation::relu(x),
        FeatureMap::Identity => x,
    }
}
