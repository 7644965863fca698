//! What a caller's tensors are dispatched to.

use burn_core::backend::TensorMetadata;
use burn_core::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubesla::{
    AttentionOptions, BlockList, Critical, FeatureMap, LowBitFormats, RouterWeights,
    SlaBackwardOptions, TopKOrder,
};

use super::super::layout::{block_list, contiguous, view, wrap, wrap_handle};
use super::super::{Lists, SlaOps};
use super::{ListTensors, Weights, launched, sla};

impl SlaOps for CubeBackend {
    fn cubesla_attention(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        indices: CubeTensor,
        counts: CubeTensor,
        options: AttentionOptions,
        formats: Option<LowBitFormats>,
    ) -> (CubeTensor, CubeTensor) {
        let like = q.clone();
        let list = block_list(indices, counts, k.shape()[2].div_ceil(options.block_k));
        let run = || {
            let (q, k, v) = (view(q)?, view(k)?, view(v)?);
            let client = &like.client;
            match formats {
                None => cubesla::block_sparse_attention(client, &q, &k, &v, &list, &options),
                Some(low) => cubesla::low_bit_attention(client, &q, &k, &v, &list, &options, low),
            }
        };
        let operation = match formats {
            None => "block_sparse_attention",
            Some(_) => "low_bit_attention",
        };
        let output = launched(operation, run());
        (wrap(&like, &output.out), wrap(&like, &output.lse))
    }

    fn cubesla_sla(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        weights: Weights,
        lists: ListTensors,
        options: SlaBackwardOptions,
    ) -> CubeTensor {
        let like = q.clone();
        let result = sla(q, k, v, weights, lists, options, false);
        let result = launched("sla", result);
        wrap(&like, &result.out)
    }

    fn cubesla_linear(
        q: CubeTensor,
        k: CubeTensor,
        v: CubeTensor,
        phi: FeatureMap,
        causal: bool,
    ) -> CubeTensor {
        let like = q.clone();
        let run = || {
            let (q, k, v) = (view(q)?, view(k)?, view(v)?);
            cubesla::linear_attention(&like.client, &q, &k, &v, phi, causal)
        };
        wrap(&like, &launched("linear_attention", run()))
    }

    fn cubesla_scores(q: CubeTensor, k: CubeTensor, options: AttentionOptions) -> CubeTensor {
        scores(q, k, None, options)
    }

    fn cubesla_projected_scores(
        q: CubeTensor,
        k: CubeTensor,
        wq: CubeTensor,
        wk: CubeTensor,
        options: AttentionOptions,
    ) -> CubeTensor {
        scores(q, k, Some((wq, wk)), options)
    }

    fn cubesla_select(scores: CubeTensor, critical: Critical, negligible: usize) -> ListTensors {
        let like = scores.clone();
        let run = || {
            let scores = contiguous(scores)?;
            Ok(cubesla::select_blocks(
                &like.client,
                &scores,
                critical,
                negligible,
            )?)
        };
        let selection = launched("route", run());
        let (indices, counts) = wrap_list(&like, &selection.critical);
        match selection.negligible {
            None => Lists::Critical { indices, counts },
            Some(negligible) => {
                let (negligible_indices, negligible_counts) = wrap_list(&like, &negligible);
                Lists::Negligible {
                    indices,
                    counts,
                    negligible_indices,
                    negligible_counts,
                }
            }
        }
    }

    fn cubesla_top_k(rows: CubeTensor, k: usize, order: TopKOrder) -> (CubeTensor, CubeTensor) {
        let like = rows.clone();
        let run = || {
            let rows = contiguous(rows)?;
            Ok(cubesla::top_k(&like.client, &rows, k, order)?)
        };
        let top = launched("top_k", run());
        let shape = top.values.shape();
        (
            wrap(&like, &top.values),
            wrap_handle(&like, &top.indices, shape, DType::I32),
        )
    }

    fn cubesla_soft_top_k(scores: CubeTensor, tau: f32, ratio: f32) -> CubeTensor {
        let like = scores.clone();
        let run = || {
            let scores = contiguous(scores)?;
            Ok(cubesla::soft_top_k(&like.client, &scores, tau, ratio)?)
        };
        wrap(&like, &launched("soft_top_k", run()))
    }
}

fn scores(
    q: CubeTensor,
    k: CubeTensor,
    weights: Option<(CubeTensor, CubeTensor)>,
    options: AttentionOptions,
) -> CubeTensor {
    let like = q.clone();
    let run = || {
        let (q, k) = (view(q)?, view(k)?);
        // The router looks at no values.
        let problem = cubesla::AttentionProblem::new(&q, &k, &k, &options)?;
        let weights = match weights {
            None => None,
            Some((wq, wk)) => Some((contiguous(wq)?, contiguous(wk)?)),
        };
        let weights = weights.as_ref().map(|(wq, wk)| RouterWeights { wq, wk });
        Ok(cubesla::pooled_scores(
            &like.client,
            &problem,
            &q,
            &k,
            weights,
        )?)
    };
    wrap(&like, &launched("route", run()))
}

fn wrap_list(like: &CubeTensor, list: &BlockList) -> (CubeTensor, CubeTensor) {
    let [batch, heads, rows, _] = list.shape();
    (
        wrap_handle(
            like,
            list.indices(),
            [batch, heads, rows, list.width()],
            DType::I32,
        ),
        wrap_handle(like, list.counts(), [batch, heads, rows], DType::I32),
    )
}
