//! Measurements of other libraries, found by the names of cases.

use std::path::Path;

use super::json::{self, Entry};
use crate::error::Error;

/// Other libraries' measurements.
#[derive(Default)]
pub struct Peers {
    /// The device that they were measured on.
    pub device: String,
    entries: Vec<Entry>,
}

impl Peers {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let file = json::read(path)?;
        Ok(Self {
            device: file.device,
            entries: file.results,
        })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The measurements of a case, fastest first.
    pub fn of(&self, case: &str) -> Vec<&Entry> {
        let mut found: Vec<&Entry> = self.entries.iter().filter(|e| e.case == case).collect();
        found.sort_by(|a, b| a.median_ms.total_cmp(&b.median_ms));
        found
    }

    /// Every implementation, in the order of their first measurement.
    pub fn implementations(&self) -> Vec<&str> {
        let mut names = Vec::new();
        for entry in &self.entries {
            if !names.contains(&&*entry.implementation) {
                names.push(&*entry.implementation);
            }
        }
        names
    }
}

/// `fastest 1.50x` and so on: how many times our time each peer takes.
pub fn ratios(peers: &[&Entry], ours: f64) -> String {
    let ratio = |peer: &&Entry| format!("{} {:.2}x", peer.implementation, peer.median_ms / ours);
    peers.iter().map(ratio).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(case: &str, implementation: &str, median_ms: f64) -> Entry {
        Entry {
            case: case.into(),
            implementation: implementation.into(),
            median_ms,
            p10_ms: median_ms,
            p90_ms: median_ms,
            calls: 10,
            own: None,
        }
    }

    #[test]
    fn peers_are_matched_by_case_and_ordered_by_time() {
        let peers = Peers {
            device: "D".into(),
            entries: vec![
                entry("a/95", "slow", 3.0),
                entry("a/95/x", "other", 1.0),
                entry("a/95", "fast", 1.5),
            ],
        };
        assert_eq!(ratios(&peers.of("a/95"), 2.0), "fast 0.75x\nslow 1.50x");
        assert_eq!(ratios(&peers.of("b"), 2.0), "");
        assert_eq!(peers.implementations(), ["slow", "other", "fast"]);
    }
}
