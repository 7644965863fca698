//! An inverse block list as kernels read it.

use cubecl::prelude::*;

use super::{BlockRow, Span, Walk, WalkExpand};

/// The buffers of an [`InverseBlockList`](super::InverseBlockList).
#[derive(CubeType, CubeLaunch)]
pub struct InverseListView {
    /// Where each key block's query blocks begin, `[B, Hq, N + 1]`.
    pub offsets: Box<[u32]>,
    /// Query blocks, `[B, Hq, capacity]`.
    pub rows: Box<[u32]>,
    /// `N`.
    pub key_blocks: u32,
    /// Distance between heads in `rows`.
    pub capacity: u32,
}

#[cube]
impl InverseListView {
    /// The query blocks that selected `key_block` in the `head`-th (batch, head) pair.
    pub fn row(&self, head: u32, key_block: u32) -> BlockRow {
        let at = head as usize * (self.key_blocks as usize + 1) + key_block as usize;
        let first = self.offsets[at];
        BlockRow {
            start: head as usize * self.capacity as usize + first as usize,
            count: self.offsets[at + 1] - first,
        }
    }

    /// Query block of entry `at` of `row`.
    pub fn query_block(&self, row: BlockRow, at: u32) -> u32 {
        self.rows[row.start + at as usize]
    }

    /// How many entries of `row` are below `query_block`.
    pub fn count_below(&self, row: BlockRow, query_block: u32) -> u32 {
        let mut low = 0u32;
        let mut high = row.count;
        while low < high {
            let middle = (low + high) / 2;
            if self.query_block(row, middle) < query_block {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

/// A walk over the queries of a row's blocks, a tile of `cols` queries at a time.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub struct QueryWalk {
    /// The blocks walked over.
    pub row: BlockRow,
    /// Queries that exist.
    pub query_len: u32,
    /// Queries of a block.
    #[cube(comptime)]
    pub block_q: usize,
    /// Most queries of a tile.
    #[cube(comptime)]
    pub cols: usize,
}

#[cube]
impl Walk for QueryWalk {
    type List = InverseListView;

    fn tiles(&self) -> u32 {
        self.row.count * comptime!(self.block_q.div_ceil(self.cols) as u32)
    }

    fn tile(&self, inverse: &InverseListView, t: u32) -> Span {
        let tiles_per_block = comptime!(self.block_q.div_ceil(self.cols) as u32);
        let block_q = comptime!(self.block_q as u32);
        let block = inverse.query_block(self.row, t / tiles_per_block);
        Span {
            first: block * block_q + t % tiles_per_block * comptime!(self.cols as u32),
            end: min((block + 1) * block_q, self.query_len),
        }
    }
}
