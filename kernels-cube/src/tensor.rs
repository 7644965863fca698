use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::{DType, ProblemError};

/// A tensor of rank `R` in device memory: a buffer, a shape and strides in elements.
///
/// Strides are free, so the transposed or broadcast view of a framework's tensor is passed as it
/// lies. The handle's offset is the tensor's first element.
#[derive(Clone, Debug)]
pub struct DeviceTensor<const R: usize> {
    handle: Handle,
    shape: [usize; R],
    strides: [usize; R],
    dtype: DType,
}

impl<const R: usize> DeviceTensor<R> {
    /// A view of `handle`.
    ///
    /// # Errors
    /// [`ProblemError::BufferTooSmall`] if the last element lies past the end of the buffer.
    pub fn new(
        handle: Handle,
        shape: [usize; R],
        strides: [usize; R],
        dtype: DType,
    ) -> Result<Self, ProblemError> {
        let last: usize = shape
            .iter()
            .zip(strides)
            .map(|(&n, stride)| n.saturating_sub(1) * stride)
            .sum();
        let needed = if shape.contains(&0) {
            0
        } else {
            (last + 1) * dtype.size()
        };
        let found = handle.size_in_used() as usize;
        if needed > found {
            return Err(ProblemError::BufferTooSmall {
                shape: shape.to_vec(),
                strides: strides.to_vec(),
                needed,
                found,
            });
        }
        Ok(Self {
            handle,
            shape,
            strides,
            dtype,
        })
    }

    /// A contiguous tensor with undefined contents.
    pub fn empty(client: &Client, shape: [usize; R], dtype: DType) -> Self {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        Self {
            handle: client.empty(bytes),
            shape,
            strides: contiguous(shape),
            dtype,
        }
    }

    /// The buffer.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Elements along each axis.
    pub fn shape(&self) -> [usize; R] {
        self.shape
    }

    /// Elements between neighbours along each axis.
    pub fn strides(&self) -> [usize; R] {
        self.strides
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements of the shape.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether an axis has length 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether elements lie in row-major order without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.strides == contiguous(self.shape)
    }

    /// The same buffer with its axes reordered: axis `i` of the result is axis `axes[i]` of `self`.
    ///
    /// # Panics
    /// If `axes` is not a permutation of `0..R`.
    pub fn permute(&self, axes: [usize; R]) -> Self {
        let mut seen = [false; R];
        for axis in axes {
            assert!(
                !std::mem::replace(&mut seen[axis], true),
                "axis {axis} twice in {axes:?}"
            );
        }
        Self {
            handle: self.handle.clone(),
            shape: axes.map(|axis| self.shape[axis]),
            strides: axes.map(|axis| self.strides[axis]),
            dtype: self.dtype,
        }
    }

    /// Every `step`-th element along `axis`, from the first, of the same buffer.
    pub(crate) fn every(&self, step: usize, axis: usize) -> Self {
        let mut view = self.clone();
        view.shape[axis] = view.shape[axis].div_ceil(step);
        view.strides[axis] *= step;
        view
    }

    /// Whether rows along the last axis are contiguous and begin at multiples of 16 bytes, so that
    /// they can be loaded in vectors and by bulk copies.
    pub fn is_aligned(&self) -> bool {
        let (column, rows) = self.strides.split_last().expect("rank is at least 1");
        let offset = self.handle.offset_start.unwrap_or(0) as usize;
        let aligned = |bytes: usize| bytes.is_multiple_of(16);
        *column == 1
            && aligned(offset)
            && rows
                .iter()
                .all(|&stride| stride > 0 && aligned(stride * self.dtype.size()))
    }

    /// Elements that the buffer must hold, for the choice of an address type.
    pub(crate) fn extent(&self) -> usize {
        self.handle.size() as usize / self.dtype.size()
    }

    /// The tensor as a kernel's argument with shape and strides.
    pub fn tensor_arg(&self) -> TensorArg {
        // SAFETY: every constructor keeps shape and strides inside the buffer.
        unsafe {
            TensorArg::from_raw_parts(
                self.handle.clone(),
                self.strides.iter().copied().collect(),
                self.shape.into(),
            )
        }
    }

    /// The tensor's elements as a kernel's argument.
    pub fn buffer_arg(&self) -> BufferArg {
        // SAFETY: as for `tensor_arg`.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), self.len()) }
    }
}

/// Row-major strides of `shape`.
pub(crate) fn contiguous<const R: usize>(shape: [usize; R]) -> [usize; R] {
    let mut strides = [1; R];
    for axis in (0..R.saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1] * shape[axis + 1];
    }
    strides
}
