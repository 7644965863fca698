//! Online softmax on the registers of a warpgroup, with a maximum that is only replaced when it must
//! be.
//!
//! Any maximum gives the same result, as it cancels; it only has to keep exponentials in range. So
//! the one in use stays until a weight may exceed [`LARGEST`], which f16 and f32 sums hold, and the
//! accumulator is rescaled a few times a row instead of once a tile. Nor is there a maximum to take
//! before: a tile's weights are made with the one in use, and their sums tell whether they hold.

use cubecl::prelude::*;

use super::kernel::{ForwardConfig, ForwardScalars};
use super::producer::Keys;
use crate::ptx::{math, wgmma};

/// Below every score, above every masked score: see `cubesla_kernels::softmax`.
pub(crate) const FLOOR: f32 = -1.0e30;
const MASKED: f32 = -3.0e38;

/// The largest weight: the exponential of a score that exceeds the maximum in use.
pub(crate) const LARGEST: f32 = 256.0;

/// log2 of that.
const SLACK: f32 = 8.0;

/// One row: the maximum in use of its scaled scores, times log2(e), and the sum of the unit's own weights.
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
    fn raise(&mut self, tile_max: f32) {
        let new_max = max(self.max, quad_max(tile_max));
        self.correction = math::exp2(self.max - new_max);
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
    /// Whether the last tile raised a maximum of the warp's rows, so that corrections are not 1.
    pub raised: bool,
}

#[cube]
impl RowPair {
    /// The unit's rows of the query block that begins at `first_query`.
    pub fn new(first_query: u32) -> RowPair {
        RowPair {
            query: upper_query(first_query),
            upper: Row::new(),
            lower: Row::new(),
            raised: false,
        }
    }

    /// Raises the maxima to those of a tile with these `tops`.
    pub fn raise(&mut self, tops: &Tops) {
        self.upper.raise(tops.upper);
        self.lower.raise(tops.lower);
    }

    /// Brings the accumulator to the maxima.
    pub fn rescale(&self, #[comptime] config: ForwardConfig) {
        wgmma::scale_accumulator(
            self.upper.correction,
            self.lower.correction,
            config.tile.products(),
        );
    }

    /// Adds a tile's weights to the rows' sums.
    pub fn add(&mut self, weights: &Weights) {
        self.upper.sum += weights.upper_sum;
        self.lower.sum += weights.lower_sum;
    }
}

/// The unit's upper row of the query block that begins at `first_query`.
#[cube]
pub(crate) fn upper_query(first_query: u32) -> u32 {
    // An item's two warpgroups at most, of however many there are.
    first_query + UNIT_POS % 256 / 32 * 16 + UNIT_POS % 32 / 4
}

/// The unit's largest scores of a tile, in its two rows.
#[derive(CubeType)]
pub(crate) struct Tops {
    pub upper: f32,
    pub lower: f32,
}

#[cube]
impl Tops {
    /// Of `scores` that are at least `floor` or masked.
    pub fn new(scores: &Array<f32>, floor: f32, #[comptime] keys: usize) -> Tops {
        let mut upper = floor;
        let mut lower = floor;
        #[unroll]
        for i in 0..comptime!(keys / 8) {
            #[unroll]
            for j in 0..2usize {
                upper = max(upper, scores[comptime!(4 * i + j)]);
                lower = max(lower, scores[comptime!(4 * i + 2 + j)]);
            }
        }
        Tops { upper, lower }
    }
}

/// The scores in the registers of `buffer`.
#[cube]
pub(crate) fn read_scores(#[comptime] buffer: usize, #[comptime] keys: usize) -> Array<f32> {
    let mut scores = Array::<f32>::new(keys / 2);
    #[unroll]
    for step in 0..comptime!(keys / 16) {
        let some = wgmma::read_score_step(buffer, step);
        #[unroll]
        for i in 0..8usize {
            scores[comptime!(8 * step + i)] = some.extract(i);
        }
    }
    scores
}

/// The largest of `scores`, with the `bias` of blocks that have weights, scaled.
#[cube]
fn top_scores(
    scores: &Array<f32>,
    bias: f32,
    scale_log2: f32,
    #[comptime] config: ForwardConfig,
) -> Tops {
    let mut tops = Tops::new(scores, f32::new(FLOOR), config.tile.keys);
    if config.weighted {
        tops.upper += bias;
        tops.lower += bias;
    }
    tops.upper *= scale_log2;
    tops.lower *= scale_log2;
    tops
}

/// Weights of a tile `exp(scale (S + bias) - m)`, packed in pairs, and the unit's sums of them.
#[derive(CubeType)]
pub(crate) struct Weights {
    pub packed: Array<u32>,
    pub upper_sum: f32,
    pub lower_sum: f32,
}

#[cube]
impl Weights {
    /// Room for `words` words.
    pub fn new(#[comptime] words: usize) -> Weights {
        Weights {
            packed: Array::<u32>::new(words),
            upper_sum: 0.0,
            lower_sum: 0.0,
        }
    }

    /// Counts the `sum` of the weights of word `i`, which begins its row's if it is the first.
    pub fn count(&mut self, sum: f32, #[comptime] i: usize) {
        if comptime!(i == 0) {
            self.upper_sum = sum;
        } else if comptime!(i == 1) {
            self.lower_sum = sum;
        } else if comptime!(i % 2 == 0) {
            self.upper_sum += sum;
        } else {
            self.lower_sum += sum;
        }
    }

    /// Whether the unit has weights that may be larger than `limit`: some whose sum is.
    pub fn exceed(&self, #[comptime] limit: f32) -> bool {
        self.upper_sum > limit || self.lower_sum > limit
    }

    /// Lets ptxas make these weights no later than here.
    pub fn make_before(&self) {
        wgmma::compute_before(u32::reinterpret(self.upper_sum + self.lower_sum));
    }
}

/// Makes the weights of `scores` with the maxima in use.
#[cube]
pub(crate) fn make_weights(
    weights: &mut Weights,
    rows: &RowPair,
    scores: &Array<f32>,
    bias: f32,
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
) {
    let scale_log2 = scale_log2(scalars);
    let mut upper_shift = rows.upper.max;
    let mut lower_shift = rows.lower.max;
    if config.weighted {
        // With a weight of 0 infinite, and nothing is left of the scores.
        upper_shift -= bias * scale_log2;
        lower_shift -= bias * scale_log2;
    }
    #[unroll]
    for i in 0..comptime!(config.tile.weight_words()) {
        let upper = comptime!(i % 2 == 0);
        let shift = if upper { upper_shift } else { lower_shift };
        let low = math::exp2(fma(scores[comptime!(2 * i)], scale_log2, -shift));
        let high = math::exp2(fma(scores[comptime!(2 * i + 1)], scale_log2, -shift));
        weights.count(low + high, i);
        weights.packed[i] = math::pack(low, high, comptime!(config.tile.products().format()));
    }
}

/// The scores in the registers of `buffer`, masked.
#[cube]
pub(crate) fn take_scores(
    rows: &RowPair,
    keys: Keys,
    scalars: ForwardScalars,
    #[comptime] buffer: usize,
    #[comptime] config: ForwardConfig,
) -> Array<f32> {
    let mut scores = read_scores(buffer, config.tile.keys);
    mask_if_partial(&mut scores, rows, keys, f32::new(MASKED), scalars, config);
    scores
}

/// Raises the maxima if one of `scores` is too far above them.
#[cube]
pub(crate) fn raise_if_needed(
    rows: &mut RowPair,
    scores: &Array<f32>,
    bias: f32,
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
) {
    let tops = top_scores(scores, bias, scale_log2(scalars), config);
    let upper = tops.upper - rows.upper.max > SLACK;
    let lower = tops.lower - rows.lower.max > SLACK;
    rows.raised = plane_any(upper || lower);
    if rows.raised {
        rows.raise(&tops);
    }
}

/// Makes the weights of the scores in `buffer`, and adds them to the rows' sums.
///
/// With the maxima in use and unmasked: few tiles raise a maximum or have keys to mask, and those are made
/// again.
#[cube]
pub(crate) fn make_tile_weights(
    weights: &mut Weights,
    rows: &mut RowPair,
    keys: Keys,
    bias: f32,
    scalars: ForwardScalars,
    #[comptime] buffer: usize,
    #[comptime] config: ForwardConfig,
) {
    let scores = read_scores(buffer, config.tile.keys);
    make_weights(weights, &*rows, &scores, bias, scalars, config);
    rows.raised = must_be_made_again(&*weights, LARGEST, &*rows, keys, scalars, config);
    if rows.raised {
        make_weights_again(weights, rows, keys, bias, scalars, buffer, config);
    }
    rows.add(&*weights);
}

/// Takes the maxima of an item's first tile, unless it has keys to mask: its weights are made again anyway.
#[cube]
pub(crate) fn begin_maxima(
    rows: &mut RowPair,
    keys: Keys,
    bias: f32,
    scalars: ForwardScalars,
    #[comptime] buffer: usize,
    #[comptime] config: ForwardConfig,
) {
    if !plane_any(unit_is_partial(&*rows, keys, scalars, config)) {
        let scores = read_scores(buffer, config.tile.keys);
        rows.raise(&top_scores(&scores, bias, scale_log2(scalars), config));
    }
}

/// Whether a unit of the warp has weights of keys to mask, or some that may be larger than `limit`.
#[cube]
pub(crate) fn must_be_made_again(
    weights: &Weights,
    #[comptime] limit: f32,
    rows: &RowPair,
    keys: Keys,
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
) -> bool {
    plane_any(unit_is_partial(rows, keys, scalars, config) || weights.exceed(limit))
}

/// Makes such weights: masks scores, and raises the maxima.
#[cube]
pub(crate) fn make_weights_again(
    weights: &mut Weights,
    rows: &mut RowPair,
    keys: Keys,
    bias: f32,
    scalars: ForwardScalars,
    #[comptime] buffer: usize,
    #[comptime] config: ForwardConfig,
) {
    let mut scores = read_scores(buffer, config.tile.keys);
    mask_if_partial(&mut scores, &*rows, keys, f32::new(MASKED), scalars, config);
    rows.raise(&top_scores(&scores, bias, scale_log2(scalars), config));
    make_weights(weights, &*rows, &scores, bias, scalars, config);
    weights.make_before();
}

/// What turns scores into base-2 logarithms of weights.
#[cube]
fn scale_log2(scalars: ForwardScalars) -> f32 {
    scalars.scale * std::f32::consts::LOG2_E
}

/// Whether the unit has scores of keys that do not exist or lie in the future: only tiles at the end of a
/// block or on the diagonal have such keys.
#[cube]
pub(crate) fn unit_is_partial(
    rows: &RowPair,
    keys: Keys,
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
) -> bool {
    let tile_keys = comptime!(config.tile.keys as u32);
    let mut partial = keys.count < tile_keys;
    if config.causal {
        let end = keys.first + tile_keys;
        partial = partial || end as i32 > rows.query as i32 + scalars.causal_shift + 1;
    }
    partial
}

/// Replaces scores of keys that do not exist, or lie in the future, by the `lowest`, if a unit of the warp has
/// any.
#[cube]
pub(crate) fn mask_if_partial(
    scores: &mut Array<f32>,
    rows: &RowPair,
    keys: Keys,
    lowest: f32,
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
) {
    if plane_any(unit_is_partial(rows, keys, scalars, config)) {
        mask(scores, rows, keys, lowest, scalars, config);
    }
}

#[cube]
fn mask(
    scores: &mut Array<f32>,
    rows: &RowPair,
    keys: Keys,
    lowest: f32,
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
) {
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
