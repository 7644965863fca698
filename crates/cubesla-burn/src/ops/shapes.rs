//! Shapes and types of results, which fusion needs before anything runs.

use burn_core::tensor::DType;
use burn_fusion::custom::TensorSpec;
use cubesla::{
    AttentionOptions, Critical, FeatureMap, LowBitFormats, SlaBackwardOptions, TopKOrder,
};

use super::values::{CombinationMetadata, ListsMetadata};

fn of<const R: usize>(shape: [usize; R], dtype: DType) -> TensorSpec {
    TensorSpec::new(shape.into(), dtype)
}

fn out(q: &TensorSpec, v: &TensorSpec) -> TensorSpec {
    of([q.shape[0], q.shape[1], q.shape[2], v.shape[3]], q.dtype)
}

fn lse(q: &TensorSpec) -> TensorSpec {
    of([q.shape[0], q.shape[1], q.shape[2]], DType::F32)
}

pub(super) fn attention(
    q: &TensorSpec,
    _k: &TensorSpec,
    v: &TensorSpec,
    _indices: &TensorSpec,
    _counts: &TensorSpec,
    _options: &AttentionOptions,
    _formats: &Option<LowBitFormats>,
) -> (TensorSpec, TensorSpec) {
    (out(q, v), lse(q))
}

pub(super) fn attention_backward(
    q: &TensorSpec,
    k: &TensorSpec,
    v: &TensorSpec,
    _out: &TensorSpec,
    _lse: &TensorSpec,
    _grad: &TensorSpec,
    _indices: &TensorSpec,
    _counts: &TensorSpec,
    _options: &AttentionOptions,
    _formats: &Option<LowBitFormats>,
) -> (TensorSpec, TensorSpec, TensorSpec) {
    (q.clone(), k.clone(), v.clone())
}

pub(super) fn sla(
    q: &TensorSpec,
    _k: &TensorSpec,
    v: &TensorSpec,
    _weights: &CombinationMetadata,
    _lists: &ListsMetadata,
    _options: &SlaBackwardOptions,
) -> TensorSpec {
    out(q, v)
}

pub(super) fn sla_saving(
    q: &TensorSpec,
    _k: &TensorSpec,
    v: &TensorSpec,
    _weights: &CombinationMetadata,
    _lists: &ListsMetadata,
    _options: &SlaBackwardOptions,
) -> (TensorSpec, TensorSpec, TensorSpec, TensorSpec) {
    (out(q, v), out(q, v), out(q, v), lse(q))
}

pub(super) fn sla_backward(
    q: &TensorSpec,
    k: &TensorSpec,
    v: &TensorSpec,
    weights: &CombinationMetadata,
    _lists: &ListsMetadata,
    _sparse: &TensorSpec,
    _linear: &TensorSpec,
    _lse: &TensorSpec,
    _grad: &TensorSpec,
    _options: &SlaBackwardOptions,
) -> (TensorSpec, TensorSpec, TensorSpec, CombinationMetadata) {
    (q.clone(), k.clone(), v.clone(), weights.clone())
}

pub(super) fn linear(
    q: &TensorSpec,
    _k: &TensorSpec,
    v: &TensorSpec,
    _phi: &FeatureMap,
    _causal: &bool,
) -> TensorSpec {
    out(q, v)
}

pub(super) fn scores(q: &TensorSpec, k: &TensorSpec, options: &AttentionOptions) -> TensorSpec {
    let blocks = [
        q.shape[2].div_ceil(options.block_q),
        k.shape[2].div_ceil(options.block_k),
    ];
    of([q.shape[0], q.shape[1], blocks[0], blocks[1]], DType::F32)
}

pub(super) fn projected_scores(
    q: &TensorSpec,
    k: &TensorSpec,
    _wq: &TensorSpec,
    _wk: &TensorSpec,
    options: &AttentionOptions,
) -> TensorSpec {
    scores(q, k, options)
}

pub(super) fn select(
    scores: &TensorSpec,
    critical: &Critical,
    negligible: &usize,
) -> ListsMetadata {
    let [batch, heads, rows] = [scores.shape[0], scores.shape[1], scores.shape[2]];
    let indices = |width| of([batch, heads, rows, width], DType::I32);
    let counts = of([batch, heads, rows], DType::I32);
    match *negligible {
        0 => ListsMetadata::Critical {
            indices: indices(critical.max()),
            counts,
        },
        width => ListsMetadata::Negligible {
            indices: indices(critical.max()),
            counts: counts.clone(),
            negligible_indices: indices(width),
            negligible_counts: counts,
        },
    }
}

pub(super) fn top_k(rows: &TensorSpec, k: &usize, _order: &TopKOrder) -> (TensorSpec, TensorSpec) {
    let shape = [rows.shape[0], *k];
    (of(shape, DType::F32), of(shape, DType::I32))
}

pub(super) fn soft(
    q: &TensorSpec,
    _k: &TensorSpec,
    v: &TensorSpec,
    _weights: &TensorSpec,
    _alpha_logit: &TensorSpec,
    _options: &AttentionOptions,
    _phi: &FeatureMap,
) -> TensorSpec {
    out(q, v)
}

pub(super) fn soft_saving(
    q: &TensorSpec,
    _k: &TensorSpec,
    v: &TensorSpec,
    _weights: &TensorSpec,
    _alpha_logit: &TensorSpec,
    _options: &AttentionOptions,
    _phi: &FeatureMap,
) -> (TensorSpec, TensorSpec, TensorSpec, TensorSpec) {
    (out(q, v), out(q, v), out(q, v), lse(q))
}

pub(super) fn soft_backward(
    q: &TensorSpec,
    k: &TensorSpec,
    v: &TensorSpec,
    weights: &TensorSpec,
    alpha_logit: &TensorSpec,
    _sparse: &TensorSpec,
    _linear: &TensorSpec,
    _lse: &TensorSpec,
    _grad: &TensorSpec,
    _options: &AttentionOptions,
    _phi: &FeatureMap,
) -> (TensorSpec, TensorSpec, TensorSpec, TensorSpec, TensorSpec) {
    (
        q.clone(),
        k.clone(),
        v.clone(),
        weights.clone(),
        alpha_logit.clone(),
    )
}

pub(super) fn router_backward(
    _q: &TensorSpec,
    _k: &TensorSpec,
    wq: &TensorSpec,
    wk: &TensorSpec,
    _grad: &TensorSpec,
    _options: &AttentionOptions,
) -> (TensorSpec, TensorSpec) {
    (wq.clone(), wk.clone())
}
