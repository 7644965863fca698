//! One picture: held-out losses by step of training.

use std::path::{Path, PathBuf};

use plotters::prelude::*;

use super::training::{Arm, Losses};
use crate::error::Error;
use crate::plot::{self, Curve, DrawResult, FAINT, text};

const SIZE: (u32, u32) = (1100, 760);

/// Draws the curves into `qat.png` in `folder`.
pub fn draw(folder: &Path, results: &[(Arm, Vec<Losses>)]) -> Result<PathBuf, Error> {
    plot::write(folder.join("qat.png"), |path| render(path, results))
}

fn render(path: &Path, results: &[(Arm, Vec<Losses>)]) -> DrawResult {
    plot::register_fonts()?;
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
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let last = all().map(|at| at.0).fold(1.0, f64::max);
    let top = 1.1 * all().map(|at| at.1).fold(1e-6, f64::max);
    let canvas = BitMapBackend::new(path, SIZE).into_drawing_area();
    canvas.fill(&WHITE)?;
    let caption = "Attention in INT8 and FP8 with outlier channels, by what trained the layer";
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
        .y_desc("loss on held-out inputs")
        .axis_desc_style(text(&canvas, 20))
        .label_style(text(&canvas, 18))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .draw()?;
    plot::curves(
        &canvas,
        &mut chart,
        &curves,
        SeriesLabelPosition::MiddleRight,
    )?;
    canvas.present()?;
    Ok(())
}
