//! Weights of blocks as kernels read them.

use cubecl::prelude::*;

use super::BlockList;
use crate::problem::expect_f32;
use crate::{AttentionProblem, DeviceTensor, ProblemError};

/// A weight for each pair of blocks.
#[derive(CubeType, CubeLaunch)]
pub struct BlockWeightsView {
    /// f32 `[B, Hq, M, N]`.
    pub values: Box<[f32]>,
    /// `M`.
    pub query_blocks: u32,
    /// `N`.
    pub key_blocks: u32,
}

#[cube]
impl BlockWeightsView {
    /// The weight of a pair of blocks of the `head`-th (batch, head) pair.
    pub fn at(&self, head: usize, query_block: u32, key_block: u32) -> f32 {
        let row = head * self.query_blocks as usize + query_block as usize;
        self.values[row * self.key_blocks as usize + key_block as usize]
    }
}

/// `weights` as kernels take them; without weights an argument that they do not read.
pub fn weights_arg(
    weights: Option<&DeviceTensor<4>>,
    list: &BlockList,
) -> RuntimeArg<BlockWeightsView> {
    let [_, _, query_blocks, key_blocks] = list.shape();
    let unread = || {
        // SAFETY: the buffer holds as many numbers of the same size.
        unsafe { BufferArg::from_raw_parts(list.counts().clone(), list.rows()) }
    };
    BlockWeightsViewLaunch::new(
        weights.map_or_else(unread, DeviceTensor::buffer_arg),
        query_blocks as u32,
        key_blocks as u32,
    )
}

/// An error unless `weights` are contiguous f32 `[B, Hq, M, N]`.
///
/// # Errors
/// A [`ProblemError`] that says what they are instead.
pub fn expect_weights(
    problem: &AttentionProblem,
    weights: &DeviceTensor<4>,
) -> Result<(), ProblemError> {
    expect_scores("weights", problem, weights)
}

/// An error unless `argument` is contiguous f32 `[B, Hq, M, N]`.
pub(crate) fn expect_scores(
    argument: &'static str,
    problem: &AttentionProblem,
    tensor: &DeviceTensor<4>,
) -> Result<(), ProblemError> {
    let shape = [
        problem.batch(),
        problem.query_heads(),
        problem.query_blocks(),
        problem.key_blocks(),
    ];
    expect_f32(argument, tensor, shape)
}
