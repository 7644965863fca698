//! Walks over the rows of listed blocks.

use cubecl::prelude::*;

/// Rows `first..end`; `end` may lie before `first`, for a tile wholly past the last row.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub struct Span {
    /// First row.
    pub first: u32,
    /// The row after the last; at least 1.
    pub end: u32,
}

#[cube]
impl Span {
    /// How many rows there are.
    pub fn rows(&self) -> u32 {
        max(self.end, self.first) - self.first
    }
}

/// A walk over the rows of a list's blocks, tile by tile.
#[cube]
pub trait Walk: CubeType + Sized {
    /// The list that names the blocks.
    type List: CubeType;

    /// Number of tiles.
    fn tiles(&self) -> u32;
    /// The rows of tile `t`.
    fn tile(&self, list: &Self::List, t: u32) -> Span;
}
