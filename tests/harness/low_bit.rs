//! What tests of low-bit attention share.

use cubesla::{LowBitFormats, LowBitScores, LowBitValues};
use cubesla_reference::low_bit::Formats;
use cubesla_reference::quantize::Format;

/// Every choice of formats.
pub const FORMATS: [LowBitFormats; 4] = [
    formats(LowBitScores::Int8, LowBitValues::Full),
    formats(LowBitScores::Int8, LowBitValues::Fp8),
    formats(LowBitScores::Fp8, LowBitValues::Full),
    formats(LowBitScores::Fp8, LowBitValues::Fp8),
];

const fn formats(scores: LowBitScores, values: LowBitValues) -> LowBitFormats {
    LowBitFormats { scores, values }
}

/// The reference's name of formats.
pub fn reference_formats(formats: LowBitFormats) -> Formats {
    Formats {
        scores: match formats.scores {
            LowBitScores::Int8 => Format::Int8,
            LowBitScores::Fp8 => Format::Fp8,
        },
        fp8_values: formats.values == LowBitValues::Fp8,
        smooth: true,
    }
}

/// Cosine of the angle between two results, and the L1 norm of their difference relative to that of
/// `exact`, which is not 0.
pub fn cosine_and_l1(found: &[f64], exact: &[f64]) -> (f64, f64) {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let cosine = dot(found, exact) / (dot(found, found) * dot(exact, exact)).sqrt();
    let difference: f64 = found.iter().zip(exact).map(|(x, y)| (x - y).abs()).sum();
    (
        cosine,
        difference / exact.iter().map(|x| x.abs()).sum::<f64>(),
    )
}
