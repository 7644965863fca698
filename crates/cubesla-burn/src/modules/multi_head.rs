//! Multi-head self-attention over SLA.

use burn_core as burn;
use burn_core::module::Module;
use burn_core::tensor::{Bool, Tensor};
use burn_nn::Linear;

use super::{LinearLayer, SparseLinearAttention};
use crate::Error;
use crate::error::unwrap;

/// Input of [`SlaMultiHeadAttention`], made as Burn's `MhaInput` is.
#[derive(Clone, Debug)]
pub struct SlaMhaInput {
    query: Tensor<3>,
    key: Tensor<3>,
    value: Tensor<3>,
    mask_pad: Option<Tensor<2, Bool>>,
    mask_attn: Option<Tensor<3, Bool>>,
}

impl SlaMhaInput {
    /// Self-attention of `[batch, seq, d_model]`.
    pub fn self_attn(tensor: Tensor<3>) -> Self {
        Self::new(tensor.clone(), tensor.clone(), tensor)
    }

    /// Queries `[batch, seq_q, d_model]` over keys and values `[batch, seq_k, d_model]`.
    pub fn new(query: Tensor<3>, key: Tensor<3>, value: Tensor<3>) -> Self {
        Self {
            query,
            key,
            value,
            mask_pad: None,
            mask_attn: None,
        }
    }

    /// With a padding mask, which [`SlaMultiHeadAttention::try_forward`] refuses.
    pub fn mask_pad(mut self, mask_pad: Tensor<2, Bool>) -> Self {
        self.mask_pad = Some(mask_pad);
        self
    }

    /// With an attention mask, which [`SlaMultiHeadAttention::try_forward`] refuses.
    pub fn mask_attn(mut self, mask_attn: Tensor<3, Bool>) -> Self {
        self.mask_attn = Some(mask_attn);
        self
    }
}

/// Output of [`SlaMultiHeadAttention`]; there are no attention weights, as they are never formed.
#[derive(Clone, Debug)]
pub struct SlaMhaOutput {
    /// `[batch, seq_q, d_model]`.
    pub context: Tensor<3>,
}

/// Multi-head attention with [`SparseLinearAttention`] inside, in the place of Burn's
/// `MultiHeadAttention`, whose four linear layers it names alike: a record of that loads into this
/// one with `allow_partial(true)`. The four may be of another kind:
/// [`map_linears`](Self::map_linears).
#[derive(Module, Debug)]
pub struct SlaMultiHeadAttention<L: Module = Linear> {
    /// From features to queries.
    pub query: L,
    /// From features to keys.
    pub key: L,
    /// From features to values.
    pub value: L,
    /// From the heads' results to features.
    pub output: L,
    /// What is between them.
    pub attention: SparseLinearAttention,
    /// Features of the input and of the output.
    pub d_model: usize,
    /// Heads.
    pub n_heads: usize,
}

impl<L: LinearLayer> SlaMultiHeadAttention<L> {
    /// The same with each of the four linear layers replaced by what `map` makes of it.
    ///
    /// ```
    /// use cubesla_burn::{Error, QuantLinear, QuantLinearScheme, SlaMultiHeadAttention};
    ///
    /// fn quantize(
    ///     attention: SlaMultiHeadAttention,
    /// ) -> Result<SlaMultiHeadAttention<QuantLinear>, Error> {
    ///     let scheme = QuantLinearScheme::w8a8_int8();
    ///     attention.try_map_linears(|linear| QuantLinear::try_from_linear(linear, &scheme))
    /// }
    /// ```
    ///
    /// # Errors
    /// Those of `map`.
    pub fn try_map_linears<M: LinearLayer>(
        self,
        mut map: impl FnMut(L) -> Result<M, Error>,
    ) -> Result<SlaMultiHeadAttention<M>, Error> {
        Ok(SlaMultiHeadAttention {
            query: map(self.query)?,
            key: map(self.key)?,
            value: map(self.value)?,
            output: map(self.output)?,
            attention: self.attention,
            d_model: self.d_model,
            n_heads: self.n_heads,
        })
    }

    /// [`try_map_linears`](Self::try_map_linears) of a `map` that makes no errors.
    pub fn map_linears<M: LinearLayer>(
        self,
        mut map: impl FnMut(L) -> M,
    ) -> SlaMultiHeadAttention<M> {
        let mapped = self.try_map_linears(|linear| Ok(map(linear)));
        unwrap("SlaMultiHeadAttention", mapped)
    }

    /// Attention of the input's queries over its keys and values.
    ///
    /// # Errors
    /// [`Error::Mask`] for a mask, [`Error::Input`] for other features than `d_model`, and as for
    /// [`SparseLinearAttention::try_forward`] and the linear layers.
    pub fn try_forward(&self, input: SlaMhaInput) -> Result<SlaMhaOutput, Error> {
        let masks = [
            ("mask_pad", input.mask_pad.is_some()),
            ("mask_attn", input.mask_attn.is_some()),
        ];
        for (mask, given) in masks {
            if given {
                return Err(Error::Mask {
                    operation: "SlaMultiHeadAttention",
                    mask,
                });
            }
        }
        let [batch, length, _] = input.query.dims();
        let q = self.heads("query", input.query, &self.query)?;
        let k = self.heads("key", input.key, &self.key)?;
        let v = self.heads("value", input.value, &self.value)?;
        let context = self.attention.try_forward(q, k, v)?;
        let context = context
            .swap_dims(1, 2)
            .reshape([batch, length, self.d_model]);
        Ok(SlaMhaOutput {
            context: self.output.try_apply(context)?,
        })
    }

    /// [`try_forward`](Self::try_forward) that panics with the message of its error.
    ///
    /// # Panics
    /// Where [`try_forward`](Self::try_forward) returns an error.
    #[track_caller]
    pub fn forward(&self, input: SlaMhaInput) -> SlaMhaOutput {
        unwrap("SlaMultiHeadAttention", self.try_forward(input))
    }

    /// `[batch, seq, d_model]` to `[batch, heads, seq, head_dim]`, a view that kernels read as it
    /// lies.
    fn heads(&self, argument: &'static str, x: Tensor<3>, linear: &L) -> Result<Tensor<4>, Error> {
        let [batch, length, features] = x.dims();
        if features != self.d_model {
            return Err(Error::Input {
                argument,
                found: x.dims().to_vec(),
                expected: format!("[batch, seq, {}]", self.d_model),
            });
        }
        let head_dim = self.d_model / self.n_heads;
        Ok(linear
            .try_apply(x)?
            .reshape([batch, length, self.n_heads, head_dim])
            .swap_dims(1, 2))
    }
}
