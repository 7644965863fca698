//! One picture a layer: errors over sparsity.

use std::path::{Path, PathBuf};

use plotters::prelude::*;

use super::measure::{Point, Routing};
use crate::error::Error;
use crate::layers::Layer;
use crate::plot::{self, Curve, DrawResult, FAINT, file_name, text};

const SIZE: (u32, u32) = (1400, 900);

type Read = fn(&Point) -> f64;
const METHODS: [(&str, Read); 3] = [
    ("sparse branch alone", |point| point.sparse),
    ("SLA, fitted", |point| point.sla_fitted),
    ("SLA2, fitted", |point| point.sla2_fitted),
];

/// Draws the errors of `layer` into a PNG of its name in `folder`.
pub fn draw(folder: &Path, layer: &Layer, points: &[Point]) -> Result<PathBuf, Error> {
    let path = folder.join(format!("{}.png", file_name(&layer.name)));
    plot::write(path, |path| render(path, layer, points))
}

fn curves(points: &[Point]) -> Vec<Curve> {
    let routings = [Routing::Heuristic, Routing::Oracle];
    let curve = |(routing, (name, read)): (Routing, (&str, Read))| {
        let mut curve = Curve {
            label: format!("{name}, {routing}"),
            points: Vec::new(),
        };
        for point in points.iter().filter(|point| point.routing == routing) {
            let [critical, all] = point.blocks;
            let left_out = 100.0 * (1.0 - critical as f64 / all as f64);
            curve.points.push((left_out, read(point)));
        }
        curve
    };
    let each = |routing| METHODS.map(|method| (routing, method));
    routings.into_iter().flat_map(each).map(curve).collect()
}

fn render(path: &Path, layer: &Layer, points: &[Point]) -> DrawResult {
    plot::register_fonts()?;
    let curves = curves(points);
    let errors = curves.iter().flat_map(|curve| &curve.points);
    let top = 1.25 * errors.map(|at| at.1).fold(0.0, f64::max).max(1e-6);
    let canvas = BitMapBackend::new(path, SIZE).into_drawing_area();
    canvas.fill(&WHITE)?;
    let p = &layer.problem;
    let caption = format!(
        "Error against full attention, {}: L = {}, D = {}, blocks of {} queries by {} keys",
        layer.name,
        p.key_len(),
        p.head_dim(),
        p.block_q(),
        p.block_k()
    );
    let left_out = curves.iter().flat_map(|curve| &curve.points);
    let first = left_out.map(|at| at.0).fold(100.0, f64::min);
    let mut chart = ChartBuilder::on(&canvas)
        .caption(caption, text(&canvas, 24))
        .margin(24)
        .x_label_area_size(60)
        .y_label_area_size(90)
        .build_cartesian_2d(first - 2.0..101.0, 0.0..top)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .axis_style(FAINT)
        .x_desc("key blocks left out of exact attention, %")
        .y_desc("relative error")
        .axis_desc_style(text(&canvas, 20))
        .label_style(text(&canvas, 18))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .draw()?;
    plot::curves(&canvas, &mut chart, &curves, SeriesLabelPosition::UpperLeft)?;
    canvas.present()?;
    Ok(())
}
