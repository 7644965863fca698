//! Tiles of words and values, and integer products of them.

use cubecl::prelude::*;

use crate::engine::*;
use crate::quantize::{Format, number};
use crate::rows::RowRange;

/// Copies `rows` rows of words from `first` on to a shared tile with a word of padding a row.
#[cube]
pub(super) fn load_words(
    tile: &mut Shared<[u32]>,
    words: &[u32],
    first: usize,
    rows: u32,
    #[comptime] tile_rows: usize,
    #[comptime] width: usize,
    #[comptime] units: usize,
) {
    for step in 0..comptime!((tile_rows * width).div_ceil(units)) {
        let at = step * units + UNIT_POS as usize;
        if at < comptime!(tile_rows * width) {
            let (row, word) = (at / width, at % width);
            let mut value = 0u32.runtime();
            if (row as u32) < rows {
                value = words[(first + row) * width + word];
            }
            tile[row * comptime!(width + 1) + word] = value;
        }
    }
}

/// Copies rows of FP8 words to a tile, as numbers: their scales are left for the end.
#[cube]
pub(super) fn load_values(
    tile: &mut <Simt as TileEngine<f32>>::Operand,
    words: &[u32],
    first: usize,
    rows: u32,
    #[comptime] tile_rows: usize,
    #[comptime] width: usize,
    #[comptime] units: usize,
) {
    for step in 0..comptime!((tile_rows * width).div_ceil(units)) {
        let at = step * units + UNIT_POS as usize;
        if at < comptime!(tile_rows * width) {
            let (row, word) = (at / width, at % width);
            let mut bits = 0u32.runtime();
            if (row as u32) < rows {
                bits = words[(first + row) * width + word];
            }
            let mut values = Array::<f32>::new(4usize);
            #[unroll]
            for e in 0..4usize {
                values[e] = number(bits, comptime!(e as u32), 0.0, Format::Fp8, false);
            }
            tile.write(row, word, &values);
        }
    }
}

/// Copies rows of values to a tile.
#[cube]
pub(super) fn load_four<F: Float, N: Size>(
    tile: &mut <Simt as TileEngine<f32>>::Operand,
    v: &Tensor<Vector<F, N>>,
    rows: RowRange,
    #[comptime] tile_rows: usize,
    #[comptime] width: usize,
    #[comptime] units: usize,
) {
    let vectors = comptime!(width / 4);
    for step in 0..comptime!((tile_rows * vectors).div_ceil(units)) {
        let at = step * units + UNIT_POS as usize;
        if at < comptime!(tile_rows * vectors) {
            let (row, vector) = (at / vectors, at % vectors);
            let mut values = Array::<f32>::new(4usize);
            #[unroll]
            for e in 0..4usize {
                values[e] = 0.0;
            }
            if (row as u32) < rows.len {
                let start = rows.base + row * rows.row_stride + vector * 4 * rows.col_stride;
                if v.vector_size() == 4 {
                    let four = Vector::<f32, N>::cast_from(v[start / 4]);
                    #[unroll]
                    for e in 0..4usize {
                        values[e] = four.extract(e);
                    }
                } else {
                    #[unroll]
                    for e in 0..4usize {
                        let x = v[start + e * rows.col_stride].extract(0usize);
                        values[e] = f32::cast_from(x);
                    }
                }
            }
            tile.write(row, vector, &values);
        }
    }
}

/// `Q8 K8^T` of two tiles of words; sums of 256 products are exact in f32 too.
#[cube]
pub(super) fn integer_scores(
    scores: &mut <Simt as TileEngine<f32>>::Fragment,
    q_tile: &Shared<[u32]>,
    k_tile: &Shared<[u32]>,
    #[comptime] words: usize,
) {
    let (rows, cols) = (scores.rows(), scores.cols());
    let mut exact = Array::<i32>::new(comptime!(rows * cols));
    #[unroll]
    for i in 0..comptime!(rows * cols) {
        exact[i] = 0;
    }
    for word in 0..words {
        let mut right = Array::<i32>::new(cols);
        #[unroll]
        for c in 0..cols {
            let at = scores.col(c) as usize * comptime!(words + 1) + word;
            right[c] = i32::reinterpret(k_tile[at]);
        }
        #[unroll]
        for r in 0..rows {
            let at = scores.row(r) as usize * comptime!(words + 1) + word;
            let left = i32::reinterpret(q_tile[at]);
            #[unroll]
            for c in 0..cols {
                let i = comptime!(r * cols + c);
                exact[i] = dp4a(left, right[c], exact[i]);
            }
        }
    }
    #[unroll]
    for r in 0..rows {
        #[unroll]
        for c in 0..cols {
            scores.set(r, c, f32::cast_from(exact[comptime!(r * cols + c)]));
        }
    }
}
