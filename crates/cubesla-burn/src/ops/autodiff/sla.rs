//! SLA and SLA2 with their backwards.

use burn_core::backend::Backend;
use burn_core::backend::autodiff::checkpoint::base::Checkpointer;
use burn_core::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_core::backend::autodiff::grads::Gradients;
use burn_core::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn_core::backend::autodiff::{Autodiff, NodeId};
use burn_core::backend::tensor::FloatTensor;
use cubesla::SlaBackwardOptions;

use super::super::{Combination, Lists, SlaGradientOps, SlaOps};

/// `q`, `k`, `v`, `Wl`, `bl`.
#[derive(Debug)]
struct Sla;

/// `q`, `k`, `v` and the logits.
#[derive(Debug)]
struct Sla2;

#[derive(Clone, Debug)]
struct Saved<B: Backend, const N: usize> {
    inputs: [NodeId; N],
    lists: Lists<B>,
    sparse: FloatTensor<B>,
    linear: FloatTensor<B>,
    lse: FloatTensor<B>,
    options: SlaBackwardOptions,
}

type Gradient<B> = (
    FloatTensor<B>,
    FloatTensor<B>,
    FloatTensor<B>,
    Combination<B>,
);

impl<B: Backend + SlaGradientOps, const N: usize> Saved<B, N> {
    fn backward(
        self,
        [q, k, v]: [FloatTensor<B>; 3],
        weights: Combination<B>,
        grad: FloatTensor<B>,
    ) -> Gradient<B> {
        B::cubesla_sla_backward(
            q,
            k,
            v,
            weights,
            self.lists,
            self.sparse,
            self.linear,
            self.lse,
            grad,
            self.options,
        )
    }
}

impl<B: Backend + SlaGradientOps> Backward<B, 5> for Sla {
    type State = Saved<B, 5>;

    fn backward(
        self,
        ops: Ops<Saved<B, 5>, 5>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let inputs = ops.state.inputs;
        let [q, k, v, wl, bl]: [FloatTensor<B>; 5] =
            inputs.map(|node| checkpointer.retrieve_node_output(node));
        let weights = Combination::Sla { wl, bl };
        let (dq, dk, dv, weights) = ops.state.backward([q, k, v], weights, grad);
        let Combination::Sla { wl, bl } = weights else {
            unreachable!("gradients are those of the weights");
        };
        for (parent, grad) in ops.parents.into_iter().zip([dq, dk, dv, wl, bl]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

impl<B: Backend + SlaGradientOps> Backward<B, 4> for Sla2 {
    type State = Saved<B, 4>;

    fn backward(
        self,
        ops: Ops<Saved<B, 4>, 4>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let inputs = ops.state.inputs;
        let [q, k, v, alpha_logit]: [FloatTensor<B>; 4] =
            inputs.map(|node| checkpointer.retrieve_node_output(node));
        let weights = Combination::Sla2 { alpha_logit };
        let (dq, dk, dv, weights) = ops.state.backward([q, k, v], weights, grad);
        let Combination::Sla2 { alpha_logit } = weights else {
            unreachable!("gradients are those of the weights");
        };
        for (parent, grad) in ops.parents.into_iter().zip([dq, dk, dv, alpha_logit]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

pub(super) fn forward_sla<B: Backend + SlaOps + SlaGradientOps, C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<B, C>>; 5],
    lists: Lists<B>,
    options: SlaBackwardOptions,
) -> FloatTensor<Autodiff<B, C>> {
    let weights = |[wl, bl]: [FloatTensor<B>; 2]| Combination::Sla { wl, bl };
    forward::<B, C, _, 5, 2>(Sla, inputs, weights, lists, options)
}

pub(super) fn forward_sla2<B: Backend + SlaOps + SlaGradientOps, C: CheckpointStrategy>(
    inputs: [FloatTensor<Autodiff<B, C>>; 4],
    lists: Lists<B>,
    options: SlaBackwardOptions,
) -> FloatTensor<Autodiff<B, C>> {
    let weights = |[alpha_logit]: [FloatTensor<B>; 1]| Combination::Sla2 { alpha_logit };
    forward::<B, C, _, 4, 1>(Sla2, inputs, weights, lists, options)
}

/// Runs the forward; `N` inputs are `q`, `k`, `v` and the `W` weights.
fn forward<B, C, O, const N: usize, const W: usize>(
    operation: O,
    inputs: [FloatTensor<Autodiff<B, C>>; N],
    weights: impl FnOnce([FloatTensor<B>; W]) -> Combination<B>,
    lists: Lists<B>,
    options: SlaBackwardOptions,
) -> FloatTensor<Autodiff<B, C>>
where
    B: Backend + SlaOps + SlaGradientOps,
    C: CheckpointStrategy,
    O: Backward<B, N, State = Saved<B, N>>,
{
    let nodes = inputs.each_ref().map(|tensor| tensor.node());
    let prepared = operation.prepare::<C>(nodes).compute_bound().stateful();
    let split = |inputs: [FloatTensor<Autodiff<B, C>>; N]| {
        let mut rest = inputs.into_iter().map(|tensor| tensor.into_primitive());
        let mut next = || rest.next().expect("N is 3 + W");
        let tensors: [_; 3] = std::array::from_fn(|_| next());
        (tensors, weights(std::array::from_fn(|_| next())))
    };
    match prepared {
        OpsKind::Tracked(mut tracked) => {
            let nodes = inputs.each_ref().map(|tensor| tracked.checkpoint(tensor));
            let ([q, k, v], weights) = split(inputs);
            let (out, sparse, linear, lse) =
                B::cubesla_sla_saving(q, k, v, weights, lists.clone(), options);
            let saved = Saved {
                inputs: nodes,
                lists,
                sparse,
                linear,
                lse,
                options,
            };
            tracked.finish(saved, out)
        }
        OpsKind::UnTracked(untracked) => {
            let ([q, k, v], weights) = split(inputs);
            untracked.finish(B::cubesla_sla(q, k, v, weights, lists, options))
        }
    }
}
