//! What pictures share: colours, fonts, files, and curves.

use std::fs;
use std::path::{Path, PathBuf};

use plotters::coord::ranged1d::{Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::register_font;

use crate::error::Error;

/// The family of the built-in fonts.
pub const FONT: &str = "sans-serif";
/// Text.
pub const INK: RGBColor = RGBColor(38, 38, 46);
/// Axes and asides.
pub const FAINT: RGBColor = RGBColor(120, 120, 130);
/// What lies in the background.
pub const PALE: RGBColor = RGBColor(237, 238, 242);

/// A part of a picture.
pub type Area<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;
/// Drawing fails in many ways.
pub type DrawResult<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Makes the built-in fonts known; text cannot be drawn before.
pub fn register_fonts() -> DrawResult {
    for (style, bytes) in [
        (FontStyle::Normal, dejavu::sans::regular()),
        (FontStyle::Bold, dejavu::sans::bold()),
    ] {
        register_font(FONT, style, bytes).map_err(|_| "the built-in font is damaged")?;
    }
    Ok(())
}

/// Draws into the file `path`, whose folder is made if need be.
pub fn write(path: PathBuf, draw: impl FnOnce(&Path) -> DrawResult) -> Result<PathBuf, Error> {
    let folder = path.parent().unwrap_or(Path::new(""));
    let drawn = fs::create_dir_all(folder)
        .map_err(Into::into)
        .and_then(|()| draw(&path));
    match drawn {
        Ok(()) => Ok(path),
        Err(source) => Err(Error::Write { path, source }),
    }
}

/// `name` without what a path could stumble over.
pub fn file_name(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    name.chars()
        .map(|c| if plain(c) { c } else { '_' })
        .collect()
}

/// Text of that size.
pub fn text(area: &Area<'_>, size: u32) -> TextStyle<'static> {
    (FONT, size).into_text_style(area).color(&INK)
}

/// A line through points, with its name.
pub struct Curve {
    /// What the legend says.
    pub label: String,
    /// `(x, y)`, by rising x.
    pub points: Vec<(f64, f64)>,
}

/// Colours of curves, told apart also by those who do not see all (Okabe and Ito).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
    RGBColor(0, 0, 0),
];

/// Draws the curves, a dot at each point, and their legend into a chart whose axes are drawn.
pub fn curves<'a, 'b: 'a, X, Y>(
    area: &Area<'_>,
    chart: &mut ChartContext<'a, BitMapBackend<'b>, Cartesian2d<X, Y>>,
    curves: &[Curve],
    legend: SeriesLabelPosition,
) -> DrawResult
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    for (curve, colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let stroke = colour.stroke_width(3);
        chart
            .draw_series([PathElement::new(curve.points.clone(), stroke)])?
            .label(&curve.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], stroke));
        let dots = curve.points.iter();
        chart.draw_series(dots.map(|&at| Circle::new(at, 5, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(legend)
        .background_style(WHITE.mix(0.85))
        .border_style(FAINT)
        .label_font(text(area, 17))
        .draw()?;
    Ok(())
}

/// What a picture of a training says beside its curves.
pub struct Training<'a> {
    pub caption: &'a str,
    /// Of the vertical axis.
    pub quantity: &'a str,
    /// How much of the picture lies above the highest point, as a factor.
    pub room: f64,
    /// Of the numbers on that axis.
    pub digits: usize,
    pub legend: SeriesLabelPosition,
    /// Pixels.
    pub size: (u32, u32),
}

/// Draws `lines` by step of training, from step and value 0 on, into the file `path`.
pub fn by_step(path: &Path, training: Training<'_>, lines: &[Curve]) -> DrawResult {
    register_fonts()?;
    let all = || lines.iter().flat_map(|curve| &curve.points);
    let last = all().map(|at| at.0).fold(1.0, f64::max);
    let top = training.room * all().map(|at| at.1).fold(1e-6, f64::max);
    let canvas = BitMapBackend::new(path, training.size).into_drawing_area();
    canvas.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&canvas)
        .caption(training.caption, text(&canvas, 24))
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
        .y_desc(training.quantity)
        .axis_desc_style(text(&canvas, 20))
        .label_style(text(&canvas, 18))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.*}", training.digits))
        .draw()?;
    curves(&canvas, &mut chart, lines, training.legend)?;
    canvas.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_file_names() {
        assert_eq!(file_name("model.layers.0/attn 1"), "model.layers.0_attn_1");
    }
}
