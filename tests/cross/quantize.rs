//! Quantization, bit by bit.

use cubesla::{
    DType, DeviceTensor, Format, Granularity, ProblemError, QuantizedTensor, dequantize, download,
    fake_quantize, quantize, upload,
};
use harness::quantize::{check, expected, hard_values, packed, words};
use harness::{Rng, client, dtypes, rounded};
use proptest::prelude::*;

const GRANULARITIES: [Granularity; 6] = [
    Granularity::Tensor,
    Granularity::Row,
    Granularity::Column,
    Granularity::Group(32),
    Granularity::Group(128),
    Granularity::Block,
];

/// Every format, with and without a zero point where it can have one.
const FORMATS: [(Format, bool); 5] = [
    (Format::Int8, false),
    (Format::Int8, true),
    (Format::Int4, false),
    (Format::Int4, true),
    (Format::Fp8, false),
];

/// Quantizes `values` twice and back, and compares all of it with the reference.
fn check_values(
    values: &[f32],
    matrix: [usize; 2],
    dtype: DType,
    granularity: Granularity,
    (format, zero_point): (Format, bool),
) {
    let client = client();
    let what = format!("{matrix:?} {dtype} {granularity:?} {format:?} {zero_point}");
    let x = upload(&client, values, matrix, dtype).unwrap();
    let exact = expected(values, matrix, format, granularity, zero_point);
    let found = quantize(&client, &x, format, granularity, zero_point).unwrap();
    check(&client, &found, &exact, &what);
    let again = quantize(&client, &x, format, granularity, zero_point).unwrap();
    check(&client, &again, &exact, &what);

    let back = download(&client, &dequantize(&client, &found, dtype).unwrap()).unwrap();
    for (at, &value) in back.iter().enumerate() {
        let (row, column) = (at / matrix[1], at % matrix[1]);
        // The product of a small integer or an FP8 value and a scale, rounded to f32 and on.
        let exact = rounded(exact.value(row, column) as f32, dtype);
        let equal = value == exact || value.is_nan() && exact.is_nan();
        assert!(equal, "{at} of {what}: {value:e} is not {exact:e}");
    }
}

#[test]
fn every_format_and_granularity() {
    let client = client();
    let mut rng = Rng::new(1);
    for dtype in dtypes(&client) {
        for granularity in GRANULARITIES {
            for format in FORMATS {
                let matrix = [5, 256];
                let values = hard_values(&mut rng, matrix, dtype);
                check_values(&values, matrix, dtype, granularity, format);
            }
        }
    }
}

#[test]
fn odd_sizes() {
    let mut rng = Rng::new(2);
    for matrix in [[1, 1], [1, 7], [131, 3], [3, 1000], [130, 129], [300, 33]] {
        let values = hard_values(&mut rng, matrix, DType::F32);
        for granularity in [
            Granularity::Tensor,
            Granularity::Row,
            Granularity::Column,
            Granularity::Block,
        ] {
            for format in FORMATS {
                check_values(&values, matrix, DType::F32, granularity, format);
            }
        }
    }
}

/// All e4m3 values, the middles between them, and what lies right beside those.
#[test]
fn fp8_rounds_to_nearest_even_everywhere() {
    let mut values = vec![448.0];
    for code in 0..0x7eu8 {
        let decoded = |code| cubesla_reference::quantize::decode_e4m3(code) as f32;
        let middle = (decoded(code) + decoded(code + 1)) / 2.0;
        for x in [decoded(code), middle.next_down(), middle, middle.next_up()] {
            values.extend([x, -x]);
        }
    }
    // The scale is 448 / 448 = 1.
    let matrix = [1, values.len()];
    let fp8 = (Format::Fp8, false);
    check_values(&values, matrix, DType::F32, Granularity::Tensor, fp8);
}

#[test]
fn integers_round_to_nearest_even() {
    let mut values = vec![127.0, -127.0];
    values.extend((-126..126).map(|i| i as f32 + 0.5));
    let int8 = (Format::Int8, false);
    check_values(&values, [1, 254], DType::F32, Granularity::Row, int8);
}

#[test]
fn zeros_infinities_nan_and_tiny_values() {
    let client = client();
    let rows: [[f32; 4]; 9] = [
        [0.0; 4],
        [-0.0, 0.0, -0.0, 0.0],
        [f32::NAN, 1.0, 2.0, 3.0],
        [f32::INFINITY, 1.0, -2.0, 0.5],
        [f32::NEG_INFINITY, f32::INFINITY, -2.0, 4.0],
        [f32::INFINITY, f32::INFINITY, f32::NEG_INFINITY, f32::NAN],
        [1e-44, -1e-40, 1e-38, 0.0],
        [f32::MAX, -f32::MAX, 1.0, 0.0],
        [1e-30, -3e-31, 2e-32, 0.0],
    ];
    let values = rows.concat();
    for granularity in [Granularity::Row, Granularity::Column, Granularity::Tensor] {
        for format in FORMATS {
            check_values(&values, [9, 4], DType::F32, granularity, format);
        }
    }
    // A NaN is not lost, and stays in its row.
    for (format, zero_point) in FORMATS {
        let x = upload(&client, &values, [9, 4], DType::F32).unwrap();
        let fake = fake_quantize(&client, &x, format, Granularity::Row, zero_point).unwrap();
        let fake = download(&client, &fake).unwrap();
        for (r, row) in fake.chunks(4).enumerate() {
            assert_eq!(
                row.iter().any(|x| x.is_nan()),
                r == 2 || r == 5,
                "{format:?}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_matrix(
        rows in 1..150usize,
        columns in 1..300usize,
        granularity in 0..6usize,
        format in 0..5usize,
        seed in any::<u64>(),
    ) {
        let granularity = GRANULARITIES[granularity];
        let columns = match granularity {
            Granularity::Group(group) => columns.next_multiple_of(group),
            _ => columns,
        };
        let values = hard_values(&mut Rng::new(seed), [rows, columns], DType::F32);
        check_values(&values, [rows, columns], DType::F32, granularity, FORMATS[format]);
    }
}

#[test]
fn strided_inputs() {
    let client = client();
    let mut rng = Rng::new(4);
    let (rows, columns) = (37, 64);
    let values = hard_values(&mut rng, [rows, columns], DType::F32);
    let transposed: Vec<f32> = (0..rows * columns)
        .map(|at| values[at % rows * columns + at / rows])
        .collect();
    let x = upload(&client, &transposed, [columns, rows], DType::F32).unwrap();
    let x = x.permute([1, 0]);
    for granularity in GRANULARITIES[..4].iter().copied() {
        let exact = expected(&values, [rows, columns], Format::Int8, granularity, false);
        let found = quantize(&client, &x, Format::Int8, granularity, false).unwrap();
        check(&client, &found, &exact, "a transposed matrix");
    }
    // Rows with gaps between them, in three axes.
    let wide = upload(&client, &values, [2, 37, 32], DType::F32).unwrap();
    let handle = wide.handle().clone();
    let part = DeviceTensor::new(handle, [2, 18, 32], [18 * 64, 64, 1], DType::F32).unwrap();
    let kept: Vec<f32> = values
        .chunks(64)
        .take(36)
        .flat_map(|row| &row[..32])
        .copied()
        .collect();
    let exact = expected(&kept, [36, 32], Format::Fp8, Granularity::Row, false);
    let found = quantize(&client, &part, Format::Fp8, Granularity::Row, false).unwrap();
    assert_eq!(found.shape(), [2, 18, 32]);
    check(&client, &found, &exact, "rows with gaps");
    // Leading axes in another order than memory's have no stride in common.
    let refused = quantize(
        &client,
        &wide.permute([1, 0, 2]),
        Format::Fp8,
        Granularity::Row,
        false,
    );
    assert!(matches!(
        refused,
        Err(ProblemError::NotContiguous { argument: "x" })
    ));
}

/// A tensor of words and scales that a program brings is read as it would be written.
#[test]
fn tensors_from_elsewhere() {
    let client = client();
    let values = hard_values(&mut Rng::new(5), [9, 96], DType::F32);
    let granularity = Granularity::Group(32);
    let exact = expected(&values, [9, 96], Format::Int4, granularity, true);
    let handle = |words: &[u32]| client.create_from_slice(bytemuck::cast_slice(words));
    let words = packed(&exact.codes, [9, 96], Format::Int4);
    let scales = upload(&client, &exact.scales, [9, 3], DType::F32).unwrap();
    let zeros = upload(&client, exact.zeros.as_ref().unwrap(), [9, 3], DType::F32).unwrap();
    let tensor = |words, scales, zeros, granularity| {
        QuantizedTensor::new(words, scales, zeros, [9, 96], Format::Int4, granularity)
    };
    let right = tensor(
        handle(&words),
        scales.clone(),
        Some(zeros.clone()),
        granularity,
    )
    .unwrap();
    check(&client, &right, &exact, "given words");
    let back = download(&client, &dequantize(&client, &right, DType::F32).unwrap()).unwrap();
    assert!(
        back.iter()
            .enumerate()
            .all(|(at, &x)| x == exact.value(at / 96, at % 96) as f32)
    );

    let short = tensor(handle(&words[1..]), scales.clone(), None, granularity);
    assert!(matches!(
        short,
        Err(ProblemError::PackedLength {
            found: 428,
            expected: 432
        })
    ));
    let of_rows = tensor(handle(&words), scales.clone(), None, Granularity::Row);
    assert!(matches!(
        of_rows,
        Err(ProblemError::ShapeMismatch {
            argument: "scales",
            ..
        })
    ));
    let one = upload(&client, &[0.0], [1, 1], DType::F32).unwrap();
    let zeros = tensor(handle(&words), scales, Some(one), granularity);
    assert!(matches!(
        zeros,
        Err(ProblemError::ShapeMismatch {
            argument: "zeros",
            ..
        })
    ));
}

#[test]
fn bad_arguments_are_refused() {
    let client = client();
    let x = upload(&client, &[0.0; 4 * 48], [4, 48], DType::F32).unwrap();
    for group in [0, 16, 32, 64] {
        let refused = quantize(&client, &x, Format::Int4, Granularity::Group(group), false);
        let found = matches!(refused, Err(ProblemError::Group { columns: 48, .. }));
        assert!(found, "{group}");
    }
    let refused = quantize(&client, &x, Format::Fp8, Granularity::Row, true);
    assert!(matches!(refused, Err(ProblemError::NotSupported { .. })));
    let empty = DeviceTensor::new(x.handle().clone(), [0, 4], [4, 1], DType::F32).unwrap();
    let refused = quantize(&client, &empty, Format::Int8, Granularity::Row, false);
    assert!(matches!(
        refused,
        Err(ProblemError::ZeroSize { argument: "x", .. })
    ));
}

/// Words past a row's end are 0, whatever memory held before.
#[test]
fn padding_is_zero() {
    let client = client();
    for _ in 0..3 {
        let bits = vec![0xFFu8; 3 * 16];
        drop(client.create_from_slice(&bits));
        let x = upload(&client, &[1.0; 15], [3, 5], DType::F32).unwrap();
        let found = quantize(&client, &x, Format::Int8, Granularity::Row, false).unwrap();
        let row = [0x7F7F_7F7F, 0x7F, 0, 0];
        assert_eq!(words(&client, found.words()), [row, row, row].concat());
    }
}
