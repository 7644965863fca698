//! Block-sparse attention, in full precision or in low bits, with its backward.

use burn_core::backend::autodiff::checkpoint::base::Checkpointer;
use burn_core::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_core::backend::autodiff::grads::Gradients;
use burn_core::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn_core::backend::autodiff::{Autodiff, NodeId};
use burn_core::backend::tensor::{FloatTensor, IntTensor};
use burn_core::backend::{AutodiffBackend, Backend};
use cubesla::{AttentionOptions, LowBitFormats};

use super::super::{SlaGradientOps, SlaOps};

#[derive(Debug)]
struct Attention;

#[derive(Clone, Debug)]
struct Saved<B: Backend> {
    inputs: [NodeId; 3],
    out: FloatTensor<B>,
    lse: FloatTensor<B>,
    indices: IntTensor<B>,
    counts: IntTensor<B>,
    options: AttentionOptions,
    formats: Option<LowBitFormats>,
}

impl<B: Backend + SlaGradientOps> Backward<B, 3> for Attention {
    type State = Saved<B>;

    fn backward(
        self,
        ops: Ops<Saved<B>, 3>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let saved = ops.state;
        let [q, k, v]: [FloatTensor<B>; 3] = saved
            .inputs
            .map(|node| checkpointer.retrieve_node_output(node));
        let (dq, dk, dv) = B::cubesla_attention_backward(
            q,
            k,
            v,
            saved.out,
            saved.lse,
            grad,
            saved.indices,
            saved.counts,
            saved.options,
            saved.formats,
        );
        for (parent, grad) in ops.parents.into_iter().zip([dq, dk, dv]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

type Differentiable<B, C> = FloatTensor<Autodiff<B, C>>;

pub(super) fn forward<B: Backend + SlaOps + SlaGradientOps, C: CheckpointStrategy>(
    inputs: [Differentiable<B, C>; 3],
    indices: IntTensor<B>,
    counts: IntTensor<B>,
    options: AttentionOptions,
    formats: Option<LowBitFormats>,
) -> (Differentiable<B, C>, Differentiable<B, C>) {
    let nodes = inputs.each_ref().map(|tensor| tensor.node());
    let prepared = Attention.prepare::<C>(nodes).compute_bound().stateful();
    match prepared {
        OpsKind::Tracked(mut tracked) => {
            let nodes = inputs.each_ref().map(|tensor| tracked.checkpoint(tensor));
            let [q, k, v] = inputs.map(|tensor| tensor.into_primitive());
            let (out, lse) =
                B::cubesla_attention(q, k, v, indices.clone(), counts.clone(), options, formats);
            let saved = Saved {
                inputs: nodes,
                out: out.clone(),
                lse: lse.clone(),
                indices,
                counts,
                options,
                formats,
            };
            let out = tracked.finish(saved, out);
            (out, <Autodiff<B, C> as AutodiffBackend>::from_inner(lse))
        }
        OpsKind::UnTracked(untracked) => {
            let [q, k, v] = inputs.map(|tensor| tensor.into_primitive());
            let (out, lse) = B::cubesla_attention(q, k, v, indices, counts, options, formats);
            let out = untracked.finish(out);
            (out, <Autodiff<B, C> as AutodiffBackend>::from_inner(lse))
        }
    }
}
