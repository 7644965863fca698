//! One picture: held-out losses by step of training.

use std::path::{Path, PathBuf};

use plotters::prelude::SeriesLabelPosition;

use super::training::{Arm, Losses};
use crate::error::Error;
use crate::plot::{self, Curve, DrawResult, Training};

const SIZE: (u32, u32) = (1100, 760);

/// Draws the curves into `qat.png` in `folder`.
pub fn draw(folder: &Path, results: &[(Arm, Vec<Losses>)]) -> Result<PathBuf, Error> {
    plot::write(folder.join("qat.png"), |path| render(path, results))
}

fn render(path: &Path, results: &[(Arm, Vec<Losses>)]) -> DrawResult {
    let points = |curve: &[Losses], loss: fn(&Losses) -> f64| -> Vec<(f64, f64)> {
        let curve = curve.iter();
        curve.map(|at| (at.step as f64, loss(at))).collect()
    };
    let mut curves: Vec<Curve> = results
        .iter()
        .map(|(arm, curve)| Curve {
            label: arm.name().into(),
            points: points(curve, |at| at.low),
        })
        .collect();
    let (arm, control) = &results[0];
    curves.push(Curve {
        label: format!("{}, evaluated in it", arm.name()),
        points: points(control, |at| at.full),
    });
    let training = Training {
        caption: "Attention in INT8 and FP8 with outlier channels, by what trained the layer",
        quantity: "loss on held-out inputs",
        room: 1.1,
        digits: 2,
        legend: SeriesLabelPosition::MiddleRight,
        size: SIZE,
    };
    plot::by_step(path, training, &curves)
}
