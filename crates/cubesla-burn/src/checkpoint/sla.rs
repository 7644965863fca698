//! Parameters of SLA and SLA2.

use std::collections::{BTreeMap, BTreeSet};

use burn_core::module::Param;
use burn_core::tensor::Tensor;
use burn_nn::Linear;

use super::{Checkpoint, CheckpointError, Entry};
use crate::{SlaVariant, SparseLinearAttention};

impl Checkpoint {
    /// The blocks that have parameters of SLA, ascending.
    pub fn sla_blocks(&self) -> Vec<usize> {
        let names = self.tensors.keys();
        let blocks: BTreeSet<usize> = names
            .filter_map(|name| {
                let (block, rest) = name.strip_prefix("blocks.")?.split_once('.')?;
                rest.strip_prefix("attention.")?;
                block.parse().ok()
            })
            .collect();
        blocks.into_iter().collect()
    }

    /// `module` with the parameters of a block, as f32 on its device; whether they require gradients
    /// is left as it was.
    ///
    /// All parameters of either must have one of the other: `module` is SLA or SLA2, with router
    /// weights or without, as the block is.
    ///
    /// # Errors
    /// [`CheckpointError::Block`] for a block without any, [`CheckpointError::Missing`] and
    /// [`CheckpointError::Unused`] for parameters of one alone, [`CheckpointError::Shape`] and
    /// [`CheckpointError::DType`] for tensors that do not fit, [`CheckpointError::Data`] for what the
    /// store cannot read.
    pub fn load_sla(
        &self,
        block: usize,
        mut module: SparseLinearAttention,
    ) -> Result<SparseLinearAttention, CheckpointError> {
        let prefix = format!("blocks.{block}.attention.");
        let range = self.tensors.range(prefix.clone()..);
        let mut unused: BTreeMap<&str, &Entry> = range
            .map_while(|(name, entry)| Some((name.strip_prefix(&prefix)?, entry)))
            .collect();
        let Some((name, sibling)) = unused.first_key_value() else {
            return Err(CheckpointError::Block {
                block,
                found: self.sla_blocks(),
            });
        };
        let stem = stem(&sibling.key, name);
        let hint = missing_hint(module.config.variant);
        let mut take = |name: &str| {
            let missing = || CheckpointError::Missing {
                key: format!("{stem}.{name}"),
                hint,
            };
            unused.remove(name).ok_or_else(missing)
        };
        if let Some(linear) = module.proj_l.take() {
            let bias = linear.bias.is_some().then(|| take("proj_l.bias"));
            module.proj_l = Some(load(linear, take("proj_l.weight")?, bias.transpose()?)?);
        }
        if let Some(param) = module.alpha_logit.take() {
            module.alpha_logit = Some(load_logits(param, take("alpha_logit")?)?);
        }
        if let Some(linear) = module.proj_q.take() {
            module.proj_q = Some(load(linear, take("proj_q.weight")?, None)?);
        }
        if let Some(linear) = module.proj_k.take() {
            module.proj_k = Some(load(linear, take("proj_k.weight")?, None)?);
        }
        match unused.first_key_value() {
            None => Ok(module),
            Some((name, entry)) => Err(CheckpointError::Unused {
                key: entry.key.clone(),
                hint: unused_hint(name),
            }),
        }
    }
}

/// What stands before a parameter's `name` in its key, whatever the last part is called there.
fn stem<'a>(key: &'a str, name: &str) -> &'a str {
    let parts = 1 + name.matches('.').count();
    key.rsplitn(1 + parts, '.').last().unwrap_or(key)
}

fn missing_hint(variant: SlaVariant) -> &'static str {
    match variant {
        SlaVariant::Sla => {
            "the module is SLA; for the weights of SLA2 make it `with_variant(SlaVariant::Sla2)`, \
             and `with_router_weights` only where the block has `proj_q` and `proj_k`"
        }
        SlaVariant::Sla2 => {
            "the module is SLA2; for the weights of SLA make it `with_variant(SlaVariant::Sla)`, \
             and `with_router_weights` only where the block has `proj_q` and `proj_k`"
        }
    }
}

fn unused_hint(name: &str) -> &'static str {
    match name {
        "proj_l.weight" | "proj_l.bias" => "make it `with_variant(SlaVariant::Sla)`",
        "alpha_logit" => "make it `with_variant(SlaVariant::Sla2)`",
        "proj_q.weight" | "proj_k.weight" => "make it `with_router_weights(true)`",
        _ => "SLA and SLA2 have no such parameter: rename it with the store's key remapping",
    }
}

/// A projection of `[out, in]`, transposed.
fn load(linear: Linear, weight: &Entry, bias: Option<&Entry>) -> Result<Linear, CheckpointError> {
    const HINT: &str = "the module's `head_dim` must be the checkpoint's";
    let [inputs, outputs] = linear.weight.lazy_shape().dims();
    weight.expect_shape(&[outputs, inputs], HINT)?;
    let device = linear.weight.lazy_device();
    let values = weight.floats([outputs, inputs], &device)?.transpose();
    let bias = match (linear.bias, bias) {
        (Some(param), Some(bias)) => {
            bias.expect_shape(&[outputs], HINT)?;
            Some(replace(param, bias.floats([outputs], &device)?))
        }
        (param, _) => param,
    };
    Ok(Linear {
        weight: replace(linear.weight, values),
        bias,
    })
}

/// Logits in any shape that is the parameter's but for axes of length 1.
fn load_logits(
    param: Param<Tensor<2>>,
    logits: &Entry,
) -> Result<Param<Tensor<2>>, CheckpointError> {
    let shape: [usize; 2] = param.lazy_shape().dims();
    let long = |shape: &[usize]| -> Vec<usize> {
        let axes = shape.iter().copied();
        axes.filter(|&len| len != 1).collect()
    };
    if long(&logits.shape()) != long(&shape) {
        let hint = "the module's `alpha_heads` and `alpha_blocks` must be the checkpoint's";
        logits.expect_shape(&shape, hint)?;
    }
    let values = logits.floats(shape, &param.lazy_device())?;
    Ok(replace(param, values))
}

/// The parameter with other values, requiring gradients if it did.
fn replace<const D: usize>(param: Param<Tensor<D>>, values: Tensor<D>) -> Param<Tensor<D>> {
    let id = param.id;
    param.transform_for_load(values, id)
}
