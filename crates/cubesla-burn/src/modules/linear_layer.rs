//! What may stand for a linear layer.

use burn_core::module::Module;
use burn_core::tensor::Tensor;
use burn_nn::Linear;

use super::{QatLinear, QuantLinear};
use crate::Error;

/// A module from `[.., d_input]` to `[.., d_output]`, of which
/// [`SlaMultiHeadAttention`](super::SlaMultiHeadAttention) has four.
pub trait LinearLayer: Module {
    /// The layer's result for `x`.
    ///
    /// # Errors
    /// Those of the layer.
    fn try_apply<const D: usize>(&self, x: Tensor<D>) -> Result<Tensor<D>, Error>;
}

impl LinearLayer for Linear {
    fn try_apply<const D: usize>(&self, x: Tensor<D>) -> Result<Tensor<D>, Error> {
        Ok(self.forward(x))
    }
}

impl LinearLayer for QuantLinear {
    fn try_apply<const D: usize>(&self, x: Tensor<D>) -> Result<Tensor<D>, Error> {
        self.try_forward(x)
    }
}

impl LinearLayer for QatLinear {
    fn try_apply<const D: usize>(&self, x: Tensor<D>) -> Result<Tensor<D>, Error> {
        self.try_forward(x)
    }
}
