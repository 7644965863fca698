//! `cubesla low-bits`: what low-bit attention costs in accuracy on real tensors, and what of it
//! quantization-aware training wins back.

mod accuracy;
mod picture;
mod table;
mod training;

use std::path::PathBuf;

use cubesla::{AttentionOptions, device};

use crate::common;
use crate::error::Error;
use crate::inputs::Inputs;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    inputs: Inputs,
    /// Folder for the curves
    #[arg(long, value_name = "DIR", default_value = "cubesla-low-bits")]
    output: PathBuf,
    /// Steps of training
    #[arg(long, value_name = "N", default_value_t = 40)]
    steps: usize,
    /// Query rows per block, which share a scale; a multiple of 16 from 16 to 128
    #[arg(long, value_name = "ROWS", default_value_t = 128)]
    block_q: usize,
    /// Keys per block, which share a scale; a multiple of 16 from 16 to 128
    #[arg(long, value_name = "KEYS", default_value_t = 64)]
    block_k: usize,
}

/// Computes on the device of that name, and what kernels do not offer in the f64 reference.
pub fn run(args: &Args, device: &str) -> Result<(), Error> {
    let client = device::select(device)?.client();
    let options = AttentionOptions {
        block_q: args.block_q,
        block_k: args.block_k,
        ..AttentionOptions::default()
    };
    let layers = args.inputs.load(&client, &options)?;
    let progress = common::progress(layers.len() * (accuracy::STEPS + args.steps + 1));
    let mut results = Vec::new();
    for layer in &layers {
        let rows = accuracy::layer(&client, layer, &options, &progress)?;
        let curve = training::curve(&client, layer, &options, args.steps, &progress)?;
        results.push((layer, rows, curve));
    }
    progress.finish_and_clear();
    println!("{}", table::LEGEND);
    for (layer, rows, curve) in &results {
        println!("{}\n{}\n", layer.name, table::table(rows));
        println!("{}\n", table::training(curve));
    }
    for (layer, _, curve) in &results {
        let path = picture::draw(&args.output, layer, curve)?;
        println!("Picture: {}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
