use std::path::PathBuf;

use burn_core::tensor::DType;
use cubesla::ProblemError;

/// Anything that can go wrong in this crate before something is launched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The library refused an argument.
    #[error(transparent)]
    Library(#[from] cubesla::Error),
    /// A tensor has a type that the operation does not take.
    #[error("`{argument}` is {found:?}, and the operation takes {takes}: use `cast`")]
    DType {
        /// The argument at fault.
        argument: &'static str,
        /// Its type.
        found: DType,
        /// The types that would do.
        takes: &'static str,
    },
    /// A tensor is on a device that the kernels do not run on.
    #[error(
        "{device} is no device of a CubeCL runtime: use `Device::cuda`, `Device::wgpu` or \
         `Device::vulkan`"
    )]
    Backend {
        /// The device.
        device: String,
    },
    /// Tensors of one call are on different devices.
    #[error("`{argument}` is on {found} and `{reference}` on {expected}: use `to_device`")]
    Device {
        /// The argument at fault.
        argument: &'static str,
        /// Its device.
        found: String,
        /// The argument that sets the device.
        reference: &'static str,
        /// The device of that one.
        expected: String,
    },
    /// A gradient would have to flow through an operation that has none.
    #[error("{operation} has no gradient for `{argument}`, which is tracked by autodiff: {hint}")]
    NotDifferentiable {
        /// The operation.
        operation: &'static str,
        /// The tracked argument.
        argument: &'static str,
        /// What to do instead.
        hint: &'static str,
    },
    /// A module that SLA2's first training stage is not defined for.
    #[error("this module has no first training stage: {why}")]
    FirstStage {
        /// What stands in the way, and what to change.
        why: &'static str,
    },
    /// The state of a training run could not be written or read.
    #[error("the state of a training run in {path}: {reason}; remove the folder to begin anew")]
    Resume {
        /// The file or folder.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// A mask where none is supported.
    #[error(
        "`{mask}` is not supported: {operation} selects and sums whole blocks of keys; leave the \
         mask out, or use `burn::nn::attention::MultiHeadAttention`"
    )]
    Mask {
        /// The operation.
        operation: &'static str,
        /// The mask.
        mask: &'static str,
    },
    /// A tensor has other features than the module.
    #[error("`{argument}` has shape {found:?}, and the module takes {expected}")]
    Input {
        /// The argument at fault.
        argument: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that would do, in words.
        expected: String,
    },
}

impl From<ProblemError> for Error {
    fn from(error: ProblemError) -> Self {
        Self::Library(error.into())
    }
}

/// The result, or a panic with the operation's name and the error.
#[track_caller]
pub(crate) fn unwrap<T>(operation: &str, result: Result<T, Error>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => panic!("{operation}: {error}"),
    }
}
