//! The first training stage with its backwards.

use burn_core::backend::Backend;
use burn_core::backend::autodiff::checkpoint::base::Checkpointer;
use burn_core::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_core::backend::autodiff::grads::Gradients;
use burn_core::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn_core::backend::autodiff::{Autodiff, NodeId};
use burn_core::backend::tensor::FloatTensor;
use cubesla::{AttentionOptions, FeatureMap};

use super::super::SlaOps;
use super::super::soft::{SoftGradientOps, SoftOps};

/// `q`, `k`, `v`, the blocks' weights and the logits.
#[derive(Debug)]
struct Soft;

#[derive(Clone, Debug)]
struct Saved<B: Backend> {
    inputs: [NodeId; 5],
    sparse: FloatTensor<B>,
    linear: FloatTensor<B>,
    lse: FloatTensor<B>,
    options: AttentionOptions,
    phi: FeatureMap,
}

impl<B: Backend + SoftGradientOps> Backward<B, 5> for Soft {
    type State = Saved<B>;

    fn backward(
        self,
        ops: Ops<Saved<B>, 5>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let saved = ops.state;
        let [q, k, v, weights, alpha_logit]: [FloatTensor<B>; 5] = saved
            .inputs
            .map(|node| checkpointer.retrieve_node_output(node));
        let (dq, dk, dv, dweights, dlogit) = B::cubesla_soft_backward(
            q,
            k,
            v,
            weights,
            alpha_logit,
            saved.sparse,
            saved.linear,
            saved.lse,
            grad,
            saved.options,
            saved.phi,
        );
        for (parent, grad) in ops.parents.into_iter().zip([dq, dk, dv, dweights, dlogit]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

impl<B: Backend + SoftOps + SoftGradientOps, C: CheckpointStrategy> SoftOps for Autodiff<B, C> {
    fn cubesla_soft(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        alpha_logit: FloatTensor<Self>,
        options: AttentionOptions,
        phi: FeatureMap,
    ) -> FloatTensor<Self> {
        let inputs = [q, k, v, weights, alpha_logit];
        let nodes = inputs.each_ref().map(|tensor| tensor.node());
        match Soft.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut tracked) => {
                let nodes = inputs.each_ref().map(|tensor| tracked.checkpoint(tensor));
                let [q, k, v, weights, logit] = inputs.map(|tensor| tensor.into_primitive());
                let (out, sparse, linear, lse) =
                    B::cubesla_soft_saving(q, k, v, weights, logit, options, phi);
                let saved = Saved {
                    inputs: nodes,
                    sparse,
                    linear,
                    lse,
                    options,
                    phi,
                };
                tracked.finish(saved, out)
            }
            OpsKind::UnTracked(untracked) => {
                let [q, k, v, weights, logit] = inputs.map(|tensor| tensor.into_primitive());
                untracked.finish(B::cubesla_soft(q, k, v, weights, logit, options, phi))
            }
        }
    }
}

/// Scores of a learnable router, for the projections `Wq` and `Wk`.
#[derive(Debug)]
struct Scores;

#[derive(Clone, Debug)]
struct ScoresSaved<B: Backend> {
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    weights: [NodeId; 2],
    options: AttentionOptions,
}

impl<B: Backend + SoftGradientOps> Backward<B, 2> for Scores {
    type State = ScoresSaved<B>;

    fn backward(
        self,
        ops: Ops<ScoresSaved<B>, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let saved = ops.state;
        let [wq, wk]: [FloatTensor<B>; 2] = saved
            .weights
            .map(|node| checkpointer.retrieve_node_output(node));
        let (dwq, dwk) = B::cubesla_router_backward(saved.q, saved.k, wq, wk, grad, saved.options);
        for (parent, grad) in ops.parents.into_iter().zip([dwq, dwk]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

/// Scores of a learnable router; nothing flows into `q` and `k`.
pub(super) fn scores<B: Backend + SlaOps + SoftGradientOps, C: CheckpointStrategy>(
    [q, k]: [FloatTensor<B>; 2],
    weights: [FloatTensor<Autodiff<B, C>>; 2],
    options: AttentionOptions,
) -> FloatTensor<Autodiff<B, C>> {
    let nodes = weights.each_ref().map(|tensor| tensor.node());
    let prepared = Scores.prepare::<C>(nodes).compute_bound().stateful();
    let run = |weights: [FloatTensor<Autodiff<B, C>>; 2]| {
        let [wq, wk] = weights.map(|tensor| tensor.into_primitive());
        B::cubesla_projected_scores(q.clone(), k.clone(), wq, wk, options)
    };
    match prepared {
        OpsKind::Tracked(mut tracked) => {
            let nodes = weights.each_ref().map(|tensor| tracked.checkpoint(tensor));
            let scores = run(weights);
            let saved = ScoresSaved {
                q,
                k,
                weights: nodes,
                options,
            };
            tracked.finish(saved, scores)
        }
        OpsKind::UnTracked(untracked) => untracked.finish(run(weights)),
    }
}
