//! One picture a layer: the error by step of training.

use std::path::{Path, PathBuf};

use plotters::prelude::SeriesLabelPosition;

use crate::error::Error;
use crate::layers::Layer;
use crate::plot::{self, Curve, DrawResult, Training, file_name};

const SIZE: (u32, u32) = (1100, 700);

/// Draws the distances of `layer` by step into a PNG of its name in `folder`.
pub fn draw(folder: &Path, layer: &Layer, distances: &[f64]) -> Result<PathBuf, Error> {
    let path = folder.join(format!("{}.png", file_name(&layer.name)));
    plot::write(path, |path| render(path, layer, distances))
}

fn render(path: &Path, layer: &Layer, distances: &[f64]) -> DrawResult {
    let last = (distances.len() - 1).max(1) as f64;
    let curves = [
        Curve {
            label: "quantization-aware training".into(),
            points: (0..)
                .map(f64::from)
                .zip(distances.iter().copied())
                .collect(),
        },
        Curve {
            label: "quantized as it is".into(),
            points: vec![(0.0, distances[0]), (last, distances[0])],
        },
    ];
    let training = Training {
        caption: &format!("Attention in INT8 and FP8, {}", layer.name),
        quantity: "relative error against exact attention",
        room: 1.25,
        digits: 3,
        legend: SeriesLabelPosition::LowerLeft,
        size: SIZE,
    };
    plot::by_step(path, training, &curves)
}
