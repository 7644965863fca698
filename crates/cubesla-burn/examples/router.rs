//! Trains SLA2's router on the queries, keys and values of a real model.
//!
//! `cargo run -p cubesla-burn --example router [-- steps picture.png]`
//!
//! Blocks of 32 queries by 16 keys at 75, 90 and 95 % sparsity. Printed is the distance to full
//! attention, relative to its length, of the sparse branch alone, of SLA with a trained projection, and
//! of SLA2 with trained weights of its branches, whose blocks the heuristic router chooses or a trained
//! one. Three quarters of the queries train, the rest is held out. `CUBESLA_DEVICE` chooses the device;
//! on software Vulkan it takes some minutes.

#[path = "router/picture.rs"]
mod picture;

use std::error::Error;

use burn_core::backend::DispatchDevice;
use burn_core::tensor::{Device, Tensor, TensorData};
use burn_optim::AdamConfig;
use cubesla_burn::training::{
    FitOptions, RouterTraining, distance, evaluate, fit, full_attention, train_router,
};
use cubesla_burn::{
    SlaVariant, SparseLinearAttention, SparseLinearAttentionConfig, try_block_sparse_attention,
};
use half::f16;
use safetensors::SafeTensors;

const DATA: &[u8] = include_bytes!("../../../data/minilm_qkv.safetensors");
const LAYER: &str = "layer4";
const SPARSITIES: [f64; 3] = [0.75, 0.90, 0.95];
const METHODS: [&str; 4] = [
    "sparse alone",
    "SLA",
    "SLA2, heuristic router",
    "SLA2, trained router",
];

type Qkv = [Tensor<4>; 3];

/// Distances of the methods at a sparsity: on the queries that train, and on those held out.
struct Point {
    sparsity: f64,
    distances: [[f32; 4]; 2],
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let steps: usize = args.next().map_or(Ok(40), |steps| steps.parse())?;
    let picture = args.next();

    let device = Device::new(DispatchDevice::Cube(cubesla::device::from_env()?)).autodiff();
    let file = SafeTensors::deserialize(DATA)?;
    let read = |name: &str| tensor(&file, &format!("{LAYER}.{name}"), &device);
    let (q, k, v) = (read("q")?, read("k")?, read("v")?);
    let [_, heads, len, dim] = q.dims();
    let part = |first, len| [q.clone().narrow(2, first, len), k.clone(), v.clone()];
    let splits = [part(0, 3 * len / 4), part(3 * len / 4, len / 4)];

    println!("{LAYER} of all-MiniLM-L6-v2, {heads} heads of {len} tokens; {steps} steps of Adam");
    println!("distance to full attention, and the share of an oracle's blocks that a router found");
    let mut points = Vec::new();
    for sparsity in SPARSITIES {
        let config = SparseLinearAttentionConfig::new(dim)
            .with_block_q(32)
            .with_block_k(16)
            .with_critical(1.0 - sparsity + 1e-9)
            .with_alpha_heads(heads);
        let train = splits[0].clone();
        let sla = config
            .clone()
            .with_variant(SlaVariant::Sla)
            .with_negligible(Some(0.0));
        let sla = second_stage(sla.init(&device), &train, steps, 1e-2)?;
        let heuristic = second_stage(config.init(&device), &train, steps, 1e-1)?;
        let options = RouterTraining {
            tau: 0.1,
            fit: fit_options(steps, 1e-2),
        };
        let router = config.with_router_weights(true).init(&device);
        let router = train_router(router, &options, |_| train.clone())?.model;
        let trained = second_stage(router, &train, steps, 1e-1)?;

        let mut point = Point {
            sparsity,
            distances: [[0.0; 4]; 2],
        };
        for (at, (name, [q, k, v])) in ["trained on", "held out"].iter().zip(&splits).enumerate() {
            let measure = |module| evaluate(module, q.clone(), k.clone(), v.clone());
            let (plain, best) = (measure(&heuristic)?, measure(&trained)?);
            let sparse = sparse_alone(&heuristic, [q, k, v].map(Tensor::clone))?;
            point.distances[at] = [sparse, measure(&sla)?.error, plain.error, best.error];
            point.sparsity = plain.sparsity.into();
            println!("{:.1} % sparse, queries {name}:", 100.0 * plain.sparsity);
            for (method, distance) in METHODS.iter().zip(point.distances[at]) {
                println!("  {method:<24} {distance:.4}");
            }
            let [plain, best] = [plain, best].map(|metrics| 100.0 * metrics.agreement);
            println!("  oracle's blocks found    {plain:.0} % heuristic, {best:.0} % trained");
        }
        points.push(point);
    }
    if let Some(path) = picture {
        picture::draw(path.as_ref(), &points)?;
        println!("{path}: distance by sparsity; dots for queries held out");
    }
    Ok(())
}

fn fit_options(steps: usize, learning_rate: f64) -> FitOptions {
    FitOptions {
        steps,
        learning_rate,
        resume: None,
    }
}

/// Trains what a module has besides its router, with hard masks, to come close to full attention.
fn second_stage(
    module: SparseLinearAttention,
    [q, k, v]: &Qkv,
    steps: usize,
    learning_rate: f64,
) -> Result<SparseLinearAttention, cubesla_burn::Error> {
    let blocks = module.try_route(q.clone(), k.clone())?;
    let attention = module.config.attention();
    let full = full_attention(q.clone(), k.clone(), v.clone(), &attention)?;
    let options = fit_options(steps, learning_rate);
    let trained = fit(module, AdamConfig::new().init(), &options, |module, _| {
        let out = module.try_forward_with(q.clone(), k.clone(), v.clone(), &blocks)?;
        Ok((out - full.clone()).powi_scalar(2).mean())
    })?;
    Ok(trained.model)
}

/// The distance of the sparse branch over the blocks that `module` chooses.
fn sparse_alone(
    module: &SparseLinearAttention,
    [q, k, v]: Qkv,
) -> Result<f32, cubesla_burn::Error> {
    let attention = module.config.attention();
    let blocks = module.try_route(q.clone(), k.clone())?;
    let full = full_attention(q.clone(), k.clone(), v.clone(), &attention)?;
    let sparse = try_block_sparse_attention(q, k, v, &blocks.critical, &attention)?;
    Ok(distance(sparse.out, full))
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
