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

/// What gradients may be off as a few codes are rounded the other way: the reference's mean key is f64.
pub const CODES: f64 = 1e-3;

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
