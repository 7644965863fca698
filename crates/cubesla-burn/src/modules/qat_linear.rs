//! A linear layer that trains for its low-bit form.

use burn_core as burn;
use burn_core::module::{Module, Param};
use burn_core::tensor::Tensor;
use burn_core::tensor::module::linear;
use burn_nn::Linear;
use cubesla::{Format, Granularity, ProblemError, activation_granularity};

use super::{Activations, QuantLinear, QuantLinearScheme};
use crate::error::unwrap;
use crate::{Error, convert, try_fake_quantize};

/// A linear layer that computes with the rounding of a [`QuantLinear`] and trains its float weight:
/// gradients pass straight through the rounding (arXiv 1308.3432).
///
/// Records have the names of Burn's `Linear`, `weight` and `bias`, and load from each other.
#[derive(Module, Debug)]
pub struct QatLinear {
    /// `[d_input, d_output]`.
    pub weight: Param<Tensor<2>>,
    /// `[d_output]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// What the layer is to become.
    #[module(skip)]
    pub scheme: QuantLinearScheme,
}

impl QatLinear {
    /// The layer of a `Linear`. A weight that is one of Burn's quantized tensors is decoded, and
    /// requires gradients from then on.
    ///
    /// # Errors
    /// [`Error::Library`] for features that the scheme does not fit.
    pub fn try_from_linear(linear: Linear, scheme: &QuantLinearScheme) -> Result<Self, Error> {
        let [inputs, outputs] = linear.weight.shape().dims();
        scheme.expect([outputs, inputs])?;
        let weight = linear.weight;
        let is_quantized = convert::element_type(weight.val().dtype()).is_none();
        Ok(Self {
            weight: if is_quantized {
                Param::from_tensor(weight.val().dequantize().detach())
            } else {
                weight
            },
            bias: linear.bias,
            scheme: *scheme,
        })
    }

    /// [`try_from_linear`](Self::try_from_linear) that panics with the message of its error.
    ///
    /// # Panics
    /// Where [`try_from_linear`](Self::try_from_linear) returns an error.
    #[track_caller]
    pub fn from_linear(linear: Linear, scheme: &QuantLinearScheme) -> Self {
        unwrap("QatLinear", Self::try_from_linear(linear, scheme))
    }

    /// `x [.., d_input]` to `[.., d_output]`, in the type of the weight: the product of what the
    /// low-bit forms of the weight, and of `x` if it is to be quantized, hold.
    ///
    /// # Errors
    /// [`Error`] for another type than the weight's, another last axis than `d_input`, and as for
    /// [`try_fake_quantize`].
    ///
    /// # Panics
    /// Where only a launch can tell; with fusion that is when the result is read.
    pub fn try_forward<const D: usize>(&self, x: Tensor<D>) -> Result<Tensor<D>, Error> {
        let weight = self.weight.val();
        self.expect(&x, &weight)?;
        let scheme = &self.scheme;
        let (format, granularity): (Format, Granularity) =
            (scheme.format.into(), scheme.granularity.into());
        let rounded =
            try_fake_quantize(weight.transpose(), format, granularity, scheme.zero_point)?;
        let x = match scheme.activations {
            Activations::Full => x,
            Activations::Quantized => {
                try_fake_quantize(x, format, activation_granularity(granularity), false)?
            }
        };
        let bias = self.bias.as_ref().map(Param::val);
        Ok(linear(x, rounded.transpose(), bias))
    }

    /// [`try_forward`](Self::try_forward) that panics with the message of its error.
    ///
    /// # Panics
    /// Where [`try_forward`](Self::try_forward) returns an error.
    #[track_caller]
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        unwrap("QatLinear", self.try_forward(x))
    }

    /// The layer with the low-bit weights that it was trained for.
    ///
    /// # Errors
    /// As for [`QuantLinear::try_from_linear`].
    ///
    /// # Panics
    /// Where only a launch can tell; with fusion that is when the result is read.
    pub fn try_into_quantized(self) -> Result<QuantLinear, Error> {
        let linear = Linear {
            weight: self.weight,
            bias: self.bias,
        };
        QuantLinear::try_from_linear(linear, &self.scheme)
    }

    /// [`try_into_quantized`](Self::try_into_quantized) that panics with the message of its error.
    ///
    /// # Panics
    /// Where [`try_into_quantized`](Self::try_into_quantized) returns an error.
    #[track_caller]
    pub fn into_quantized(self) -> QuantLinear {
        unwrap("QatLinear", self.try_into_quantized())
    }

    /// An error unless `x` can be multiplied with the weight.
    fn expect<const D: usize>(&self, x: &Tensor<D>, weight: &Tensor<2>) -> Result<(), Error> {
        convert::expect_device(&[("x", x.device()), ("weight", weight.device())])?;
        let found = convert::expect_floats("x", x)?;
        let expected = convert::expect_floats("weight", weight)?;
        if found != expected {
            return Err(ProblemError::DTypeMismatch {
                argument: "x",
                found,
                expected,
            }
            .into());
        }
        let mut shape = x.dims();
        shape[D - 1] = weight.dims()[0];
        convert::expect_shape("x", x, shape)
    }
}
