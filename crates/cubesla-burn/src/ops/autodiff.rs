//! The operations under Burn's autodiff, with the library's own backwards.

mod attention;
mod sla;
mod soft;
mod soft_top_k;

use burn_core::backend::autodiff::Autodiff;
use burn_core::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_core::backend::tensor::{FloatTensor, IntTensor};
use burn_core::backend::{AutodiffBackend, Backend};
use cubesla::{
    AttentionOptions, Critical, FeatureMap, LowBitFormats, SlaBackwardOptions, TopKOrder,
};

use super::soft::SoftGradientOps;
use super::{Combination, Lists, SlaGradientOps, SlaOps};

impl<B, C> SlaOps for Autodiff<B, C>
where
    B: Backend + SlaOps + SlaGradientOps + SoftGradientOps,
    C: CheckpointStrategy,
{
    fn cubesla_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        indices: IntTensor<Self>,
        counts: IntTensor<Self>,
        options: AttentionOptions,
        formats: Option<LowBitFormats>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        attention::forward::<B, C>([q, k, v], indices, counts, options, formats)
    }

    fn cubesla_sla(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        weights: Combination<Self>,
        lists: Lists<Self>,
        options: SlaBackwardOptions,
    ) -> FloatTensor<Self> {
        let lists = inner_lists(lists);
        match weights {
            Combination::Sla { wl, bl } => {
                sla::forward_sla::<B, C>([q, k, v, wl, bl], lists, options)
            }
            Combination::Sla2 { alpha_logit } => {
                sla::forward_sla2::<B, C>([q, k, v, alpha_logit], lists, options)
            }
        }
    }

    fn cubesla_linear(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        phi: FeatureMap,
        causal: bool,
    ) -> FloatTensor<Self> {
        let [q, k, v] = [q, k, v].map(|tensor| tensor.into_primitive());
        Self::from_inner(B::cubesla_linear(q, k, v, phi, causal))
    }

    fn cubesla_scores(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        options: AttentionOptions,
    ) -> FloatTensor<Self> {
        let [q, k] = [q, k].map(|tensor| tensor.into_primitive());
        Self::from_inner(B::cubesla_scores(q, k, options))
    }

    fn cubesla_projected_scores(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        wq: FloatTensor<Self>,
        wk: FloatTensor<Self>,
        options: AttentionOptions,
    ) -> FloatTensor<Self> {
        let inputs = [q, k].map(|tensor| tensor.into_primitive());
        soft::scores::<B, C>(inputs, [wq, wk], options)
    }

    fn cubesla_select(
        scores: FloatTensor<Self>,
        critical: Critical,
        negligible: usize,
    ) -> Lists<Self> {
        match B::cubesla_select(scores.into_primitive(), critical, negligible) {
            Lists::Critical { indices, counts } => Lists::Critical { indices, counts },
            Lists::Negligible {
                indices,
                counts,
                negligible_indices,
                negligible_counts,
            } => Lists::Negligible {
                indices,
                counts,
                negligible_indices,
                negligible_counts,
            },
        }
    }

    fn cubesla_top_k(
        rows: FloatTensor<Self>,
        k: usize,
        order: TopKOrder,
    ) -> (FloatTensor<Self>, IntTensor<Self>) {
        let (values, indices) = B::cubesla_top_k(rows.into_primitive(), k, order);
        (Self::from_inner(values), indices)
    }

    fn cubesla_soft_top_k(scores: FloatTensor<Self>, tau: f32, ratio: f32) -> FloatTensor<Self> {
        soft_top_k::forward::<B, C>(scores, tau, ratio)
    }
}

/// Lists of integers, which autodiff leaves as they are.
fn inner_lists<B: Backend, C: CheckpointStrategy>(lists: Lists<Autodiff<B, C>>) -> Lists<B> {
    match lists {
        Lists::Critical { indices, counts } => Lists::Critical { indices, counts },
        Lists::Negligible {
            indices,
            counts,
            negligible_indices,
            negligible_counts,
        } => Lists::Negligible {
            indices,
            counts,
            negligible_indices,
            negligible_counts,
        },
    }
}
