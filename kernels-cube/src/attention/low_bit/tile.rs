//! Tiles of words and values, and integer products of them.

use cubecl::prelude::*;

use crate::engine::*;
use crate::quantize::{Format, number};
use crate::rows::RowRange;

type Numbers = <Simt as TileEngine<f32>>::Operand;

/// A shared tile of queries or keys: INT8 as words with one of padding a row, FP8 as numbers.
#[derive(CubeType)]
pub(super) struct CodeTile {
    words: Shared<[u32]>,
    numbers: Numbers,
    #[cube(comptime)]
    rows: usize,
    /// Words of a row.
    #[cube(comptime)]
    width: usize,
    #[cube(comptime)]
    format: Format,
    #[cube(comptime)]
    units: usize,
}

#[cube]
impl CodeTile {
    /// A tile of `rows x dim`, not initialised.
    pub fn new(
        #[comptime] rows: usize,
        #[comptime] dim: usize,
        #[comptime] format: Format,
        #[comptime] tile: Tile,
    ) -> CodeTile {
        let width = comptime!(dim / 4);
        let space = comptime!(match format {
            Format::Fp8 => [1, rows],
            _ => [rows * (width + 1), 0],
        });
        CodeTile {
            words: Shared::new_slice(comptime!(space[0])),
            numbers: <Simt as TileEngine<f32>>::operand(comptime!(space[1]), dim, tile),
            rows,
            width,
            format,
            units: tile.units,
        }
    }

    /// Fills the tile with `rows` rows of `words` from `first` on, and zeros.
    pub fn load(&mut self, words: &[u32], first: usize, rows: u32) {
        let (tile_rows, width, units) = (self.rows, self.width, self.units);
        if comptime!(self.format == Format::Fp8) {
            load_numbers(
                &mut self.numbers,
                words,
                first,
                rows,
                tile_rows,
                width,
                units,
            );
        } else {
            for step in 0..comptime!((tile_rows * width).div_ceil(units)) {
                let at = step * units + UNIT_POS as usize;
                if at < comptime!(tile_rows * width) {
                    let (row, word) = (at / width, at % width);
                    let mut value = 0u32.runtime();
                    if (row as u32) < rows {
                        value = words[(first + row) * width + word];
                    }
                    self.words[row * comptime!(width + 1) + word] = value;
                }
            }
        }
    }

    /// `scores = self keys^T`, before the scales.
    pub fn scores(&self, scores: &mut <Simt as TileEngine<f32>>::Fragment, keys: &CodeTile) {
        if comptime!(self.format == Format::Fp8) {
            <Simt as TileEngine<f32>>::mul_nt(scores, &self.numbers, &keys.numbers);
        } else {
            integer_scores(scores, &self.words, &keys.words, self.width);
        }
    }
}

/// Copies rows of FP8 words to a tile, as numbers: their scales are left for the end.
#[cube]
pub(super) fn load_numbers(
    tile: &mut Numbers,
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
    tile: &mut Numbers,
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
fn integer_scores(
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
