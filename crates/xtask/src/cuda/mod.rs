//! CUDA kernels on a machine without a GPU: compiled by NVRTC, judged by ptxas.
//!
//! `compile-cuda` launches every kernel variant on a driver that runs nothing and leaves the PTX
//! behind (see `backends/fake-cuda`), once for each architecture.

mod ptxas;
mod toolchain;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::{env, fs, thread};

use crate::workspace::{cargo, debug_folder, target};
use crate::{Result, step};
use ptxas::Report;

/// Compute capability times ten, and the name that ptxas compiles it under: `a` where kernels use
/// what only that architecture has.
const ARCHITECTURES: [(u32, &str); 4] = [
    (80, "sm_80"),
    (89, "sm_89"),
    (90, "sm_90a"),
    (120, "sm_120a"),
];

/// Compiles every kernel, or those of a part, for every architecture; an error if ptxas finds fault
/// with one.
pub fn check(part: Option<&str>) -> Result {
    let cuda = toolchain::provide(&target()?.join("nvrtc"))?;
    let driver = provide_driver()?;
    step::run(cargo("build").args(["--bin", "compile-cuda"]))?;
    // CubeCL compiles on one thread, so the architectures take a core each.
    let folders = thread::scope(|scope| {
        let threads = ARCHITECTURES.map(|(capability, _)| {
            let (cuda, driver) = (&cuda, &driver);
            let compile =
                move || compile(capability, part, cuda, driver).map_err(|e| e.to_string());
            scope.spawn(compile)
        });
        threads.map(|thread| thread.join().expect("a compiler's thread"))
    });
    let mut faults = Vec::new();
    for ((_, arch), ptx) in ARCHITECTURES.into_iter().zip(folders) {
        let ptx = ptx?;
        let reports = step::timed(&format!("ptxas -v -arch={arch} on every kernel"), || {
            ptxas::compile_all(&cuda.join("bin/ptxas"), arch, &ptx)
        })?;
        print_table(arch, &reports);
        let found = reports.iter().filter_map(Report::fault);
        faults.extend(found.map(|fault| format!("{arch}: {fault}")));
    }
    if faults.is_empty() {
        return Ok(());
    }
    Err(format!("CUDA kernels at fault:\n  {}", faults.join("\n  ")).into())
}

/// Builds the driver that runs nothing: the folder that holds it as `libcuda.so`.
fn provide_driver() -> Result<PathBuf> {
    step::run(cargo("build").args(["--package", "cubesla-fake-cuda"]))?;
    let folder = target()?.join("fake-cuda");
    fs::create_dir_all(&folder)?;
    // No libcuda.so.1 beside it: NVRTC would load that, and crash.
    let library = debug_folder()?.join("libcubesla_fake_cuda.so");
    fs::copy(library, folder.join("libcuda.so"))?;
    Ok(folder)
}

/// Has kernels compiled for `capability`: the folder of PTX files.
fn compile(capability: u32, part: Option<&str>, cuda: &Path, driver: &Path) -> Result<PathBuf> {
    let ptx = driver.join("ptx").join(capability.to_string());
    if ptx.exists() {
        fs::remove_dir_all(&ptx)?;
    }
    fs::create_dir_all(&ptx)?;
    step::run(
        cargo("run")
            .args(["--bin", "compile-cuda", "--"])
            .args(part)
            .env("CUBESLA_DEVICE", "cuda:0")
            .env("FAKE_CUDA_SM", capability.to_string())
            .env("FAKE_CUDA_PTX", &ptx)
            .env("CUDA_PATH", cuda)
            .env("LD_LIBRARY_PATH", library_path(driver, &cuda.join("lib"))?),
    )?;
    Ok(ptx)
}

/// The two folders before those that libraries are searched in already.
fn library_path(driver: &Path, toolkit: &Path) -> Result<OsString> {
    let old = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let old = env::split_paths(&old).filter(|path| path.as_os_str() != OsStr::new(""));
    let new = [driver.to_owned(), toolkit.to_owned()];
    Ok(env::join_paths(new.into_iter().chain(old))?)
}

fn print_table(arch: &str, reports: &[Report]) {
    let width = reports
        .iter()
        .map(|report| report.kernel.len())
        .max()
        .unwrap_or(0);
    println!("{arch:<width$}  registers  spill stores  spill loads  with all registers");
    for report in reports {
        println!(
            "{:<width$}  {:>9}  {:>10} B  {:>9} B  {:>16} B",
            report.kernel,
            report.registers,
            report.spill_stores,
            report.spill_loads,
            report.forced_stores
        );
    }
    println!();
}
