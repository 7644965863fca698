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
