//! The lists of a call, and how they are dispatched.

use burn_core::backend::Dispatch;
use burn_core::tensor::{Device, Tensor};
use cubesla::AttentionProblem;

use crate::ops::Lists;
use crate::{BlockList, Error};

/// Where exact attention is computed, and where nothing is.
#[derive(Clone, Debug)]
pub struct Blocks {
    /// Blocks of exact attention.
    pub critical: BlockList,
    /// Blocks left out, disjoint from the critical ones, which is not checked; the rest is
    /// marginal.
    pub negligible: Option<BlockList>,
}

impl Blocks {
    pub(crate) fn expect(&self, problem: &AttentionProblem, device: &Device) -> Result<(), Error> {
        self.critical.expect(problem, device)?;
        match &self.negligible {
            Some(list) => list.expect(problem, device),
            None => Ok(()),
        }
    }

    pub(crate) fn to_dispatch(&self) -> Lists<Dispatch> {
        let tensors = |list: &BlockList| {
            (
                list.indices.clone().into_dispatch(),
                list.counts.clone().into_dispatch(),
            )
        };
        let (indices, counts) = tensors(&self.critical);
        match &self.negligible {
            None => Lists::Critical { indices, counts },
            Some(list) => {
                let (negligible_indices, negligible_counts) = tensors(list);
                Lists::Negligible {
                    indices,
                    counts,
                    negligible_indices,
                    negligible_counts,
                }
            }
        }
    }

    pub(crate) fn from_dispatch(lists: Lists<Dispatch>, key_blocks: usize) -> Self {
        let list = |indices, counts| BlockList {
            indices: Tensor::from_dispatch(indices),
            counts: Tensor::from_dispatch(counts),
            key_blocks,
        };
        match lists {
            Lists::Critical { indices, counts } => Self {
                critical: list(indices, counts),
                negligible: None,
            },
            Lists::Negligible {
                indices,
                counts,
                negligible_indices,
                negligible_counts,
            } => Self {
                critical: list(indices, counts),
                negligible: Some(list(negligible_indices, negligible_counts)),
            },
        }
    }
}
