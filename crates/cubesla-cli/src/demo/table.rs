//! The table of results, and the verdict.

use cubesla::DType;
use indicatif::BinaryBytes;

use super::Results;
use super::measure::CALLS;
use crate::common;
use crate::error::Error;

fn legend() -> String {
    format!(
        "\
sparsity        share of the key blocks that exact attention leaves out for each block of queries
blocks          share of exact attention, in whole blocks
attention kept  mean softmax mass that lies in the blocks of exact attention
kernel error    relative error of the device's result against the same in f64
approximation   relative error against attention to all keys, both in f64
time            median of {CALLS} calls after a first one, from launch until the device is done
speed-up        against the dense row
memory          inputs, block list and outputs on the device

The library's router chooses the blocks; its time is part of SLA2's. SLA2's weights of the sparse
branch are fitted to these very tensors, one for each head and block of queries, where training
would learn them: its approximation is what they can reach at best.
"
    )
}

/// A legend and one table over all layers.
pub fn table(results: &Results<'_>) -> String {
    let header = [
        "layer",
        "attention",
        "sparsity",
        "blocks",
        "attention kept",
        "kernel error",
        "approximation",
        "time",
        "speed-up",
        "memory",
    ];
    let mut table = common::table(header, 2);
    for (layer, runs) in results {
        for run in runs {
            let mass = run.head_mass.iter().sum::<f64>() / run.head_mass.len() as f64;
            let speed_up = runs[0].time.as_secs_f64() / run.time.as_secs_f64();
            table.add_row([
                layer.name.clone(),
                run.method.to_string(),
                format!("{} %", run.sparsity),
                format!("{:.1} %", 100.0 * run.list.density()),
                format!("{:.1} %", 100.0 * mass),
                format!("{:.1e}", run.kernel_error),
                format!("{:.3}", run.approximation_error),
                format!("{:.2} ms", 1e3 * run.time.as_secs_f64()),
                format!("{speed_up:.1}x"),
                BinaryBytes(run.bytes as u64).to_string(),
            ]);
        }
    }
    format!("{}\n{table}", legend())
}

/// An error at the first run whose kernel is further from the reference than its type allows.
pub fn check(results: &Results<'_>) -> Result<(), Error> {
    for (layer, runs) in results {
        let dtype = layer.problem.dtype();
        if let Some(run) = runs.iter().find(|run| !is_right(run.kernel_error, dtype)) {
            return Err(Error::Inaccurate {
                layer: layer.name.clone(),
                method: run.method.to_string(),
                sparsity: run.sparsity,
                error: run.kernel_error,
                bound: bound(dtype),
                dtype,
            });
        }
    }
    Ok(())
}

fn is_right(error: f64, dtype: DType) -> bool {
    // A NaN lies in no range.
    (0.0..=bound(dtype)).contains(&error)
}

/// The largest relative error of a kernel that is right.
fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 5e-3,
        DType::BF16 => 3e-2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_small_errors_are_right() {
        assert!(is_right(2e-4, DType::F16) && !is_right(2e-4, DType::F32));
        assert!(!is_right(f64::NAN, DType::F32) && !is_right(1.0, DType::BF16));
    }
}
