//! Weights of published checkpoints.

mod error;
mod quantized;
mod sla;

pub use error::CheckpointError;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;

use burn_core::tensor::{DType, Device, Tensor, TensorData};
use burn_store::burn_pack::Tensor as Stored;
use burn_store::{KeyRemapper, ModuleStore, PytorchStore, SafetensorsStore, bridge};

/// The tensors of a checkpoint, read when they are asked for.
///
/// Names are those of TurboDiffusion and FastVideo, wherever `_checkpoint_wrapped_module.` is in a
/// key:
///
/// | key | tensor |
/// |---|---|
/// | `blocks.{i}.self_attn.attn_op.local_attn.*` | of SLA in block `i`, TurboDiffusion's name |
/// | `blocks.{i}.attn1.attn_impl.*` | the same, FastVideo's name |
/// | `*.proj_l.weight`, `*.proj_l.bias` | SLA's projection, `[D, D]` and `[D]` |
/// | `*.proj_q.weight`, `*.proj_k.weight` | SLA2's router, `[D, D]` |
/// | `*.alpha_logit`, `*.alpha_logits` | SLA2's logits, a value to a head or one for all |
/// | `{layer}.int8_weight` | codes of a quantized linear layer, `[out, in]` |
/// | `{layer}.scale` | its scales, `[ceil(out / 128), ceil(in / 128)]`: a value is code times scale |
/// | `{layer}.bias` | its bias, `[out]`, if it has one |
///
/// What stands before `blocks` does not matter. Matrices are `[out, in]`, as PyTorch has them, and
/// come out transposed, as Burn has them. Other names can be brought to these by a store's key
/// remapping.
///
/// ```no_run
/// use cubesla_burn::checkpoint::{Checkpoint, CheckpointError};
/// use cubesla_burn::SparseLinearAttention;
///
/// fn load(
///     path: &str,
///     layers: Vec<SparseLinearAttention>,
/// ) -> Result<Vec<SparseLinearAttention>, CheckpointError> {
///     let checkpoint = Checkpoint::open(path)?;
///     let layers = layers.into_iter().enumerate();
///     layers
///         .map(|(block, layer)| checkpoint.load_sla(block, layer))
///         .collect()
/// }
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    /// By name without wrappers, SLA's parameters as `blocks.{i}.attention.*`.
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    /// The name in the file.
    key: String,
    tensor: Stored,
}

impl Checkpoint {
    /// The checkpoint of a file: `.safetensors`, or PyTorch's `.pt`, `.pth` or `.bin`.
    ///
    /// # Errors
    /// [`CheckpointError::FileType`] for another ending, and as for [`from_store`](Self::from_store).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let ending = path.extension().and_then(|ending| ending.to_str());
        match ending {
            Some("safetensors") => Self::read(&mut SafetensorsStore::from_file(path), name),
            Some("pt" | "pth" | "bin") => {
                // Blocks keep their numbers where some have no SLA.
                let store = PytorchStore::from_file(path).map_indices_contiguous(false);
                Self::read(&mut { store }, name)
            }
            _ => Err(CheckpointError::FileType { path: name }),
        }
    }

    /// The checkpoint of a store of `burn-store`, which may rename keys or choose among nested
    /// dictionaries. A `PytorchStore` numbers blocks anew unless it is told not to, by
    /// `map_indices_contiguous(false)`.
    ///
    /// # Errors
    /// [`CheckpointError::Store`] for what the store cannot read, [`CheckpointError::Ambiguous`] if
    /// it has a parameter of a block twice, such as of a model and of its moving average.
    pub fn from_store<S: ModuleStore>(store: &mut S) -> Result<Self, CheckpointError> {
        Self::read(store, "the store".into())
    }

    fn read<S: ModuleStore>(store: &mut S, source_name: String) -> Result<Self, CheckpointError> {
        let tensors = store
            .get_all_tensors()
            .map_err(|error| CheckpointError::Store {
                source_name,
                reason: error.to_string(),
            })?;
        let (named, names) = names().remap(tensors.values().cloned().collect());
        let mut tensors = BTreeMap::new();
        for (tensor, (name, key)) in named.into_iter().zip(names) {
            let entry = Entry { key, tensor };
            if let Some(Entry { key: other, .. }) = tensors.get(&name) {
                return Err(CheckpointError::Ambiguous {
                    key: entry.key,
                    other: String::clone(other),
                });
            }
            tensors.insert(name, entry);
        }
        Ok(Self { tensors })
    }

    /// The tensor of that name, with its key; [`CheckpointError::Missing`] if there is none.
    fn entry(&self, name: &str, hint: &'static str) -> Result<&Entry, CheckpointError> {
        self.tensors
            .get(name)
            .ok_or_else(|| CheckpointError::Missing {
                key: name.to_owned(),
                hint,
            })
    }
}

impl Entry {
    fn shape(&self) -> Vec<usize> {
        self.tensor.shape.to_vec()
    }

    fn expect_shape(&self, expected: &[usize], hint: &'static str) -> Result<(), CheckpointError> {
        let found = self.shape();
        if found == expected {
            return Ok(());
        }
        Err(CheckpointError::Shape {
            key: self.key.clone(),
            found,
            expected: format!("{expected:?}"),
            hint,
        })
    }

    fn data(&self) -> Result<TensorData, CheckpointError> {
        let failed = |error: &dyn Display| CheckpointError::Data {
            key: self.key.clone(),
            reason: error.to_string(),
        };
        bridge::to_data(&self.tensor).map_err(|error| failed(&error))
    }

    /// The values as f32, in a shape of as many elements.
    fn floats<const D: usize>(
        &self,
        shape: [usize; D],
        device: &Device,
    ) -> Result<Tensor<D>, CheckpointError> {
        if !self.tensor.dtype.is_float() {
            return Err(CheckpointError::DType {
                key: self.key.clone(),
                found: self.tensor.dtype,
                expected: "a float",
            });
        }
        let data = self.data()?.convert::<f32>();
        let values: Vec<f32> = data.try_into_vec().expect("the data was converted to f32");
        let data = TensorData::new(values, shape);
        Ok(Tensor::from_data(data, (device, DType::F32)))
    }
}

/// From names in files to those of [`Checkpoint::tensors`].
fn names() -> KeyRemapper {
    let patterns = vec![
        (r"_checkpoint_wrapped_module\.", ""),
        (
            r"^(?:.*\.)?blocks\.(\d+)\.(?:self_attn\.attn_op\.local_attn|attn1\.attn_impl)\.",
            "blocks.${1}.attention.",
        ),
        (r"^(blocks\.\d+\.attention\.alpha_logit)s$", "${1}"),
    ];
    KeyRemapper::from_patterns(patterns).expect("the patterns are constants")
}
