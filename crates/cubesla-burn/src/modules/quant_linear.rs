//! A linear layer with low-bit weights.

use burn_core as burn;
use burn_core::config::Config;
use burn_core::module::{Module, Param, ParamId};
use burn_core::tensor::{DType, Device, Int, Tensor};
use burn_nn::Linear;
use cubesla::{Format, Granularity};

use super::QuantLinearScheme;
use crate::error::unwrap;
use crate::{Error, QuantizedWeight, try_quantize_weight, try_quantized_linear};

/// Configuration of a [`QuantLinear`] that a record is loaded into.
#[derive(Config, Debug)]
pub struct QuantLinearConfig {
    /// Features of the input.
    pub d_input: usize,
    /// Features of the output.
    pub d_output: usize,
    /// How the weights are stored and multiplied.
    pub scheme: QuantLinearScheme,
    /// Whether there is a bias.
    #[config(default = true)]
    pub bias: bool,
}

impl QuantLinearConfig {
    /// The layer on `device`, with weights and bias 0 until a record is loaded.
    ///
    /// # Errors
    /// [`Error::Library`] for features that the scheme does not fit.
    pub fn try_init(&self, device: &Device) -> Result<QuantLinear, Error> {
        let shape = [self.d_output, self.d_input];
        self.scheme.expect(shape)?;
        let (format, granularity): (Format, Granularity) =
            (self.scheme.format.into(), self.scheme.granularity.into());
        let words = [self.d_output, format.words_per_row(self.d_input)];
        let scales = granularity.scales_shape(shape);
        let floats = (device, DType::F32);
        let weight = QuantizedWeight::from_tensors(
            Tensor::zeros(words, (device, DType::I32)),
            Tensor::ones(scales, floats),
            self.scheme
                .zero_point
                .then(|| Tensor::zeros(scales, floats)),
            self.d_input,
            format,
            granularity,
        )?;
        let bias = self
            .bias
            .then(|| Param::from_tensor(Tensor::zeros([self.d_output], device)));
        Ok(QuantLinear::new(weight, bias, self.scheme))
    }

    /// [`try_init`](Self::try_init) that panics with the message of its error.
    ///
    /// # Panics
    /// Where [`try_init`](Self::try_init) returns an error.
    #[track_caller]
    pub fn init(&self, device: &Device) -> QuantLinear {
        unwrap("QuantLinear", self.try_init(device))
    }
}

/// A linear layer with low-bit weights, in the place of Burn's `Linear`.
///
/// Records have the fields' names: `words`, `scales`, `zeros` where codes have zero points, `bias`
/// where there is one. The bias trains as that of a `Linear`; the weights do not require gradients.
#[derive(Module, Debug)]
pub struct QuantLinear {
    /// The packed codes, `[d_output, words of a row]`; see [`QuantizedWeight`].
    pub words: Param<Tensor<2, Int>>,
    /// The scales, f32.
    pub scales: Param<Tensor<2>>,
    /// The zero points, f32.
    pub zeros: Option<Param<Tensor<2>>>,
    /// `[d_output]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// Features of the input.
    pub d_input: usize,
    /// How the weights are stored and multiplied.
    #[module(skip)]
    pub scheme: QuantLinearScheme,
}

impl QuantLinear {
    /// The layer of a `Linear`, whose weight is quantized as `scheme` says and whose bias is taken
    /// over.
    ///
    /// A weight that is one of Burn's quantized tensors is decoded first and then quantized like any
    /// other. Nothing is lost by that where the scale comes out the same: for symmetric codes of the
    /// same width, with the same elements to a scale, and a scale made of the largest of them.
    ///
    /// # Errors
    /// [`Error::Library`] for features that the scheme does not fit.
    ///
    /// # Panics
    /// Where only a launch can tell; with fusion that is when the result is read.
    pub fn try_from_linear(linear: Linear, scheme: &QuantLinearScheme) -> Result<Self, Error> {
        let [inputs, outputs] = linear.weight.shape().dims();
        scheme.expect([outputs, inputs])?;
        let weight = linear.weight.val().dequantize().detach();
        let weight = try_quantize_weight(
            weight.set_require_grad(false).transpose(),
            scheme.format.into(),
            scheme.granularity.into(),
            scheme.zero_point,
        )?;
        Ok(Self::new(weight, linear.bias, *scheme))
    }

    /// [`try_from_linear`](Self::try_from_linear) that panics with the message of its error.
    ///
    /// # Panics
    /// Where [`try_from_linear`](Self::try_from_linear) returns an error.
    #[track_caller]
    pub fn from_linear(linear: Linear, scheme: &QuantLinearScheme) -> Self {
        unwrap("QuantLinear", Self::try_from_linear(linear, scheme))
    }

    /// The layer of a weight that was made as `scheme` says.
    pub(crate) fn new(
        weight: QuantizedWeight,
        bias: Option<Param<Tensor<1>>>,
        scheme: QuantLinearScheme,
    ) -> Self {
        let frozen =
            |tensor: &Tensor<2>| Param::from_tensor(tensor.clone()).set_require_grad(false);
        Self {
            words: Param::initialized(ParamId::new(), weight.words().clone()),
            scales: frozen(weight.scales()),
            zeros: weight.zeros().map(frozen),
            bias,
            d_input: weight.shape()[1],
            scheme,
        }
    }

    /// The weight that the parameters hold, `[d_output, d_input]`.
    ///
    /// # Errors
    /// As for [`QuantizedWeight::from_tensors`], for parameters that were put there by hand.
    pub fn try_weight(&self) -> Result<QuantizedWeight, Error> {
        QuantizedWeight::from_tensors(
            self.words.val(),
            self.scales.val(),
            self.zeros.as_ref().map(Param::val),
            self.d_input,
            self.scheme.format.into(),
            self.scheme.granularity.into(),
        )
    }

    /// `x [.., d_input]` to `[.., d_output]` in its type, f32, f16 or bf16.
    ///
    /// # Errors
    /// As for [`try_quantized_linear`] and [`try_weight`](Self::try_weight).
    ///
    /// # Panics
    /// Where only a launch can tell; with fusion that is when the result is read.
    pub fn try_forward<const D: usize>(&self, x: Tensor<D>) -> Result<Tensor<D>, Error> {
        let bias = self.bias.as_ref().map(Param::val);
        try_quantized_linear(x, &self.try_weight()?, bias, self.scheme.activations)
    }

    /// [`try_forward`](Self::try_forward) that panics with the message of its error.
    ///
    /// # Panics
    /// Where [`try_forward`](Self::try_forward) returns an error.
    #[track_caller]
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        unwrap("QuantLinear", self.try_forward(x))
    }
}
