//! One picture a layer: the error by step of training.

use std::path::{Path, PathBuf};

use plotters::prelude::*;

use crate::error::Error;
use crate::layers::Layer;
use crate::plot::{self, Curve, DrawResult, FAINT, file_name, text};

const SIZE: (u32, u32) = (1100, 700);

/// Draws the distances of `layer` by step into a PNG of its name in `folder`.
pub fn draw(folder: &Path, layer: &Layer, distances: &[f64]) -> Result<PathBuf, Error> {
    let path = folder.join(format!("{}.png", file_name(&layer.name)));
    plot::write(path, |path| render(path, layer, distances))
}

fn render(path: &Path, layer: &Layer, distances: &[f64]) -> DrawResult {
    plot::register_fonts()?;
    let last = (distances.len() - 1).max(1) as f64;
    let top = 1.25 * distances.iter().copied().fold(1e-6, f64::max);
    let canvas = BitMapBackend::new(path, SIZE).into_drawing_area();
    canvas.fill(&WHITE)?;
    let caption = format!("Attention in INT8 and FP8, {}", layer.name);
    let mut chart = ChartBuilder::on(&canvas)
        .caption(caption, text(&canvas, 24))
        .margin(24)
        .x_label_area_size(60)
        .y_label_area_size(90)
        .build_cartesian_2d(0.0..last, 0.0..top)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .axis_style(FAINT)
        .x_desc("step of training")
        .y_desc("relative error against exact attention")
        .axis_desc_style(text(&canvas, 20))
        .label_style(text(&canvas, 18))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.3}"))
        .draw()?;
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
    plot::curves(&canvas, &mut chart, &curves, SeriesLabelPosition::LowerLeft)?;
    canvas.present()?;
    Ok(())
}
