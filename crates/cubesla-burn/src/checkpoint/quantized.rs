//! Quantized linear layers.

use burn_core::module::Param;
use burn_core::tensor::{DType, Device};
use cubesla::{Format, Granularity};

use super::{Checkpoint, CheckpointError};
use crate::{
    Activations, FormatConfig, GranularityConfig, QuantLinear, QuantLinearScheme, QuantizedWeight,
};

/// What a layer's codes are called.
const CODES: &str = ".int8_weight";

impl Checkpoint {
    /// The names of quantized linear layers, ascending: keys before `.int8_weight`, without wrappers.
    pub fn quant_linears(&self) -> Vec<String> {
        let layers = self.tensors.keys();
        layers
            .filter_map(|name| name.strip_suffix(CODES))
            .map(str::to_owned)
            .collect()
    }

    /// The quantized linear layer of that name on `device`: INT8 in blocks of 128 by 128, with its
    /// bias if it has one.
    ///
    /// With [`Activations::Quantized`] activations have a scale to each 128 features, which must
    /// divide the layer's; with [`Activations::Full`] features are free.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] for a name without codes or scales, [`CheckpointError::Shape`] and
    /// [`CheckpointError::DType`] for tensors that do not fit, [`CheckpointError::Data`] for what the
    /// store cannot read, [`CheckpointError::Layer`] for features that `activations` do not allow.
    pub fn quant_linear(
        &self,
        name: &str,
        activations: Activations,
        device: &Device,
    ) -> Result<QuantLinear, CheckpointError> {
        let hint = "`Checkpoint::quant_linears` has the names of the quantized layers";
        let codes = self.entry(&format!("{name}{CODES}"), hint)?;
        let hint = "a quantized layer needs the scales of its blocks";
        let scale = self.entry(&format!("{name}.scale"), hint)?;
        let &[outputs, inputs] = codes.shape().as_slice() else {
            return Err(CheckpointError::Shape {
                key: codes.key.clone(),
                found: codes.shape(),
                expected: "[out, in]".into(),
                hint: "a linear layer's codes are a matrix",
            });
        };
        if codes.tensor.dtype != DType::I8 {
            return Err(CheckpointError::DType {
                key: codes.key.clone(),
                found: codes.tensor.dtype,
                expected: "int8",
            });
        }
        let scales = Granularity::Block.scales_shape([outputs, inputs]);
        scale.expect_shape(&scales, "a scale belongs to a block of 128 by 128 codes")?;
        let scheme = QuantLinearScheme::new(FormatConfig::Int8, activations)
            .with_granularity(GranularityConfig::Block);
        let refused = |source| CheckpointError::Layer {
            key: name.to_owned(),
            source,
        };
        scheme.expect([outputs, inputs]).map_err(refused)?;
        let weight = QuantizedWeight::from_codes(
            codes.data()?.as_bytes(),
            [outputs, inputs],
            Format::Int8,
            Granularity::Block,
            scale.floats(scales, device)?,
            None,
        );
        let bias = match self.tensors.get(&format!("{name}.bias")) {
            None => None,
            Some(bias) => {
                bias.expect_shape(&[outputs], "a bias belongs to a row of codes")?;
                Some(Param::from_tensor(bias.floats([outputs], device)?))
            }
        };
        Ok(QuantLinear::new(weight.map_err(refused)?, bias, scheme))
    }
}
