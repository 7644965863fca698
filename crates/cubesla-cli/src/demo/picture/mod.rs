//! One picture a layer: the blocks of exact attention beside all attention, and errors by head.

mod bars;
mod maps;

use std::path::{Path, PathBuf};

use plotters::prelude::*;

use super::measure::{Method, Run};
use crate::error::Error;
use crate::layers::Layer;
use crate::plot::{self, Area, DrawResult, FAINT, FONT, INK, file_name};

const SIZE: (u32, u32) = (1600, 1250);
/// Height of the title and of the maps; the bars have the rest.
const TITLE: u32 = 84;
const MAPS: u32 = 706;

/// Percent left out in the map of chosen blocks.
const SHOWN_SPARSITY: usize = 75;

/// Draws `layer` into a PNG of its name in `folder`, which is made if need be.
pub fn draw(folder: &Path, layer: &Layer, runs: &[Run]) -> Result<PathBuf, Error> {
    let path = folder.join(format!("{}.png", file_name(&layer.name)));
    plot::write(path, |path| render(path, layer, runs))
}

fn render(path: &Path, layer: &Layer, runs: &[Run]) -> DrawResult {
    plot::register_fonts()?;
    let shown = runs
        .iter()
        .find(|run| run.method == Method::Sla2 && run.sparsity == SHOWN_SPARSITY)
        .ok_or("no run has the sparsity to show")?;
    let head = median_head(&shown.head_errors);

    let canvas = BitMapBackend::new(path, SIZE).into_drawing_area();
    canvas.fill(&WHITE)?;
    let (title, rest) = canvas.split_vertically(TITLE);
    let (maps, bars) = rest.split_vertically(MAPS);
    draw_title(&title, layer)?;
    maps::draw(&maps, layer, shown, head)?;
    bars::draw(&bars, runs, head)?;
    canvas.present()?;
    Ok(())
}

/// The head whose error is the median: neither the easiest nor the hardest.
fn median_head(errors: &[f64]) -> usize {
    let mut heads: Vec<usize> = (0..errors.len()).collect();
    heads.sort_by(|&a, &b| errors[a].total_cmp(&errors[b]));
    heads[heads.len() / 2]
}

fn draw_title(area: &Area<'_>, layer: &Layer) -> DrawResult {
    let p = &layer.problem;
    let sizes = format!(
        "B = {}, H = {}, Lq = {}, Lk = {}, D = {}, {}; blocks of {} queries by {} keys",
        p.batch(),
        p.query_heads(),
        p.query_len(),
        p.key_len(),
        p.head_dim(),
        p.dtype(),
        p.block_q(),
        p.block_k()
    );
    area.draw_text(
        &format!("Sparse-linear attention (SLA2), {}", layer.name),
        &(FONT, 30, FontStyle::Bold)
            .into_text_style(area)
            .color(&INK),
        (60, 24),
    )?;
    area.draw_text(
        &sizes,
        &(FONT, 20).into_text_style(area).color(&FAINT),
        (60, 60),
    )?;
    Ok(())
}

/// The label of a tick, which is empty between whole numbers; axes that run down count as positive.
fn whole(at: &f64) -> String {
    let near = at.round().abs();
    if (at.abs() - near).abs() < 1e-6 {
        format!("{near}")
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_between_whole_numbers_have_no_label() {
        assert_eq!(
            [-50.0, -0.0, 3.0, 0.5].map(|at| whole(&at)),
            ["50", "0", "3", ""]
        );
    }

    #[test]
    fn the_median_head_is_in_the_middle() {
        assert_eq!(median_head(&[0.3, 0.1, 0.2]), 2);
        assert_eq!(median_head(&[1.0]), 0);
    }
}
