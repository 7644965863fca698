//! Relative error of each head at each sparsity, with and without the linear branch.

use plotters::prelude::*;

use super::{Method, Run, whole};
use crate::plot::{Area, DrawResult, FAINT, INK, PALE, text};

/// From the least sparse to the most.
const SHADES: [RGBColor; 3] = [
    RGBColor(94, 201, 98),
    RGBColor(33, 145, 140),
    RGBColor(68, 1, 84),
];
/// Share of a head's place that its bars fill.
const FILLED: f64 = 0.78;
/// Height of the axis over the highest bar, which leaves room for the legend.
const HEADROOM: f64 = 1.4;

/// `shown` is the head of the maps.
pub fn draw(area: &Area<'_>, runs: &[Run], shown: usize) -> DrawResult {
    let of = |method| -> Vec<&Run> { runs.iter().filter(|run| run.method == method).collect() };
    let (sla2, sparse) = (of(Method::Sla2), of(Method::Sparse));
    let heads = sla2[0].head_errors.len();
    let highest = sla2
        .iter()
        .chain(&sparse)
        .flat_map(|run| &run.head_errors)
        .copied()
        .fold(0.0, f64::max);
    let top = if highest > 0.0 {
        HEADROOM * highest
    } else {
        1.0
    };
    let decimals = (1.0 - top.log10().floor()).clamp(1.0, 9.0) as usize;

    let mut chart = ChartBuilder::on(area)
        .caption(
            "Relative error of SLA2 against full attention, by head; line: of its sparse branch alone",
            text(area, 21),
        )
        .margin(16)
        .margin_left(32)
        .x_label_area_size(54)
        .y_label_area_size(64)
        .build_cartesian_2d(-0.5..heads as f64 - 0.5, 0.0..top)?;
    let at = shown as f64;
    chart.draw_series([Rectangle::new(
        [(at - 0.5, 0.0), (at + 0.5, top)],
        PALE.filled(),
    )])?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .axis_style(FAINT)
        .x_desc("head (shaded: the one above)")
        .y_desc("relative error")
        .axis_desc_style(text(area, 18))
        .label_style(text(area, 16))
        .x_labels(heads.min(32))
        .x_label_formatter(&whole)
        .y_label_formatter(&|y| format!("{y:.decimals$}"))
        .draw()?;

    let width = FILLED / sla2.len() as f64;
    for (n, (run, shade)) in sla2.iter().zip(SHADES).enumerate() {
        let start = n as f64 * width - FILLED / 2.0;
        let bars = run.head_errors.iter().enumerate().map(|(head, &error)| {
            let x = head as f64 + start;
            Rectangle::new([(x, 0.0), (x + width, error)], shade.filled())
        });
        chart
            .draw_series(bars)?
            .label(format!("{} % of the blocks left out", run.sparsity))
            .legend(move |(x, y)| Rectangle::new([(x, y - 6), (x + 16, y + 6)], shade.filled()));
        let lines = sparse[n]
            .head_errors
            .iter()
            .enumerate()
            .map(|(head, &error)| {
                let x = head as f64 + start;
                PathElement::new([(x, error), (x + width, error)], INK.stroke_width(2))
            });
        chart.draw_series(lines)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.9))
        .border_style(FAINT)
        .label_font(text(area, 18))
        .draw()?;
    Ok(())
}
