use burn_core::config::Config;
use burn_core::module::{Module, Quantizer};
use burn_core::tensor::quantization::{Calibration, QuantScheme, QuantValue};
use burn_core::tensor::{DType, FloatDType, Tensor};
use burn_nn::{Linear, LinearConfig};
use burn_optim::{AdamConfig, GradientsParams};
use cubesla_burn::{
    Activations, Error, FormatConfig, GranularityConfig, ProblemError, QatLinear, QuantLinear,
    QuantLinearConfig, QuantLinearScheme, SlaMhaInput, SlaMultiHeadAttentionConfig,
    SparseLinearAttentionConfig,
};

use crate::common::{assert_close, device, floats, leaf, noise};
use crate::records::names;

fn schemes() -> [QuantLinearScheme; 5] {
    [
        QuantLinearScheme::w8a8_int8(),
        QuantLinearScheme::w8a8_int8().with_granularity(GranularityConfig::Block),
        QuantLinearScheme::w8a8_fp8(),
        QuantLinearScheme::w8a16().with_zero_point(true),
        QuantLinearScheme::w4a16()
            .with_granularity(GranularityConfig::Group(32))
            .with_zero_point(true),
    ]
}

fn linear() -> Linear {
    LinearConfig::new(128, 35).init(&device())
}

#[test]
fn a_layer_computes_nearly_what_its_linear_did() {
    let x = noise([2, 3, 128], 1, &device());
    let exact = linear();
    for scheme in schemes() {
        let layer = QuantLinear::from_linear(exact.clone(), &scheme);
        let found = layer.forward(x.clone());
        let limit = match scheme.format {
            FormatConfig::Int8 => 0.02,
            FormatConfig::Fp8 => 0.06,
            FormatConfig::Int4 => 0.15,
        };
        let what = format!("{scheme:?}");
        assert_close(&what, found.clone(), exact.forward(x.clone()), limit);

        // And just what the same layer computes in training.
        let training = QatLinear::from_linear(exact.clone(), &scheme);
        assert_close(&what, found, training.forward(x.clone()), 1e-5);
    }
}

#[test]
fn half_precision_activations_meet_weights_of_f32_scales() {
    let device = device();
    if !device.supports_dtype(DType::F16) {
        return;
    }
    let x = noise([5, 128], 1, &device).cast(FloatDType::F16);
    for scheme in schemes() {
        let layer = QuantLinear::from_linear(linear(), &scheme);
        let found = layer.forward(x.clone());
        assert_eq!(found.dtype(), DType::F16);
        let wide = layer.forward(x.clone().cast(FloatDType::F32));
        assert_close(&format!("{scheme:?}"), found, wide, 2e-3);
    }
}

#[test]
fn names_are_stable() {
    let scheme = QuantLinearScheme::w4a16().with_zero_point(true);
    let layer = QuantLinear::from_linear(linear(), &scheme);
    assert_eq!(names(&layer), ["words", "scales", "zeros", "bias"]);
    let bare = LinearConfig::new(16, 4).with_bias(false).init(&device());
    let layer = QuantLinear::from_linear(bare, &QuantLinearScheme::w8a8_int8());
    assert_eq!(names(&layer), ["words", "scales"]);
    let layer = QatLinear::from_linear(linear(), &scheme);
    assert_eq!(names(&layer), ["weight", "bias"]);
}

#[test]
fn a_record_brings_the_layer_back() {
    let device = device();
    let folder = std::env::temp_dir().join(format!("cubesla-burn-quant-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let x = noise([3, 128], 1, &device);
    for (at, scheme) in schemes().into_iter().enumerate() {
        let layer = QuantLinear::from_linear(linear(), &scheme);
        let path = folder.join(format!("layer-{at}"));
        layer.clone().save_file(&path).unwrap();
        let empty = QuantLinearConfig::new(128, 35, scheme).init(&device);
        assert_eq!(floats(empty.forward(x.clone())), [0.0; 3 * 35]);
        let loaded = empty.load_file(&path);
        let found = loaded.forward(x.clone()).into_data();
        found.assert_eq(&layer.forward(x.clone()).into_data(), true);
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_scheme_survives_a_file() {
    let config = QuantLinearConfig::new(128, 35, schemes()[4]);
    let name = format!("cubesla-burn-quant-{}.json", std::process::id());
    let path = std::env::temp_dir().join(name);
    config.save(&path).unwrap();
    let loaded = QuantLinearConfig::load(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    assert_eq!(loaded.scheme, config.scheme);
}

/// Every float parameter gets a gradient through the rounding, and following them lowers the loss of
/// what the layer is to become.
#[test]
fn training_through_the_rounding_lowers_the_loss() {
    let device = device().autodiff();
    let x = noise([16, 64], 1, &device);
    let target = x.clone().matmul(noise([64, 8], 2, &device));
    let loss = |out: Tensor<2>| (out - target.clone()).powi_scalar(2).mean();
    for scheme in [
        QuantLinearScheme::w4a16().with_granularity(GranularityConfig::Group(32)),
        QuantLinearScheme::w8a8_int8(),
        QuantLinearScheme::w8a8_fp8(),
    ] {
        let start = LinearConfig::new(64, 8).init(&device);
        let mut layer = QatLinear::from_linear(start.clone(), &scheme);
        let mut optimizer = AdamConfig::new().init();
        for _ in 0..12 {
            let grads = loss(layer.forward(x.clone())).backward();
            let grads = GradientsParams::from_grads(grads, &layer);
            assert_eq!(grads.len(), 2, "{scheme:?}");
            layer = optimizer.step(5e-2, layer, grads);
        }
        let at = |layer: QuantLinear| floats::<1>(loss(layer.forward(x.clone())))[0];
        let before = at(QuantLinear::from_linear(start, &scheme));
        let after = at(layer.into_quantized());
        assert!(after < 0.5 * before, "{scheme:?}: {before} to {after}");
    }
}

#[test]
fn low_bit_weights_stay_as_they_are_and_the_bias_trains() {
    let device = device().autodiff();
    let start = LinearConfig::new(64, 8).init(&device);
    let layer = QuantLinear::from_linear(start, &QuantLinearScheme::w8a8_int8());
    let x = leaf(noise([3, 64], 1, &device));
    let grads = layer.forward(x.clone()).sum().backward();
    assert!(x.grad(&grads).is_some());
    assert_eq!(GradientsParams::from_grads(grads, &layer).len(), 1);
    assert!(!layer.scales.is_require_grad());

    let (valid, input) = (layer.valid(), x.clone().without_autodiff());
    let found = valid.forward(input).into_data();
    found.assert_eq(&layer.forward(x).into_data(), true);
    let again = valid.train();
    assert!(!again.scales.is_require_grad());
    assert!(again.bias.expect("there is one").is_require_grad());
}

/// What Burn has quantized is decoded, and its codes come out again.
#[test]
fn burns_quantized_weights_are_taken() {
    let exact = LinearConfig::new(64, 32).init(&device());
    let scheme = QuantScheme::default().with_value(QuantValue::Q8S);
    let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
    let bias = exact.bias.clone();
    let burns = exact.quantize_weights(&mut quantizer);
    let burns = Linear {
        weight: burns.weight,
        bias,
    };
    let decoded = burns.weight.val().dequantize().transpose();

    let scheme = QuantLinearScheme::w8a16().with_granularity(GranularityConfig::Tensor);
    let layer = QuantLinear::from_linear(burns.clone(), &scheme);
    let found = layer.try_weight().unwrap().dequantize(DType::F32);
    assert_close("weight", found, decoded, 1e-6);
    let training = QatLinear::from_linear(burns, &scheme);
    let x = noise([3, 64], 1, &device());
    assert_close("out", layer.forward(x.clone()), training.forward(x), 1e-5);
}

/// Trained through the rounding, then with low-bit weights: the same attention.
#[test]
fn the_linears_of_an_attention_are_replaced() {
    let device = device();
    // All blocks, lest rounding choose others.
    let attention = SparseLinearAttentionConfig::new(32).with_critical(1.0);
    let config = SlaMultiHeadAttentionConfig::new(64, 2)
        .with_attention(Some(attention))
        .with_key_bias(false);
    let exact = config.init(&device);
    let scheme = QuantLinearScheme::w8a8_int8();
    let training = exact
        .clone()
        .map_linears(|linear| QatLinear::from_linear(linear, &scheme));
    assert_eq!(names(&training), names(&exact));
    let input = || SlaMhaInput::self_attn(noise([1, 70, 64], 1, &device));
    let rounded = training.forward(input()).context;
    let low = training.map_linears(QatLinear::into_quantized);
    assert_eq!(
        names(&low)[..5],
        [
            "query.words",
            "query.scales",
            "query.bias",
            "key.words",
            "key.scales"
        ]
    );
    let found = low.forward(input()).context;
    assert_close("context", found.clone(), rounded, 1e-3);
    assert_close("context", found, exact.forward(input()).context, 0.1);

    let odd = SlaMultiHeadAttentionConfig::new(96, 3).init(&device);
    let groups = scheme.with_granularity(GranularityConfig::Group(64));
    let refused = odd.try_map_linears(|linear| QuantLinear::try_from_linear(linear, &groups));
    assert!(matches!(
        problem(refused.unwrap_err()),
        ProblemError::Group { .. }
    ));
}

fn problem(error: Error) -> ProblemError {
    match error {
        Error::Library(cubesla::Error::Problem(problem)) => problem,
        other => panic!("{other}"),
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = device();
    let odd = || LinearConfig::new(100, 8).init(&device);
    let groups = QuantLinearScheme::w4a16().with_granularity(GranularityConfig::Group(32));
    let blocks = QuantLinearScheme::w8a8_int8().with_granularity(GranularityConfig::Block);
    for scheme in [groups, blocks] {
        for error in [
            QuantLinear::try_from_linear(odd(), &scheme).unwrap_err(),
            QatLinear::try_from_linear(odd(), &scheme).unwrap_err(),
            QuantLinearConfig::new(100, 8, scheme)
                .try_init(&device)
                .unwrap_err(),
        ] {
            assert!(matches!(problem(error), ProblemError::Group { .. }));
        }
    }
    // Decoded weights need no whole blocks.
    let scheme = QuantLinearScheme::new(FormatConfig::Fp8, Activations::Full)
        .with_granularity(GranularityConfig::Block);
    assert!(QuantLinear::try_from_linear(odd(), &scheme).is_ok());

    let layer = QatLinear::from_linear(linear(), &scheme);
    let error = layer.try_forward(noise([2, 127], 1, &device)).unwrap_err();
    assert!(matches!(
        problem(error),
        ProblemError::ShapeMismatch { argument: "x", .. }
    ));
    if device.supports_dtype(DType::F16) {
        let x = noise([2, 128], 1, &device).cast(FloatDType::F16);
        let error = layer.try_forward(x).unwrap_err();
        assert!(matches!(
            problem(error),
            ProblemError::DTypeMismatch { argument: "x", .. }
        ));
    }
}
