//! Choices that a configuration file can hold.

use burn_core as burn;
use burn_core::config::Config;
use cubesla::{FeatureMap, LinearMode, Precision};

/// Which operation a module is.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum SlaVariant {
    /// SLA: the linear branch is projected and added (arXiv 2509.24006).
    Sla,
    /// SLA2: the branches are mixed by a learned weight (arXiv 2602.12675).
    Sla2,
}

/// phi of the linear branch; see [`FeatureMap`].
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum FeatureMapConfig {
    /// Softmax over the head dimension, the papers' choice.
    Softmax,
    /// `elu(x) + 1`.
    EluPlusOne,
    /// `max(x, 0)`.
    Relu,
    /// `x` itself.
    Identity,
}

impl From<FeatureMapConfig> for FeatureMap {
    fn from(config: FeatureMapConfig) -> Self {
        match config {
            FeatureMapConfig::Softmax => Self::Softmax,
            FeatureMapConfig::EluPlusOne => Self::EluPlusOne,
            FeatureMapConfig::Relu => Self::Relu,
            FeatureMapConfig::Identity => Self::Identity,
        }
    }
}

/// Over which keys the linear branch sums; see [`LinearMode`].
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum LinearModeConfig {
    /// Those of marginal blocks, as in the papers.
    Complement,
    /// All keys, as in SLA's public code.
    Global,
}

impl From<LinearModeConfig> for LinearMode {
    fn from(config: LinearModeConfig) -> Self {
        match config {
            LinearModeConfig::Complement => Self::Complement,
            LinearModeConfig::Global => Self::Global,
        }
    }
}

/// Arithmetic of the sparse branch; see [`Precision`].
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum PrecisionConfig {
    /// That of the inputs.
    Full,
    /// Scores in INT8, weights and values in the inputs' type.
    Int8,
    /// Scores in INT8, weights and values in FP8.
    Int8Fp8,
    /// All of them in FP8.
    Fp8,
}

impl From<PrecisionConfig> for Precision {
    fn from(config: PrecisionConfig) -> Self {
        match config {
            PrecisionConfig::Full => Self::Full,
            PrecisionConfig::Int8 => Self::Int8,
            PrecisionConfig::Int8Fp8 => Self::Int8Fp8,
            PrecisionConfig::Fp8 => Self::Fp8,
        }
    }
}
