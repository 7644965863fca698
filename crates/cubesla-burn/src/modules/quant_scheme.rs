//! How a linear layer is quantized.

use burn_core as burn;
use burn_core::config::Config;
use cubesla::{Format, Granularity};

use crate::Error;

/// What becomes of the activations of a product with low-bit weights.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum Activations {
    /// They stay in their type, and the weights are decoded: W4A16, W8A16.
    Full,
    /// They are quantized to the weights' format in the call, with a scale to a row, or one to each
    /// 128 of a row for weights in blocks: W8A8.
    Quantized,
}

/// How an element is stored; see [`Format`].
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum FormatConfig {
    /// 8-bit integers.
    Int8,
    /// 4-bit integers.
    Int4,
    /// FP8 e4m3.
    Fp8,
}

impl From<FormatConfig> for Format {
    fn from(config: FormatConfig) -> Self {
        match config {
            FormatConfig::Int8 => Self::Int8,
            FormatConfig::Int4 => Self::Int4,
            FormatConfig::Fp8 => Self::Fp8,
        }
    }
}

/// Which elements of `[d_output, d_input]` share a scale; see [`Granularity`].
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum GranularityConfig {
    /// All of them.
    Tensor,
    /// Those of an output.
    Row,
    /// So many neighbouring inputs of an output: 32, 64 or 128, which must divide `d_input`.
    Group(usize),
    /// Blocks of 128 outputs and 128 inputs.
    Block,
}

impl From<GranularityConfig> for Granularity {
    fn from(config: GranularityConfig) -> Self {
        match config {
            GranularityConfig::Tensor => Self::Tensor,
            GranularityConfig::Row => Self::Row,
            GranularityConfig::Group(group) => Self::Group(group),
            GranularityConfig::Block => Self::Block,
        }
    }
}

/// How a linear layer is quantized: [`QuantLinear`](super::QuantLinear),
/// [`QatLinear`](super::QatLinear).
///
/// ```
/// use cubesla_burn::{GranularityConfig, QuantLinearScheme};
///
/// let scheme = QuantLinearScheme::w4a16()
///     .with_granularity(GranularityConfig::Group(64))
///     .with_zero_point(true);
/// ```
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub struct QuantLinearScheme {
    /// How weights are stored, and activations if they are quantized.
    pub format: FormatConfig,
    /// Whether activations are quantized too.
    pub activations: Activations,
    /// Which weights share a scale.
    #[config(default = "GranularityConfig::Row")]
    pub granularity: GranularityConfig,
    /// Whether codes of weights have a zero point. FP8 has none, and INT8 activations are then
    /// decoded before the product.
    #[config(default = false)]
    pub zero_point: bool,
}

impl QuantLinearScheme {
    /// INT8 weights and activations, summed in integers.
    pub fn w8a8_int8() -> Self {
        Self::new(FormatConfig::Int8, Activations::Quantized)
    }

    /// FP8 e4m3 weights and activations.
    pub fn w8a8_fp8() -> Self {
        Self::new(FormatConfig::Fp8, Activations::Quantized)
    }

    /// INT8 weights, activations in their own type.
    pub fn w8a16() -> Self {
        Self::new(FormatConfig::Int8, Activations::Full)
    }

    /// INT4 weights, activations in their own type.
    pub fn w4a16() -> Self {
        Self::new(FormatConfig::Int4, Activations::Full)
    }

    /// An error unless a weight `[d_output, d_input]` can be held and multiplied like this.
    pub(crate) fn expect(&self, shape: [usize; 2]) -> Result<(), Error> {
        let (format, granularity) = (self.format.into(), self.granularity.into());
        cubesla::expect_format("w", shape, format, granularity, self.zero_point)?;
        if self.activations == Activations::Quantized {
            cubesla::expect_dynamic([1, shape[1]], format, granularity, self.zero_point)?;
        }
        Ok(())
    }
}
