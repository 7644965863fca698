//! `cubesla`: what this machine's devices are, attention on a real model's data, and how fast it is.

mod bench;
mod common;
mod demo;
mod devices;
mod error;
mod exact;
mod fit;
mod inputs;
mod layers;
mod low_bits;
mod plot;
mod qat;
mod report;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use error::Error;

/// Sparse attention on CUDA and on everything that wgpu reaches.
#[derive(Parser)]
#[command(name = "cubesla", version, arg_required_else_help = true)]
struct Cli {
    /// Device: auto, cuda:0, wgpu, wgpu:discrete:0, wgpu:cpu, ...; `cubesla devices` lists them
    #[arg(long, global = true, value_name = "NAME")]
    #[arg(env = cubesla::device::DEVICE_VARIABLE, default_value = "auto")]
    device: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List the devices that this build can reach
    Devices(devices::Args),
    /// Run dense attention and SLA2 on a model's Q, K, V: table of errors and times, pictures
    Demo(demo::Args),
    /// Errors of sparse attention, SLA and SLA2 against full attention, by sparsity: tables, curves
    Report(report::Args),
    /// Errors of low-bit attention by format, and what training wins back: tables, curves
    LowBits(low_bits::Args),
    /// Train a layer with attention in low bits, and see what that wins back: table, curves
    Qat(qat::Args),
    /// Check and time every operation; compare with other libraries, draw times over sizes
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        Command::Devices(args) => devices::run(args, &cli.device),
        Command::Demo(args) => demo::run(args, &cli.device),
        Command::Report(args) => report::run(args, &cli.device),
        Command::LowBits(args) => low_bits::run(args, &cli.device),
        Command::Qat(args) => qat::run(args, &cli.device),
        Command::Bench(args) => bench::run(args, &cli.device),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn complain(error: &Error) {
    eprintln!("error: {error}");
    for cause in common::causes(error) {
        eprintln!("  caused by: {cause}");
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        super::Cli::command().debug_assert();
    }
}
