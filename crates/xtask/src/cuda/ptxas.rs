//! What ptxas says about kernels.

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{fs, thread};

use crate::Result;

/// Spilled bytes that a kernel of the portable engines may have with all registers that a thread can
/// get: four of 255.
const FORCED_ALLOWANCE: u32 = 16;

/// Spilled bytes of a kernel that has none, or those few, with all registers: ptxas then gave up to so
/// many for another cube on the multiprocessor.
const TRADED_ALLOWANCE: u32 = 64;

/// Most registers of a thread, and registers of a multiprocessor.
const REGISTERS: [u32; 2] = [255, 65_536];

/// ptxas on one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Name of the kernel, with its hash.
    pub kernel: String,
    /// Registers per thread.
    pub registers: u32,
    /// Bytes of registers written to local memory.
    pub spill_stores: u32,
    /// Bytes read back.
    pub spill_loads: u32,
    /// Bytes written to local memory if the kernel has all registers that a thread can get.
    pub forced_stores: u32,
    /// Whether matrix instructions that should overlap were made to wait for each other.
    pub serialized: bool,
    /// How the kernel moves registers between warpgroups.
    pub exchange: Option<Exchange>,
}

/// A producer's warpgroup that shrinks to `kept` registers a thread, for others to grow to `taken`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    threads: u32,
    kept: u32,
    taken: u32,
}

impl Exchange {
    fn parse(ptx: &str) -> Option<Self> {
        let after = |mark: &str| -> Option<u32> {
            let text = &ptx[ptx.find(mark)? + mark.len()..];
            let end = text.find(|c: char| !c.is_ascii_digit())?;
            text[..end].parse().ok()
        };
        Some(Self {
            threads: after(".maxntid ")?,
            kept: after("setmaxnreg.dec.sync.aligned.u32 ")?,
            taken: after("setmaxnreg.inc.sync.aligned.u32 ")?,
        })
    }

    /// Whether what one warpgroup of 128 gives up is enough for the others, of a kernel launched
    /// with so many `registers` a thread. If not, they wait for ever.
    fn is_covered(&self, registers: u32) -> bool {
        let given = registers.saturating_sub(self.kept) * 128;
        let needed = self.taken.saturating_sub(registers) * (self.threads - 128);
        given >= needed
    }
}

impl Report {
    fn parse(kernel: &str, ptx: &str, log: &str) -> Option<Self> {
        let before = |line: &str, unit: &str| -> Option<u32> {
            line.split(unit)
                .next()?
                .split_whitespace()
                .last()?
                .parse()
                .ok()
        };
        let mut report = Self {
            kernel: kernel.to_owned(),
            registers: 0,
            spill_stores: 0,
            spill_loads: 0,
            forced_stores: 0,
            serialized: log.contains("serialized"),
            exchange: Exchange::parse(ptx),
        };
        for line in log.lines() {
            if line.contains("bytes spill stores") {
                report.spill_stores += before(line, " bytes spill stores")?;
                report.spill_loads += before(line, " bytes spill loads")?;
            } else if line.contains(": Used ") {
                report.registers = report.registers.max(before(line, " registers")?);
            }
        }
        (report.registers > 0).then_some(report)
    }

    /// What is wrong with the kernel, if anything is.
    pub fn fault(&self) -> Option<String> {
        let kernel = &self.kernel;
        if self.serialized {
            return Some(format!("{kernel}: matrix instructions are serialized"));
        }
        if let Some(exchange) = self.exchange
            && !exchange.is_covered(self.registers)
        {
            let registers = self.registers;
            return Some(format!(
                "{kernel} would hang: {registers} registers a thread do not cover {exchange:?}"
            ));
        }
        // Their registers are counted by hand.
        let [traded, forced] = if kernel.contains("wgmma") {
            [0; 2]
        } else {
            [TRADED_ALLOWANCE, FORCED_ALLOWANCE]
        };
        let spills = |what: &str, bytes: u32, allowed: u32| {
            (bytes > allowed)
                .then(|| format!("{kernel} spills {bytes} bytes {what}, of at most {allowed}"))
        };
        spills("with all registers", self.forced_stores, forced)
            .or_else(|| spills("for occupancy", self.spill_stores, traded))
    }
}

/// `ptx` with the bound on threads, which ptxas derives a bound on registers from, replaced by the
/// most registers that so many threads can have.
fn with_all_registers(ptx: &str) -> Option<String> {
    let mark = ".maxntid ";
    let start = ptx.find(mark)?;
    let line = ptx[start..].lines().next()?;
    let threads: u32 = line[mark.len()..].split(',').next()?.trim().parse().ok()?;
    let [most, all] = REGISTERS;
    let registers = most.min(all / threads.max(1) / 8 * 8);
    Some(ptx.replacen(line, &format!(".maxnreg {registers}"), 1))
}

/// Runs ptxas on every PTX file of `folder`, on all cores; reports in the order of the names.
pub fn compile_all(ptxas: &Path, arch: &str, folder: &Path) -> Result<Vec<Report>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "ptx") {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(format!("no kernel was compiled into {}", folder.display()).into());
    }
    files.sort();

    let left = Mutex::new(files.into_iter());
    let work = || {
        let next = || left.lock().expect("no thread panics with it").next();
        let reports = std::iter::from_fn(next).map(|file| compile(ptxas, arch, file));
        reports.collect::<std::result::Result<Vec<_>, String>>()
    };
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let results = thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        let joined = threads
            .into_iter()
            .map(|t| t.join().expect("ptxas's thread"));
        joined.collect::<std::result::Result<Vec<_>, String>>()
    })?;
    let mut reports = results.concat();
    reports.sort_by(|a, b| a.kernel.cmp(&b.kernel));
    Ok(reports)
}

fn compile(ptxas: &Path, arch: &str, file: PathBuf) -> std::result::Result<Report, String> {
    let ptx = fs::read_to_string(&file)
        .map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    let mut report = assemble(ptxas, arch, &file, &ptx)?;
    if report.spill_stores > 0 {
        report.forced_stores = match with_all_registers(&ptx) {
            Some(ptx) => {
                let roomy = file.with_extension("all-registers");
                fs::write(&roomy, &ptx)
                    .map_err(|error| format!("cannot write {}: {error}", roomy.display()))?;
                assemble(ptxas, arch, &roomy, &ptx)?.spill_stores
            }
            None => report.spill_stores,
        };
    }
    Ok(report)
}

/// Runs ptxas on a file that holds `ptx`.
fn assemble(
    ptxas: &Path,
    arch: &str,
    file: &Path,
    ptx: &str,
) -> std::result::Result<Report, String> {
    let output = Command::new(ptxas)
        .arg("-v")
        .arg(format!("-arch={arch}"))
        .args(["-o", "/dev/null"])
        .arg(file)
        .output()
        .map_err(|error| format!("cannot run {}: {error}", ptxas.display()))?;
    let log = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    let kernel = file.file_stem().unwrap_or_default().to_string_lossy();
    Report::parse(&kernel, ptx, &log)
        .filter(|_| output.status.success())
        .ok_or_else(|| format!("ptxas fails on {}:\n{log}", file.display()))
}

#[cfg(test)]
mod tests;
