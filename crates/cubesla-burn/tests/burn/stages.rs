//! The two stages of training, and what measures them.

use std::path::PathBuf;

use burn_core::tensor::Tensor;
use burn_optim::AdamConfig;
use cubesla_burn::training::{
    FitOptions, Resume, RouterTraining, block_mass, distance, evaluate, fit, full_attention,
    train_router,
};
use cubesla_burn::{PrecisionConfig, SparseLinearAttention, SparseLinearAttentionConfig};

use crate::common::{
    assert_close, backward, device, floats, gradient, heads, leaf, limit, relative_error,
};

fn config() -> SparseLinearAttentionConfig {
    SparseLinearAttentionConfig::new(32)
        .with_block_q(32)
        .with_block_k(16)
        .with_critical(0.34)
        .with_alpha_heads(2)
        .with_router_weights(true)
}

fn inputs(device: &burn_core::tensor::Device) -> [Tensor<4>; 3] {
    [1, 2, 3].map(|seed| heads([1, 2, 90, 32], seed, device) * 2.0)
}

fn options(steps: usize) -> RouterTraining {
    RouterTraining {
        tau: 0.1,
        fit: FitOptions {
            steps,
            learning_rate: 3e-2,
            resume: None,
        },
    }
}

fn parameters(module: &SparseLinearAttention) -> Vec<f32> {
    let linears = [&module.proj_q, &module.proj_k];
    let weights = linears.map(|linear| linear.as_ref().expect("a projection").weight.val());
    let mut all = floats(module.alpha_logit.as_ref().expect("logits").val());
    weights.into_iter().for_each(|w| all.extend(floats(w)));
    all
}

#[test]
fn the_first_stage_lowers_its_loss_and_freezes_the_router() {
    let device = device().autodiff();
    let qkv = inputs(&device);
    let module = config().init(&device);
    let before = parameters(&module);
    let trained = train_router(module, &options(8), |_| qkv.clone()).unwrap();
    let (first, last) = (trained.losses[0], trained.losses[7]);
    assert!(last < 0.9 * first, "{:?}", trained.losses);
    let after = parameters(&trained.model);
    // Logits and both projections have moved.
    for range in [0..2, 2..2 + 1024, 2 + 1024..2 + 2048] {
        assert!(before[range.clone()] != after[range]);
    }
    let frozen = trained.model.proj_q.as_ref().expect("a projection");
    assert!(!frozen.weight.is_require_grad());
    // Frozen, the module routes.
    let [q, k, v] = qkv;
    trained.model.try_forward(q, k, v).unwrap();
}

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_stopped_run_goes_on_as_if_it_had_not_been() {
    let device = device().autodiff();
    let qkv = inputs(&device);
    let name = format!("cubesla-burn-stages-{}", std::process::id());
    let folder = Folder(std::env::temp_dir().join(name));
    let run = |steps, resume| {
        let mut options = options(steps);
        options.fit.resume = resume;
        train_router(config().init(&device), &options, |_| qkv.clone()).unwrap()
    };
    let whole = run(5, None);
    let resume = || {
        Some(Resume {
            folder: folder.0.clone(),
            every: 2,
        })
    };
    run(3, resume());
    let resumed = run(5, resume());
    if limit(0.0) == 0.0 {
        assert_eq!(resumed.losses, whole.losses);
        assert_eq!(parameters(&resumed.model), parameters(&whole.model));
    } else {
        // Burn tunes its products while it runs, so two runs need not take the same.
        let [found, expected] = [&resumed, &whole].map(|run| parameters(&run.model));
        assert!(relative_error(&found, &expected) < limit(0.0));
    }
    // One state is kept, of the last step.
    let mut names: Vec<String> = std::fs::read_dir(&folder.0)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["losses.txt", "model-5.bpk", "optimizer-5.bpk"]);

    std::fs::write(folder.0.join("losses.txt"), "no number").unwrap();
    let mut options = options(6);
    options.fit.resume = resume();
    let error = train_router(config().init(&device), &options, |_| qkv.clone()).unwrap_err();
    assert!(error.to_string().contains("losses.txt"), "{error}");
}

#[test]
fn masses_are_those_of_full_attention() {
    let device = device();
    let [q, k, v] = inputs(&device);
    let attention = cubesla_burn::AttentionOptions {
        block_q: 32,
        block_k: 16,
        ..Default::default()
    };
    let mass = block_mass(q.clone(), k.clone(), &attention).unwrap();
    assert_eq!(mass.dims(), [1, 2, 3, 6]);
    let scores = q.clone().matmul(k.clone().transpose()) / 32f64.sqrt();
    let p = burn_core::tensor::activation::softmax(scores, 3);
    let full = full_attention(q, k, v.clone(), &attention).unwrap();
    assert_close("full", full, p.clone().matmul(v), 1e-5);
    let p = floats(p);
    for (at, found) in floats(mass).into_iter().enumerate() {
        let (column, row) = (at % 6, at / 6 % 3);
        let head = at / 18;
        let rows = 32 * row..(32 * row + 32).min(90);
        let count = rows.len() as f32;
        let columns = 16 * column..(16 * column + 16).min(90);
        let sum: f32 = rows
            .flat_map(|i| columns.clone().map(move |j| (i, j)))
            .map(|(i, j)| p[(head * 90 + i) * 90 + j])
            .sum();
        assert!(
            f64::from((found - sum / count).abs()) < limit(1e-5),
            "{at}: {found}"
        );
    }
}

#[test]
fn metrics_of_all_blocks_are_perfect() {
    let device = device();
    let [q, k, v] = inputs(&device);
    let all = config().with_critical(1.0).with_alpha_logit(30.0);
    let metrics = evaluate(&all.init(&device), q.clone(), k.clone(), v.clone()).unwrap();
    assert_eq!((metrics.sparsity, metrics.agreement), (0.0, 1.0));
    assert!(f64::from((metrics.mass - 1.0).abs()) < limit(1e-5));
    assert!(f64::from(metrics.error) < limit(1e-5));
    let some = evaluate(&config().init(&device), q, k, v).unwrap();
    assert!((some.sparsity - 4.0 / 6.0).abs() < 1e-6);
    assert!((0.0..=1.0).contains(&some.agreement) && some.mass < 1.0 && some.error > 0.01);
}

/// The second stage, quantization-aware: the forward is in low bits, and its gradients pass straight
/// through the rounding.
#[test]
fn the_second_stage_trains_in_low_bits() {
    let device = device().autodiff();
    let config = config().with_router_weights(false).with_critical(0.5);
    let init = |precision| config.clone().with_precision(precision).init(&device);
    let run = |module: &SparseLinearAttention| {
        let [q, k, v] = inputs(&device).map(leaf);
        let out = module.forward(q.clone(), k.clone(), v.clone());
        let grads = backward(out.clone(), 9);
        (out, [q, k, v].map(|x| gradient(&x, &grads)))
    };
    let (exact, exact_grads) = run(&init(PrecisionConfig::Full));
    for precision in [PrecisionConfig::Int8, PrecisionConfig::Int8Fp8] {
        let (rounded, grads) = run(&init(precision));
        let error = distance(rounded.inner(), exact.clone().inner());
        assert!(error > 1e-4 && error < 0.05, "{error} of {precision:?}");
        for (found, expected) in grads.into_iter().zip(&exact_grads) {
            let error = relative_error(&floats(found), &floats(expected.clone()));
            assert!(error > 1e-6 && error < 0.1, "{error} of {precision:?}");
        }
    }

    let [q, k, v] = inputs(&device);
    let target = v.clone().mean_dim(2).expand([1, 2, 90, 32]);
    let options = FitOptions {
        steps: 6,
        learning_rate: 0.1,
        resume: None,
    };
    let low = init(PrecisionConfig::Int8Fp8);
    let trained = fit(low, AdamConfig::new().init(), &options, |model, _| {
        let out = model.try_forward(q.clone(), k.clone(), v.clone())?;
        Ok((out - target.clone()).powi_scalar(2).mean())
    })
    .unwrap();
    assert!(
        trained.losses[5] < trained.losses[0],
        "{:?}",
        trained.losses
    );
}
