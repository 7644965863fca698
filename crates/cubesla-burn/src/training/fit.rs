//! A loop of optimiser steps.

use burn_core::module::Module;
use burn_core::tensor::Tensor;
use burn_optim::{GradientsParams, ModuleOptimizer};
use indicatif::{ProgressBar, ProgressStyle};

use super::Resume;
use crate::Error;

/// What a caller chooses about [`fit`].
#[derive(Clone, Debug)]
pub struct FitOptions {
    /// Steps in all, those of earlier runs that are resumed included.
    pub steps: usize,
    /// The optimiser's.
    pub learning_rate: f64,
    /// Where the state is kept, and resumed from if there is one.
    pub resume: Option<Resume>,
}

/// What [`fit`] returns.
#[derive(Clone, Debug)]
pub struct Fit<M> {
    /// The trained module.
    pub model: M,
    /// The loss before each step.
    pub losses: Vec<f32>,
}

/// Lowers `loss(model, step)`, a scalar, step by step, with a progress bar on a terminal.
///
/// `model` is on an autodiff device. The loss is read after every step, so the device is waited for.
/// With [`Resume`] a run that was stopped goes on where its folder left it, as if it had not been: the
/// loss must then depend on nothing but the model and the number of the step.
///
/// # Errors
/// Those of `loss`, and [`Error::Resume`].
pub fn fit<M: Module>(
    model: M,
    optimizer: ModuleOptimizer,
    options: &FitOptions,
    mut loss: impl FnMut(&M, usize) -> Result<Tensor<1>, Error>,
) -> Result<Fit<M>, Error> {
    let (mut model, mut optimizer) = (model, optimizer);
    let mut losses = Vec::with_capacity(options.steps);
    if let Some(resume) = &options.resume {
        (model, optimizer, losses) = resume.read(model, optimizer)?;
    }
    let style = ProgressStyle::with_template("{bar:30} step {pos}/{len}, loss {msg}, {eta} left");
    let bar = ProgressBar::new(options.steps as u64)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_position(losses.len() as u64);
    while losses.len() < options.steps {
        let value = loss(&model, losses.len())?;
        let grads = GradientsParams::from_grads(value.backward(), &model);
        model = optimizer.step(options.learning_rate, model, grads);
        let value = value.into_scalar::<f32>();
        losses.push(value);
        bar.set_message(format!("{value:.3e}"));
        bar.inc(1);
        if let Some(resume) = &options.resume {
            resume.write(&model, &optimizer, &losses, options.steps)?;
        }
    }
    bar.finish_and_clear();
    Ok(Fit { model, losses })
}
