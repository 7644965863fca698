//! `cubesla demo`: dense attention, its sparse branch alone and SLA2 on the queries, keys and values
//! of a model.

mod measure;
mod picture;
mod table;

use std::path::PathBuf;

use cubesla::{AttentionOptions, device};

use crate::common;
use crate::error::Error;
use crate::inputs::Inputs;
use crate::layers::Layer;
use measure::{Run, STEPS};

/// The layers with their runs, in order.
type Results<'a> = [(&'a Layer, Vec<Run>)];

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    inputs: Inputs,
    /// Folder for the pictures
    #[arg(long, value_name = "DIR", default_value = "cubesla-demo")]
    output: PathBuf,
    /// Query rows per block, a multiple of 16 from 16 to 128
    #[arg(long, value_name = "ROWS", default_value_t = 32)]
    block_q: usize,
    /// Keys per block, a multiple of 16 from 16 to 128
    #[arg(long, value_name = "KEYS", default_value_t = 32)]
    block_k: usize,
}

/// Runs the demo on the device of that name.
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
    println!("{}", table::table(&results));
    table::check(&results)?;

    for (layer, runs) in &results {
        let path = picture::draw(&args.output, layer, runs)?;
        println!("Picture: {}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
