//! Timing calls of a device that runs behind the host.

use std::time::{Duration, Instant};

use cubesla::Client;

use crate::error::Error;

/// Shortest batch between two waits for the device: the wait itself is then lost in it.
const BATCH: Duration = Duration::from_millis(20);
/// Most calls of a batch.
const MAX_BATCH: usize = 1024;
/// Fewest batches that a median is taken of.
const MIN_BATCHES: usize = 3;
/// Batches that percentiles are taken of, where time allows.
const BATCHES: usize = 10;
const WARM_UP: usize = 3;

/// Times of one call, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// Median over batches.
    pub median: f64,
    /// 10th percentile over batches.
    pub p10: f64,
    /// 90th percentile over batches.
    pub p90: f64,
    /// Median of what the host takes to enqueue a call, without waiting for the device.
    pub host: f64,
    /// Calls that were timed.
    pub calls: usize,
    /// Calls of a batch.
    pub batch: usize,
}

/// Times `call`, which is given a running number, for at least `runs` calls or until `budget` is
/// spent.
pub fn measure(
    client: &Client,
    runs: usize,
    budget: Duration,
    mut call: impl FnMut(usize) -> Result<(), Error>,
) -> Result<Timing, Error> {
    let mut number = 0;
    let mut batch = |size: usize| -> Result<(Duration, Duration), Error> {
        let start = Instant::now();
        for _ in 0..size {
            call(number)?;
            number += 1;
        }
        let enqueued = start.elapsed();
        cubesla::sync(client)?;
        Ok((start.elapsed(), enqueued))
    };
    let started = Instant::now();
    batch(WARM_UP)?;
    let mut size = 1;
    while size < MAX_BATCH && batch(size)?.0 < BATCH {
        size *= 2;
    }
    let batches = runs.div_ceil(size).max(BATCHES);
    let (mut times, mut hosts) = (Vec::new(), Vec::new());
    while times.len() < batches && (times.len() < MIN_BATCHES || started.elapsed() < budget) {
        let (time, host) = batch(size)?;
        times.push(1e3 * time.as_secs_f64() / size as f64);
        hosts.push(1e3 * host.as_secs_f64() / size as f64);
    }
    Ok(Timing {
        median: percentile(&times, 50),
        p10: percentile(&times, 10),
        p90: percentile(&times, 90),
        host: percentile(&hosts, 50),
        calls: times.len() * size,
        batch: size,
    })
}

/// The value below which `percent` of `values` lie, between neighbours in proportion.
pub fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() - 1) as f64 * percent as f64 / 100.0;
    let (below, above) = (at.floor() as usize, at.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_neighbours() {
        let values = [4.0, 1.0, 3.0, 2.0, 5.0];
        assert_eq!(
            [0, 50, 100].map(|p| percentile(&values, p)),
            [1.0, 3.0, 5.0]
        );
        assert!((percentile(&values, 10) - 1.4).abs() < 1e-12);
        assert_eq!(percentile(&[7.0], 90), 7.0);
        assert_eq!(percentile(&[1.0, 2.0], 50), 1.5);
    }
}
