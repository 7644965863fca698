//! Layers of attention inputs in a safetensors file.

use std::collections::BTreeSet;

use cubesla::{AttentionOptions, AttentionProblem, DType};
use cubesla_reference::Tensor;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use crate::error::Error;

/// Queries, keys and values of one layer, rounded to the type that the device computes in.
#[derive(Debug)]
pub struct Layer {
    /// What precedes `.q`, `.k` and `.v` in the file; `qkv` if nothing does.
    pub name: String,
    /// The validated sizes and options.
    pub problem: AttentionProblem,
    /// `[B, Hq, Lq, D]`.
    pub q: Tensor,
    /// `[B, Hkv, Lk, D]`.
    pub k: Tensor,
    /// `[B, Hkv, Lk, Dv]`.
    pub v: Tensor,
}

impl Layer {
    /// Number of (batch, query head) pairs, which pictures and errors by head count over.
    pub fn heads(&self) -> usize {
        self.problem.batch() * self.problem.query_heads()
    }
}

/// Every layer of a safetensors file: each prefix, or none, under which there are a `q`, a `k` and
/// a `v`, in the order of their names.
pub fn parse(bytes: &[u8], dtype: DType, options: &AttentionOptions) -> Result<Vec<Layer>, Error> {
    let file = SafeTensors::deserialize(bytes)?;
    let names: BTreeSet<&str> = file.names().into_iter().collect();
    let prefixes: Vec<&str> = names
        .iter()
        .filter_map(|name| name.strip_suffix('q'))
        .filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
        .filter(|prefix| {
            ["k", "v"]
                .iter()
                .all(|t| names.contains(&*format!("{prefix}{t}")))
        })
        .collect();
    if prefixes.is_empty() {
        let found = Vec::from_iter(names).join(", ");
        return Err(Error::NoLayer { found });
    }
    prefixes
        .into_iter()
        .map(|prefix| layer(&file, prefix, dtype, options))
        .collect()
}

fn layer(
    file: &SafeTensors<'_>,
    prefix: &str,
    dtype: DType,
    options: &AttentionOptions,
) -> Result<Layer, Error> {
    let [q, k, v] = ["q", "k", "v"].map(|t| tensor(file, &format!("{prefix}{t}"), dtype));
    let (q, k, v) = (q?, k?, v?);
    let name = prefix.strip_suffix('.').unwrap_or("qkv").to_owned();
    match AttentionProblem::from_shapes(q.shape(), k.shape(), v.shape(), dtype, options) {
        Ok(problem) => Ok(Layer {
            name,
            problem,
            q,
            k,
            v,
        }),
        Err(source) => Err(Error::Layer {
            layer: name,
            source,
        }),
    }
}

fn tensor(file: &SafeTensors<'_>, name: &str, dtype: DType) -> Result<Tensor, Error> {
    let view = file.tensor(name)?;
    let shape = match *view.shape() {
        [b, h, l, d] => [b, h, l, d],
        [h, l, d] => [1, h, l, d],
        ref other => {
            return Err(Error::Rank {
                tensor: name.to_owned(),
                shape: other.to_vec(),
            });
        }
    };
    let data = view.data();
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => bytemuck::pod_collect_to_vec(data),
        Dtype::F16 => to_f32(data, f16::to_f32),
        Dtype::BF16 => to_f32(data, bf16::to_f32),
        other => {
            return Err(Error::TensorType {
                tensor: name.to_owned(),
                found: other.to_string(),
            });
        }
    };
    let values: Vec<f64> = values.into_iter().map(|x| rounded(x, dtype)).collect();
    if values.iter().any(|x| !x.is_finite()) {
        return Err(Error::NotFinite {
            tensor: name.to_owned(),
            dtype,
        });
    }
    Ok(Tensor::new(shape, values))
}

fn to_f32<T: bytemuck::Pod>(data: &[u8], widen: impl Fn(T) -> f32) -> Vec<f32> {
    // A file does not align its tensors for their type.
    let values: Vec<T> = bytemuck::pod_collect_to_vec(data);
    values.into_iter().map(widen).collect()
}

/// `x` as `dtype` holds it.
fn rounded(x: f32, dtype: DType) -> f64 {
    match dtype {
        DType::F32 => x.into(),
        DType::F16 => f16::from_f32(x).into(),
        DType::BF16 => bf16::from_f32(x).into(),
    }
}

#[cfg(test)]
mod tests;
