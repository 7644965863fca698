//! SLA2's first stage.

use burn_core::tensor::Tensor;
use burn_optim::AdamConfig;

use super::{Fit, FitOptions, fit, full_attention};
use crate::{Error, SparseLinearAttention, convert};

/// What a caller chooses about [`train_router`].
#[derive(Clone, Debug)]
pub struct RouterTraining {
    /// Temperature of SoftTop-k, above 0; the paper's is 0.1.
    pub tau: f32,
    /// Steps of Adam.
    pub fit: FitOptions,
}

/// Trains the router's projections and alpha of `module` so that SLA2 with a soft mask comes close to
/// full attention: the mean squared error of the outputs of `batch(step)`, which are `q`, `k` and `v` as
/// the module takes them, untracked. The module is on an autodiff device and comes back with a frozen
/// router.
///
/// Full attention is computed anew in every step, without storing scores.
///
/// # Errors
/// [`Error::FirstStage`] for a module that has no first stage, [`Error::NotDifferentiable`] for tracked
/// inputs, [`Error::Resume`], and what [`SparseLinearAttention::try_forward_soft`] refuses.
pub fn train_router(
    module: SparseLinearAttention,
    options: &RouterTraining,
    mut batch: impl FnMut(usize) -> [Tensor<4>; 3],
) -> Result<Fit<SparseLinearAttention>, Error> {
    module.first_stage()?;
    let optimizer = AdamConfig::new().init();
    let module = module.with_router_gradients(true);
    let trained = fit(module, optimizer, &options.fit, |module, step| {
        let [q, k, v] = batch(step);
        let attention = module.config.attention();
        let full = full_attention(q.clone(), k.clone(), v.clone(), &attention)?;
        let soft = module.try_forward_soft(q, k, v, options.tau)?;
        let difference = convert::to_f32(soft) - convert::to_f32(full);
        Ok(difference.powi_scalar(2).mean())
    })?;
    Ok(Fit {
        model: trained.model.with_router_gradients(false),
        losses: trained.losses,
    })
}
