//! `cubesla report`: how close sparse attention, SLA and SLA2 come to full attention on real tensors.

mod measure;
mod picture;
mod table;

use std::path::PathBuf;

use cubesla::{AttentionOptions, device};

use crate::common;
use crate::error::Error;
use crate::inputs::Inputs;
use measure::STEPS;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    inputs: Inputs,
    /// Folder for the curves
    #[arg(long, value_name = "DIR", default_value = "cubesla-report")]
    output: PathBuf,
    /// Query rows per block, a multiple of 16 from 16 to 128
    #[arg(long, value_name = "ROWS", default_value_t = 32)]
    block_q: usize,
    /// Keys per block, a multiple of 16 from 16 to 128; by default less than the demo's, so that
    /// 512 keys have blocks enough for 97 %
    #[arg(long, value_name = "KEYS", default_value_t = 16)]
    block_k: usize,
}

/// Computes everything on the device of that name; fits are made on the host.
pub fn run(args: &Args, device: &str) -> Result<(), Error> {
    let client = device::select(device)?.client();
    let options = AttentionOptions {
        block_q: args.block_q,
        block_k: args.block_k,
        ..AttentionOptions::default()
    };
    let layers = args.inputs.load(&client, &options)?;
    let progress = common::progress(layers.len() * STEPS);
    let mut results = Vec::new();
    for layer in &layers {
        results.push((layer, measure::layer(&client, layer, &options, &progress)?));
    }
    progress.finish_and_clear();
    println!("{}", table::LEGEND);
    for (layer, points) in &results {
        println!("{}\n{}\n", layer.name, table::table(points));
    }
    for (layer, points) in &results {
        let path = picture::draw(&args.output, layer, points)?;
        println!("Picture: {}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
