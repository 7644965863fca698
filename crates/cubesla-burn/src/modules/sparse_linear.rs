//! SLA and SLA2 as a module.

use burn_core as burn;
use burn_core::module::{Module, Param};
use burn_core::tensor::Tensor;
use burn_nn::Linear;

use super::SparseLinearAttentionConfig;
use crate::error::unwrap;
use crate::{
    Blocks, Error, RouterOptions, RouterWeights, SlaOptions, try_route, try_sla, try_sla2,
};

/// Exact attention over the blocks that a router finds critical and linear attention over the rest,
/// combined as SLA or SLA2 do.
///
/// Records have the fields' names: `proj_l.weight`, `proj_l.bias` for SLA, `alpha_logit` for SLA2,
/// `proj_q.weight`, `proj_k.weight` where the router has weights.
#[derive(Module, Debug)]
pub struct SparseLinearAttention {
    /// SLA: the projection of the linear branch, `[Dv, Dv]` and `[Dv]`, at first 0.
    pub proj_l: Option<Linear>,
    /// SLA2: the logits of the sparse branch's weight, `[1, 1]`, `[Hq, 1]` or `[Hq, M]`.
    pub alpha_logit: Option<Param<Tensor<2>>>,
    /// The router's projection of pooled queries, `[D, D]`.
    pub proj_q: Option<Linear>,
    /// The router's projection of pooled keys, `[D, D]`.
    pub proj_k: Option<Linear>,
    /// What it was made with.
    #[module(skip)]
    pub config: SparseLinearAttentionConfig,
}

impl SparseLinearAttention {
    /// Attention of `q [B, Hq, Lq, D]` over `k [B, Hkv, Lk, D]` and `v [B, Hkv, Lk, D]`, any
    /// strides, f32, f16 or bf16; returns `[B, Hq, Lq, D]` in their type.
    ///
    /// # Errors
    /// [`Error`] for an argument that is refused, before anything is launched;
    /// [`Error::NotDifferentiable`] for router weights that were made to require gradients.
    ///
    /// # Panics
    /// Where only a launch can tell; with fusion that is when the result is read.
    pub fn try_forward(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
    ) -> Result<Tensor<4>, Error> {
        let blocks = self.try_route(q.clone(), k.clone())?;
        self.try_forward_with(q, k, v, &blocks)
    }

    /// [`try_forward`](Self::try_forward) over blocks that were chosen before, by
    /// [`try_route`](Self::try_route) or by hand.
    ///
    /// # Errors
    /// As for [`try_forward`](Self::try_forward).
    pub fn try_forward_with(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        blocks: &Blocks,
    ) -> Result<Tensor<4>, Error> {
        let options = SlaOptions {
            attention: self.config.attention(),
            phi: self.config.feature_map.into(),
            linear: self.config.linear.into(),
        };
        match (&self.proj_l, &self.alpha_logit) {
            (Some(projection), _) => {
                let weight = projection.weight.val();
                let bias = match &projection.bias {
                    Some(bias) => bias.val(),
                    None => Tensor::zeros([weight.dims()[1]], &weight.device()),
                };
                try_sla(q, k, v, weight, bias, blocks, &options)
            }
            (None, Some(logit)) => try_sla2(q, k, v, logit.val(), blocks, &options),
            (None, None) => unreachable!("a module has the weights of its variant"),
        }
    }

    /// The blocks that the module's router chooses for `q` and `k`.
    ///
    /// # Errors
    /// As for [`try_forward`](Self::try_forward).
    pub fn try_route(&self, q: Tensor<4>, k: Tensor<4>) -> Result<Blocks, Error> {
        let weights = self.proj_q.as_ref().zip(self.proj_k.as_ref());
        let options = RouterOptions {
            critical: self.config.critical,
            mass: self.config.mass.map(|mass| mass as f32),
            negligible: self.config.negligible(),
            weights: weights.map(|(proj_q, proj_k)| RouterWeights {
                proj_q: proj_q.weight.val(),
                proj_k: proj_k.weight.val(),
            }),
        };
        let routing = try_route(q, k, &self.config.attention(), &options)?;
        Ok(routing.blocks)
    }

    /// [`try_forward`](Self::try_forward) that panics with the message of its error.
    ///
    /// # Panics
    /// Where [`try_forward`](Self::try_forward) returns an error.
    #[track_caller]
    pub fn forward(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
        unwrap("SparseLinearAttention", self.try_forward(q, k, v))
    }
}
