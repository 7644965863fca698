use burn_core::tensor::DType;

use crate::Error;

/// Why a checkpoint cannot be opened, or does not fit a module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file's name does not say what it is.
    #[error(
        "{path} ends in none of .safetensors, .pt, .pth and .bin: open it with a store of \
         `burn-store` and use `Checkpoint::from_store`"
    )]
    FileType {
        /// The file.
        path: String,
    },
    /// A file cannot be read.
    #[error("{source_name} cannot be read: {reason}")]
    Store {
        /// The file, or the kind of store.
        source_name: String,
        /// The store's report.
        reason: String,
    },
    /// Two keys are the same parameter once wrappers and prefixes are taken off.
    #[error(
        "`{key}` and `{other}` are the same parameter of a block: choose one, with the store's \
         `with_top_level_key` or `with_key_remapping`, and use `Checkpoint::from_store`"
    )]
    Ambiguous {
        /// A key.
        key: String,
        /// The other key.
        other: String,
    },
    /// No SLA parameters of this block.
    #[error("there are no SLA parameters of block {block}, but of blocks {found:?}")]
    Block {
        /// The block asked for.
        block: usize,
        /// The blocks that have some.
        found: Vec<usize>,
    },
    /// A parameter of the module is not in the checkpoint.
    #[error("there is no `{key}`: {hint}")]
    Missing {
        /// The key, without wrappers.
        key: String,
        /// What to change.
        hint: &'static str,
    },
    /// A parameter of the checkpoint has no place in the module.
    #[error("the module has no place for `{key}`: {hint}")]
    Unused {
        /// The key.
        key: String,
        /// What to change.
        hint: &'static str,
    },
    /// A tensor has another shape than the module calls for.
    #[error("`{key}` has shape {found:?}, where {expected} is expected: {hint}")]
    Shape {
        /// The key.
        key: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that would do.
        expected: String,
        /// What to change.
        hint: &'static str,
    },
    /// A tensor has another type.
    #[error("`{key}` is {found:?}, where {expected} is expected")]
    DType {
        /// The key.
        key: String,
        /// Its type.
        found: DType,
        /// The types that would do.
        expected: &'static str,
    },
    /// A tensor's data cannot be read.
    #[error("`{key}` cannot be read: {reason}")]
    Data {
        /// The key.
        key: String,
        /// The store's report.
        reason: String,
    },
    /// A layer of these tensors is refused.
    #[error("`{key}` makes no layer")]
    Layer {
        /// The layer's name.
        key: String,
        /// Why.
        source: Error,
    },
}
