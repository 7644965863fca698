//! Selection in rows.

use burn_core::backend::Dispatch;
use burn_core::tensor::{Int, Tensor};
use cubesla::{ProblemError, TopKOrder};

use crate::error::unwrap;
use crate::ops::SlaOps;
use crate::{Error, convert};

/// The `k` largest elements of each row of `rows`, f32 `[rows, len]`, any strides: values and 32-bit
/// indices, each `[rows, k]`.
///
/// Exact and the same on every device: equal values are taken by rising index, and NaN ranks below
/// everything. `len` is at most 8192. Not differentiable; see [`cubesla::top_k`].
///
/// # Errors
/// [`Error::NotDifferentiable`] for tracked rows; [`Error`] for any other argument that is refused,
/// before anything is launched.
///
/// # Panics
/// Where only a launch can tell; with fusion that is when the result is read.
pub fn try_top_k(
    rows: Tensor<2>,
    k: usize,
    order: TopKOrder,
) -> Result<(Tensor<2>, Tensor<2, Int>), Error> {
    let hint = "pass `rows.clone().inner()`, and `gather` from the tracked rows at the indices";
    convert::expect_untracked("top_k", "rows", &rows, hint)?;
    convert::client(&rows.device())?;
    convert::expect_f32("rows", &rows)?;
    let [count, len] = rows.dims();
    if count == 0 || !(1..=len).contains(&k) {
        return Err(ProblemError::Count {
            argument: "k",
            found: k,
            limit: len,
        }
        .into());
    }
    convert::expect_row(len)?;
    let (values, indices) = Dispatch::cubesla_top_k(rows.into_dispatch(), k, order);
    Ok((
        Tensor::from_dispatch(values),
        Tensor::from_dispatch(indices),
    ))
}

/// [`try_top_k`] that panics with the message of its error.
///
/// # Panics
/// Where [`try_top_k`] returns an error.
#[track_caller]
pub fn top_k(rows: Tensor<2>, k: usize, order: TopKOrder) -> (Tensor<2>, Tensor<2, Int>) {
    unwrap("top_k", try_top_k(rows, k, order))
}

/// The soft selection of each row of `scores`, f32 `[B, Hq, M, N]`, any strides: of the same shape,
/// between 0 and 1, each row summing to `ratio N`. Differentiable.
///
/// ```text
/// m_j = sigmoid(x_j / tau + lambda),  lambda such that sum_j m_j = ratio N
/// ```
///
/// `N` is at most 8192. Source: SoftTop-k (arXiv 2403.19969); see [`cubesla::soft_top_k`].
///
/// # Errors
/// [`Error`] for an argument that is refused, before anything is launched.
///
/// # Panics
/// Where only a launch can tell; with fusion that is when the result is read.
pub fn try_soft_top_k(scores: Tensor<4>, tau: f32, ratio: f32) -> Result<Tensor<4>, Error> {
    convert::client(&scores.device())?;
    convert::expect_f32("scores", &scores)?;
    if scores.dims().contains(&0) {
        return Err(ProblemError::ZeroSize {
            argument: "scores",
            shape: scores.dims().to_vec(),
        }
        .into());
    }
    if !(tau > 0.0 && tau.is_finite()) {
        return Err(ProblemError::Temperature { tau }.into());
    }
    if !(ratio > 0.0 && ratio < 1.0) {
        return Err(ProblemError::Ratio { ratio }.into());
    }
    convert::expect_row(scores.dims()[3])?;
    let soft = Dispatch::cubesla_soft_top_k(scores.into_dispatch(), tau, ratio);
    Ok(Tensor::from_dispatch(soft))
}

/// [`try_soft_top_k`] that panics with the message of its error.
///
/// # Panics
/// Where [`try_soft_top_k`] returns an error.
#[track_caller]
pub fn soft_top_k(scores: Tensor<4>, tau: f32, ratio: f32) -> Tensor<4> {
    unwrap("soft_top_k", try_soft_top_k(scores, tau, ratio))
}
