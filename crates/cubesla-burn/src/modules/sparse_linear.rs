//! SLA and SLA2 as a module.

use burn_core as burn;
use burn_core::module::{Module, Param};
use burn_core::tensor::Tensor;
use burn_nn::Linear;

use super::SparseLinearAttentionConfig;
use super::{LinearModeConfig, SlaVariant};
use crate::error::unwrap;
use crate::{
    Blocks, Error, RouterOptions, RouterWeights, SlaOptions, try_route, try_router_scores, try_sla,
    try_sla2, try_sla2_soft, try_soft_top_k,
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
            precision: self.config.precision.into(),
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

    /// The forward of SLA2's first training stage: each block is in both branches, with the weight
    /// that SoftTop-k at temperature `tau` gives it in the sparse one. Differentiable in the logits of
    /// alpha and in the router's projections where they require gradients
    /// ([`with_router_gradients`](Self::with_router_gradients)); `q` and `k` must not be tracked.
    ///
    /// The rows' weights sum to the number of blocks that [`try_forward`](Self::try_forward) selects.
    ///
    /// # Errors
    /// [`Error::FirstStage`] for a module that it is not defined for: SLA, a router without weights, a
    /// mass, negligible blocks, or a linear branch over all keys. [`Error`] for an argument that is
    /// refused, before anything is launched.
    ///
    /// # Panics
    /// Where only a launch can tell; with fusion that is when the result is read.
    pub fn try_forward_soft(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        tau: f32,
    ) -> Result<Tensor<4>, Error> {
        let (weights, logit) = self.first_stage()?;
        let attention = self.config.attention();
        let scores = try_router_scores(q.clone(), k.clone(), &weights, &attention)?;
        let blocks = scores.dims()[3];
        let ratio = self.config.critical_blocks(blocks)? as f32 / blocks as f32;
        let soft = try_soft_top_k(scores, tau, ratio)?;
        let phi = self.config.feature_map.into();
        try_sla2_soft(q, k, v, soft, logit, &attention, phi)
    }

    /// The module with a router whose projections require gradients, for the first training stage, or
    /// do not, for everything else.
    pub fn with_router_gradients(mut self, require: bool) -> Self {
        let set = |linear: Option<Linear>| {
            linear.map(|mut linear| {
                linear.weight = linear.weight.set_require_grad(require);
                linear
            })
        };
        self.proj_q = set(self.proj_q);
        self.proj_k = set(self.proj_k);
        self
    }

    /// What the first stage trains, if the module is one for it.
    pub(crate) fn first_stage(&self) -> Result<(RouterWeights, Tensor<2>), Error> {
        let refuse = |why| Err(Error::FirstStage { why });
        if self.config.variant != SlaVariant::Sla2 {
            return refuse("only SLA2 has one: use `with_variant(SlaVariant::Sla2)`");
        }
        if self.config.mass.is_some() {
            return refuse("a soft selection has a fixed sum: leave `mass` out");
        }
        if self.config.negligible() > 0.0 {
            return refuse("no block is left out of a soft mask: use `with_negligible(Some(0.0))`");
        }
        if self.config.linear == LinearModeConfig::Global {
            return refuse(
                "a soft mask weighs the linear branch: use `LinearModeConfig::Complement`",
            );
        }
        match (self.router_weights(), &self.alpha_logit) {
            (Some(weights), Some(logit)) => Ok((weights, logit.val())),
            _ => refuse("there are no router weights: use `with_router_weights(true)`"),
        }
    }

    /// The blocks that the module's router chooses for `q` and `k`.
    ///
    /// # Errors
    /// As for [`try_forward`](Self::try_forward).
    pub fn try_route(&self, q: Tensor<4>, k: Tensor<4>) -> Result<Blocks, Error> {
        let options = RouterOptions {
            critical: self.config.critical,
            mass: self.config.mass.map(|mass| mass as f32),
            negligible: self.config.negligible(),
            weights: self.router_weights(),
        };
        let routing = try_route(q, k, &self.config.attention(), &options)?;
        Ok(routing.blocks)
    }

    fn router_weights(&self) -> Option<RouterWeights> {
        let projections = self.proj_q.as_ref().zip(self.proj_k.as_ref());
        projections.map(|(proj_q, proj_k)| RouterWeights {
            proj_q: proj_q.weight.val(),
            proj_k: proj_k.weight.val(),
        })
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
