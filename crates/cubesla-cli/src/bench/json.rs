//! Measurements as JSON, in the form that benches/peers/peers.py writes too.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Outcome;
use crate::error::Error;

/// A file of measurements.
#[derive(Debug, Serialize, Deserialize)]
pub struct File {
    /// The device that everything was measured on.
    pub device: String,
    /// One entry for each case and implementation.
    pub results: Vec<Entry>,
}

/// A case measured with one implementation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The case's name.
    pub case: String,
    /// Whose operation it is.
    pub implementation: String,
    /// Median time of a call in milliseconds.
    pub median_ms: f64,
    /// 10th percentile.
    pub p10_ms: f64,
    /// 90th percentile.
    pub p90_ms: f64,
    /// Calls that were timed.
    pub calls: usize,
    /// What only this program tells.
    #[serde(flatten)]
    pub own: Option<Own>,
}

/// What only this program tells about a case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Own {
    /// Milliseconds to enqueue a call.
    pub host_ms: f64,
    /// Milliseconds of the first call.
    pub first_ms: f64,
    /// Kernels of a call.
    #[serde(default)]
    pub launches: usize,
    /// Bytes of device memory that the first call reserved.
    #[serde(default)]
    pub memory: u64,
    /// Operations of a call.
    pub flops: f64,
    /// Compulsory traffic of a call.
    pub bytes: f64,
    /// Relative error of the sample.
    pub error: f64,
    /// How the library runs it.
    pub plan: Option<String>,
}

/// Writes what was measured; failed cases have no entry.
pub fn write(path: &Path, device: &str, outcomes: &[Outcome]) -> Result<(), Error> {
    let file = File {
        device: device.to_owned(),
        results: outcomes.iter().filter_map(entry).collect(),
    };
    let text = serde_json::to_string_pretty(&file).expect("numbers and text become JSON");
    fs::write(path, text + "\n").map_err(|source| Error::Write {
        path: path.to_owned(),
        source: source.into(),
    })
}

fn entry(outcome: &Outcome) -> Option<Entry> {
    let measured = outcome.result.as_ref().ok()?;
    Some(Entry {
        case: outcome.name.clone(),
        implementation: "cubesla".into(),
        median_ms: measured.timing.median,
        p10_ms: measured.timing.p10,
        p90_ms: measured.timing.p90,
        calls: measured.timing.calls,
        own: Some(Own {
            host_ms: measured.timing.host,
            first_ms: measured.first,
            launches: measured.launches,
            memory: measured.memory,
            flops: measured.cost.flops,
            bytes: measured.cost.bytes,
            error: measured.check.error,
            plan: measured.plan.clone(),
        }),
    })
}

/// Reads a file of measurements.
pub fn read(path: &Path) -> Result<File, Error> {
    let text = fs::read(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_slice(&text).map_err(|source| Error::Measurements {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_the_way_through_json() {
        let plain = r#"{"device": "D", "results": [{"case": "a/b", "implementation": "flash2",
            "median_ms": 1.5, "p10_ms": 1.0, "p90_ms": 2.0, "calls": 100}]}"#;
        let file: File = serde_json::from_str(plain).unwrap();
        assert_eq!(file.results[0].own, None);
        let own = Entry {
            own: Some(Own {
                host_ms: 0.01,
                first_ms: 80.0,
                launches: 2,
                memory: 1 << 20,
                flops: 1e12,
                bytes: 1e8,
                error: 1e-3,
                plan: Some("wgmma 2x64".into()),
            }),
            ..file.results[0].clone()
        };
        for entry in [own, file.results[0].clone()] {
            let text = serde_json::to_string(&entry).unwrap();
            assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), entry);
        }
    }
}
