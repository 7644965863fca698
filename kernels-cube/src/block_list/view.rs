//! A block list as kernels read it.

use cubecl::prelude::*;

use super::{Span, Walk, WalkExpand};

/// The buffers of a [`BlockList`](super::BlockList).
#[derive(CubeType, CubeLaunch)]
pub struct BlockListView {
    /// Key blocks, `[B, Hq, M, width]`.
    pub indices: Box<[u32]>,
    /// Entries of each row, `[B, Hq, M]`.
    pub counts: Box<[u32]>,
    /// `M`.
    pub query_blocks: u32,
    /// Distance between rows.
    pub width: u32,
}

/// One row: the key blocks of one query block of one (batch, head).
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub struct BlockRow {
    /// Where the row begins in the indices.
    pub start: usize,
    /// Entries of the row.
    pub count: u32,
}

#[cube]
impl BlockListView {
    /// The row of `query_block` of the `head`-th (batch, head) pair.
    pub fn row(&self, head: u32, query_block: u32) -> BlockRow {
        let row = head as usize * self.query_blocks as usize + query_block as usize;
        BlockRow {
            start: row * self.width as usize,
            count: self.counts[row],
        }
    }

    /// Key block of entry `at` of `row`.
    pub fn key_block(&self, row: BlockRow, at: u32) -> u32 {
        self.indices[row.start + at as usize]
    }

    /// How many entries of `row` are below `key_block`, for a row that is ascending.
    pub fn count_below(&self, row: BlockRow, key_block: u32) -> u32 {
        let mut low = 0u32;
        let mut high = row.count;
        while low < high {
            let middle = (low + high) / 2;
            if self.key_block(row, middle) < key_block {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

#[cube]
impl BlockListView {
    /// Whether `row` has `key_block`.
    pub fn selects(&self, row: BlockRow, key_block: u32) -> bool {
        let at = self.count_below(row, key_block);
        let mut found = false.runtime();
        if at < row.count {
            found = self.key_block(row, at) == key_block;
        }
        found
    }
}

/// A walk over the keys of a row's blocks, a tile of `cols` keys at a time.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub struct KeyWalk {
    /// The blocks walked over.
    pub row: BlockRow,
    /// Keys that exist.
    pub key_len: u32,
    /// Keys of a block.
    #[cube(comptime)]
    pub block_k: usize,
    /// Most keys of a tile.
    #[cube(comptime)]
    pub cols: usize,
}

#[cube]
impl Walk for KeyWalk {
    type List = BlockListView;

    fn tiles(&self) -> u32 {
        self.row.count * comptime!(self.block_k.div_ceil(self.cols) as u32)
    }

    fn tile(&self, list: &BlockListView, t: u32) -> Span {
        let tiles_per_block = comptime!(self.block_k.div_ceil(self.cols) as u32);
        let block_k = comptime!(self.block_k as u32);
        let block = list.key_block(self.row, t / tiles_per_block);
        Span {
            first: block * block_k + t % tiles_per_block * comptime!(self.cols as u32),
            end: min((block + 1) * block_k, self.key_len),
        }
    }
}
