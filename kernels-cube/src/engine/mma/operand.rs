//! Tiles in shared memory, as vectors of 16 bytes.

use cubecl::prelude::barrier::copy_async_checked;
use cubecl::prelude::*;

use crate::engine::{VectorRows, VectorRowsExpand};
use crate::rows::RowRange;

/// Shared tiles of `[rows, pitch]` vectors of `N` elements, 16 bytes, one of which is turned to.
#[derive(CubeType)]
pub struct MmaOperand<F: Float, N: Size> {
    pub(super) data: Shared<[Vector<F, N>]>,
    /// First vector of the tile.
    pub(super) first: usize,
    #[cube(comptime)]
    pub(super) rows: usize,
    #[cube(comptime)]
    pub(super) width: usize,
    /// Elements of a vector.
    #[cube(comptime)]
    pub(super) wide: usize,
}

/// Columns that products contract over, a multiple of the two vectors that one of them takes.
pub(super) fn padded(width: usize, wide: usize) -> usize {
    width.next_multiple_of(2 * wide)
}

/// Vectors from one row of a shared tile to the next: odd, so that eight rows lie in different banks.
pub(super) fn pitch(width: usize, wide: usize) -> usize {
    padded(width, wide) / wide + 1
}

#[cube]
impl<F: Float, N: Size> MmaOperand<F, N> {
    pub(super) fn new(
        #[comptime] rows: usize,
        #[comptime] width: usize,
        #[comptime] stages: usize,
    ) -> Self {
        let wide = N::value().comptime();
        MmaOperand::<F, N> {
            data: Shared::new_aligned_slice(
                comptime!((stages * rows * pitch(width, wide)).max(1)),
                16usize,
            ),
            first: 0usize.runtime(),
            rows,
            width,
            wide,
        }
    }

    /// Where a vector of the tile lies.
    pub(super) fn at(&self, row: usize, vector: usize) -> usize {
        self.first + row * comptime!(pitch(self.width, self.wide)) + vector
    }

    /// Begins to fill one vector of the tile.
    pub(super) fn load<S: Size>(
        &mut self,
        row: usize,
        vector: usize,
        src: &Tensor<Vector<F, S>>,
        rows: RowRange,
    ) {
        let wide = comptime!(self.wide);
        let exists = (row as u32) < rows.len && vector < comptime!(self.width / wide);
        let to = self.at(row, vector);
        let start = rows.base + row * rows.row_stride;
        if src.vector_size() == wide {
            // Nothing is read of a vector that does not exist: it becomes zeros.
            let from = (start + vector * wide) / wide;
            let source = &src.as_slice()[from..from + select(exists, 1usize, 0usize)];
            copy_async_checked(
                source.downcast(),
                &mut self.data[to..to + 1],
                comptime!(wide as u32),
            );
        } else {
            let mut value = Vector::<F, N>::new(F::new(0.0));
            if exists {
                #[unroll]
                for e in 0..wide {
                    let x = src[start + (vector * wide + e) * rows.col_stride];
                    value.insert(e, x.extract(0usize));
                }
            }
            self.data[to] = value;
        }
    }
}

#[cube]
impl<F: Float, N: Size> VectorRows for MmaOperand<F, N> {
    fn rows(&self) -> comptime_type!(usize) {
        self.rows
    }

    fn vectors(&self) -> comptime_type!(usize) {
        comptime!(self.width / self.wide)
    }

    fn size(&self) -> comptime_type!(usize) {
        self.wide
    }

    fn read(&self, row: usize, vector: usize) -> Array<f32> {
        let x = self.data[self.at(row, vector)];
        let mut values = Array::<f32>::new(self.wide);
        #[unroll]
        for e in 0..self.wide {
            values[e] = f32::cast_from(x.extract(e));
        }
        values
    }

    fn write(&mut self, row: usize, vector: usize, values: &Array<f32>) {
        let mut x = Vector::<F, N>::empty();
        #[unroll]
        for e in 0..self.wide {
            x.insert(e, F::cast_from(values[e]));
        }
        let at = self.at(row, vector);
        self.data[at] = x;
    }
}
