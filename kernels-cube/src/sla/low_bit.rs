//! The sparse branch in low bits, before the kernel of both branches.

use cubecl::prelude::*;

use super::SlaInputs;
use crate::attention::{ForwardInputs, ForwardOutputs, LowBitFormats, LowBitPlan, launch_low_bit};
use crate::{AttentionProblem, DType, DeviceTensor, ProblemError};

/// Arithmetic of the sparse branch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// That of the inputs.
    #[default]
    Full,
    /// Scores in INT8, weights and values in the inputs' type.
    Int8,
    /// Scores in INT8, weights and values in FP8.
    Int8Fp8,
    /// All of them in FP8.
    Fp8,
}

impl Precision {
    /// The formats of low-bit attention, if it is that.
    pub fn formats(self) -> Option<LowBitFormats> {
        match self {
            Self::Full => None,
            Self::Int8 => Some(LowBitFormats::INT8),
            Self::Int8Fp8 => Some(LowBitFormats::INT8_FP8),
            Self::Fp8 => Some(LowBitFormats::FP8),
        }
    }
}

/// A sparse branch that was computed before.
pub(super) struct SparseBranch {
    pub out: DeviceTensor<4>,
    pub lse: DeviceTensor<3>,
}

/// The sparse branch in low bits, with its log-sum-exp.
pub(super) fn sparse_branch(
    client: &Client,
    problem: &AttentionProblem,
    plan: &LowBitPlan,
    inputs: SlaInputs<'_>,
    formats: LowBitFormats,
) -> Result<SparseBranch, ProblemError> {
    let branch = SparseBranch {
        out: DeviceTensor::empty(client, problem.out_shape(), problem.dtype()),
        lse: DeviceTensor::empty(client, problem.lse_shape(), DType::F32),
    };
    let SlaInputs {
        q, k, v, critical, ..
    } = inputs;
    launch_low_bit(
        client,
        problem,
        plan,
        ForwardInputs {
            q,
            k,
            v,
            list: critical,
        },
        ForwardOutputs {
            out: &branch.out,
            lse: &branch.lse,
        },
        formats,
    )?;
    Ok(branch)
}
