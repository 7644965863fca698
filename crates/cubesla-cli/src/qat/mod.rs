//! `cubesla qat`: what quantization-aware training of a layer wins back of what low bits cost, by how
//! gradients are taken.

mod attention;
mod layer;
mod picture;
mod training;

use std::path::PathBuf;

use comfy_table::Table;
use cubesla::device;

use crate::bench::host::Random;
use crate::common;
use crate::error::Error;
use attention::Attention;
use training::{Arm, Experiment};

/// Sequences in a batch.
const BATCH: usize = 2;
/// Tokens in a sequence, which share a scale.
const LEN: usize = 128;
const HEADS: usize = 2;
/// Head dimension.
const DIM: usize = 32;
const CHANNELS: usize = HEADS * DIM;
/// How much larger the outlier channels of queries and keys are.
const OUTLIER: f32 = 10.0;

#[derive(clap::Args)]
pub struct Args {
    /// Folder for the picture
    #[arg(long, value_name = "DIR", default_value = "cubesla-qat")]
    output: PathBuf,
    /// Seed of the layer, its inputs and their order
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Steps of training in full precision that the others start from
    #[arg(long, value_name = "N", default_value_t = 200)]
    pretraining: usize,
    /// Steps of each training
    #[arg(long, value_name = "N", default_value_t = 400)]
    steps: usize,
    /// Size of the first step of Adam; it falls to zero with the last
    #[arg(long, value_name = "X", default_value_t = 4e-3)]
    rate: f32,
}

/// Computes in f32 on the device of that name.
pub fn run(args: &Args, device: &str) -> Result<(), Error> {
    let client = device::select(device)?.client();
    println!("Device: {}, f32", client.properties().identity.name);
    let progress = common::progress(args.pretraining + Arm::ALL.len() * args.steps);
    let attention = Attention::new(client);
    let experiment = Experiment::new(&attention, args.seed, args.rate);
    let start = experiment.pretrained(args.pretraining, &progress)?;
    let mut results = Vec::new();
    for arm in Arm::ALL {
        results.push((arm, experiment.curve(&start, arm, args.steps, &progress)?));
    }
    progress.finish_and_clear();
    println!("{}", table(&results));
    let path = picture::draw(&args.output, &results)?;
    println!("Picture: {}", path.display());
    Ok(())
}

/// Losses after training, and what of the control's loss to low bits it won back.
fn table(results: &[(Arm, Vec<training::Losses>)]) -> Table {
    let header = [
        "training",
        "loss in low bits",
        "in full precision",
        "won back",
    ];
    let mut table = common::table(header, 1);
    let control = training::last(&results[0].1);
    for (arm, curve) in results {
        let last = training::last(curve);
        table.add_row([
            arm.name().to_owned(),
            format!("{:.4}", last.low),
            format!("{:.4}", last.full),
            format!("{:.0} %", 100.0 * training::won_back(control, last)),
        ]);
    }
    table
}

#[cfg(test)]
mod tests;
