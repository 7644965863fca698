use std::collections::BTreeMap;
use std::path::PathBuf;

use burn_core::tensor::{DType, Tensor};
use cubesla_burn::checkpoint::{Checkpoint, CheckpointError};
use cubesla_burn::{
    Activations, Error, ProblemError, SlaVariant, SparseLinearAttention,
    SparseLinearAttentionConfig,
};
use half::bf16;
use safetensors::tensor::{Dtype, TensorView};

use crate::common::{assert_close, device, floats, noise, values};
use crate::pytorch_file::{self, Saved};

/// A folder of its own for a test, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let name = format!("cubesla-burn-{test}-{}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }

    fn safetensors(&self, tensors: &[Saved]) -> PathBuf {
        let path = self.0.join("model.safetensors");
        let views: BTreeMap<&str, TensorView<'_>> = tensors
            .iter()
            .map(|tensor| {
                let dtype = match tensor.storage {
                    "FloatStorage" => Dtype::F32,
                    "BFloat16Storage" => Dtype::BF16,
                    "CharStorage" => Dtype::I8,
                    other => panic!("{other}"),
                };
                let view = TensorView::new(dtype, tensor.shape.clone(), &tensor.bytes);
                (tensor.key.as_str(), view.unwrap())
            })
            .collect();
        safetensors::serialize_to_file(views, None, &path).unwrap();
        path
    }

    fn pytorch(&self, tensors: &[Saved]) -> PathBuf {
        let path = self.0.join("model.pt");
        pytorch_file::write(&path, tensors);
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

const DIM: usize = 32;

fn matrix(key: &str, seed: u64) -> Saved {
    Saved::floats(key, &[DIM, DIM], &values(DIM * DIM, seed))
}

fn vector(key: &str, seed: u64) -> Saved {
    Saved::floats(key, &[DIM], &values(DIM, seed))
}

fn module(variant: SlaVariant) -> SparseLinearAttention {
    SparseLinearAttentionConfig::new(DIM)
        .with_variant(variant)
        .init(&device())
}

/// The matrix of a file as Burn has it.
fn burns(seed: u64) -> Tensor<2> {
    noise([DIM, DIM], seed, &device()).transpose()
}

fn check_sla(module: SparseLinearAttention, seed: u64) {
    let projection = module.proj_l.expect("SLA has a projection");
    let bias = projection.bias.expect("with a bias");
    let weight = projection.weight.val().into_data();
    weight.assert_eq(&burns(seed).into_data(), true);
    assert_eq!(floats(bias.val()), values(DIM, seed + 1));
}

/// The same tensors by the names of either project, wrapped or not, in either kind of file.
#[test]
fn sla_of_either_project_in_either_file() {
    let folder = Folder::new("either");
    let tensors = [
        matrix("blocks.3.self_attn.attn_op.local_attn.proj_l.weight", 1),
        vector("blocks.3.self_attn.attn_op.local_attn.proj_l.bias", 2),
        matrix(
            "net.blocks.5._checkpoint_wrapped_module.self_attn.attn_op.local_attn.proj_l.weight",
            3,
        ),
        vector(
            "net.blocks.5.self_attn._checkpoint_wrapped_module.attn_op.local_attn.proj_l.bias",
            4,
        ),
        matrix("blocks.11.attn1.attn_impl.proj_l.weight", 5),
        vector("blocks.11.attn1.attn_impl.proj_l.bias", 6),
        vector("blocks.0.norm1.weight", 7),
    ];
    for path in [folder.safetensors(&tensors), folder.pytorch(&tensors)] {
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(checkpoint.sla_blocks(), [3, 5, 11], "{path:?}");
        for (block, seed) in [(3, 1), (5, 3), (11, 5)] {
            let loaded = checkpoint.load_sla(block, module(SlaVariant::Sla));
            check_sla(loaded.unwrap(), seed);
        }
    }
}

#[test]
fn parameters_train_as_they_did() {
    let folder = Folder::new("train");
    let path = folder.safetensors(&[
        matrix("blocks.0.attn1.attn_impl.proj_q.weight", 1),
        matrix("blocks.0.attn1.attn_impl.proj_k.weight", 2),
        Saved::floats(
            "blocks.0.attn1.attn_impl.alpha_logits",
            &[1, 4, 1, 1],
            &values(4, 3),
        ),
    ]);
    let device = device().autodiff();
    let module = SparseLinearAttentionConfig::new(DIM)
        .with_alpha_heads(4)
        .with_router_weights(true)
        .init(&device);
    let loaded = Checkpoint::open(path).unwrap().load_sla(0, module).unwrap();
    let logit = loaded.alpha_logit.clone().expect("SLA2 has logits").val();
    assert!(logit.is_require_grad());
    assert_eq!(logit.dims(), [4, 1]);
    assert_eq!(floats(logit), values(4, 3));
    for (linear, seed) in [(&loaded.proj_q, 1), (&loaded.proj_k, 2)] {
        let weight = linear
            .as_ref()
            .expect("the router has weights")
            .weight
            .val();
        assert!(!weight.is_require_grad());
        weight.into_data().assert_eq(&burns(seed).into_data(), true);
    }
    let [q, k, v] = [4, 5, 6].map(|seed| noise([1, 4, 70, DIM], seed, &device));
    assert!(loaded.forward(q, k, v).is_tracked());
}

#[test]
fn half_precision_is_widened() {
    let folder = Folder::new("half");
    let halves = values(DIM * DIM, 1).into_iter().map(bf16::from_f32);
    let wide: Vec<f32> = halves.clone().map(f32::from).collect();
    let path = folder.safetensors(&[
        Saved {
            key: "blocks.0.attn1.attn_impl.proj_l.weight".into(),
            storage: "BFloat16Storage",
            shape: vec![DIM, DIM],
            bytes: halves.flat_map(|value| value.to_le_bytes()).collect(),
        },
        vector("blocks.0.attn1.attn_impl.proj_l.bias", 2),
    ]);
    let checkpoint = Checkpoint::open(path).unwrap();
    let loaded = checkpoint.load_sla(0, module(SlaVariant::Sla)).unwrap();
    let weight = loaded.proj_l.expect("SLA has a projection").weight.val();
    assert_eq!(weight.dtype(), DType::F32);
    assert_eq!(floats(weight.transpose()), wide);
}

/// `[out, in]` that end in short blocks.
const LAYER: [usize; 2] = [130, 256];

fn layer(name: &str) -> Vec<Saved> {
    let [outputs, inputs] = LAYER;
    let codes = (0..outputs * inputs).map(|i| (i * 89 % 256) as u8);
    let scales: Vec<f32> = values(4, 1).iter().map(|x| 0.01 * x.abs() + 1e-3).collect();
    vec![
        Saved {
            key: format!("{name}.int8_weight"),
            storage: "CharStorage",
            shape: LAYER.to_vec(),
            bytes: codes.collect(),
        },
        Saved::floats(&format!("{name}.scale"), &[2, 2], &scales),
        Saved::floats(&format!("{name}.bias"), &[outputs], &values(outputs, 2)),
    ]
}

#[test]
fn quantized_layers_are_codes_times_scales() {
    let folder = Folder::new("layers");
    let tensors = layer("blocks.0._checkpoint_wrapped_module.ffn.0");
    let [outputs, inputs] = LAYER;
    let scales: Vec<f32> = tensors[1]
        .bytes
        .chunks(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    let exact: Vec<f32> = (0..outputs * inputs)
        .map(|at| {
            let scale = scales[at / inputs / 128 * 2 + at % inputs / 128];
            f32::from(tensors[0].bytes[at] as i8) * scale
        })
        .collect();
    let exact = burn_core::tensor::TensorData::new(exact, LAYER);
    let exact = Tensor::<2>::from_data(exact, &device());
    let bias = noise([1, outputs], 2, &device());
    for path in [folder.safetensors(&tensors), folder.pytorch(&tensors)] {
        let checkpoint = Checkpoint::open(path).unwrap();
        assert_eq!(checkpoint.quant_linears(), ["blocks.0.ffn.0"]);
        for (activations, limit) in [(Activations::Full, 1e-5), (Activations::Quantized, 0.02)] {
            let layer = checkpoint.quant_linear("blocks.0.ffn.0", activations, &device());
            let x = noise([3, inputs], 3, &device());
            let expected = x.clone().matmul(exact.clone().transpose()) + bias.clone();
            assert_close("out", layer.unwrap().forward(x), expected, limit);
        }
    }
}

fn refused(tensors: &[Saved], variant: SlaVariant) -> CheckpointError {
    let folder = Folder::new("refused");
    let checkpoint = Checkpoint::open(folder.safetensors(tensors)).unwrap();
    checkpoint.load_sla(1, module(variant)).unwrap_err()
}

#[test]
fn blocks_that_do_not_fit_are_refused() {
    const WEIGHT: &str = "blocks.1.attn1.attn_impl.proj_l.weight";
    const BIAS: &str = "blocks.1.attn1.attn_impl.proj_l.bias";
    let other = matrix("blocks.7.attn1.attn_impl.proj_l.weight", 1);
    match refused(&[other], SlaVariant::Sla) {
        CheckpointError::Block { block: 1, found } => assert_eq!(found, [7]),
        error => panic!("{error}"),
    }
    match refused(&[matrix(WEIGHT, 1)], SlaVariant::Sla) {
        CheckpointError::Missing { key, .. } => {
            assert_eq!(key, BIAS);
        }
        error => panic!("{error}"),
    }
    match refused(&[matrix(WEIGHT, 1), vector(BIAS, 2)], SlaVariant::Sla2) {
        CheckpointError::Missing { key, hint } => {
            assert_eq!(key, "blocks.1.attn1.attn_impl.alpha_logit");
            assert!(hint.contains("SlaVariant::Sla)"), "{hint}");
        }
        error => panic!("{error}"),
    }
    let router = matrix("blocks.1.attn1.attn_impl.proj_q.weight", 3);
    match refused(
        &[matrix(WEIGHT, 1), vector(BIAS, 2), router],
        SlaVariant::Sla,
    ) {
        CheckpointError::Unused { key, hint } => {
            assert_eq!(key, "blocks.1.attn1.attn_impl.proj_q.weight");
            assert!(hint.contains("with_router_weights"), "{hint}");
        }
        error => panic!("{error}"),
    }
    let wide = Saved::floats(WEIGHT, &[64, 64], &values(64 * 64, 1));
    match refused(&[wide, vector(BIAS, 2)], SlaVariant::Sla) {
        CheckpointError::Shape { key, found, .. } => {
            assert_eq!((key.as_str(), found), (WEIGHT, vec![64, 64]));
        }
        error => panic!("{error}"),
    }
    let codes = Saved {
        storage: "CharStorage",
        bytes: vec![0; DIM * DIM],
        ..matrix(WEIGHT, 1)
    };
    match refused(&[codes, vector(BIAS, 2)], SlaVariant::Sla) {
        CheckpointError::DType { key, found, .. } => {
            assert_eq!((key.as_str(), found), (WEIGHT, DType::I8));
        }
        error => panic!("{error}"),
    }
    let heads = "blocks.1.attn1.attn_impl.alpha_logit";
    match refused(&[Saved::floats(heads, &[4], &[0.0; 4])], SlaVariant::Sla2) {
        CheckpointError::Shape { key, hint, .. } => {
            assert_eq!(key, heads);
            assert!(hint.contains("alpha_heads"), "{hint}");
        }
        error => panic!("{error}"),
    }
}

#[test]
fn layers_that_do_not_fit_are_refused() {
    let folder = Folder::new("layers-refused");
    let load = |tensors: &[Saved], activations| {
        let checkpoint = Checkpoint::open(folder.safetensors(tensors)).unwrap();
        checkpoint
            .quant_linear("ffn", activations, &device())
            .unwrap_err()
    };
    let key = |error| match error {
        CheckpointError::Missing { key, .. }
        | CheckpointError::Shape { key, .. }
        | CheckpointError::DType { key, .. } => key,
        error => panic!("{error}"),
    };
    let mut tensors = layer("ffn");
    tensors.remove(1);
    assert_eq!(key(load(&tensors, Activations::Full)), "ffn.scale");
    let mut tensors = layer("ffn");
    tensors[1] = Saved::floats("ffn.scale", &[2, 1], &[1.0; 2]);
    assert_eq!(key(load(&tensors, Activations::Full)), "ffn.scale");
    let mut tensors = layer("ffn");
    tensors[2] = Saved::floats("ffn.bias", &[3], &[1.0; 3]);
    assert_eq!(key(load(&tensors, Activations::Full)), "ffn.bias");
    let mut tensors = layer("ffn");
    tensors[0] = Saved::floats("ffn.int8_weight", &[2, 2], &[0.0; 4]);
    assert_eq!(key(load(&tensors, Activations::Full)), "ffn.int8_weight");

    let mut tensors = layer("ffn");
    tensors[0].shape = vec![256, 130];
    match load(&tensors, Activations::Quantized) {
        CheckpointError::Layer { key, source } => {
            assert_eq!(key, "ffn");
            let group = ProblemError::Group {
                group: 128,
                columns: 130,
            };
            assert!(matches!(
                source,
                Error::Library(cubesla::Error::Problem(problem)) if problem == group
            ));
        }
        error => panic!("{error}"),
    }
}

#[test]
fn files_that_cannot_be_read_are_refused() {
    let folder = Folder::new("files");
    let error = Checkpoint::open(folder.0.join("model.gguf")).unwrap_err();
    assert!(matches!(error, CheckpointError::FileType { .. }), "{error}");
    for name in ["none.safetensors", "none.pt"] {
        let error = Checkpoint::open(folder.0.join(name)).unwrap_err();
        assert!(matches!(error, CheckpointError::Store { .. }), "{error}");
    }
    let path = folder.safetensors(&[
        matrix("net.blocks.1.attn1.attn_impl.proj_l.weight", 1),
        matrix("net_ema.blocks.1.attn1.attn_impl.proj_l.weight", 2),
    ]);
    let error = Checkpoint::open(&path).unwrap_err();
    assert!(
        matches!(error, CheckpointError::Ambiguous { .. }),
        "{error}"
    );

    // What a store can do about it.
    let mut store = burn_store::SafetensorsStore::from_file(path)
        .with_key_remapping("^net_ema\\.blocks", "moving_average.layers");
    let checkpoint = Checkpoint::from_store(&mut store).unwrap();
    assert_eq!(checkpoint.sla_blocks(), [1]);
}
