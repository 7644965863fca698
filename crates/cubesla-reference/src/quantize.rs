//! Low-bit storage of matrices, and products with it.
//!
//! ```text
//! symmetric     scale = amax / top             code = clamp(rne(x / scale), -top, top)
//! zero point    scale = hi/levels + lo/levels  zero = clamp(rne(lo / scale), 0, levels)
//!               code = clamp(rne(x / scale) + zero, 0, levels)
//! ```
//!
//! `rne` rounds to nearest, ties to even. `top` is 127 for INT8, 7 for INT4 and 448 for FP8 e4m3, whose
//! codes are the nearest of its values instead of the nearest integers; `levels` is 255 or 15, `hi` the
//! largest of the elements and 0, `lo` that of the negated elements and 0. Scales and quotients are
//! f32: this is the one module whose results a kernel has to match bit by bit.
//!
//! | elements that share a scale | result |
//! |---|---|
//! | all zero, or so small that the scale would be below the smallest normal f32 | scale 1, zero point 0 |
//! | an infinity | saturates; the scale is that of the finite elements |
//! | a NaN, integer formats | scale NaN and codes 0: all of them become NaN |
//! | a NaN, FP8 | the code of NaN; the others keep theirs |

use crate::Tensor;

/// How an element is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// 8-bit integers, -127 to 127, or 0 to 255 with a zero point.
    Int8,
    /// 4-bit integers, -7 to 7, or 0 to 15 with a zero point.
    Int4,
    /// FP8 e4m3: 4 bits of exponent, 3 of mantissa, up to 448, no infinities.
    Fp8,
}

/// A quantized matrix.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// `[rows, columns]`.
    pub shape: [usize; 2],
    /// How elements are stored.
    pub format: Format,
    /// Rows and columns of the blocks that share a scale.
    pub region: [usize; 2],
    /// Row-major codes, one to a byte; negative ones in two's complement.
    pub codes: Vec<u8>,
    /// A scale to each block, row-major over blocks.
    pub scales: Vec<f32>,
    /// A zero point to each block.
    pub zeros: Option<Vec<f32>>,
}

impl Quantized {
    /// The block of an element.
    pub fn block(&self, row: usize, column: usize) -> usize {
        let across = self.shape[1].div_ceil(self.region[1]);
        row / self.region[0] * across + column / self.region[1]
    }

    /// The code of an element as a number.
    pub fn number(&self, row: usize, column: usize) -> f64 {
        let code = self.codes[row * self.shape[1] + column];
        match (self.format, &self.zeros) {
            (Format::Fp8, _) => decode_e4m3(code),
            (_, Some(zeros)) => f64::from(code) - f64::from(zeros[self.block(row, column)]),
            (_, None) => f64::from(code as i8),
        }
    }

    /// The value of an element, not rounded.
    pub fn value(&self, row: usize, column: usize) -> f64 {
        self.number(row, column) * f64::from(self.scales[self.block(row, column)])
    }
}

impl Quantized {
    /// Replaces the codes by those that `quotient` of an element's index and scale gives.
    pub(crate) fn recode(&mut self, quotient: impl Fn(usize, f32) -> f32) {
        for i in 0..self.codes.len() {
            let [_, columns] = self.shape;
            let scale = self.scales[self.block(i / columns, i % columns)];
            // A NaN scale leaves no codes.
            let unit = if scale.is_nan() { scale } else { 1.0 };
            self.codes[i] = encode(quotient(i, scale), unit, None, self.format);
        }
    }
}

/// Quantizes row-major `values` with one scale for each block of `region` rows and columns.
pub fn quantize(
    values: &[f32],
    shape: [usize; 2],
    format: Format,
    region: [usize; 2],
    zero_point: bool,
) -> Quantized {
    let [rows, columns] = shape;
    let across = columns.div_ceil(region[1]);
    let blocks = rows.div_ceil(region[0]) * across;
    let mut members = vec![Vec::new(); blocks];
    for row in 0..rows {
        for column in 0..columns {
            let block = row / region[0] * across + column / region[1];
            members[block].push(values[row * columns + column]);
        }
    }
    let (scales, zeros): (Vec<f32>, Vec<f32>) = members
        .iter()
        .map(|block| scale_of(block, format, zero_point))
        .unzip();
    let mut quantized = Quantized {
        shape,
        format,
        region,
        codes: vec![0; rows * columns],
        scales,
        zeros: zero_point.then_some(zeros),
    };
    for row in 0..rows {
        for column in 0..columns {
            let block = quantized.block(row, column);
            let (x, scale) = (values[row * columns + column], quantized.scales[block]);
            let zero = quantized.zeros.as_ref().map(|zeros| zeros[block]);
            quantized.codes[row * columns + column] = encode(x, scale, zero, format);
        }
    }
    quantized
}

/// Scale and zero point of elements that share them.
fn scale_of(block: &[f32], format: Format, zero_point: bool) -> (f32, f32) {
    if format != Format::Fp8 && block.iter().any(|x| x.is_nan()) {
        return (f32::NAN, 0.0);
    }
    let finite = block.iter().filter(|x| x.is_finite());
    let (mut hi, mut lo) = (0.0f32, 0.0f32);
    for &x in finite {
        hi = hi.max(x);
        lo = lo.max(-x);
    }
    let scale = if zero_point {
        hi / levels(format) + lo / levels(format)
    } else {
        hi.max(lo) / top(format)
    };
    if scale < f32::MIN_POSITIVE {
        return (1.0, 0.0);
    }
    let zero = if zero_point {
        (lo / scale).round_ties_even().min(levels(format))
    } else {
        0.0
    };
    (scale, zero)
}

fn encode(x: f32, scale: f32, zero: Option<f32>, format: Format) -> u8 {
    if format == Format::Fp8 {
        return encode_e4m3(x / scale);
    }
    if scale.is_nan() {
        return 0;
    }
    let top = top(format);
    let code = (x / scale).round_ties_even();
    match zero {
        Some(zero) => (code + zero).clamp(0.0, levels(format)) as u8,
        None => code.clamp(-top, top) as i8 as u8,
    }
}

/// The largest magnitude of a format without a zero point.
pub fn top(format: Format) -> f32 {
    match format {
        Format::Int8 => 127.0,
        Format::Int4 => 7.0,
        Format::Fp8 => 448.0,
    }
}

/// The largest code with a zero point.
fn levels(format: Format) -> f32 {
    match format {
        Format::Int8 => 255.0,
        Format::Int4 => 15.0,
        Format::Fp8 => unreachable!("FP8 has no zero point"),
    }
}

/// The value of an e4m3 code.
pub fn decode_e4m3(code: u8) -> f64 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => sign * mantissa * 2f64.powi(-9),
        _ => sign * (8.0 + mantissa) * 2f64.powi(exponent - 10),
    }
}

/// The nearest e4m3 value, ties to the even code, saturating; by search over all of them.
pub fn encode_e4m3(x: f32) -> u8 {
    if x.is_nan() {
        return 0x7f;
    }
    let magnitude = f64::from(x.abs());
    let mut best = 0u8;
    for code in 1..=0x7eu8 {
        let distance = |code: u8| (decode_e4m3(code) - magnitude).abs();
        let nearer = distance(code) < distance(best);
        if nearer || (distance(code) == distance(best) && code % 2 == 0) {
            best = code;
        }
    }
    // At an infinity every distance is the same.
    if magnitude >= 448.0 {
        best = 0x7e;
    }
    best | u8::from(x.is_sign_negative()) << 7
}

/// `X W^T + b` from exact values: `x` is `[M, K]`, `w` is `[N, K]`, `bias` is `[N]` or empty.
pub fn matmul(
    x: impl Fn(usize, usize) -> f64,
    w: impl Fn(usize, usize) -> f64,
    [m, n, k]: [usize; 3],
    bias: &[f32],
) -> Tensor {
    Tensor::from_fn([1, 1, m, n], |[_, _, i, j]| {
        let sum: f64 = (0..k).map(|l| x(i, l) * w(j, l)).sum();
        sum + bias.get(j).map_or(0.0, |&b| f64::from(b))
    })
}

/// The gradient of [`matmul`] with respect to `x`: `dY W`, `[M, K]`, from `dy [M, N]`.
pub fn matmul_backward(
    dy: impl Fn(usize, usize) -> f64,
    w: impl Fn(usize, usize) -> f64,
    [m, n, k]: [usize; 3],
) -> Tensor {
    Tensor::from_fn([1, 1, m, k], |[_, _, i, l]| {
        (0..n).map(|j| dy(i, j) * w(j, l)).sum()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_values_encode_to_themselves() {
        for code in 0..=0xffu8 {
            let value = decode_e4m3(code);
            if !value.is_nan() {
                assert_eq!(encode_e4m3(value as f32), code, "{value}");
            }
        }
        assert_eq!(decode_e4m3(0x7e), 448.0);
        assert_eq!(decode_e4m3(0x08), 2f64.powi(-6));
        assert_eq!(decode_e4m3(0x01), 2f64.powi(-9));
    }

    #[test]
    fn e4m3_ties_go_to_even_codes() {
        for code in 0..0x7eu8 {
            let middle = (decode_e4m3(code) + decode_e4m3(code + 1)) / 2.0;
            assert_eq!(encode_e4m3(middle as f32), code + code % 2);
        }
        for x in [449.0, 1e30, f32::INFINITY] {
            assert_eq!([encode_e4m3(x), encode_e4m3(-x)], [0x7e, 0xfe]);
        }
        assert_eq!(encode_e4m3(f32::NAN), 0x7f);
    }

    #[test]
    fn errors_are_at_most_half_a_step() {
        let values: Vec<f32> = (0..96)
            .map(|i| ((i * 37) % 101) as f32 * 0.07 - 2.0)
            .collect();
        for format in [Format::Int8, Format::Int4] {
            for zero_point in [false, true] {
                for region in [[3, 32], [1, 32], [3, 1], [1, 8], [2, 20]] {
                    let q = quantize(&values, [3, 32], format, region, zero_point);
                    for row in 0..3 {
                        for column in 0..32 {
                            let step = f64::from(q.scales[q.block(row, column)]);
                            let x = f64::from(values[row * 32 + column]);
                            let error = (q.value(row, column) - x).abs();
                            assert!(error <= 0.5001 * step, "{error} of {step}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn degenerate_blocks_are_defined() {
        let values = [0.0, 1e-44, f32::NAN, 3.0, f32::INFINITY, -2.0];
        let int8 = quantize(&values, [3, 2], Format::Int8, [1, 2], false);
        assert_eq!(int8.scales[0], 1.0);
        assert!(int8.scales[1].is_nan() && int8.value(1, 1).is_nan());
        assert_eq!(int8.scales[2], 2.0 / 127.0);
        assert_eq!([int8.number(2, 0), int8.number(2, 1)], [127.0, -127.0]);
        let fp8 = quantize(&values, [3, 2], Format::Fp8, [1, 2], false);
        assert!(fp8.value(1, 0).is_nan());
        assert!((fp8.value(1, 1) - 3.0).abs() < 1e-6);
    }
}
