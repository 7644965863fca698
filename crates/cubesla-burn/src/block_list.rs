//! Block lists as Burn's tensors.

use burn_core::tensor::{DType, Device, Int, Tensor, TensorData};
use cubesla::{AttentionProblem, HostBlockList, ProblemError};

use crate::Error;

/// For each (batch, query head, query block) the key blocks it attends to.
///
/// Indices are 32-bit integers `[B, Hq, M, width]`, each row's first entries ascending and below
/// `N`; how many of a row count is in `[B, Hq, M]`. Rows may be empty. A router makes lists on the
/// device ([`route`](crate::route)); a [`HostBlockList`] makes them from masks or other formats.
#[derive(Clone, Debug)]
pub struct BlockList {
    pub(crate) indices: Tensor<4, Int>,
    pub(crate) counts: Tensor<3, Int>,
    pub(crate) key_blocks: usize,
}

impl BlockList {
    /// A list that was checked on the host, on `device`.
    pub fn from_host(list: &HostBlockList, device: &Device) -> Self {
        let [batch, heads, query_blocks, key_blocks] = list.shape();
        // A buffer must not be empty.
        let width = list.width().max(1);
        let mut indices = Vec::with_capacity(list.rows().len() * width);
        let mut counts = Vec::with_capacity(list.rows().len());
        for row in list.rows() {
            indices.extend(row.iter().map(|&index| index as i32));
            indices.resize((counts.len() + 1) * width, 0);
            counts.push(row.len() as i32);
        }
        let indices = TensorData::new(indices, [batch, heads, query_blocks, width]);
        let counts = TensorData::new(counts, [batch, heads, query_blocks]);
        let device = device.clone().without_autodiff();
        Self {
            indices: Tensor::from_data(indices, (&device, DType::I32)),
            counts: Tensor::from_data(counts, (&device, DType::I32)),
            key_blocks,
        }
    }

    /// Every key block for every query block: dense attention. `shape` is `[B, Hq, M, N]`.
    pub fn dense(shape: [usize; 4], device: &Device) -> Self {
        Self::from_host(&HostBlockList::dense(shape), device)
    }

    /// A list of tensors that were made elsewhere on the device, for rows of `key_blocks` blocks.
    ///
    /// # Errors
    /// [`Error::DType`] for integers of another size than 32 bits, [`Error::Device`] for tensors of
    /// two devices, [`Error::Library`] if the shapes differ in their first three axes or one is
    /// empty.
    ///
    /// # Safety
    /// A kernel reads key blocks at the indices it finds, without checking them: each row's count
    /// must be at most `width`, and its first entries strictly ascending, below `key_blocks` and not
    /// negative.
    pub unsafe fn from_tensors(
        indices: Tensor<4, Int>,
        counts: Tensor<3, Int>,
        key_blocks: usize,
    ) -> Result<Self, Error> {
        let types = [("indices", indices.dtype()), ("counts", counts.dtype())];
        for (argument, found) in types {
            if !matches!(found, DType::I32 | DType::U32) {
                return Err(Error::DType {
                    argument,
                    found,
                    takes: "i32 or u32",
                });
            }
        }
        let devices = [("indices", indices.device()), ("counts", counts.device())];
        crate::convert::expect_device(&devices)?;
        let [batch, heads, rows, width] = indices.dims();
        if indices.dims().contains(&0) {
            return Err(ProblemError::ZeroSize {
                argument: "indices",
                shape: vec![batch, heads, rows, width],
            }
            .into());
        }
        if counts.dims() != [batch, heads, rows] {
            return Err(ProblemError::ShapeMismatch {
                argument: "counts",
                found: counts.dims().to_vec(),
                expected: vec![batch, heads, rows],
            }
            .into());
        }
        Ok(Self {
            indices,
            counts,
            key_blocks,
        })
    }

    /// Key blocks `[B, Hq, M, width]`, 32-bit integers.
    pub fn indices(&self) -> &Tensor<4, Int> {
        &self.indices
    }

    /// Entries of each row that count, `[B, Hq, M]`.
    pub fn counts(&self) -> &Tensor<3, Int> {
        &self.counts
    }

    /// `[B, Hq, M, N]`.
    pub fn shape(&self) -> [usize; 4] {
        let [batch, heads, query_blocks, _] = self.indices.dims();
        [batch, heads, query_blocks, self.key_blocks]
    }

    /// Entries that a row has room for.
    pub fn width(&self) -> usize {
        self.indices.dims()[3]
    }

    /// An error unless the list is one of `problem`, on `device`.
    pub(crate) fn expect(&self, problem: &AttentionProblem, device: &Device) -> Result<(), Error> {
        let devices = [("q", device.clone()), ("list", self.indices.device())];
        crate::convert::expect_device(&devices)?;
        let expected = [
            problem.batch(),
            problem.query_heads(),
            problem.query_blocks(),
            problem.key_blocks(),
        ];
        let axes = ["B", "Hq", "M", "N"];
        for (axis, (found, expected)) in
            axes.into_iter().zip(self.shape().into_iter().zip(expected))
        {
            if found != expected {
                return Err(ProblemError::ListMismatch {
                    axis,
                    found,
                    expected,
                }
                .into());
            }
        }
        Ok(())
    }
}
