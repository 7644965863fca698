//! The distance to full attention by step, as a PNG.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

/// Draws one curve for each (sparsity, distance of sparse attention alone, distance by step).
pub fn draw(path: &Path, curves: &[(f64, f32, Vec<f32>)]) -> Result<(), Box<dyn Error>> {
    register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| "the font cannot be read")?;
    let root = BitMapBackend::new(path, (900, 560)).into_drawing_area();
    root.fill(&WHITE)?;
    let steps = curves.iter().map(|(_, _, curve)| curve.len()).max();
    let tops = curves
        .iter()
        .flat_map(|(_, sparse, curve)| [*sparse, curve[0]]);
    let top = tops.fold(0.0f32, f32::max);
    let mut chart = ChartBuilder::on(&root)
        .caption("SLA2's distance to full attention", ("sans-serif", 24))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0..steps.unwrap_or(1), 0.0..1.1 * top)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("|O - full| / |full|")
        .draw()?;
    for (at, (sparsity, sparse, curve)) in curves.iter().enumerate() {
        let color = Palette99::pick(at).to_rgba();
        let points: Vec<_> = curve.iter().copied().enumerate().collect();
        let line = PathElement::new(points, color.stroke_width(2));
        chart
            .draw_series(std::iter::once(line))?
            .label(format!("{:.1} % sparse", 100.0 * sparsity))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color));
        let level = vec![(0, *sparse), (curve.len() - 1, *sparse)];
        let line = PathElement::new(level, color.stroke_width(1));
        chart.draw_series(std::iter::once(line))?;
    }
    chart
        .configure_series_labels()
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}
