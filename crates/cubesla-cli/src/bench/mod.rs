//! `cubesla bench`: every operation, checked against f64 and then timed.

mod cases;
mod compare;
pub mod host;
mod json;
mod report;
mod series;
mod timing;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cubecl::MemoryScope;
use cubecl::logging::{LaunchObservation, LaunchObserver};
use cubesla::plan::{self, Choice};
use cubesla::{Client, DType, device};
use indicatif::ProgressBar;

use crate::common;
use crate::error::Error;
use cases::{Case, Check, Cost, Scale, Tuning};
use compare::Peers;
use timing::Timing;

#[derive(clap::Args)]
pub struct Args {
    /// Only cases whose name contains this; may be given several times
    #[arg(long, value_name = "SUBSTR")]
    filter: Vec<String>,
    /// Print the names of the cases and stop
    #[arg(long)]
    list: bool,
    /// Write the measurements to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Compare with measurements of other libraries: a file that benches/peers/peers.py wrote
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Calls to time at least, unless a case takes long
    #[arg(long, value_name = "N", default_value_t = 100)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Element type: f32, f16 or bf16; by default bf16 on CUDA, with some f32, and f32 elsewhere
    #[arg(long, value_parser = common::dtype)]
    dtype: Option<DType>,
    /// Measure sparse attention over lengths and over sparsities instead, and draw the curves
    #[arg(long)]
    series: bool,
    /// Run block-sparse attention by the fastest plan on this device instead of the table's, and print
    /// the time of each
    #[arg(long)]
    tune: bool,
    /// Folder for the curves
    #[arg(long, value_name = "DIR", default_value = "cubesla-bench")]
    output: PathBuf,
}

/// What became of a case.
pub struct Outcome {
    /// The case's name.
    pub name: String,
    /// The measurement, or why there is none.
    pub result: Result<Measured, String>,
}

/// A case whose results are right.
pub struct Measured {
    /// Times of a call.
    pub timing: Timing,
    /// The first call, in milliseconds: it compiles what the process has not compiled yet.
    pub first: f64,
    /// Kernels that it launched.
    pub launches: usize,
    /// Bytes of device memory that it reserved.
    pub memory: u64,
    /// The sample against the reference.
    pub check: Check,
    /// What a call takes.
    pub cost: Cost,
    /// How the library runs it, where it tells.
    pub plan: Option<String>,
    /// Times of other plans, if they were asked for.
    pub tuning: Option<Tuning>,
}

/// Longest time for the timed calls of a case.
const BUDGET: Duration = Duration::from_secs(10);
const SOFTWARE_BUDGET: Duration = Duration::from_secs(2);

/// Measures on the device of that name.
pub fn run(args: &Args, device: &str) -> Result<(), Error> {
    let device = device::select(device)?;
    let scale = match &device {
        cubesla::Device::Cuda(_) => Scale::Large,
        _ => Scale::Small,
    };
    let wanted = |case: &Case| {
        let named = |part: &String| case.name.contains(part);
        args.filter.is_empty() || args.filter.iter().any(named)
    };
    let (mut by_length, mut by_sparsity) = (Vec::new(), Vec::new());
    let mut all = Vec::new();
    if args.series {
        by_length = cases::by_length(scale, args.dtype);
        by_sparsity = cases::by_sparsity(scale, args.dtype);
    } else {
        all = cases::all(scale, args.dtype);
    }
    let series = by_length.iter().chain(&by_sparsity);
    let points = series.flat_map(|series| series.points.iter().map(|(_, case)| case));
    let mut chosen: Vec<&Case> = points.chain(&all).filter(|case| wanted(case)).collect();
    // Two series may cross in a case.
    let mut seen = HashSet::new();
    chosen.retain(|case| seen.insert(&case.name));
    if args.list {
        chosen.iter().for_each(|case| println!("{}", case.name));
        return Ok(());
    }
    if chosen.is_empty() {
        return Err(Error::NoCase);
    }
    let peers = match &args.compare {
        Some(path) => Peers::load(path)?,
        None => Peers::default(),
    };

    if args.tune {
        plan::set_choice(Choice::Tuned);
    }
    let client = device.client();
    let name = client.properties().identity.name.clone();
    println!("Device: {name}");
    let progress = common::progress(chosen.len());
    let outcomes: Vec<Outcome> = chosen
        .iter()
        .map(|case| outcome(&client, case, args.runs as usize, &progress))
        .collect();
    progress.finish_and_clear();

    println!("{}", report::table(&outcomes, &name, &peers));
    if args.tune {
        println!("{}", report::tuning(&outcomes));
        if let Some(fault) = plan::cache_fault() {
            eprintln!("warning: {fault}");
        }
    }
    if let Some(path) = &args.json {
        json::write(path, &name, &outcomes)?;
        println!("Measurements: {}", path.display());
    }
    if args.series {
        let series = [&by_length[..], &by_sparsity];
        for path in series::draw(&args.output, &name, series, &outcomes, &peers)? {
            println!("Picture: {}", path.display());
        }
    }
    verdict(&outcomes)
}

fn outcome(client: &Client, case: &Case, runs: usize, progress: &ProgressBar) -> Outcome {
    let result = measured(client, case, runs, progress).map_err(|error| {
        let causes = common::causes(&error).map(|cause| format!(": {cause}"));
        format!("{error}{}", causes.collect::<String>())
    });
    progress.inc(1);
    Outcome {
        name: case.name.clone(),
        result,
    }
}

fn measured(
    client: &Client,
    case: &Case,
    runs: usize,
    progress: &ProgressBar,
) -> Result<Measured, Error> {
    let say = |what: &str| progress.set_message(format!("{}: {what}", case.name));
    say("inputs");
    let work = (case.prepare)(client)?;
    cubesla::sync(client)?;
    say("first call");
    client
        .memory_cleanup()
        .map_err(|source| cubesla::Error::Device {
            operation: "releasing memory that is not in use",
            source,
        })?;
    let reserved = || {
        let report = client.memory_report(MemoryScope::CurrentStream);
        report.usage().bytes_reserved
    };
    let before = reserved();
    let launches = Arc::new(Launches::default());
    let watching = LaunchObservation::new(launches.clone());
    let start = Instant::now();
    work.call(0)?;
    cubesla::sync(client)?;
    drop(watching);
    let first = 1e3 * start.elapsed().as_secs_f64();
    let memory = reserved().saturating_sub(before);
    say("check");
    let check = work.check()?;
    if !check.is_right() {
        return Err(Error::Sample {
            error: check.error,
            bound: check.bound,
        });
    }
    say("timing");
    let budget = if is_software(client) {
        SOFTWARE_BUDGET
    } else {
        BUDGET
    };
    let tuning = match plan::choice() {
        Choice::Table => None,
        Choice::Tuned => work.tune()?,
    };
    let timing = timing::measure(client, runs, budget, |number| work.call(number))?;
    Ok(Measured {
        timing,
        first,
        launches: launches.0.load(Ordering::Relaxed),
        memory,
        check,
        cost: work.cost(),
        plan: work.plan(),
        tuning,
    })
}

/// Counts launches.
#[derive(Default)]
struct Launches(AtomicUsize);

impl LaunchObserver for Launches {
    fn launched(&self, _kernel: &'static str) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Whether the device is the host's processor.
fn is_software(client: &Client) -> bool {
    let name = &client.properties().identity.name;
    ["llvmpipe", "SwiftShader", "Basic Render"]
        .iter()
        .any(|software| name.contains(software))
}

fn verdict(outcomes: &[Outcome]) -> Result<(), Error> {
    let failed: Vec<&str> = outcomes
        .iter()
        .filter(|outcome| outcome.result.is_err())
        .map(|outcome| &*outcome.name)
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    Err(Error::Failed {
        count: failed.len(),
        total: outcomes.len(),
        names: failed.join(", "),
    })
}
