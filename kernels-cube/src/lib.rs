//! Every kernel of CubeSLA, written once in CubeCL.

#[allow(
    missing_docs,
    reason = "`#[cube]` makes a module and a struct of a function"
)]
pub mod asm;
pub mod attention;
pub mod block_list;
mod dtype;
#[allow(missing_docs, reason = "`#[cube]` adds methods of its own to traits")]
pub mod engine;
mod error;
mod limits;
pub mod linear;
mod mask;
#[allow(missing_docs, reason = "`CubeLaunch` derives a struct of its own")]
pub mod matmul;
mod problem;
#[allow(missing_docs, reason = "`CubeLaunch` derives a struct of its own")]
pub mod quantize;
pub mod router;
mod rows;
mod scan;
pub mod select;
pub mod sla;
mod softmax;
mod tensor;

pub use block_list::{BlockList, InverseBlockList};
pub use dtype::{DType, F32Products, FactorType};
pub use error::ProblemError;
pub use problem::{AttentionOptions, AttentionProblem, Causal};
pub use tensor::DeviceTensor;
