//! `cargo xtask`: how the workspace is run, tested, checked and measured.

mod cuda;
mod device;
mod links;
mod step;
mod workspace;

use std::env;
use std::error::Error;
use std::process::{Command, ExitCode};

use workspace::{cargo, cubesla};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const USAGE: &str = "\
Usage: cargo xtask <command>

  demo [args]        run `cubesla demo`
  report [args]      run `cubesla report`
  low-bits [args]    run `cubesla low-bits`
  qat [args]         run `cubesla qat`
  bench [args]       run `cubesla bench`, optimised
  test [args]        run all tests, on a GPU or on software Vulkan, then `cuda`
  cuda [part]        compile the CUDA kernels for each architecture, with no GPU, and judge them;
                     parts are attention, widths, sla, selection and low-bits
  application [features]
                     run tests/application, an application of Burn outside the workspace: by default
                     with wgpu, then with Burn's fusion too; `cuda,fusion` on a GPU of NVIDIA's
  ci [--after-test]  run `test` unless it was run, then format, lints, documentation, links, and the
                     tests of Burn with fusion

demo, report, low-bits, qat, bench and test install software Vulkan first if the machine has no GPU
(Debian, Ubuntu).";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result {
    let args: Vec<String> = env::args().skip(1).collect();
    let Some((command, args)) = args.split_first() else {
        return Err(USAGE.into());
    };
    workspace::provide_runtime_folder()?;
    match (command.as_str(), args) {
        ("demo" | "report" | "low-bits" | "qat", args) => {
            device::ensure(false)?;
            step::run(cubesla(false).arg(command).args(args))
        }
        ("bench", args) => {
            device::ensure(true)?;
            step::run(cubesla(true).arg("bench").args(args))
        }
        ("test", args) => test(args),
        ("cuda", []) => cuda::check(None),
        ("cuda", [part]) => cuda::check(Some(part)),
        ("application", []) => application(&["wgpu", "wgpu,fusion"]),
        ("application", [features]) => application(&[features]),
        ("ci", []) => {
            test(&[])?;
            checks()
        }
        ("ci", [flag]) if flag == "--after-test" => checks(),
        ("help" | "--help" | "-h", _) => {
            println!("{USAGE}");
            Ok(())
        }
        _ => Err(format!("cannot do `{command} {}`\n\n{USAGE}", args.join(" ")).into()),
    }
}

/// Runs the application once with each list of features.
fn application(features: &[&str]) -> Result {
    device::ensure(false)?;
    for list in features {
        let manifest = ["--manifest-path", "tests/application/Cargo.toml"];
        step::run(
            cargo("run")
                .args(manifest)
                .args(["--features", list])
                .env("CARGO_TARGET_DIR", workspace::target()?.join("application")),
        )?;
    }
    Ok(())
}

fn test(args: &[String]) -> Result {
    device::ensure(false)?;
    step::run(test_command().args(args))?;
    if cfg!(target_os = "linux") {
        cuda::check(None)
    } else {
        println!("No CUDA check: it needs Linux.");
        Ok(())
    }
}

/// `cargo test` of the workspace.
fn test_command() -> Command {
    let mut tests = cargo("test");
    if env::var_os("RUST_TEST_THREADS").is_none() {
        // Each test keeps all cores of a software device busy.
        tests.env("RUST_TEST_THREADS", "2");
    }
    tests.arg("--workspace");
    tests
}

/// What CI checks besides the tests.
fn checks() -> Result {
    step::run(cargo("fmt").args(["--all", "--check"]))?;
    let deny = ["--", "-D", "warnings"];
    step::run(
        cargo("clippy")
            .args(["--workspace", "--all-targets"])
            .args(deny),
    )?;
    step::run(
        cargo("doc")
            .args(["--workspace", "--no-deps"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    step::timed("Links of the documentation", || {
        links::check(&workspace::root())
    })?;
    // Last, as Burn is built anew for it, with other features.
    step::run(test_command().args(["--test", "burn", "--features", "cubesla-burn/fusion"]))
}
