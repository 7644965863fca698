//! Codes: INT8 as words with one of padding a row, summed by `dp4a`; FP8 as numbers.

use cubecl::prelude::*;

use super::{Simt, SimtFragment, SimtOperand};
use crate::engine::vectors::load_numbers;
use crate::engine::*;
use crate::quantize::Format;

/// A shared tile of codes.
#[derive(CubeType)]
pub struct SimtCodes {
    words: Shared<[u32]>,
    numbers: SimtOperand,
    #[cube(comptime)]
    rows: usize,
    /// Words of a row.
    #[cube(comptime)]
    width: usize,
    #[cube(comptime)]
    format: Format,
}

#[cube]
impl<F: Float> CodeEngine<F> for Simt {
    type Codes = SimtCodes;

    fn codes(
        #[comptime] rows: usize,
        #[comptime] dim: usize,
        #[comptime] format: Format,
        #[comptime] _tile: Tile,
    ) -> SimtCodes {
        let width = comptime!(dim / 4);
        let space = comptime!(match format {
            Format::Fp8 => [1, rows],
            _ => [rows * (width + 1), 0],
        });
        SimtCodes {
            words: Shared::new_slice(comptime!(space[0])),
            numbers: SimtOperand::new(comptime!(space[1]), dim, 1usize),
            rows,
            width,
            format,
        }
    }

    fn begin_codes<W: Size>(
        dst: &mut SimtCodes,
        words: &[Vector<u32, W>],
        first: usize,
        rows: u32,
        #[comptime] tile: Tile,
    ) {
        let (tile_rows, width) = comptime!((dst.rows, dst.width));
        if comptime!(dst.format == Format::Fp8) {
            load_numbers::<SimtOperand, W>(&mut dst.numbers, words, first, rows, tile);
        } else {
            for step in 0..comptime!((tile_rows * width).div_ceil(tile.units)) {
                let at = step * tile.units + UNIT_POS as usize;
                if at < comptime!(tile_rows * width) {
                    let (row, word) = (at / width, at % width);
                    let mut value = 0u32.runtime();
                    if (row as u32) < rows {
                        value = words[(first + row) * width + word].extract(0usize);
                    }
                    dst.words[row * comptime!(width + 1) + word] = value;
                }
            }
        }
    }

    fn mul_codes(dst: &mut SimtFragment, a: &SimtCodes, b: &SimtCodes) {
        if comptime!(a.format == Format::Fp8) {
            <Simt as TileEngine<F>>::mul_nt(dst, &a.numbers, &b.numbers);
        } else {
            mul_integers(dst, &a.words, &b.words, a.width);
        }
    }

    fn load_numbers<W: Size>(
        dst: &mut SimtOperand,
        words: &[Vector<u32, W>],
        first: usize,
        rows: u32,
        #[comptime] tile: Tile,
    ) {
        load_numbers::<SimtOperand, W>(dst, words, first, rows, tile);
    }
}

/// `dst = a b^T` of two tiles of words.
#[cube]
fn mul_integers(
    dst: &mut SimtFragment,
    a: &Shared<[u32]>,
    b: &Shared<[u32]>,
    #[comptime] words: usize,
) {
    let (rows, cols) = (dst.rows(), dst.cols());
    let mut exact = Array::<i32>::new(comptime!(rows * cols));
    #[unroll]
    for i in 0..comptime!(rows * cols) {
        exact[i] = 0;
    }
    for word in 0..words {
        let mut right = Array::<i32>::new(cols);
        #[unroll]
        for c in 0..cols {
            let at = dst.col(c) as usize * comptime!(words + 1) + word;
            right[c] = i32::reinterpret(b[at]);
        }
        #[unroll]
        for r in 0..rows {
            let at = dst.row(r) as usize * comptime!(words + 1) + word;
            let left = i32::reinterpret(a[at]);
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
            dst.set(r, c, f32::cast_from(exact[comptime!(r * cols + c)]));
        }
    }
}
