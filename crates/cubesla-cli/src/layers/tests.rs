use safetensors::tensor::{TensorView, serialize};

use super::*;

const OPTIONS: AttentionOptions = AttentionOptions {
    scale: None,
    causal: cubesla::Causal::None,
    block_q: 32,
    block_k: 32,
    products: cubesla::F32Products::F32,
};

/// A file of zeros, given as (name, type, shape).
fn file(tensors: &[(&str, Dtype, &[usize])]) -> Vec<u8> {
    let buffers: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, dtype, shape)| vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8])
        .collect();
    let views = tensors
        .iter()
        .zip(&buffers)
        .map(|(&(name, dtype, shape), buffer)| {
            (
                name,
                TensorView::new(dtype, shape.to_vec(), buffer).unwrap(),
            )
        });
    serialize(views, None).unwrap()
}

fn parsed(tensors: &[(&str, Dtype, &[usize])]) -> Result<Vec<Layer>, Error> {
    parse(&file(tensors), DType::F32, &OPTIONS)
}

fn message(tensors: &[(&str, Dtype, &[usize])]) -> String {
    parsed(tensors).unwrap_err().to_string()
}

#[test]
fn every_complete_triple_is_a_layer() {
    let (qk, v) = (&[2, 4, 40, 32][..], &[2, 4, 40, 64][..]);
    let layers = parsed(&[
        ("model.1.q", Dtype::F32, qk),
        ("model.1.k", Dtype::F32, qk),
        ("model.1.v", Dtype::F32, v),
        ("v", Dtype::BF16, v),
        ("q", Dtype::BF16, qk),
        ("k", Dtype::BF16, qk),
        ("half.q", Dtype::F16, qk),
        ("half.v", Dtype::F16, v),
        ("seq", Dtype::I64, &[3]),
    ])
    .unwrap();
    let names: Vec<&str> = layers.iter().map(|layer| &*layer.name).collect();
    assert_eq!(names, ["model.1", "qkv"]);
    assert_eq!(layers[1].problem.out_shape(), [2, 4, 40, 64]);
    assert_eq!(layers[1].heads(), 8);
}

#[test]
fn the_shipped_file_has_two_layers() {
    let layers = parse(crate::inputs::SHIPPED, DType::F16, &OPTIONS).unwrap();
    let names: Vec<&str> = layers.iter().map(|layer| &*layer.name).collect();
    assert_eq!(names, ["layer1", "layer4"]);
    assert!(
        layers
            .iter()
            .all(|layer| layer.q.shape() == [1, 12, 512, 32])
    );
}

#[test]
fn rank_three_is_a_batch_of_one() {
    let shape = &[4, 40, 32][..];
    let layers = parsed(&[
        ("q", Dtype::F32, shape),
        ("k", Dtype::F32, &[1, 2, 50, 32]),
        ("v", Dtype::F32, &[2, 50, 32]),
    ])
    .unwrap();
    assert_eq!(layers[0].q.shape(), [1, 4, 40, 32]);
    assert_eq!(layers[0].problem.kv_heads(), 2);
}

#[test]
fn values_are_rounded_to_the_type_of_the_device() {
    let data: Vec<u8> = [1.0f32 + 1.0 / 4096.0; 32]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let view = || TensorView::new(Dtype::F32, vec![1, 1, 32], &data).unwrap();
    let bytes = serialize(["q", "k", "v"].map(|name| (name, view())), None).unwrap();
    let first = |dtype| parse(&bytes, dtype, &OPTIONS).unwrap()[0].q[[0, 0, 0, 0]];
    assert_eq!(first(DType::F32), 1.0 + 1.0 / 4096.0);
    assert_eq!(first(DType::F16), 1.0);
}

#[test]
fn a_wrong_rank_or_type_names_the_tensor() {
    let good = &[4, 40, 32][..];
    let bad = message(&[
        ("a.q", Dtype::F32, good),
        ("a.k", Dtype::F32, &[40, 32]),
        ("a.v", Dtype::F32, good),
    ]);
    assert!(bad.contains("`a.k`") && bad.contains("[40, 32]"), "{bad}");
    let bad = message(&[
        ("q", Dtype::F32, good),
        ("k", Dtype::F32, good),
        ("v", Dtype::I32, good),
    ]);
    assert!(bad.contains("`v`") && bad.contains("I32"), "{bad}");
}

#[test]
fn shapes_that_do_not_fit_name_the_layer_and_the_tensor() {
    let error = parsed(&[
        ("a.q", Dtype::F32, &[4, 40, 32]),
        ("a.k", Dtype::F32, &[4, 50, 32]),
        ("a.v", Dtype::F32, &[4, 40, 32]),
    ])
    .unwrap_err();
    assert!(error.to_string().contains("`a`"), "{error}");
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(
        source.contains("`v`") && source.contains("[1, 4, 40, 32]"),
        "{source}"
    );
}

#[test]
fn a_file_without_a_layer_says_what_it_has() {
    let shape = &[4, 40, 32][..];
    let bad = message(&[
        ("x.q", Dtype::F32, shape),
        ("y.k", Dtype::F32, shape),
        ("y.v", Dtype::F32, shape),
    ]);
    assert!(bad.contains("x.q, y.k, y.v"), "{bad}");
}

#[test]
fn values_that_overflow_are_refused() {
    let data: Vec<u8> = [1e6f32; 32].iter().flat_map(|x| x.to_le_bytes()).collect();
    let view = || TensorView::new(Dtype::F32, vec![1, 1, 32], &data).unwrap();
    let bytes = serialize(["q", "k", "v"].map(|name| (name, view())), None).unwrap();
    assert!(parse(&bytes, DType::F32, &OPTIONS).is_ok());
    let error = parse(&bytes, DType::F16, &OPTIONS).unwrap_err();
    assert!(
        matches!(&error, Error::NotFinite { tensor, .. } if tensor == "q"),
        "{error}"
    );
}

#[test]
fn other_files_are_refused() {
    for bytes in [&b""[..], b"not a safetensors file at all", &[0xff; 64]] {
        let error = parse(bytes, DType::F32, &OPTIONS).unwrap_err();
        assert!(matches!(error, Error::Format(_)), "{error}");
    }
}
