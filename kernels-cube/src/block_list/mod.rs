//! Lists of selected key blocks, in device memory.

mod inverse;
#[allow(missing_docs, reason = "`CubeLaunch` derives a struct of its own")]
mod inverse_view;
mod remaining;
#[allow(missing_docs, reason = "`CubeLaunch` derives a struct of its own")]
mod view;
#[allow(missing_docs, reason = "`#[cube]` adds methods of its own to traits")]
mod walk;
#[allow(missing_docs, reason = "`CubeLaunch` derives a struct of its own")]
mod weights;

pub use inverse::InverseBlockList;
pub use inverse_view::{InverseListView, InverseListViewLaunch, QueryWalk};
pub use view::{BlockListView, BlockListViewLaunch, BlockRow, KeyWalk};
pub use walk::{Span, Walk, WalkExpand};
pub(crate) use weights::expect_scores;
pub use weights::{BlockWeightsView, BlockWeightsViewLaunch, expect_weights, weights_arg};

use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::{AttentionProblem, ProblemError};

/// For each (batch, query head, query block) the key blocks it attends to, in device memory.
///
/// `indices` is u32 `[B, Hq, M, width]`, each row's first `counts[row]` entries ascending and below
/// `N`, what follows them ignored; `counts` is u32 `[B, Hq, M]`, at most `width`. Rows may be empty.
#[derive(Clone, Debug)]
pub struct BlockList {
    indices: Handle,
    counts: Handle,
    batch: usize,
    heads: usize,
    query_blocks: usize,
    key_blocks: usize,
    width: usize,
}

impl BlockList {
    /// A list over buffers that a kernel or a checked upload filled.
    ///
    /// # Safety
    /// The buffers must hold what the type's documentation says: a kernel reads key blocks at the
    /// indices it finds, without checking them.
    ///
    /// # Panics
    /// If a buffer is too small for the shape.
    pub unsafe fn from_handles(
        indices: Handle,
        counts: Handle,
        [batch, heads, query_blocks, key_blocks]: [usize; 4],
        width: usize,
    ) -> Self {
        let rows = batch * heads * query_blocks;
        assert!(
            indices.size_in_used() as usize >= rows * width * 4,
            "`indices` is too small"
        );
        assert!(
            counts.size_in_used() as usize >= rows * 4,
            "`counts` is too small"
        );
        Self {
            indices,
            counts,
            batch,
            heads,
            query_blocks,
            key_blocks,
            width,
        }
    }

    /// A list of no blocks, of shape `[B, Hq, M, N]`.
    pub(crate) fn empty(client: &Client, shape: [usize; 4]) -> Self {
        let rows = shape[..3].iter().product::<usize>();
        let zeros = client.create_from_slice(&vec![0; rows * 4]);
        // SAFETY: all counts are 0, so that no index is read.
        unsafe { Self::from_handles(zeros.clone(), zeros, shape, 1) }
    }

    /// A list of all blocks, of shape `[B, Hq, M, N]`.
    ///
    /// # Errors
    /// As for [`remaining`](Self::remaining).
    pub(crate) fn dense(client: &Client, shape: [usize; 4]) -> Result<Self, ProblemError> {
        Self::empty(client, shape).remaining(client, None)
    }

    /// u32 `[B, Hq, M, width]`.
    pub fn indices(&self) -> &Handle {
        &self.indices
    }

    /// u32 `[B, Hq, M]`.
    pub fn counts(&self) -> &Handle {
        &self.counts
    }

    /// `[B, Hq, M, N]`.
    pub fn shape(&self) -> [usize; 4] {
        [self.batch, self.heads, self.query_blocks, self.key_blocks]
    }

    /// Entries that a row has room for.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows of the list, `B * Hq * M`.
    pub fn rows(&self) -> usize {
        self.batch * self.heads * self.query_blocks
    }

    /// An error unless the list is one of `problem`.
    pub(crate) fn expect_problem(&self, problem: &AttentionProblem) -> Result<(), ProblemError> {
        let sizes = [
            ("B", self.batch, problem.batch()),
            ("Hq", self.heads, problem.query_heads()),
            ("M", self.query_blocks, problem.query_blocks()),
            ("N", self.key_blocks, problem.key_blocks()),
        ];
        for (axis, found, expected) in sizes {
            if found != expected {
                return Err(ProblemError::ListMismatch {
                    axis,
                    found,
                    expected,
                });
            }
        }
        Ok(())
    }

    /// An error unless `other` is a list of the same problem.
    pub(crate) fn expect_same(&self, other: &BlockList) -> Result<(), ProblemError> {
        for (axis, (found, expected)) in ["B", "Hq", "M", "N"]
            .into_iter()
            .zip(other.shape().into_iter().zip(self.shape()))
        {
            if found != expected {
                return Err(ProblemError::ListMismatch {
                    axis,
                    found,
                    expected,
                });
            }
        }
        Ok(())
    }

    /// The list as kernels take it.
    pub fn launch_arg(&self) -> RuntimeArg<BlockListView> {
        let buffer = |handle: &Handle, len| {
            // SAFETY: the constructor checked both sizes.
            unsafe { BufferArg::from_raw_parts(handle.clone(), len) }
        };
        BlockListViewLaunch::new(
            buffer(&self.indices, self.rows() * self.width),
            buffer(&self.counts, self.rows()),
            self.query_blocks as u32,
            self.width as u32,
        )
    }
}
