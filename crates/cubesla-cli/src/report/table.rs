//! The tables of errors.

use comfy_table::Table;

use super::measure::Point;
use crate::common;

/// What the columns mean, and what the fits are worth.
pub const LEGEND: &str = "\
Relative errors |out - full| / |full| of the device's outputs against full attention in f64.

blocks          who chose the critical blocks: the router, from block means, or the oracle, which
                takes those with the most softmax mass and has to know full attention for that
sparsity        share left out, and the critical blocks of a row
attention kept  mean softmax mass of the critical blocks
sparse          the sparse branch alone
SLA, W = 0      SLA as its training begins, with a projection of zero: the sparse branch again
SLA, W fitted   SLA with one Wl and bl for the layer, fitted by least squares with a small ridge
SLA2, a fitted  SLA2 with a weight a in [0, 1] for each head and block of queries, fitted likewise
mean a          mean of these weights

Fits are made on the tensors shown, so their errors are a lower bound for what training can reach on
these inputs with the model as it is. The linear branch sums over the blocks that are not critical.
";

/// One row for each sparsity and routing.
pub fn table(points: &[Point]) -> Table {
    let header = [
        "blocks",
        "sparsity",
        "attention kept",
        "sparse",
        "SLA, W = 0",
        "SLA, W fitted",
        "SLA2, a fitted",
        "mean a",
    ];
    let mut table = common::table(header, 1);
    for point in points {
        let [critical, all] = point.blocks;
        let sparsities: Vec<String> = point.sparsities.iter().map(usize::to_string).collect();
        table.add_row([
            point.routing.to_string(),
            format!("{} %: {critical} of {all}", sparsities.join(", ")),
            format!("{:.1} %", 100.0 * point.kept),
            format!("{:.3}", point.sparse),
            format!("{:.3}", point.sla_zero),
            format!("{:.3}", point.sla_fitted),
            format!("{:.3}", point.sla2_fitted),
            format!("{:.2}", point.alpha),
        ]);
    }
    table
}
