//! Products with low-bit matrices.

use cubesla::plan::MatmulPlan;
use cubesla::{
    DType, DeviceTensor, Format, Granularity, MatmulProblem, ProblemError, QuantizedTensor,
    download, dynamic_matmul, expect_dynamic, fake_quantize, quantize, quantized_matmul,
    quantized_matmul_backward, upload, weight_only_matmul,
};
use cubesla_reference::quantize::{Quantized, matmul, matmul_backward};
use cubesla_reference::{Tensor, cosine, relative_error, relative_l1};
use harness::case::wide;
use harness::plain::stored;
use harness::quantize::{expected, packed};
use harness::{Rng, client, dtypes};
use proptest::prelude::*;

/// How a matrix is quantized.
type Scheme = (Format, Granularity, bool);

/// M, N, K.
type Size = [usize; 3];

fn int8(granularity: Granularity) -> Scheme {
    (Format::Int8, granularity, false)
}

fn fp8(granularity: Granularity) -> Scheme {
    (Format::Fp8, granularity, false)
}

/// NaN in freed memory of the output's size: what a kernel does not write is then likely to be NaN.
fn poison(len: usize, dtype: DType) {
    let client = client();
    drop(upload(&client, &vec![f32::NAN; len], [len], dtype).unwrap());
}

/// 1e-5 in f32, in 16 bits twice what rounding the exact result costs.
fn expect_near(found: &[f32], exact: &Tensor, dtype: DType, what: &str) {
    let bound = match dtype {
        DType::F32 => 1e-5,
        _ => 2.0 * relative_error(stored(exact, dtype).data(), exact.data()),
    };
    let error = relative_error(&wide(found), exact.data());
    assert!(error <= bound, "{what}: {error:.2e} > {bound:.2e}");
}

struct Inputs {
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
}

impl Inputs {
    fn new([m, n, k]: Size, dtype: DType, seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        Self {
            x: rng.normals(m * k, dtype),
            w: rng.normals(n * k, dtype),
            bias: rng.normals(n, DType::F32),
        }
    }
}

fn reference(values: &[f32], matrix: [usize; 2], (format, granularity, zero): Scheme) -> Quantized {
    expected(values, matrix, format, granularity, zero)
}

fn quantized(
    values: &[f32],
    shape: [usize; 2],
    scheme: Scheme,
    dtype: DType,
) -> QuantizedTensor<2> {
    let client = client();
    let tensor = upload(&client, values, shape, dtype).unwrap();
    quantize(&client, &tensor, scheme.0, scheme.1, scheme.2).unwrap()
}

/// Every engine's plan for a product.
fn plans(
    x: &QuantizedTensor<2>,
    w: &QuantizedTensor<2>,
    bias: Option<&DeviceTensor<1>>,
    dtype: DType,
) -> Vec<MatmulPlan> {
    let problem = MatmulProblem::new(x, w, bias, dtype);
    MatmulPlan::all(&problem, client().properties())
}

/// Both operands in low bits, with a bias, twice with every engine.
fn check_quantized(size: Size, x_scheme: Scheme, w_scheme: Scheme, dtype: DType) {
    let client = client();
    let [m, n, k] = size;
    let what = format!("{size:?} {x_scheme:?} {w_scheme:?} {dtype}");
    let inputs = Inputs::new(size, dtype, 7);
    let x = quantized(&inputs.x, [m, k], x_scheme, dtype);
    let w = quantized(&inputs.w, [n, k], w_scheme, dtype);
    let bias = upload(&client, &inputs.bias, [n], DType::F32).unwrap();
    let exact = {
        let x = reference(&inputs.x, [m, k], x_scheme);
        let w = reference(&inputs.w, [n, k], w_scheme);
        let (x, w) = (|i, l| x.value(i, l), |j, l| w.value(j, l));
        matmul(x, w, size, &inputs.bias)
    };
    for plan in plans(&x, &w, Some(&bias), dtype) {
        let run = || {
            poison(m * n, dtype);
            let out = plan.launch(&client, &x, &w, Some(&bias), dtype).unwrap();
            assert_eq!((out.shape(), out.dtype()), ([m, n], dtype));
            download(&client, &out).unwrap()
        };
        let found = run();
        assert_eq!(found, run(), "two runs of {what}: {plan}");
        expect_near(&found, &exact, dtype, &format!("{what}: {plan}"));
    }
}

/// Full-precision activations, with a bias, twice; then the gradient.
fn check_weight_only(size: Size, scheme: Scheme, dtype: DType) {
    let client = client();
    let [m, n, k] = size;
    let what = format!("{size:?} {scheme:?} {dtype}");
    let inputs = Inputs::new(size, dtype, 9);
    let x = upload(&client, &inputs.x, [m, k], dtype).unwrap();
    let w = quantized(&inputs.w, [n, k], scheme, dtype);
    let bias = upload(&client, &inputs.bias, [n], DType::F32).unwrap();
    let run = || {
        poison(m * n, dtype);
        let out = weight_only_matmul(&client, &x, &w, Some(&bias), dtype).unwrap();
        download(&client, &out).unwrap()
    };
    let found = run();
    assert_eq!(found, run(), "two runs of {what}");
    let exact_w = reference(&inputs.w, [n, k], scheme);
    let value = |j, l| exact_w.value(j, l);
    let exact = matmul(|i, l| inputs.x[i * k + l].into(), value, size, &inputs.bias);
    expect_near(&found, &exact, dtype, &what);

    let grad = Rng::new(10).normals(m * n, dtype);
    let dy = upload(&client, &grad, [m, n], dtype).unwrap();
    let run = || {
        poison(m * k, dtype);
        let dx = quantized_matmul_backward(&client, &dy, &w).unwrap();
        assert_eq!((dx.shape(), dx.dtype()), ([m, k], dtype));
        download(&client, &dx).unwrap()
    };
    let found = run();
    assert_eq!(found, run(), "two runs of the gradient of {what}");
    let exact = matmul_backward(|i, j| grad[i * n + j].into(), value, size);
    expect_near(&found, &exact, dtype, &format!("gradient of {what}"));
}

const SIZES: [Size; 6] = [
    [1, 5, 7],
    [1, 64, 256],
    [3, 70, 130],
    [5, 33, 97],
    [17, 65, 200],
    [70, 129, 384],
];

#[test]
fn int8_by_int8() {
    let row = int8(Granularity::Row);
    for size in SIZES {
        check_quantized(size, row, row, DType::F32);
    }
    check_quantized([9, 40, 300], int8(Granularity::Tensor), row, DType::F32);
    check_quantized([9, 40, 300], row, int8(Granularity::Tensor), DType::F32);
    let block = int8(Granularity::Block);
    for k in [128, 384] {
        check_quantized(
            [20, 150, k],
            int8(Granularity::Group(128)),
            block,
            DType::F32,
        );
    }
    check_quantized([20, 150, 333], row, block, DType::F32);
    check_quantized([20, 20, 50], block, block, DType::F32);
    let groups = (int8(Granularity::Group(32)), int8(Granularity::Group(64)));
    check_quantized([20, 30, 192], groups.0, groups.1, DType::F32);
}

#[test]
fn large_tiles() {
    let row = int8(Granularity::Row);
    check_quantized([1030, 1040, 40], row, row, DType::F32);
    check_weight_only(
        [1030, 1040, 32],
        (Format::Int4, Granularity::Group(32), false),
        DType::F32,
    );
}

#[test]
fn fp8_by_fp8() {
    let row = fp8(Granularity::Row);
    for size in SIZES {
        check_quantized(size, row, row, DType::F32);
    }
    let blocks = (fp8(Granularity::Group(128)), fp8(Granularity::Block));
    check_quantized([20, 150, 256], blocks.0, blocks.1, DType::F32);
}

#[test]
fn weights_alone() {
    for size in SIZES {
        check_weight_only(size, int8(Granularity::Row), DType::F32);
    }
    for size in [[1, 70, 256], [2, 9, 128], [4, 33, 384], [40, 70, 128]] {
        for (format, zero_point) in [
            (Format::Int8, true),
            (Format::Int4, false),
            (Format::Int4, true),
        ] {
            for group in [32, 128] {
                check_weight_only(
                    size,
                    (format, Granularity::Group(group), zero_point),
                    DType::F32,
                );
            }
        }
        check_weight_only(size, fp8(Granularity::Block), DType::F32);
    }
    check_weight_only(
        [6, 40, 50],
        (Format::Int4, Granularity::Row, true),
        DType::F32,
    );
}

#[test]
fn sixteen_bits() {
    let client = client();
    for dtype in dtypes(&client) {
        let row = int8(Granularity::Row);
        check_quantized([20, 70, 130], row, row, dtype);
        for m in [1, 20] {
            let groups = Granularity::Group(64);
            check_weight_only([m, 70, 256], (Format::Int4, groups, true), dtype);
        }
    }
}

/// What tensor cores take where there are any: all formats, rows in one half of a product and in
/// several products, scales of groups and of rows, lengths that end inside a step.
#[test]
fn few_rows_in_sixteen_bits() {
    let schemes = [
        (Format::Int4, Granularity::Group(128), false),
        (Format::Int4, Granularity::Group(128), true),
        (Format::Int4, Granularity::Row, false),
        (Format::Int8, Granularity::Row, true),
        (Format::Int8, Granularity::Group(64), false),
        (Format::Fp8, Granularity::Block, false),
    ];
    for dtype in dtypes(&client()) {
        for (i, scheme) in schemes.into_iter().enumerate() {
            for size in [[1, 70, 256], [8, 16, 1152], [9, 33, 384], [40, 129, 640]] {
                check_weight_only(size, scheme, dtype);
            }
            if scheme.1 == Granularity::Row {
                check_weight_only([3 + i, 40, 1000], scheme, dtype);
            }
        }
    }
}

/// Every number of rows of a cube of tensor cores, and more: sums of whole steps, sums that end inside
/// one, and long ones, of which each warp has several steps.
#[test]
fn each_small_number_of_rows() {
    let group = Granularity::Group(128);
    let schemes = [
        (Format::Int4, group, false),
        (Format::Int4, group, true),
        (Format::Int8, group, false),
        (Format::Int8, group, true),
    ];
    for dtype in dtypes(&client()) {
        for m in 1..=17 {
            check_weight_only([m, 45, 384], schemes[m % 4], dtype);
            let (format, _, zero_point) = schemes[(m + m / 4) % 4];
            check_weight_only(
                [m, 33, 392],
                (format, Granularity::Block, zero_point),
                dtype,
            );
        }
        for (i, scheme) in schemes.into_iter().enumerate() {
            check_weight_only([3 + 3 * i, 20, 8320], scheme, dtype);
            // More than 16 rows, and a cube of 32 columns for each multiprocessor of a large GPU.
            check_weight_only([18 + 11 * i, 70, 384], scheme, dtype);
            check_weight_only([1 + 2 * i, 4810, 384], scheme, dtype);
        }
    }
}

/// Sizes that engines with large tiles take, all of them ragged.
const TILES: [Size; 3] = [[17, 8, 31], [130, 264, 200], [260, 520, 300]];

#[test]
fn large_tiles_in_every_type() {
    let client = client();
    for dtype in dtypes(&client) {
        for size in TILES {
            for granularity in [int8, fp8] {
                let row = granularity(Granularity::Row);
                check_quantized(size, row, row, dtype);
            }
        }
    }
}

#[test]
fn large_tiles_with_scales_along_the_sum() {
    let client = client();
    let (row, block) = (Granularity::Row, Granularity::Block);
    let group = Granularity::Group(128);
    for dtype in dtypes(&client) {
        for of in [int8, fp8] {
            for (x, w) in [(group, block), (group, row), (block, block)] {
                check_quantized([150, 264, 384], of(x), of(w), dtype);
            }
            for (x, w) in [(row, block), (block, row), (Granularity::Tensor, block)] {
                check_quantized([150, 264, 200], of(x), of(w), dtype);
            }
        }
    }
}

/// INT8 sums under one pair of scales are exact, so every engine rounds the same numbers.
#[test]
fn engines_agree_on_int8_bit_by_bit() {
    let client = client();
    let (row, tensor) = (Granularity::Row, Granularity::Tensor);
    // The last has more tiles than a device has multiprocessors.
    for size in [
        [17, 8, 31],
        [130, 264, 200],
        [70, 1000, 515],
        [2100, 4104, 650],
    ] {
        let [m, n, k] = size;
        for dtype in dtypes(&client) {
            let inputs = Inputs::new(size, dtype, 8);
            let bias = upload(&client, &inputs.bias, [n], DType::F32).unwrap();
            for (x_granularity, w_granularity) in [(row, row), (tensor, row), (row, tensor)] {
                let x = quantized(&inputs.x, [m, k], int8(x_granularity), dtype);
                let w = quantized(&inputs.w, [n, k], int8(w_granularity), dtype);
                for bias in [None, Some(&bias)] {
                    let plans = plans(&x, &w, bias, dtype);
                    if plans.len() == 1 {
                        continue;
                    }
                    let mut results = plans.iter().map(|plan| {
                        poison(m * n, dtype);
                        let out = plan.launch(&client, &x, &w, bias, dtype).unwrap();
                        download(&client, &out).unwrap()
                    });
                    let first = results.next().unwrap();
                    assert!(
                        results.all(|other| other == first),
                        "{size:?} {x_granularity:?} {w_granularity:?} {dtype}"
                    );
                }
            }
        }
    }
}

/// Weights that have every code of FP8, by activations that pick one summand each; and a NaN among them,
/// which spoils its own result only.
#[test]
fn every_code_of_fp8_weights() {
    let client = client();
    let (rows, columns, summands) = (64, 16, 256);
    let value = |code: usize| {
        let (exponent, mantissa) = ((code >> 3) & 15, code & 7);
        let size = match exponent {
            // Not a number.
            15 if mantissa == 7 => 0.0,
            0 => mantissa as f32 * 2f32.powi(-9),
            _ => (8 + mantissa) as f32 * 2f32.powi(exponent as i32 - 10),
        };
        if code < 128 { size } else { -size }
    };
    // The largest is 448, so the scale is 1.
    let mut weights: Vec<f32> = (0..columns * summands)
        .map(|at| value((at / summands + at) % 256))
        .collect();
    for dtype in dtypes(&client) {
        let multiply = |weights: &[f32], first: usize| {
            let w = upload(&client, weights, [columns, summands], dtype).unwrap();
            let w = quantize(&client, &w, Format::Fp8, Granularity::Tensor, false).unwrap();
            let mut picks = vec![0.0; rows * summands];
            for row in 0..rows {
                picks[row * summands + first + row] = 1.0;
            }
            let x = upload(&client, &picks, [rows, summands], dtype).unwrap();
            let y = weight_only_matmul(&client, &x, &w, None, dtype).unwrap();
            download(&client, &y).unwrap()
        };
        for first in (0..summands).step_by(rows) {
            let found = multiply(&weights, first);
            for (at, found) in found.into_iter().enumerate() {
                let (row, column) = (at / columns, at % columns);
                let exact = weights[column * summands + first + row];
                assert_eq!(found, exact, "{row} {column} of {first} in {dtype}");
            }
        }
        let kept = std::mem::replace(&mut weights[3 * summands + 5], f32::NAN);
        for (at, found) in multiply(&weights, 0).into_iter().enumerate() {
            assert_eq!(found.is_nan(), at % columns == 3, "{at} in {dtype}");
        }
        weights[3 * summands + 5] = kept;
    }
}

/// More tiles than a device has multiprocessors, long sums: every engine against the portable one.
#[test]
fn engines_agree_on_fp8() {
    let client = client();
    let size = [2100, 4104, 2048];
    let [m, n, k] = size;
    for dtype in dtypes(&client) {
        let inputs = Inputs::new(size, dtype, 8);
        let (row, group, block) = (
            Granularity::Row,
            Granularity::Group(128),
            Granularity::Block,
        );
        for (x_granularity, w_granularity) in [(row, row), (group, block)] {
            let x = quantized(&inputs.x, [m, k], fp8(x_granularity), dtype);
            let w = quantized(&inputs.w, [n, k], fp8(w_granularity), dtype);
            let plans = plans(&x, &w, None, dtype);
            let [wgmma, portable] = &plans[..] else {
                continue;
            };
            let run = |plan: &MatmulPlan, dtype| {
                let out = plan.launch(&client, &x, &w, None, dtype).unwrap();
                wide(&download(&client, &out).unwrap())
            };
            let exact = run(portable, DType::F32);
            let bound = 2.0 * relative_error(&run(portable, dtype), &exact);
            let error = relative_error(&run(wgmma, dtype), &exact);
            println!("{dtype} {x_granularity:?}: {error:.2e} of {bound:.2e}");
            assert!(error <= bound, "{dtype}: {error:.2e} > {bound:.2e}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn any_size(m in 1..90usize, n in 1..150usize, k in 1..400usize, kind in 0..4usize) {
        let row = int8(Granularity::Row);
        match kind {
            0 => check_quantized([m, n, k], row, row, DType::F32),
            1 => check_quantized([m, n, k], row, int8(Granularity::Block), DType::F32),
            2 => check_weight_only([m, n, k], row, DType::F32),
            _ => {
                let k = k.next_multiple_of(32);
                let scheme = (Format::Int4, Granularity::Group(32), true);
                check_weight_only([m, n, k], scheme, DType::F32);
            }
        }
    }
}

/// With scales of 1 every product and every sum is a whole number that f32 holds.
#[test]
fn integer_sums_are_exact() {
    let client = client();
    let [m, n, k] = [19, 72, 1000];
    let mut rng = Rng::new(3);
    let mut codes = |len: usize| -> Vec<u8> {
        (0..len)
            .map(|_| (rng.below(255) as i32 - 127) as i8 as u8)
            .collect()
    };
    let (x_codes, w_codes) = (codes(m * k), codes(n * k));
    let tensor = |codes: &[u8], rows: usize| {
        let words = packed(codes, [rows, k], Format::Int8);
        let handle = client.create_from_slice(bytemuck::cast_slice(&words));
        let one = upload(&client, &[1.0], [1, 1], DType::F32).unwrap();
        let granularity = Granularity::Tensor;
        QuantizedTensor::new(handle, one, None, [rows, k], Format::Int8, granularity).unwrap()
    };
    let (x, w) = (tensor(&x_codes, m), tensor(&w_codes, n));
    let out = quantized_matmul(&client, &x, &w, None, DType::F32).unwrap();
    let found = download(&client, &out).unwrap();
    for (at, value) in found.into_iter().enumerate() {
        let (i, j) = (at / n, at % n);
        let products = (0..k)
            .map(|l| i32::from(x_codes[i * k + l] as i8) * i32::from(w_codes[j * k + l] as i8));
        assert_eq!(value as i32, products.sum::<i32>(), "{i} {j}");
    }
}

/// The low-bit error rule: against the product of what was quantized.
#[test]
fn low_bit_errors() {
    let client = client();
    let size = [33, 64, 512];
    let [m, n, k] = size;
    let inputs = Inputs::new(size, DType::F32, 21);
    let exact = matmul(
        |i, l| inputs.x[i * k + l].into(),
        |j, l| inputs.w[j * k + l].into(),
        size,
        &[],
    );
    let exact = exact.data();
    let x = upload(&client, &inputs.x, [m, k], DType::F32).unwrap();
    let group = Granularity::Group(32);
    // Cosine and relative L1; four bits cannot keep the rule of eight.
    for (scheme, least_cosine, most_l1) in [
        (int8(Granularity::Row), 0.9998, 0.02),
        (int8(Granularity::Block), 0.9998, 0.02),
        (fp8(Granularity::Row), 0.999, 0.05),
        (fp8(Granularity::Block), 0.999, 0.05),
        ((Format::Int8, group, true), 0.9999, 0.01),
        ((Format::Int4, group, false), 0.99, 0.15),
        ((Format::Int4, group, true), 0.99, 0.15),
    ] {
        let w = quantized(&inputs.w, [n, k], scheme, DType::F32);
        let out = if scheme.1 == group {
            weight_only_matmul(&client, &x, &w, None, DType::F32)
        } else {
            dynamic_matmul(&client, &x, &w, None, DType::F32)
        };
        let found = wide(&download(&client, &out.unwrap()).unwrap());
        let (cosine, l1) = (cosine(&found, exact), relative_l1(&found, exact));
        println!("{scheme:?}: cosine {cosine:.6}, relative L1 {l1:.4}");
        assert!(
            cosine >= least_cosine && l1 <= most_l1,
            "{scheme:?}: {cosine} {l1}"
        );
    }
}

#[test]
fn nan_stays_in_its_rows_and_columns() {
    let client = client();
    let [m, n, k] = [20, 24, 64];
    for scheme in [int8(Granularity::Row), fp8(Granularity::Row)] {
        let mut inputs = Inputs::new([m, n, k], DType::F32, 2);
        inputs.x[3 * k + 5] = f32::NAN;
        inputs.w[7 * k + 1] = f32::NAN;
        let x = upload(&client, &inputs.x, [m, k], DType::F32).unwrap();
        let w = quantized(&inputs.w, [n, k], scheme, DType::F32);
        let out = dynamic_matmul(&client, &x, &w, None, DType::F32).unwrap();
        for (at, value) in download(&client, &out).unwrap().into_iter().enumerate() {
            assert_eq!(
                value.is_nan(),
                at / n == 3 || at % n == 7,
                "{at} {scheme:?}"
            );
        }
    }
}

#[test]
fn strided_activations_in_more_axes() {
    let client = client();
    let (n, k) = (40, 64);
    let inputs = Inputs::new([6, n, k], DType::F32, 4);
    let w = quantized(&inputs.w, [n, k], int8(Granularity::Row), DType::F32);
    let flat = upload(&client, &inputs.x, [6, k], DType::F32).unwrap();
    let exact = weight_only_matmul(&client, &flat, &w, None, DType::F32).unwrap();
    let exact = download(&client, &exact).unwrap();
    let transposed: Vec<f32> = (0..6 * k).map(|at| inputs.x[at % 6 * k + at / 6]).collect();
    let view = upload(&client, &transposed, [k, 2, 3], DType::F32)
        .unwrap()
        .permute([1, 2, 0]);
    let out = weight_only_matmul(&client, &view, &w, None, DType::F32).unwrap();
    assert_eq!(out.shape(), [2, 3, n]);
    assert_eq!(download(&client, &out).unwrap(), exact);
    // Rows that no stride walks.
    let refused = weight_only_matmul(&client, &view.permute([1, 0, 2]), &w, None, DType::F32);
    assert!(matches!(
        refused,
        Err(ProblemError::NotContiguous { argument: "x" })
    ));
}

/// Training with fake-quantized weights computes what the low-bit product computes.
#[test]
fn fake_quantization_agrees_with_the_product() {
    let client = client();
    let size = [6, 40, 128];
    let [m, n, k] = size;
    let inputs = Inputs::new(size, DType::F32, 6);
    let scheme = (Format::Int4, Granularity::Group(32), true);
    let w = upload(&client, &inputs.w, [n, k], DType::F32).unwrap();
    let fake = fake_quantize(&client, &w, scheme.0, scheme.1, scheme.2).unwrap();
    let fake = download(&client, &fake).unwrap();
    let exact = matmul(
        |i, l| inputs.x[i * k + l].into(),
        |j, l| fake[j * k + l].into(),
        size,
        &[],
    );
    let x = upload(&client, &inputs.x, [m, k], DType::F32).unwrap();
    let w = quantized(&inputs.w, [n, k], scheme, DType::F32);
    let out = weight_only_matmul(&client, &x, &w, None, DType::F32).unwrap();
    expect_near(
        &download(&client, &out).unwrap(),
        &exact,
        DType::F32,
        "fake",
    );
}

#[test]
fn bad_arguments_are_refused() {
    let client = client();
    let zeros = |shape: [usize; 2]| {
        upload(&client, &vec![0.0; shape[0] * shape[1]], shape, DType::F32).unwrap()
    };
    let x = zeros([3, 64]);
    let w = |granularity| quantize(&client, &zeros([5, 64]), Format::Int8, granularity, false);
    let rows = w(Granularity::Row).unwrap();

    let other = quantize(
        &client,
        &zeros([5, 32]),
        Format::Int8,
        Granularity::Row,
        false,
    )
    .unwrap();
    let refused = weight_only_matmul(&client, &x, &other, None, DType::F32);
    assert!(matches!(
        refused,
        Err(ProblemError::ShapeMismatch { argument: "w", .. })
    ));
    let refused = dynamic_matmul(&client, &x, &other, None, DType::F32);
    assert!(matches!(
        refused,
        Err(ProblemError::ShapeMismatch { argument: "w", .. })
    ));
    let refused = quantized_matmul_backward(&client, &x, &rows);
    assert!(matches!(
        refused,
        Err(ProblemError::ShapeMismatch { argument: "dy", .. })
    ));

    let bias = upload(&client, &[0.0; 4], [4], DType::F32).unwrap();
    let refused = weight_only_matmul(&client, &x, &rows, Some(&bias), DType::F32);
    assert!(matches!(
        refused,
        Err(ProblemError::ShapeMismatch {
            argument: "bias",
            ..
        })
    ));
    let bias = upload(&client, &[0.0; 5], [5], DType::F16).unwrap();
    let refused = weight_only_matmul(&client, &x, &rows, Some(&bias), DType::F32);
    assert!(matches!(
        refused,
        Err(ProblemError::DTypeMismatch {
            argument: "bias",
            ..
        })
    ));

    let columns = w(Granularity::Column).unwrap();
    let refused = dynamic_matmul(&client, &x, &columns, None, DType::F32).map(|_| ());
    assert!(matches!(refused, Err(ProblemError::NotSupported { .. })));
    let before = |x, granularity, zeros| expect_dynamic(x, Format::Int8, granularity, zeros);
    assert_eq!(before([3, 64], Granularity::Column, false), refused);
    let refused = quantized_matmul_backward(&client, &zeros([3, 5]), &columns);
    assert!(matches!(refused, Err(ProblemError::NotSupported { .. })));

    // Sums that could overflow.
    let long = 133_145;
    let x = quantize(
        &client,
        &zeros([1, long]),
        Format::Int8,
        Granularity::Row,
        false,
    )
    .unwrap();
    let refused = quantized_matmul(&client, &x, &x, None, DType::F32).map(|_| ());
    assert!(matches!(refused, Err(ProblemError::NotSupported { .. })));
    assert_eq!(before([1, long], Granularity::Row, false), refused);
    assert_eq!(before([1, long - 1], Granularity::Row, false), Ok(()));
    // In f32, or in parts, they cannot.
    assert_eq!(before([1, long], Granularity::Row, true), Ok(()));
    assert_eq!(before([1, 133_248], Granularity::Block, false), Ok(()));

    // Blocks whose activations cannot be grouped.
    let w = quantize(
        &client,
        &zeros([5, 100]),
        Format::Fp8,
        Granularity::Block,
        false,
    )
    .unwrap();
    let refused = dynamic_matmul(&client, &zeros([3, 100]), &w, None, DType::F32).map(|_| ());
    assert_eq!(before([3, 100], Granularity::Block, false), refused);
    assert!(matches!(
        refused,
        Err(ProblemError::Group {
            group: 128,
            columns: 100
        })
    ));

    let empty = DeviceTensor::new(zeros([1, 1]).handle().clone(), [0, 64], [64, 1], DType::F32);
    let refused = weight_only_matmul(&client, &empty.unwrap(), &rows, None, DType::F32);
    assert!(matches!(
        refused,
        Err(ProblemError::ZeroSize { argument: "x", .. })
    ));
}
