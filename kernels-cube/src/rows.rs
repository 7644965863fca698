//! Rows of `[batch, heads, length, dim]` tensors in global memory.

use cubecl::prelude::*;

use crate::engine::*;

/// `len` rows from `base`, a stride apart, in elements. Rows past `len` read as zeros.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub struct RowRange {
    /// Offset of the first row.
    pub base: usize,
    /// Distance between rows.
    pub row_stride: usize,
    /// Distance between the elements of a row; 1 if vectors are wider than 1.
    pub col_stride: usize,
    /// Number of rows that exist.
    pub len: u32,
}

#[cube]
impl RowRange {
    /// Rows `first..end` of one head of `tensor`; none if `end` lies before `first`.
    pub fn new<F: Float, N: Size>(
        tensor: &Tensor<Vector<F, N>>,
        batch: usize,
        head: usize,
        first: u32,
        end: u32,
    ) -> RowRange {
        RowRange {
            base: batch * tensor.stride(0)
                + head * tensor.stride(1)
                + first as usize * tensor.stride(2),
            row_stride: tensor.stride(2),
            col_stride: tensor.stride(3),
            len: max(end, first) - first,
        }
    }

    /// The same rows from column `first` on.
    pub fn at_column(self, first: u32) -> RowRange {
        RowRange {
            base: self.base + first as usize * self.col_stride,
            row_stride: self.row_stride,
            col_stride: self.col_stride,
            len: self.len,
        }
    }
}

/// Where a fragment's rows go in a contiguous `[.., width]` tensor.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub struct RowTarget {
    /// Row of the tensor that is the tile's first.
    pub first_row: usize,
    /// Rows of the tile that exist.
    pub len: u32,
    /// Column of the tensor that is the tile's first.
    pub first_column: u32,
    /// Column of the tensor after the tile's last that exists.
    pub end_column: u32,
}

/// Adds what [`store_rows`] wrote to the rows and columns of `tile` that exist.
#[cube]
pub(crate) fn add_rows<F: Float, V: Size, Fr: Fragment>(
    tile: &mut Fr,
    from: &[Vector<F, V>],
    target: RowTarget,
    #[comptime] width: usize,
) {
    let tile_cols = tile.cols();
    let run = tile.run();
    let runs = comptime!(tile_cols / run);
    #[unroll]
    for r in 0..tile.rows() {
        if tile.row(r) < target.len {
            let start = (target.first_row + tile.row(r) as usize) * width;
            #[unroll]
            for g in 0..runs {
                let col = target.first_column + tile.col(comptime!(g * run));
                if col < target.end_column {
                    let values = from[(start + col as usize) / run];
                    #[unroll]
                    for e in 0..run {
                        let c = comptime!(g * run + e);
                        tile.set(r, c, tile.get(r, c) + f32::cast_from(values.extract(e)));
                    }
                }
            }
        }
    }
}

/// Writes the rows and columns of `tile` that exist to a tensor of that `width`.
#[cube]
pub fn store_rows<F: Float, V: Size, Fr: Fragment>(
    out: &mut [Vector<F, V>],
    tile: &Fr,
    target: RowTarget,
    #[comptime] width: usize,
) {
    let tile_cols = tile.cols();
    let run = tile.run();
    let runs = comptime!(tile_cols / run);
    #[unroll]
    for r in 0..tile.rows() {
        if tile.row(r) < target.len {
            let start = (target.first_row + tile.row(r) as usize) * width;
            #[unroll]
            for g in 0..runs {
                let col = target.first_column + tile.col(comptime!(g * run));
                if col < target.end_column {
                    let mut values = Vector::<F, V>::empty();
                    #[unroll]
                    for e in 0..run {
                        values.insert(e, F::cast_from(tile.get(r, comptime!(g * run + e))));
                    }
                    out[(start + col as usize) / run] = values;
                }
            }
        }
    }
}
