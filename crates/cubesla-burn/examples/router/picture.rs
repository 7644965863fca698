//! The distance to full attention by sparsity, as a PNG.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use super::{METHODS, Point};

/// Draws a line for each method on the queries that it was trained on, dots for those held out.
pub fn draw(path: &Path, points: &[Point]) -> Result<(), Box<dyn Error>> {
    register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| "the font cannot be read")?;
    let root = BitMapBackend::new(path, (900, 560)).into_drawing_area();
    root.fill(&WHITE)?;
    let sparsity = |point: &Point| 100.0 * point.sparsity;
    let first = points.iter().map(sparsity).fold(100.0, f64::min);
    let distances = points
        .iter()
        .flat_map(|point| point.distances.as_flattened());
    let top = 1.2 * distances.copied().fold(0.0f32, f32::max);
    let mut chart = ChartBuilder::on(&root)
        .caption("Distance to full attention", ("sans-serif", 24))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(first - 1.0..100.0, 0.0..top)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("key blocks left out of exact attention, %")
        .y_desc("|O - full| / |full|")
        .draw()?;
    for (method, name) in METHODS.iter().enumerate() {
        let color = Palette99::pick(method).to_rgba();
        let line: Vec<_> = points
            .iter()
            .map(|point| (sparsity(point), point.distances[0][method]))
            .collect();
        let line = PathElement::new(line, color.stroke_width(2));
        chart
            .draw_series(std::iter::once(line))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
        chart.draw_series(points.iter().map(|point| {
            let at = (sparsity(point), point.distances[1][method]);
            Circle::new(at, 4, color.filled())
        }))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}
