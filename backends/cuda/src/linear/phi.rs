//! Feature maps on tiles of keys in shared memory.

use cubecl::prelude::*;
use cubesla_kernels::linear::{FeatureMap, feature};

use super::ring::StateTile;
use crate::ptx::math;

/// Elements of a row that a unit maps: four chunks of 16 bytes.
const ELEMENTS: usize = 32;

/// Applies phi to the first `len` rows of the tile of 64 keys at shared address `at`, and sets the other
/// rows and the columns past D to 0. All consumers take part; visible to others after a barrier.
#[cube]
pub(crate) fn map_keys(
    at: u32,
    len: u32,
    #[comptime] tile: StateTile,
    #[comptime] phi: FeatureMap,
) {
    let format = comptime!(tile.products().format());
    // Units of a row: 32 columns each of 64 for each warpgroup.
    let lanes = comptime!(2 * tile.consumers() as u32);
    let lane = UNIT_POS % lanes;
    let row = UNIT_POS / lanes;
    let start = at + row * 128;
    let mut x = Array::<f32>::new(ELEMENTS);
    let mut largest = f32::new(-3.0e38);
    #[unroll]
    for i in 0..4usize {
        let chunk = comptime!(i as u32) * lanes + lane;
        let inside = chunk * 8 < comptime!(tile.head_dim as u32);
        let words = math::load_chunk(address(start, row, chunk, tile));
        #[unroll]
        for w in 0..4usize {
            let pair = math::unpack(words.extract(w), format);
            #[unroll]
            for e in 0..2usize {
                let element = pair.extract(e);
                x[comptime!(8 * i + 2 * w + e)] = element;
                largest = select(inside, max(largest, element), largest);
            }
        }
    }
    let mut factor = f32::new(1.0);
    if comptime!(phi == FeatureMap::Softmax) {
        let shift = row_max(largest, lanes) * std::f32::consts::LOG2_E;
        let mut sum = 0.0f32;
        #[unroll]
        for i in 0..4usize {
            let chunk = comptime!(i as u32) * lanes + lane;
            let inside = chunk * 8 < comptime!(tile.head_dim as u32);
            #[unroll]
            for e in 0..8usize {
                let y = math::exp2(fma(
                    x[comptime!(8 * i + e)],
                    std::f32::consts::LOG2_E,
                    -shift,
                ));
                x[comptime!(8 * i + e)] = y;
                sum += select(inside, y, 0.0);
            }
        }
        factor = 1.0 / row_sum(sum, lanes);
    } else {
        #[unroll]
        for i in 0..ELEMENTS {
            x[i] = feature(x[i], phi);
        }
    }
    #[unroll]
    for i in 0..4usize {
        let chunk = comptime!(i as u32) * lanes + lane;
        let exists = row < len && chunk * 8 < comptime!(tile.head_dim as u32);
        let mut words = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for w in 0..4usize {
            let at = comptime!(8 * i + 2 * w);
            let word = math::pack(x[at] * factor, x[comptime!(at + 1)] * factor, format);
            words.insert(w, select(exists, word, 0));
        }
        math::store_chunk(address(start, row, chunk, tile), words);
    }
}

/// Shared address of a row's chunk of 16 bytes, in boxes of 64 columns.
#[cube]
fn address(start: u32, row: u32, chunk: u32, #[comptime] tile: StateTile) -> u32 {
    start + chunk / 8 * comptime!(tile.keys as u32 * 128) + ((chunk % 8) ^ (row % 8)) * 16
}

/// Maximum over the units of a row.
#[cube]
fn row_max(x: f32, #[comptime] lanes: u32) -> f32 {
    let mut x = max(x, plane_shuffle_xor(x, 1));
    if comptime!(lanes == 4) {
        x = max(x, plane_shuffle_xor(x, 2));
    }
    x
}

/// Sum over the units of a row.
#[cube]
fn row_sum(x: f32, #[comptime] lanes: u32) -> f32 {
    let mut x = x + plane_shuffle_xor(x, 1);
    if comptime!(lanes == 4) {
        x += plane_shuffle_xor(x, 2);
    }
    x
}
