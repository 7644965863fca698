use std::io;
use std::path::PathBuf;

use cubesla::{DType, ProblemError};
use safetensors::SafeTensorError;

/// Anything that ends a command early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The library refused an argument, or the device failed.
    #[error(transparent)]
    Library(#[from] cubesla::Error),
    /// The input file cannot be read.
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// The input file is damaged or of another kind.
    #[error("the input is not a safetensors file")]
    Format(#[from] SafeTensorError),
    /// The input has nothing to compute on.
    #[error(
        "the input has no layer, which is three tensors `q`, `k`, `v`, or `NAME.q`, `NAME.k`, \
         `NAME.v`; its tensors: {found}"
    )]
    NoLayer { found: String },
    /// A tensor has the wrong rank.
    #[error("tensor `{tensor}` has shape {shape:?}: it must be [B, H, L, D] or [H, L, D]")]
    Rank { tensor: String, shape: Vec<usize> },
    /// A tensor is not of a type that attention is computed in.
    #[error("tensor `{tensor}` is {found}: it must be F32, F16 or BF16")]
    TensorType { tensor: String, found: String },
    /// A tensor has NaN or infinities, or gets them by conversion.
    #[error("tensor `{tensor}` has values that are not finite as {dtype}")]
    NotFinite { tensor: String, dtype: DType },
    /// The tensors of a layer do not fit together, or not the options.
    #[error("`{layer}` cannot be computed")]
    Layer { layer: String, source: ProblemError },
    /// A kernel is wrong.
    #[error(
        "`{layer}`, {method} at {sparsity} % sparsity: the kernel's relative error against the f64 reference \
         is {error:.1e}, above the bound of {bound:.0e} for {dtype}"
    )]
    Inaccurate {
        layer: String,
        method: String,
        sparsity: usize,
        error: f64,
        bound: f64,
        dtype: DType,
    },
    /// A picture or its folder cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        path: PathBuf,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Measurements of another program cannot be understood.
    #[error("{} is not a file of measurements", path.display())]
    Measurements {
        path: PathBuf,
        source: serde_json::Error,
    },
    /// A sample of an operation's results is wrong.
    #[error("its error against the f64 reference is {error:.1e}, above the bound of {bound:.0e}")]
    Sample { error: f64, bound: f64 },
    /// No case has a name like that.
    #[error("no case matches: `cubesla bench --list` names them")]
    NoCase,
    /// Some cases gave wrong results or none.
    #[error("{count} of {total} cases failed: {names}")]
    Failed {
        count: usize,
        total: usize,
        names: String,
    },
}
