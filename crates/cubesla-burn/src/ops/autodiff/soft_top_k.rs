//! SoftTop-k with its backward, which needs the forward's result alone.

use burn_core::backend::Backend;
use burn_core::backend::autodiff::Autodiff;
use burn_core::backend::autodiff::checkpoint::base::Checkpointer;
use burn_core::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_core::backend::autodiff::grads::Gradients;
use burn_core::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn_core::backend::tensor::FloatTensor;

use super::super::{SlaGradientOps, SlaOps};

#[derive(Debug)]
struct SoftTopK;

impl<B: Backend + SlaGradientOps> Backward<B, 1> for SoftTopK {
    type State = (FloatTensor<B>, f32);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let (soft, tau) = ops.state;
        if let [Some(parent)] = ops.parents {
            grads.register::<B>(parent.id, B::cubesla_soft_top_k_backward(soft, grad, tau));
        }
    }
}

pub(super) fn forward<B: Backend + SlaOps + SlaGradientOps, C: CheckpointStrategy>(
    scores: FloatTensor<Autodiff<B, C>>,
    tau: f32,
    ratio: f32,
) -> FloatTensor<Autodiff<B, C>> {
    let prepared = SoftTopK
        .prepare::<C>([scores.node()])
        .compute_bound()
        .stateful();
    let soft = B::cubesla_soft_top_k(scores.into_primitive(), tau, ratio);
    match prepared {
        OpsKind::Tracked(tracked) => tracked.finish((soft.clone(), tau), soft),
        OpsKind::UnTracked(untracked) => untracked.finish(soft),
    }
}
