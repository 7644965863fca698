//! What several commands share.

use std::error::Error;
use std::iter::successors;
use std::time::Duration;

use comfy_table::{CellAlignment, Row, Table, presets};
use cubesla::DType;
use indicatif::{ProgressBar, ProgressStyle};

/// Parses an element type.
pub fn dtype(name: &str) -> Result<DType, String> {
    DType::ALL
        .into_iter()
        .find(|dtype| dtype.to_string() == name)
        .ok_or_else(|| "use f32, f16 or bf16".into())
}

/// A bar of so many steps.
pub fn progress(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{elapsed} [{bar:32}] {pos}/{len} {msg}")
        .expect("a valid template")
        .progress_chars("=> ");
    let bar = ProgressBar::new(steps as u64).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// A table in Markdown, whose columns after the first `words` hold numbers, aligned to the right.
pub fn table(header: impl Into<Row>, words: usize) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(header);
    for column in table.column_iter_mut().skip(words) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// What caused an error, and what caused that.
pub fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    successors(error.source(), |&cause| cause.source())
}
