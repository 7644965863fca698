use burn_core::tensor::{DType, Device, FloatDType, Tensor};
use cubesla_burn::{
    Activations, Error, Format, Granularity, ProblemError, QuantizedWeight, fake_quantize,
    quantize_weight, quantized_linear, try_fake_quantize, try_quantize_weight,
    try_quantized_linear,
};

use crate::common::{
    assert_close, constant, device, floats, gradient, leaf, noise, relative_error,
};

/// Format, granularity, zero point, activations.
type Case = (Format, Granularity, bool, Activations);

use Activations::{Full, Quantized};

/// Of K = 128; those whose scales have any K also of others.
const CASES: [Case; 9] = [
    (Format::Int8, Granularity::Row, false, Quantized),
    (Format::Int8, Granularity::Block, false, Quantized),
    (Format::Int8, Granularity::Tensor, true, Quantized),
    (Format::Fp8, Granularity::Row, false, Quantized),
    (Format::Fp8, Granularity::Block, false, Full),
    (Format::Int8, Granularity::Row, true, Full),
    (Format::Int4, Granularity::Group(32), true, Full),
    (Format::Int4, Granularity::Group(64), false, Full),
    (Format::Int4, Granularity::Row, false, Full),
];

/// Activations as the product has them.
fn seen<const D: usize>(x: Tensor<D>, case: Case) -> Tensor<D> {
    let granularity = match case.1 {
        Granularity::Block => Granularity::Group(128),
        _ => Granularity::Row,
    };
    match case.3 {
        Full => x,
        Quantized => fake_quantize(x, case.0, granularity, false),
    }
}

/// `X W^T + b` in Burn's operations.
fn formula(x: Tensor<3>, w: Tensor<2>, bias: Tensor<1>) -> Tensor<3> {
    x.matmul(w.transpose().unsqueeze()) + bias.unsqueeze()
}

/// The transposed weight of a Burn layer: rows are not contiguous.
fn weight(shape: [usize; 2], seed: u64, device: &Device) -> Tensor<2> {
    noise([shape[1], shape[0]], seed, device).transpose()
}

fn check([m, n, k]: [usize; 3], case: Case, dtype: FloatDType, limit: f64) {
    let what = format!("{m} {n} {k} {case:?} {dtype:?}");
    let device = device();
    let w = weight([n, k], 1, &device).cast(dtype);
    let w = quantize_weight(w, case.0, case.1, case.2);
    let decoded = w.dequantize(DType::F32);
    let bias = noise([n], 2, &device);
    // Queries of two heads side by side: a view.
    let x = noise([m, 2, k], 3, &device).cast(dtype).swap_dims(0, 1);
    let found = quantized_linear(x.clone(), &w, Some(bias.clone()), case.3);
    assert_eq!(found.dtype(), dtype.into(), "{what}");
    let x = seen(x, case).cast(FloatDType::F32);
    let exact = formula(x, decoded, bias);
    assert_close(&what, found.cast(FloatDType::F32), exact, limit);
}

#[test]
fn products_are_the_formulas() {
    for case in CASES {
        check([3, 33, 128], case, FloatDType::F32, 1e-5);
        if matches!(case.1, Granularity::Row | Granularity::Tensor) {
            check([1, 5, 7], case, FloatDType::F32, 1e-5);
            check([9, 70, 101], case, FloatDType::F32, 1e-5);
        }
    }
    // Blocks that end short need no whole groups if activations are not quantized.
    let blocks = (Format::Int8, Granularity::Block, false, Full);
    check([3, 130, 150], blocks, FloatDType::F32, 1e-5);
}

#[test]
fn half_precision_stays_half() {
    if device().supports_dtype(DType::F16) {
        for case in CASES {
            check([5, 33, 128], case, FloatDType::F16, 2e-3);
        }
    }
}

#[test]
fn gradients_are_the_formulas() {
    let device = device().autodiff();
    for case in CASES {
        let what = format!("{case:?}");
        let w = constant(&weight([33, 128], 1, &device));
        let w = quantize_weight(w, case.0, case.1, case.2);
        let x = leaf(noise([2, 5, 128], 2, &device));
        let bias = leaf(noise([33], 3, &device));
        let upstream = noise([2, 5, 33], 4, &device);
        let found = quantized_linear(x.clone(), &w, Some(bias.clone()), case.3);
        let found = (found * upstream.clone()).sum().backward();
        let decoded = w.dequantize(DType::F32);
        let exact = formula(seen(x.clone(), case), decoded, bias.clone());
        let exact = (exact * upstream.clone()).sum().backward();
        assert_close(&what, gradient(&x, &found), gradient(&x, &exact), 1e-5);
        let bias = (gradient(&bias, &found), gradient(&bias, &exact));
        assert_close(&what, bias.0, bias.1, 1e-5);

        let alone = quantized_linear(x.clone(), &w, None, case.3);
        let alone = (alone * upstream).sum().backward();
        assert_close(&what, gradient(&x, &alone), gradient(&x, &found), 1e-7);
    }
}

#[test]
fn gradients_have_the_types_of_their_inputs() {
    let device = device().autodiff();
    if !device.supports_dtype(DType::F16) {
        return;
    }
    let half = FloatDType::F16;
    for case in [CASES[0], CASES[3], CASES[6]] {
        let w = constant(&weight([33, 128], 1, &device));
        let w = quantize_weight(w, case.0, case.1, case.2);
        let x = noise([2, 5, 128], 2, &device).cast(half);
        let bias = noise([33], 3, &device).cast(half);
        let upstream = noise([2, 5, 33], 4, &device).cast(half);
        let [found, exact] = [half, FloatDType::F32].map(|dtype| {
            let (x, bias) = (leaf(x.clone().cast(dtype)), leaf(bias.clone().cast(dtype)));
            let out = quantized_linear(x.clone(), &w, Some(bias.clone()), case.3);
            let grads = (out * upstream.clone().cast(dtype)).sum().backward();
            let (dx, dbias) = (gradient(&x, &grads), gradient(&bias, &grads));
            assert_eq!([dx.dtype(), dbias.dtype()], [DType::from(dtype); 2]);
            (dx.cast(FloatDType::F32), dbias.cast(FloatDType::F32))
        });
        let what = format!("{case:?}");
        assert_close(&what, found.0, exact.0, 2e-3);
        assert_close(&what, found.1, exact.1, 2e-3);
    }
}

#[test]
fn a_bias_alone_has_its_gradient() {
    let device = device().autodiff();
    let w = constant(&noise([5, 7], 1, &device));
    let w = quantize_weight(w, Format::Int8, Granularity::Row, false);
    let bias = leaf(noise([5], 2, &device));
    let x = constant(&noise([3, 7], 3, &device));
    let out = quantized_linear(x, &w, Some(bias.clone()), Full);
    let grads = out.sum().backward();
    assert_eq!(floats(gradient(&bias, &grads)), [3.0; 5]);
}

#[test]
fn rounding_passes_gradients_straight_through() {
    let device = device().autodiff();
    for (format, granularity, zero_point, _) in CASES {
        let w = leaf(noise([2, 3, 128], 1, &device).swap_dims(0, 1));
        let upstream = noise([3, 2, 128], 2, &device);
        let rounded = fake_quantize(w.clone(), format, granularity, zero_point);
        let matrix = constant(&w).reshape([6, 128]);
        let low = quantize_weight(matrix, format, granularity, zero_point);
        let decoded = low.dequantize(DType::F32).reshape([3, 2, 128]);
        rounded.to_data().assert_eq(&decoded.into_data(), true);
        let grads = (rounded * upstream.clone()).sum().backward();
        let found = gradient(&w, &grads).into_data();
        found.assert_eq(&upstream.into_data(), true);
    }
}

#[test]
fn codes_of_a_checkpoint_are_read_as_they_are() {
    let device = device();
    let scales = noise([3, 1], 1, &device);
    let steps = floats(scales.clone());
    // -128 is no code of the library's own.
    let codes: Vec<i8> = (0..21).map(|i| (i * 37 % 256 - 128) as i8).collect();
    let bytes: Vec<u8> = codes.iter().map(|&code| code as u8).collect();
    let row = Granularity::Row;
    let w = QuantizedWeight::from_codes(&bytes, [3, 7], Format::Int8, row, scales.clone(), None);
    let values = floats(w.unwrap().dequantize(DType::F32));
    for (at, value) in values.into_iter().enumerate() {
        assert_eq!(value, f32::from(codes[at]) * steps[at / 7], "{at}");
    }

    let nibbles: Vec<u8> = (0..30).map(|i| (i * 7 % 16) as u8).collect();
    let zeros = Tensor::from_data([[8.0], [3.0], [0.0]], &device);
    let zeros = Some(zeros);
    let w = QuantizedWeight::from_codes(&nibbles, [3, 10], Format::Int4, row, scales, zeros);
    let w = w.unwrap();
    assert_eq!(w.words().dims(), [3, 4]);
    let values = floats(w.dequantize(DType::F32));
    for (at, value) in values.into_iter().enumerate() {
        let zero = [8.0, 3.0, 0.0][at / 10];
        assert_eq!(value, (f32::from(nibbles[at]) - zero) * steps[at / 10]);
    }
}

#[test]
fn a_weight_of_tensors_is_the_same_weight() {
    let device = device();
    let made = quantize_weight(
        noise([6, 64], 1, &device),
        Format::Int4,
        Granularity::Group(32),
        true,
    );
    let again = QuantizedWeight::from_tensors(
        made.words().clone(),
        made.scales().clone(),
        made.zeros().cloned(),
        64,
        made.format(),
        made.granularity(),
    );
    let values = again.unwrap().dequantize(DType::F32).into_data();
    values.assert_eq(&made.dequantize(DType::F32).into_data(), true);
    let error = relative_error(
        &floats(made.dequantize(DType::F32)),
        &floats(noise([6, 64], 1, &device)),
    );
    assert!((1e-4..0.1).contains(&error), "{error}");
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
    let w = noise([4, 96], 1, &device);
    let quantize = |format, granularity, zero| {
        problem(try_quantize_weight(w.clone(), format, granularity, zero).unwrap_err())
    };
    assert!(matches!(
        quantize(Format::Int8, Granularity::Group(64), false),
        ProblemError::Group {
            group: 64,
            columns: 96
        }
    ));
    for error in [
        quantize(Format::Fp8, Granularity::Row, true),
        quantize(Format::Int8, Granularity::Column, false),
    ] {
        assert!(
            matches!(error, ProblemError::NotSupported { .. }),
            "{error}"
        );
    }
    assert!(matches!(
        problem(
            try_fake_quantize(w.clone(), Format::Int4, Granularity::Group(64), false).unwrap_err()
        ),
        ProblemError::Group { .. }
    ));

    let blocks = quantize_weight(w.clone(), Format::Int8, Granularity::Block, false);
    let multiply = |x, bias, activations| {
        problem(try_quantized_linear::<2>(x, &blocks, bias, activations).unwrap_err())
    };
    assert!(matches!(
        multiply(noise([2, 95], 2, &device), None, Full),
        ProblemError::ShapeMismatch { argument: "x", .. }
    ));
    assert!(matches!(
        multiply(noise([2, 96], 2, &device), None, Quantized),
        ProblemError::Group { group: 128, .. }
    ));
    assert!(matches!(
        multiply(
            noise([2, 96], 2, &device),
            Some(noise([3], 3, &device)),
            Full
        ),
        ProblemError::ShapeMismatch {
            argument: "bias",
            ..
        }
    ));
    let long = Tensor::<2>::zeros([1, 140_000], &device);
    let (format, row) = (Format::Int8, Granularity::Row);
    let scales = noise([1, 1], 4, &device);
    let w = QuantizedWeight::from_codes(&[0; 140_000], [1, 140_000], format, row, scales, None);
    let error = problem(try_quantized_linear(long, &w.unwrap(), None, Quantized).unwrap_err());
    assert!(
        matches!(error, ProblemError::NotSupported { .. }),
        "{error}"
    );
}

#[test]
fn parts_of_a_weight_are_checked() {
    let device = device();
    let made = quantize_weight(
        noise([4, 64], 1, &device),
        Format::Int8,
        Granularity::Row,
        false,
    );
    let of = |scales: Tensor<2>, columns| {
        let words = made.words().clone();
        let (format, row) = (Format::Int8, Granularity::Row);
        QuantizedWeight::from_tensors(words, scales, None, columns, format, row).unwrap_err()
    };
    let scales = made.scales().clone();
    assert!(matches!(
        problem(of(scales.clone(), 65)),
        ProblemError::ShapeMismatch {
            argument: "words",
            ..
        }
    ));
    assert!(matches!(
        problem(of(noise([4, 2], 1, &device), 64)),
        ProblemError::ShapeMismatch {
            argument: "scales",
            ..
        }
    ));
    let tracked = leaf(noise([4, 1], 1, &device.clone().autodiff()));
    assert!(matches!(
        of(tracked, 64),
        Error::NotDifferentiable {
            argument: "scales",
            ..
        }
    ));
    let (format, row) = (Format::Int8, Granularity::Row);
    let error = QuantizedWeight::from_codes(&[0; 5], [2, 3], format, row, scales, None);
    assert!(matches!(
        error.unwrap_err(),
        Error::Library(cubesla::Error::Length {
            argument: "codes",
            ..
        })
    ));
    let tracked = leaf(noise([4, 64], 1, &device.autodiff()));
    let error = try_quantize_weight(tracked, format, row, false).unwrap_err();
    assert!(matches!(
        error,
        Error::NotDifferentiable {
            operation: "quantize_weight",
            ..
        }
    ));
}
