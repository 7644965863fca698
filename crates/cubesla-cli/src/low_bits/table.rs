//! The tables of accuracy.

use comfy_table::Table;

use super::accuracy::Row;
use crate::common;

/// What the columns mean.
pub const LEGEND: &str = "\
Dense attention in low bits against exact attention in f64 on the same inputs.

scores      format of queries and keys, a scale to each block; first the inputs' own
values      format of weights and values
cosine      of the angle between the device's result and the exact one
L1          norm of their difference, relative to that of the exact result
unsmoothed  the same of the f64 reference if the mean key is not taken from the keys
";

/// One row for each choice of formats.
pub fn table(rows: &[Row]) -> Table {
    let header = [
        "scores",
        "values",
        "cosine",
        "L1",
        "unsmoothed cosine",
        "unsmoothed L1",
    ];
    let mut table = common::table(header, 2);
    for row in rows {
        let [scores, values] = row.formats.clone();
        let cosine = |x: f64| format!("{x:.5}");
        let l1 = |x: f64| format!("{x:.4}");
        let rough = row.unsmoothed;
        table.add_row([
            scores,
            values,
            cosine(row.device.cosine),
            l1(row.device.l1),
            rough.map_or("-".into(), |rough| cosine(rough.cosine)),
            rough.map_or("-".into(), |rough| l1(rough.l1)),
        ]);
    }
    table
}

/// What training won back, in a line.
pub fn training(distances: &[f64]) -> String {
    let (first, last) = (distances[0], distances[distances.len() - 1]);
    format!(
        "Quantization-aware training, INT8 and FP8: relative error {first:.4} before, {last:.4} after \
         {} steps",
        distances.len() - 1
    )
}
