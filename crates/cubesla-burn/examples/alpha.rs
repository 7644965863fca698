//! Trains SLA2's alpha on the queries, keys and values of a real model.
//!
//! `cargo run -p cubesla-burn --example alpha [-- steps picture.png]`
//!
//! Blocks of 32 queries by 16 keys, chosen by the heuristic router at 75, 90 and 95 % sparsity. The
//! logits of alpha, one for each head and query block, learn to bring SLA2 close to full attention;
//! printed is the distance to it, relative to its length, before and after, beside that of sparse
//! attention alone. `CUBESLA_DEVICE` chooses the device; on software Vulkan it takes a minute or two.

#[path = "alpha/picture.rs"]
mod picture;

use std::error::Error;

use burn_core as burn;
use burn_core::backend::DispatchDevice;
use burn_core::module::{Module, Param};
use burn_core::tensor::{Device, Tensor, TensorData};
use burn_optim::{AdamConfig, GradientsParams};
use cubesla_burn::{
    AttentionOptions, BlockList, Blocks, RouterOptions, SlaOptions, block_sparse_attention, route,
    sla2,
};
use half::f16;
use indicatif::{ProgressBar, ProgressStyle};
use safetensors::SafeTensors;

const DATA: &[u8] = include_bytes!("../../../data/minilm_qkv.safetensors");
const LAYER: &str = "layer4";
const SPARSITIES: [f64; 3] = [0.75, 0.90, 0.95];
const BLOCKS: AttentionOptions = AttentionOptions {
    scale: None,
    causal: cubesla_burn::Causal::None,
    block_q: 32,
    block_k: 16,
};

/// What is trained.
#[derive(Module, Debug)]
struct Alpha {
    logit: Param<Tensor<2>>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let steps: usize = args.next().map_or(Ok(40), |steps| steps.parse())?;
    let picture = args.next();

    let plain = Device::new(DispatchDevice::Cube(cubesla::device::from_env()?));
    let device = plain.clone().autodiff();
    let file = SafeTensors::deserialize(DATA)?;
    let read = |name: &str| tensor(&file, &format!("{LAYER}.{name}"), &device);
    let (q, k, v) = (read("q")?, read("k")?, read("v")?);
    let [_, heads, len, _] = q.dims();
    let [rows, columns] = [len.div_ceil(BLOCKS.block_q), len.div_ceil(BLOCKS.block_k)];
    let all = BlockList::dense([1, heads, rows, columns], &plain);
    let full = block_sparse_attention(q.clone(), k.clone(), v.clone(), &all, &BLOCKS);

    println!("{LAYER} of all-MiniLM-L6-v2, {heads} heads of {len} tokens; {steps} steps of Adam");
    println!("sparsity   sparse only   SLA2 before   SLA2 after");
    let mut curves = Vec::new();
    for sparsity in SPARSITIES {
        let router = RouterOptions {
            critical: 1.0 - sparsity,
            ..RouterOptions::sla2()
        };
        let blocks = route(q.clone(), k.clone(), &BLOCKS, &router).blocks;
        let sparse =
            block_sparse_attention(q.clone(), k.clone(), v.clone(), &blocks.critical, &BLOCKS);
        let sparse = distance(sparse, &full);
        let inputs = [&q, &k, &v].map(Tensor::clone);
        let curve = train(inputs, &blocks, &full, [heads, rows], steps);
        let actual = 1.0 - blocks.critical.width() as f64 / columns as f64;
        let (before, after) = (curve[0], curve[curve.len() - 1]);
        println!(
            "{:>7.1} %   {sparse:>11.4}   {before:>11.4}   {after:>10.4}",
            100.0 * actual
        );
        curves.push((actual, sparse, curve));
    }
    if let Some(path) = picture {
        picture::draw(path.as_ref(), &curves)?;
        println!("{path}: the distance by step; thin, sparse attention alone");
    }
    Ok(())
}

/// The distance to full attention before each step and after the last.
fn train(
    [q, k, v]: [Tensor<4>; 3],
    blocks: &Blocks,
    full: &Tensor<4>,
    logits: [usize; 2],
    steps: usize,
) -> Vec<f32> {
    let options = SlaOptions {
        attention: BLOCKS,
        ..SlaOptions::default()
    };
    let forward = |model: &Alpha| {
        let logit = model.logit.val();
        sla2(q.clone(), k.clone(), v.clone(), logit, blocks, &options)
    };
    let mut model = Alpha {
        logit: Param::from_tensor(Tensor::zeros(logits, &full.device())),
    };
    let mut optimizer = AdamConfig::new().init();
    let style = ProgressStyle::with_template("{bar:30} step {pos}/{len}, distance {msg}");
    let bar = ProgressBar::new(steps as u64)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut curve = Vec::with_capacity(steps + 1);
    for _ in 0..steps {
        let out = forward(&model);
        curve.push(distance(out.clone(), full));
        bar.set_message(format!("{:.4}", curve[curve.len() - 1]));
        let loss = (out - full.clone()).powi_scalar(2).sum();
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(0.1, model, grads);
        bar.inc(1);
    }
    bar.finish_and_clear();
    curve.push(distance(forward(&model), full));
    curve
}

/// `|x - full| / |full|`.
fn distance(x: Tensor<4>, full: &Tensor<4>) -> f32 {
    let length = |x: Tensor<4>| x.powi_scalar(2).sum().into_scalar::<f32>().sqrt();
    length(x - full.clone()) / length(full.clone())
}

/// A tensor of the file in f32.
fn tensor(
    file: &SafeTensors<'_>,
    name: &str,
    device: &Device,
) -> Result<Tensor<4>, Box<dyn Error>> {
    let view = file.tensor(name)?;
    let values: Vec<f32> = view
        .data()
        .chunks_exact(2)
        .map(|bytes| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32())
        .collect();
    let data = TensorData::new(values, view.shape().to_vec());
    Ok(Tensor::from_data(data, device))
}
