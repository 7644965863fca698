//! Curves of time over length and over sparsity.

use std::path::{Path, PathBuf};

use plotters::prelude::*;

use super::cases::{Case, Series};
use super::compare::Peers;
use super::{Measured, Outcome};
use crate::error::Error;
use crate::plot::{self, Curve, DrawResult, FAINT, text};

const SIZE: (u32, u32) = (1400, 900);

/// One file for each series: over lengths, then over sparsities.
pub fn draw(
    folder: &Path,
    device: &str,
    series: [&[Series]; 2],
    outcomes: &[Outcome],
    peers: &Peers,
) -> Result<Vec<PathBuf>, Error> {
    let [by_length, by_sparsity] = series.map(|series| curves(series, outcomes, peers));
    let mut paths = Vec::new();
    for (name, curves, over_length) in [
        ("length.png", by_length, true),
        ("sparsity.png", by_sparsity, false),
    ] {
        if curves.iter().any(|curve| !curve.points.is_empty()) {
            let path = folder.join(name);
            paths.push(plot::write(path, |path| {
                picture(path, device, &curves, over_length)
            })?);
        }
    }
    Ok(paths)
}

/// Ours, then those of the peers that have a point.
fn curves(series: &[Series], outcomes: &[Outcome], peers: &Peers) -> Vec<Curve> {
    let ours = |case: &Case| {
        let outcome = outcomes.iter().find(|outcome| outcome.name == case.name)?;
        let Measured { timing, .. } = outcome.result.as_ref().ok()?;
        Some(timing.median)
    };
    let theirs = |case: &Case, implementation: &str| {
        let entries = peers.of(&case.name);
        let entry = entries
            .iter()
            .find(|e| e.implementation == implementation)?;
        Some(entry.median_ms)
    };
    let curve = |name: &str, series: &Series, y: &dyn Fn(&Case) -> Option<f64>| Curve {
        label: format!("{name} {}", series.label).trim_end().to_owned(),
        points: series
            .points
            .iter()
            .filter_map(|(x, case)| Some((*x, y(case)?)))
            .collect(),
    };
    let mut curves: Vec<Curve> = series.iter().map(|s| curve("cubesla", s, &ours)).collect();
    for name in peers.implementations() {
        curves.extend(
            series
                .iter()
                .map(|s| curve(name, s, &|case| theirs(case, name))),
        );
    }
    curves.retain(|curve| !curve.points.is_empty());
    curves
}

fn picture(path: &Path, device: &str, curves: &[Curve], over_length: bool) -> DrawResult {
    plot::register_fonts()?;
    let canvas = BitMapBackend::new(path, SIZE).into_drawing_area();
    canvas.fill(&WHITE)?;
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let least = |f: fn(&(f64, f64)) -> f64| points().map(f).fold(f64::INFINITY, f64::min);
    let most = |f: fn(&(f64, f64)) -> f64| points().map(f).fold(0.0, f64::max);
    let y = (0.7 * least(|p| p.1)..1.8 * most(|p| p.1)).log_scale();
    let mut builder = ChartBuilder::on(&canvas);
    builder
        .margin(24)
        .x_label_area_size(60)
        .y_label_area_size(90);
    macro_rules! chart {
        ($caption:expr, $x:expr, $description:expr, $legend:expr) => {{
            let mut chart = builder
                .caption(format!("{}, {device}", $caption), text(&canvas, 24))
                .build_cartesian_2d($x, y)?;
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .bold_line_style(BLACK.mix(0.12))
                .axis_style(FAINT)
                .x_desc($description)
                .y_desc("time of a call, ms")
                .axis_desc_style(text(&canvas, 20))
                .label_style(text(&canvas, 18))
                .x_label_formatter(&|x| format!("{x:.0}"))
                .y_label_formatter(&|ms| format!("{ms}"))
                .draw()?;
            plot::curves(&canvas, &mut chart, curves, $legend)?;
        }};
    }
    // The two axes are of different types.
    if over_length {
        let x = (0.9 * least(|p| p.0)..1.1 * most(|p| p.0))
            .log_scale()
            .base(2.0);
        let caption = "Dense attention, and with 95 % of the blocks left out";
        chart!(caption, x, "length", SeriesLabelPosition::UpperLeft);
    } else {
        let caption = "Sparse attention by sparsity";
        let description = "blocks left out, %";
        let legend = SeriesLabelPosition::LowerLeft;
        chart!(caption, -2.0..101.0, description, legend);
    }
    canvas.present()?;
    Ok(())
}
