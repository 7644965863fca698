//! A layer that learns what another one does, in full precision and with low bits in its forward.

use indicatif::ProgressBar;

use super::attention::{Attention, Backward, Branches};
use super::layer::Layer;
use super::{BATCH, CHANNELS, LEN, Random};
use crate::error::Error;

/// Batches that no step has seen.
const HELD_OUT: usize = 4;
/// Steps from one point of a curve to the next.
const INTERVAL: usize = 25;

/// How the forward and the backward of training compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arm {
    /// In full precision.
    Full,
    /// The forward in low bits.
    Low(Backward),
}

impl Arm {
    pub const ALL: [Self; 4] = [
        Self::Full,
        Self::Low(Backward::Rounded),
        Self::Low(Backward::Exact),
        Self::Low(Backward::AsIs),
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full precision",
            Self::Low(Backward::Rounded) => "low bits; backward at rounded Q, K and V",
            Self::Low(Backward::Exact) => "low bits; backward at Q, K and V, exact O",
            Self::Low(Backward::AsIs) => "low bits; backward at Q, K and V, low-bit O",
        }
    }
}

/// `|Y - target|^2 / |target|^2` over the held-out batches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Losses {
    /// Steps before.
    pub step: usize,
    /// With attention in low bits.
    pub low: f64,
    /// With attention in full precision.
    pub full: f64,
}

pub fn last(curve: &[Losses]) -> Losses {
    *curve.last().expect("a curve has a point")
}

/// The share of what low bits cost the control that another training does not lose.
pub fn won_back(control: Losses, other: Losses) -> f64 {
    (control.low - other.low) / (control.low - control.full)
}

/// A layer to learn from, and inputs.
pub struct Experiment<'a> {
    attention: &'a Attention,
    teacher: Layer,
    disturbed: Layer,
    held_out: Vec<Vec<f32>>,
    seed: u64,
    rate: f32,
}

impl<'a> Experiment<'a> {
    pub fn new(attention: &'a Attention, seed: u64, rate: f32) -> Self {
        let mut random = Random::new(seed);
        let teacher = Layer::with_outliers(&mut random);
        Self {
            attention,
            held_out: (0..HELD_OUT).map(|_| inputs(&mut random)).collect(),
            disturbed: teacher.disturbed(0.1, &mut random),
            teacher,
            seed,
            rate,
        }
    }

    /// The layer to learn from, which in full precision has nothing to learn.
    #[cfg(test)]
    pub fn teacher(&self) -> &Layer {
        &self.teacher
    }

    /// A layer with weights 10 % off, after so many steps in full precision.
    pub fn pretrained(&self, steps: usize, progress: &ProgressBar) -> Result<Layer, Error> {
        let mut layer = self.disturbed.clone();
        let seed = self.seed + 1000;
        self.train(&mut layer, Arm::Full, seed, steps, progress, |_, _| Ok(()))?;
        Ok(layer)
    }

    /// Losses on the way of a layer that starts as `start`. All trainings see the same inputs.
    pub fn curve(
        &self,
        start: &Layer,
        arm: Arm,
        steps: usize,
        progress: &ProgressBar,
    ) -> Result<Vec<Losses>, Error> {
        let mut layer = start.rested();
        let mut curve = vec![self.losses(&layer, 0)?];
        progress.set_message(arm.name());
        let seed = self.seed + 2000;
        self.train(&mut layer, arm, seed, steps, progress, |layer, step| {
            if step % INTERVAL == 0 || step == steps {
                curve.push(self.losses(layer, step)?);
            }
            Ok(())
        })?;
        Ok(curve)
    }

    fn train(
        &self,
        layer: &mut Layer,
        arm: Arm,
        seed: u64,
        steps: usize,
        progress: &ProgressBar,
        mut after: impl FnMut(&Layer, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut random = Random::new(seed);
        let (low, backward) = match arm {
            Arm::Full => (false, Backward::AsIs),
            Arm::Low(backward) => (true, backward),
        };
        for step in 0..steps {
            let x = inputs(&mut random);
            let (difference, _, branches) = self.difference(layer, &x, low)?;
            let rate = self.rate * (1.0 - step as f32 / steps as f32);
            let how = (self.attention, backward);
            layer.step(&x, &branches, &difference, how, rate)?;
            after(layer, step + 1)?;
            progress.inc(1);
        }
        Ok(())
    }

    fn losses(&self, layer: &Layer, step: usize) -> Result<Losses, Error> {
        let loss = |low| {
            let losses = self.held_out.iter();
            let losses = losses.map(|x| Ok(self.difference(layer, x, low)?.1));
            Ok::<f64, Error>(losses.sum::<Result<f64, Error>>()? / HELD_OUT as f64)
        };
        Ok(Losses {
            step,
            low: loss(true)?,
            full: loss(false)?,
        })
    }

    /// `Y - target`, the loss, and what gradients need.
    fn difference(
        &self,
        layer: &Layer,
        x: &[f32],
        low: bool,
    ) -> Result<(Vec<f32>, f64, Branches), Error> {
        let (target, _) = self.teacher.forward(x, self.attention, false)?;
        let (y, branches) = layer.forward(x, self.attention, low)?;
        let difference: Vec<f32> = y.iter().zip(&target).map(|(y, t)| y - t).collect();
        let square = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        let loss = square(&difference) / square(&target);
        Ok((difference, loss, branches))
    }
}

/// Standard normals, `[BATCH LEN, CHANNELS]`.
fn inputs(random: &mut Random) -> Vec<f32> {
    let normals = std::iter::repeat_with(|| random.normal());
    normals.take(BATCH * LEN * CHANNELS).collect()
}
