//! Online softmax on the registers of a warpgroup, with a maximum that is only replaced when it must
//! be.
//!
//! Any maximum gives the same result, as it cancels; it only has to keep exponentials in range. So
//! the one in use stays until a score exceeds it by 2^[`SLACK`], and the accumulator is rescaled a
//! few times a row instead of once a tile. Weights then reach 2^8, which f16 and f32 sums hold.

use cubecl::prelude::*;

use super::kernel::{ForwardConfig, ForwardScalars};
use super::producer::Keys;
use crate::ptx::{math, wgmma};

/// Below every score, above every masked score: see `cubesla_kernels::softmax`.
const FLOOR: f32 = -1.0e30;
const MASKED: f32 = -3.0e38;

/// Powers of two by which scores may exceed the maximum in use.
const SLACK: f32 = 8.0;

/// One row: the maximum in use of its unscaled scores, and the sum of the unit's own weights.
#[derive(CubeType)]
pub(crate) struct Row {
    pub max: f32,
    pub sum: f32,
    /// Factor that brings what was accumulated before the last tile to its maximum.
    pub correction: f32,
}

#[cube]
impl Row {
    fn new() -> Row {
        Row {
            max: FLOOR,
            sum: 0.0,
            correction: 1.0,
        }
    }

    /// Takes the unit's largest score of a tile into account.
    fn raise(&mut self, tile_max: f32, scale_log2: f32) {
        let tile_max = quad_max(tile_max);
        let new_max = select(
            (tile_max - self.max) * scale_log2 > SLACK,
            tile_max,
            self.max,
        );
        self.correction = math::exp2((self.max - new_max) * scale_log2);
        self.sum *= self.correction;
        self.max = new_max;
    }
}

/// The two rows that a unit holds, 8 apart.
#[derive(CubeType)]
pub(crate) struct RowPair {
    /// The upper one's query.
    pub query: u32,
    pub upper: Row,
    pub lower: Row,
}

#[cube]
impl RowPair {
    /// The unit's rows of the query block that begins at `first_query`.
    pub fn new(first_query: u32) -> RowPair {
        RowPair {
            query: upper_query(first_query),
            upper: Row::new(),
            lower: Row::new(),
        }
    }
}

/// The unit's upper row of the query block that begins at `first_query`.
#[cube]
pub(crate) fn upper_query(first_query: u32) -> u32 {
    first_query + UNIT_POS / 32 * 16 + UNIT_POS % 32 / 4
}

/// The scores in the registers of `buffer`, masked; the rows' maxima take them into account, with the
/// `bias` of blocks that have weights.
#[cube]
pub(crate) fn take_scores(
    rows: &mut RowPair,
    keys: Keys,
    bias: f32,
    scalars: ForwardScalars,
    #[comptime] buffer: usize,
    #[comptime] config: ForwardConfig,
) -> Array<f32> {
    let count = comptime!(config.tile.keys / 2);
    let mut scores = Array::<f32>::new(count);
    #[unroll]
    for step in 0..comptime!(count / 8) {
        let some = wgmma::read_score_step(buffer, step);
        #[unroll]
        for i in 0..8usize {
            scores[comptime!(8 * step + i)] = some.extract(i);
        }
    }
    mask(&mut scores, &*rows, keys, f32::new(MASKED), scalars, config);

    let mut upper_max = f32::new(FLOOR);
    let mut lower_max = f32::new(FLOOR);
    #[unroll]
    for i in 0..comptime!(count / 4) {
        #[unroll]
        for j in 0..2usize {
            upper_max = max(upper_max, scores[comptime!(4 * i + j)]);
            lower_max = max(lower_max, scores[comptime!(4 * i + 2 + j)]);
        }
    }
    if config.weighted {
        upper_max += bias;
        lower_max += bias;
    }
    let scale_log2 = scalars.scale * std::f32::consts::LOG2_E;
    rows.upper.raise(upper_max, scale_log2);
    rows.lower.raise(lower_max, scale_log2);
    scores
}

/// The weights `exp(scale (S + bias) - m)`, packed in pairs, and added to the rows' sums.
#[cube]
pub(crate) fn make_weights(
    rows: &mut RowPair,
    scores: &Array<f32>,
    bias: f32,
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
) -> Array<u32> {
    let count = comptime!(config.tile.keys / 4);
    let scale_log2 = scalars.scale * std::f32::consts::LOG2_E;
    let mut upper_shift = rows.upper.max * scale_log2;
    let mut lower_shift = rows.lower.max * scale_log2;
    if config.weighted {
        // With a weight of 0 infinite, and nothing is left of the scores.
        upper_shift = (rows.upper.max - bias) * scale_log2;
        lower_shift = (rows.lower.max - bias) * scale_log2;
    }
    let mut packed = Array::<u32>::new(count);
    #[unroll]
    for i in 0..count {
        let upper = comptime!(i % 2 == 0);
        let shift = if upper { upper_shift } else { lower_shift };
        let low = math::exp2(fma(scores[comptime!(2 * i)], scale_log2, -shift));
        let high = math::exp2(fma(scores[comptime!(2 * i + 1)], scale_log2, -shift));
        if upper {
            rows.upper.sum += low + high;
        } else {
            rows.lower.sum += low + high;
        }
        packed[i] = math::pack(low, high, comptime!(config.tile.products().format()));
    }
    packed
}

/// Replaces scores of keys that do not exist, or lie in the future, by the `lowest`. Only tiles at
/// the end of a block or on the diagonal have such keys.
#[cube]
pub(crate) fn mask(
    scores: &mut Array<f32>,
    rows: &RowPair,
    keys: Keys,
    lowest: f32,
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
) {
    let tile_keys = comptime!(config.tile.keys as u32);
    let mut partial = keys.count < tile_keys;
    if config.causal {
        let end = keys.first + tile_keys;
        partial = partial || end as i32 > rows.query as i32 + scalars.causal_shift + 1;
    }
    if plane_any(partial) {
        #[unroll]
        for i in 0..comptime!(config.tile.keys / 2) {
            let at = comptime!((i / 4 * 8 + i % 2) as u32) + UNIT_POS % 4 * 2;
            let mut visible = at < keys.count;
            if config.causal {
                let query = rows.query + comptime!((i / 2 % 2 * 8) as u32);
                let key = keys.first + at;
                visible = visible && key as i32 <= query as i32 + scalars.causal_shift;
            }
            scores[i] = select(visible, scores[i], lowest);
        }
    }
}

/// Maximum over the four units of a row.
#[cube]
pub(crate) fn quad_max(x: f32) -> f32 {
    let x = max(x, plane_shuffle_xor(x, 1));
    max(x, plane_shuffle_xor(x, 2))
}

/// Sum over the four units of a row.
#[cube]
pub(crate) fn quad_sum(x: f32) -> f32 {
    let x = x + plane_shuffle_xor(x, 1);
    x + plane_shuffle_xor(x, 2)
}
