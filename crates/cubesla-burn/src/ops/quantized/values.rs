//! A matrix in low bits.

use burn_core::backend::Backend;
use burn_core::backend::tensor::{FloatTensor, IntTensor};
use cubesla::{Format, Granularity};

use crate::shim as burn;

/// The tensors of a matrix in low bits: 32-bit words `[rows, words of a row]`, f32 scales and zero
/// points.
#[derive(burn_core::backend::ExtensionType, Clone, Debug)]
#[extension_type(fusion)]
pub enum Packed<B: Backend> {
    /// Codes are symmetric about 0.
    Symmetric {
        /// The codes.
        words: IntTensor<B>,
        /// The scales.
        scales: FloatTensor<B>,
    },
    /// Codes have zero points.
    ZeroPoint {
        /// The codes.
        words: IntTensor<B>,
        /// The scales.
        scales: FloatTensor<B>,
        /// The zero points.
        zeros: FloatTensor<B>,
    },
}

/// What the tensors do not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// How an element is stored.
    pub format: Format,
    /// Which elements share a scale.
    pub granularity: Granularity,
    /// Elements of a row.
    pub columns: usize,
}
