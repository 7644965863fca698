//! Which scores of a tile count.

use cubecl::prelude::*;

use crate::engine::*;

/// The rows and keys of one tile of scores.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub struct TileWindow {
    /// Query of the tile's first row.
    pub first_query: u32,
    /// Key of the tile's first column.
    pub first_key: u32,
    /// First key that does not belong to the tile's block or does not exist.
    pub end_key: u32,
    /// With causal masking query `i` sees keys up to `i + causal_shift`.
    pub causal_shift: i32,
}

#[cube]
impl TileWindow {
    /// The first key that `query` does not see, of those from the tile's first on.
    pub fn end_seen(&self, query: u32, #[comptime] causal: bool) -> u32 {
        let mut end = self.end_key;
        if causal {
            let seen = max(query as i32 + self.causal_shift + 1, 0);
            end = min(end, seen as u32);
        }
        end
    }
}

/// Adds `x` to every score.
#[cube]
pub fn add_to_all<Fr: Fragment>(scores: &mut Fr, x: f32) {
    #[unroll]
    for r in 0..scores.rows() {
        #[unroll]
        for c in 0..scores.cols() {
            scores.set(r, c, scores.get(r, c) + x);
        }
    }
}

/// Scales the scores and pushes those that do not count below every other.
#[cube]
pub fn scale_and_mask<Fr: Fragment>(
    scores: &mut Fr,
    window: TileWindow,
    scale: f32,
    #[comptime] causal: bool,
) {
    #[unroll]
    for r in 0..scores.rows() {
        let end = window.end_seen(window.first_query + scores.row(r), causal);
        #[unroll]
        for c in 0..scores.cols() {
            let visible = window.first_key + scores.col(c) < end;
            let score = select(visible, scores.get(r, c) * scale, f32::min_value());
            scores.set(r, c, score);
        }
    }
}
