//! An application with CubeSLA in its model: compares gradients with Burn's own of the formula, then
//! trains, and fails if either is wrong.
//!
//! `cargo xtask application` runs it on wgpu, with Burn's fusion and without; with a GPU of NVIDIA's,
//! `cargo run --features cuda,fusion`.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Device, Distribution, Tensor, TensorData};
use cubesla_burn::{
    AttentionOptions, BlockList, HostBlockList, SlaVariant, SparseLinearAttention,
    SparseLinearAttentionConfig, block_sparse_attention,
};

const HEADS: usize = 2;
const DIM: usize = 32;
const LEN: usize = 200;
const BLOCK_Q: usize = 32;
const BLOCK_K: usize = 16;

fn main() {
    let device = Device::default().autodiff();
    compare_gradients(&device);
    for variant in [SlaVariant::Sla, SlaVariant::Sla2] {
        train(variant, &device);
    }
}

/// Gradients of sparse attention, and those of the formula with a mask.
fn compare_gradients(device: &Device) {
    let leaf = || random([1, HEADS, LEN, DIM], device).require_grad();
    let (q, k, v) = (leaf(), leaf(), leaf());
    let list = some_blocks();
    let options = AttentionOptions {
        block_q: BLOCK_Q,
        block_k: BLOCK_K,
        ..AttentionOptions::default()
    };
    let blocks = BlockList::from_host(&list, device);
    // Operations around it, for fusion to fuse.
    let out = block_sparse_attention(q.clone() * 2.0, k.clone(), v.clone(), &blocks, &options);
    let found = out.exp().sum().backward();

    let scores = (q.clone() * 2.0).matmul(k.clone().transpose()) / (DIM as f64).sqrt();
    let scores = scores.mask_fill(mask(&list, device).bool_not(), -1e30);
    let exact = softmax(scores, 3).matmul(v.clone()).exp().sum().backward();
    for (name, leaf) in [("dq", &q), ("dk", &k), ("dv", &v)] {
        let found = leaf.grad(&found).expect("a gradient of the kernels");
        let exact = leaf.grad(&exact).expect("a gradient of Burn's");
        let distance = length(found - exact.clone()) / length(exact);
        println!("{name}: relative distance to Burn's autodiff {distance:.1e}");
        // Burn's products of f32 round their factors to TF32 on CUDA.
        assert!(distance < 2e-3, "{name} is wrong");
    }
}

/// Every row's first key block and each third one.
fn some_blocks() -> HostBlockList {
    let shape = [1, HEADS, LEN.div_ceil(BLOCK_Q), LEN.div_ceil(BLOCK_K)];
    let row = |at: usize| {
        (0..shape[3] as u32)
            .filter(|&block| block == 0 || (block as usize + at).is_multiple_of(3))
            .collect()
    };
    let rows = (0..HEADS * shape[2]).map(row).collect();
    HostBlockList::from_rows(shape, rows).expect("rows are ascending")
}

/// The same for each pair of a query and a key.
fn mask(list: &HostBlockList, device: &Device) -> Tensor<4, Bool> {
    let [_, heads, query_blocks, key_blocks] = list.shape();
    let blocks = list.to_mask();
    let mut pairs = Vec::new();
    for head in 0..heads {
        for query in 0..LEN {
            let row = head * query_blocks + query / BLOCK_Q;
            pairs.extend((0..LEN).map(|key| blocks[row * key_blocks + key / BLOCK_K]));
        }
    }
    Tensor::from_data(TensorData::new(pairs, [1, heads, LEN, LEN]), device)
}

#[derive(Module, Debug)]
struct Model {
    input: Linear,
    attention: SparseLinearAttention,
    output: Linear,
}

impl Model {
    /// `x [1, L, H D]`.
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let split = |x: Tensor<3>| x.reshape([1, LEN, HEADS, DIM]).swap_dims(1, 2);
        let parts = self.input.forward(x).chunk(3, 2);
        let [q, k, v] = [0, 1, 2].map(|i| split(parts[i].clone()));
        let out = self.attention.forward(q, k, v);
        self.output
            .forward(out.swap_dims(1, 2).reshape([1, LEN, HEADS * DIM]))
    }
}

/// Fits a target, and fails if the error does not fall.
fn train(variant: SlaVariant, device: &Device) {
    let width = HEADS * DIM;
    let mut model = Model {
        input: LinearConfig::new(width, 3 * width).init(device),
        attention: SparseLinearAttentionConfig::new(DIM)
            .with_variant(variant)
            .with_block_q(BLOCK_Q)
            .with_block_k(BLOCK_K)
            .with_critical(0.3)
            .init(device),
        output: LinearConfig::new(width, width).init(device),
    };
    let mut optimizer = AdamConfig::new().init();
    let x = random([1, LEN, width], device);
    let target = random([1, 1, width], device).expand([1, LEN, width]);
    let mut losses = Vec::new();
    for _ in 0..20 {
        let loss = (model.forward(x.clone()) - target.clone()).square().mean();
        losses.push(loss.clone().into_scalar::<f32>());
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-2, model, gradients);
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    println!("{variant:?}: loss {first:.4} before training, {last:.4} after 20 steps");
    assert!(last < 0.5 * first, "{variant:?} does not learn: {losses:?}");
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

fn length<const D: usize>(x: Tensor<D>) -> f64 {
    f64::from(x.square().sum().sqrt().into_scalar::<f32>())
}
