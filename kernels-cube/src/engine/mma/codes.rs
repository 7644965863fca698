//! Codes: INT8 by products of 16x8x32, summed in integers; FP8 as 16-bit numbers, which hold it exactly.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::barrier::copy_async_checked;
use cubecl::prelude::*;

use super::operand::{padded, pitch};
use super::{Mma, MmaFragment, MmaOperand};
use crate::engine::vectors::load_numbers;
use crate::engine::*;
use crate::quantize::Format;

/// Sixteen codes: a row of a matrix that `ldmatrix` loads.
pub(crate) type Sixteen = Vector<u32, Const<4>>;
/// Four codes: a register of a factor.
type Four = Vector<i8, Const<4>>;
/// Elements of 16 bits that take the room of sixteen codes.
const HALVES: usize = 8;

/// Shared tiles of `rows x 16 vectors` INT8 codes, one of which is turned to: vectors of padding between
/// rows as [`MmaOperand`] has them.
#[derive(CubeType)]
pub(crate) struct IntegerTile {
    data: Shared<[Sixteen]>,
    /// First vector of the tile.
    first: usize,
    #[cube(comptime)]
    rows: usize,
    /// Vectors of a row.
    #[cube(comptime)]
    vectors: usize,
}

/// Vectors of a row that products contract over, a multiple of the two that one of them takes.
fn whole(vectors: usize) -> usize {
    padded(vectors * HALVES, HALVES) / HALVES
}

/// Vectors from one row of a shared tile to the next.
fn row_pitch(vectors: usize) -> usize {
    pitch(vectors * HALVES, HALVES)
}

#[cube]
impl IntegerTile {
    /// `stages` tiles, not initialised.
    pub fn new(
        #[comptime] rows: usize,
        #[comptime] vectors: usize,
        #[comptime] stages: usize,
    ) -> IntegerTile {
        let space = comptime!((stages * rows * row_pitch(vectors)).max(1));
        IntegerTile {
            data: Shared::new_aligned_slice(space, 16usize),
            first: 0usize.runtime(),
            rows,
            vectors,
        }
    }

    /// Turns to another tile.
    pub fn turn(&mut self, stage: u32) {
        self.first = stage as usize * comptime!(self.rows * row_pitch(self.vectors));
    }

    /// Where a vector of the tile lies.
    fn at(&self, row: usize, vector: usize) -> usize {
        self.first + row * comptime!(row_pitch(self.vectors)) + vector
    }

    /// Begins to fill the tile: with the first `rows` rows from row `first_row` on of a matrix of `pitch`
    /// vectors to a row, `vectors` of each from `first` on, and zeros.
    pub fn begin_load<W: Size>(
        &mut self,
        words: &[Vector<u32, W>],
        first_row: usize,
        rows: u32,
        first: usize,
        vectors: usize,
        pitch: usize,
        #[comptime] units: usize,
    ) {
        let width = comptime!(whole(self.vectors));
        let mut at = UNIT_POS as usize;
        while at < comptime!(self.rows * width) {
            let (row, vector) = (at / width, at % width);
            // Nothing is read of a vector that does not exist: it becomes zeros.
            let exists = (row as u32) < rows && vector < vectors;
            let from = (first_row + row) * pitch + first + vector;
            let source = &words[from..from + select(exists, 1usize, 0usize)];
            let to = self.at(row, vector);
            copy_async_checked(source.downcast(), &mut self.data[to..to + 1], 4u32);
            at += units;
        }
    }

    /// A left factor of step `step`, 32 codes to a step: the plane's rows, of which lanes pass the first.
    pub fn left(&self, first_row: usize, #[comptime] step: usize) -> Array<Four> {
        let lane = UNIT_POS_PLANE as usize;
        let at = self.at(first_row + lane % 16, comptime!(2 * step) + lane / 16);
        self.load(at, MatrixIdent::A)
    }

    /// The right factors of two products: their columns are 16 rows from `first_row` on.
    pub fn right(&self, first_row: usize, #[comptime] step: usize) -> Array<Four> {
        let lane = UNIT_POS_PLANE as usize;
        let at = self.at(
            first_row + lane % 8 + lane / 16 * 8,
            comptime!(2 * step) + lane / 8 % 2,
        );
        self.load(at, MatrixIdent::B)
    }

    /// Four registers of factors: of matrices whose rows begin where lanes pass.
    fn load(&self, at: usize, #[comptime] ident: MatrixIdent) -> Array<Four> {
        let row = &self.data[at..at + 1];
        let words = product().load_matrix::<Sixteen, Const<1>>(row, ident, 4usize, false);
        let mut codes = Array::<Four>::new(4usize);
        #[unroll]
        for i in 0..4usize {
            codes[i] = Four::reinterpret(words[i]);
        }
        codes
    }
}

#[cube]
fn product() -> MmaDefinition<i8, i8, i32> {
    MmaDefinition::<i8, i8, i32>::new(16usize, 8usize, 32usize)
}

/// Sums of integers, spread over lanes as an [`MmaFragment`] of so many times 8 columns.
#[derive(CubeType)]
pub(crate) struct IntegerSums {
    tiles: Sequence<Array<Vector<i32, Const<2>>>>,
    #[cube(comptime)]
    count: usize,
}

#[cube]
impl IntegerSums {
    /// All zeros.
    pub fn zeros(#[comptime] count: usize) -> IntegerSums {
        let mut tiles = Sequence::<Array<Vector<i32, Const<2>>>>::new();
        #[unroll]
        for _ in 0..count {
            tiles.push(Array::<Vector<i32, Const<2>>>::new(2usize));
        }
        let mut sums = IntegerSums { tiles, count };
        sums.clear();
        sums
    }

    /// Sets them to zero.
    pub fn clear(&mut self) {
        #[unroll]
        for t in 0..self.count {
            let tile = self.tiles.index_mut(t);
            tile[0] = Vector::new(0i32);
            tile[1] = Vector::new(0i32);
        }
    }

    /// Adds the two products of `left` with `right` to the sums `first` and `first + 1`.
    pub fn add(&mut self, left: &Array<Four>, right: &Array<Four>, #[comptime] first: usize) {
        #[unroll]
        for number in 0..2usize {
            let mut side = Array::<Four>::new(2usize);
            side[0] = right[comptime!(2 * number)];
            side[1] = right[comptime!(2 * number + 1)];
            let tile = self.tiles.index_mut(comptime!(first + number));
            product().execute_inplace(left, &side, tile);
        }
    }

    /// Those of 8 columns, of the lane's upper or lower row.
    pub fn pair(&self, #[comptime] tile: usize, #[comptime] row: usize) -> Vector<f32, Const<2>> {
        Vector::cast_from(self.tiles[tile][row])
    }
}

/// A shared tile of codes.
#[derive(CubeType)]
pub struct MmaCodes<F: Float> {
    integers: IntegerTile,
    numbers: MmaOperand<F, Const<8>>,
    #[cube(comptime)]
    format: Format,
}

#[cube]
impl<F: Float> CodeEngine<F> for Mma {
    type Codes = MmaCodes<F>;

    fn codes(
        #[comptime] rows: usize,
        #[comptime] dim: usize,
        #[comptime] format: Format,
        #[comptime] _tile: Tile,
    ) -> MmaCodes<F> {
        let rows = comptime!(match format {
            Format::Fp8 => [0, rows],
            _ => [rows, 0],
        });
        MmaCodes::<F> {
            integers: IntegerTile::new(comptime!(rows[0]), comptime!(dim / 16), 1usize),
            numbers: MmaOperand::<F, Const<8>>::new(comptime!(rows[1]), dim, 1usize),
            format,
        }
    }

    fn begin_codes<W: Size>(
        dst: &mut MmaCodes<F>,
        words: &[Vector<u32, W>],
        first: usize,
        rows: u32,
        #[comptime] tile: Tile,
    ) {
        if comptime!(dst.format == Format::Fp8) {
            load_numbers::<MmaOperand<F, Const<8>>, W>(&mut dst.numbers, words, first, rows, tile);
        } else {
            let vectors = dst.integers.vectors;
            let units = tile.units;
            dst.integers
                .begin_load::<W>(words, first, rows, 0usize, vectors, vectors, units);
        }
        copies::commit();
    }

    fn mul_codes(dst: &mut MmaFragment, a: &MmaCodes<F>, b: &MmaCodes<F>) {
        if comptime!(a.format == Format::Fp8) {
            <Mma as TileEngine<F>>::mul_nt(dst, &a.numbers, &b.numbers);
        } else {
            mul_integers(dst, &a.integers, &b.integers);
        }
    }

    fn load_numbers<W: Size>(
        dst: &mut MmaOperand<F, Const<8>>,
        words: &[Vector<u32, W>],
        first: usize,
        rows: u32,
        #[comptime] tile: Tile,
    ) {
        load_numbers::<MmaOperand<F, Const<8>>, W>(dst, words, first, rows, tile);
    }
}

/// `dst = a b^T` of two tiles of INT8.
#[cube]
fn mul_integers(dst: &mut MmaFragment, a: &IntegerTile, b: &IntegerTile) {
    let mut exact = IntegerSums::zeros(dst.count);
    let own_rows = (UNIT_POS / 32 * 16) as usize;
    #[unroll]
    for step in 0..comptime!(whole(a.vectors) / 2) {
        let left = a.left(own_rows, step);
        #[unroll]
        for t in 0..comptime!(dst.count / 2) {
            let right = b.right(comptime!(16 * t), step);
            exact.add(&left, &right, comptime!(2 * t));
        }
    }
    #[unroll]
    for t in 0..comptime!(dst.count) {
        let tile = dst.tiles.index_mut(t);
        tile[0] = exact.pair(t, 0usize);
        tile[1] = exact.pair(t, 1usize);
    }
}
