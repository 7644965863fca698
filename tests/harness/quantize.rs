//! Quantized tensors on both sides.

use cubesla::{Client, DType, Format, Granularity, QuantizedTensor, download};
use cubesla_reference::quantize as reference;

use crate::Rng;

/// The reference's name of a format.
pub fn reference_format(format: Format) -> reference::Format {
    match format {
        Format::Int8 => reference::Format::Int8,
        Format::Int4 => reference::Format::Int4,
        Format::Fp8 => reference::Format::Fp8,
    }
}

/// The reference's quantization of row-major `values`.
pub fn expected(
    values: &[f32],
    matrix: [usize; 2],
    format: Format,
    granularity: Granularity,
    zero_point: bool,
) -> reference::Quantized {
    let region = granularity.region(matrix);
    reference::quantize(values, matrix, reference_format(format), region, zero_point)
}

/// The bits of 32-bit words in device memory.
pub fn words(client: &Client, handle: &cubecl::server::Handle) -> Vec<u32> {
    let bytes = client.read_one(handle.clone()).expect("a buffer");
    bytemuck::pod_collect_to_vec(&bytes)
}

/// The words that hold these codes, one to a byte.
pub fn packed(codes: &[u8], [rows, columns]: [usize; 2], format: Format) -> Vec<u32> {
    let (bits, per_word) = (format.bits(), format.per_word());
    let pitch = columns.div_ceil(per_word).next_multiple_of(4);
    let mut words = vec![0u32; rows * pitch];
    for row in 0..rows {
        for column in 0..columns {
            let code = u32::from(codes[row * columns + column]) & ((1 << bits) - 1);
            words[row * pitch + column / per_word] |= code << (column % per_word * bits);
        }
    }
    words
}

/// Checks every word, scale and zero point, bit by bit; any NaN equals any other.
pub fn check<const R: usize>(
    client: &Client,
    found: &QuantizedTensor<R>,
    expected: &reference::Quantized,
    what: &str,
) {
    let same = |found: &[f32], expected: &[f32], part: &str| {
        assert_eq!(found.len(), expected.len(), "{part} of {what}");
        for (at, (x, y)) in found.iter().zip(expected).enumerate() {
            let equal = x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan();
            assert!(equal, "{part} {at} of {what}: {x:e} is not {y:e}");
        }
    };
    let scales = download(client, found.scales()).expect("scales");
    same(&scales, &expected.scales, "scale");
    assert_eq!(found.zeros().is_some(), expected.zeros.is_some());
    if let (Some(zeros), Some(exact)) = (found.zeros(), &expected.zeros) {
        same(&download(client, zeros).expect("zeros"), exact, "zero");
    }
    let exact = packed(&expected.codes, expected.shape, found.format());
    let words = words(client, found.words());
    let different = words.iter().zip(&exact).position(|(x, y)| x != y);
    if let Some(at) = different {
        let pitch = found.words_per_row();
        panic!(
            "word {} of row {} of {what}: {:08x} is not {:08x}",
            at % pitch,
            at / pitch,
            words[at],
            exact[at]
        );
    }
    assert_eq!(words.len(), exact.len(), "words of {what}");
}

/// Values with what makes quantization hard: rows of very different sizes, ties, zero rows.
pub fn hard_values(rng: &mut Rng, [rows, columns]: [usize; 2], dtype: DType) -> Vec<f32> {
    let mut values = Vec::with_capacity(rows * columns);
    for _ in 0..rows {
        let size = match rng.below(6) {
            0 => 0.0,
            1 => 1e-3,
            2 => 200.0,
            _ => 1.0,
        };
        for _ in 0..columns {
            let x = match rng.below(8) {
                // Halves of what scales of whole numbers divide evenly.
                0 => (rng.below(255) as f32 - 127.0) * 0.5,
                1 => 0.0,
                _ => rng.normal() as f32,
            };
            values.push(crate::rounded(x * size, dtype));
        }
    }
    values
}
