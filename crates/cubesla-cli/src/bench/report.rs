//! The table of measurements.

use std::time::Duration;

use cubesla::DType;
use indicatif::BinaryBytes;

use super::compare::{Peers, ratios};
use super::{Measured, Outcome};
use crate::common;

const LEGEND: &str = "\
error          relative error of a sample of results against the f64 reference, in L1 for low bits;
               for top-k the share of wrong places, for the router by how much a block left out
               beats one taken
median, spread time of a call on the device and its 10th and 90th percentile, over batches of calls
               between two waits for the device
host           time for the host to enqueue a call
first          first call, which compiles what this process has not compiled yet
launches       kernels of a call
TFLOP/s        products of what is computed, by the formula: neither padding nor recomputation count
dense TFLOP/s  the products of dense attention of the same size over the same time: no rate of any
               unit, but what dense attention would need to be as fast
bytes          inputs read once and outputs written once
memory         what the first call made the device's allocator reserve for results and for what it needs
               between, in pages
";
const FLOOR: &str = "\
floor          the greater of products at 930 TFLOP/s, 1860 in 8 bits, and bytes at 4.2 TB/s, and its
               share of the time
";
const PEERS: &str = "\
peers          their median over ours: above 1 ours is faster
";

/// What an H100 or H200 reaches in products of 16 bits, and in memory traffic.
const PEAK_FLOPS: f64 = 930e12;
const PEAK_BYTES: f64 = 4.2e12;

/// The plans of each case with their times.
pub fn tuning(outcomes: &[Outcome]) -> String {
    let mut table = common::table(["case", "plan", "ms", ""], 4);
    for outcome in outcomes {
        let Ok(Measured {
            tuning: Some(tuning),
            ..
        }) = &outcome.result
        else {
            continue;
        };
        for (number, (plan, time)) in tuning.measured.iter().enumerate() {
            let mut marks = Vec::new();
            if number == 0 {
                marks.push("table");
            }
            if plan.engine == tuning.chosen.engine {
                marks.push("chosen");
            }
            let time = match *time {
                Duration::MAX => "failed".to_owned(),
                time => format!("{:.3}", 1e3 * time.as_secs_f64()),
            };
            table.add_row([
                outcome.name.clone(),
                plan.engine.to_string(),
                time,
                marks.join(", "),
            ]);
        }
    }
    format!("Plans of block-sparse attention:\n{table}")
}

/// A legend, the table, and the plans.
pub fn table(outcomes: &[Outcome], device: &str, peers: &Peers) -> String {
    let hopper = ["H100", "H200"].iter().any(|name| device.contains(name));
    let mut header = vec![
        "case",
        "error",
        "median ms",
        "spread ms",
        "host ms",
        "first ms",
        "launches",
        "TFLOP/s",
        "dense TFLOP/s",
        "bytes",
        "memory",
        "floor ms",
        "of floor",
    ];
    if !peers.is_empty() {
        header.push("peers");
    }
    let width = header.len();
    let mut table = common::table(header, 1);
    for outcome in outcomes {
        let mut cells = vec![outcome.name.clone()];
        match &outcome.result {
            Ok(measured) => {
                cells.extend(row(measured, hopper));
                if !peers.is_empty() {
                    cells.push(ratios(&peers.of(&outcome.name), measured.timing.median));
                }
            }
            Err(_) => cells.push("FAILED".into()),
        }
        cells.resize(width, String::new());
        table.add_row(cells);
    }
    let mut text = LEGEND.to_owned();
    if hopper {
        text += FLOOR;
    }
    if !peers.is_empty() {
        text += PEERS;
        text += &format!("Peers were measured on: {}\n", peers.device);
    }
    text += &format!("\n{table}\n");
    for outcome in outcomes {
        match &outcome.result {
            Ok(Measured {
                plan: Some(plan), ..
            }) => text += &format!("{}: {plan}\n", outcome.name),
            Ok(_) => {}
            Err(why) => text += &format!("FAILED {}: {why}\n", outcome.name),
        }
    }
    text
}

fn row(measured: &Measured, hopper: bool) -> [String; 12] {
    let (timing, cost) = (&measured.timing, &measured.cost);
    let seconds = 1e-3 * timing.median;
    let rate = |flops: f64| significant(flops / seconds / 1e12);
    let judged = cost.dtype != DType::F32 || cost.flops == 0.0;
    let floor =
        (hopper && judged).then(|| floor_ms(cost.flops - cost.low_bit_flops / 2.0, cost.bytes));
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    [
        format!("{:.1e}", measured.check.error),
        significant(timing.median),
        format!("{}..{}", significant(timing.p10), significant(timing.p90)),
        significant(timing.host),
        significant(measured.first),
        measured.launches.to_string(),
        or_dash((cost.flops > 0.0).then(|| rate(cost.flops))),
        or_dash(cost.dense_flops.map(rate)),
        BinaryBytes(cost.bytes as u64).to_string(),
        BinaryBytes(measured.memory).to_string(),
        or_dash(floor.map(significant)),
        or_dash(floor.map(|floor| format!("{:.0} %", 100.0 * floor / timing.median))),
    ]
}

/// The least time that arithmetic and memory allow, in milliseconds.
fn floor_ms(flops: f64, bytes: f64) -> f64 {
    1e3 * (flops / PEAK_FLOPS).max(bytes / PEAK_BYTES)
}

/// At least three digits that count.
fn significant(x: f64) -> String {
    let decimals = match x.abs() {
        x if x >= 100.0 => 0,
        x if x >= 10.0 => 1,
        x if x >= 1.0 => 2,
        x if x >= 0.01 => 4,
        _ => 5,
    };
    format!("{x:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::super::cases::{Check, Cost};
    use super::super::timing::Timing;
    use super::super::verdict;
    use super::*;

    fn outcomes() -> [Outcome; 2] {
        let measured = Measured {
            timing: Timing {
                median: 2.0,
                p10: 1.9,
                p90: 2.5,
                host: 0.01,
                calls: 100,
                batch: 10,
            },
            first: 300.0,
            launches: 2,
            memory: 1 << 20,
            check: Check {
                error: 1e-3,
                bound: 1e-2,
            },
            cost: Cost {
                flops: 930e9,
                low_bit_flops: 0.0,
                dense_flops: Some(9300e9),
                bytes: 1e6,
                dtype: DType::BF16,
            },
            plan: Some("wgmma".into()),
            tuning: None,
        };
        let outcome = |name: &str, result| Outcome {
            name: name.into(),
            result,
        };
        [
            outcome("a/good", Ok(measured)),
            outcome("a/bad", Err("its error is 2".into())),
        ]
    }

    #[test]
    fn wrong_results_are_named_without_a_speed_and_fail_the_command() {
        let outcomes = outcomes();
        let text = table(&outcomes, "llvmpipe", &Peers::default());
        assert!(text.contains("FAILED a/bad: its error is 2"), "{text}");
        let row = text
            .lines()
            .find(|line| line.starts_with("| a/bad"))
            .unwrap();
        assert!(!row.contains(|c: char| c.is_ascii_digit()), "{row}");
        let error = verdict(&outcomes).unwrap_err().to_string();
        assert_eq!(error, "1 of 2 cases failed: a/bad");
        assert!(verdict(&outcomes[..1]).is_ok());
    }

    #[test]
    fn floors_are_those_of_one_device() {
        let outcomes = outcomes();
        let text = |device| table(&outcomes[..1], device, &Peers::default());
        assert!(text("NVIDIA H200").contains("50 %"));
        assert!(!text("NVIDIA L4").contains("50 %"));
    }

    #[test]
    fn the_floor_is_the_slower_of_arithmetic_and_memory() {
        assert_eq!(floor_ms(930e12, 0.0), 1e3);
        assert_eq!(floor_ms(930e9, 42e9), 10.0);
    }

    #[test]
    fn numbers_keep_three_digits() {
        let texts = [1234.5, 12.34, 1.234, 0.1234, 0.001234].map(significant);
        assert_eq!(texts, ["1234", "12.3", "1.23", "0.1234", "0.00123"]);
    }
}
