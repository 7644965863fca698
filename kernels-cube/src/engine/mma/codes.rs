//! Codes: INT8 by products of 16x8x32, summed in integers; FP8, in tiles that become left sides, as 16-bit
//! numbers, which hold it exactly.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::barrier::copy_async_checked;
use cubecl::prelude::*;

use super::operand::{padded, pitch};
use super::{Mma, MmaFragment, MmaOperand};
use crate::asm::value;
use crate::engine::vectors::load_numbers;
use crate::engine::*;
use crate::quantize::Format;

/// Sixteen codes: a row of a matrix that `ldmatrix` loads.
pub(crate) type Sixteen = Vector<u32, Const<4>>;
/// Four codes: a register of a factor.
pub(crate) type Four = Vector<u32, Const<1>>;
/// Elements of 16 bits that take the room of sixteen codes.
const HALVES: usize = 8;

/// Shared tiles of `rows x 16 vectors` codes, one of which is turned to: vectors of padding between rows as
/// [`MmaOperand`] has them.
#[derive(CubeType)]
pub(crate) struct CodeTile {
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
impl CodeTile {
    /// `stages` tiles, not initialised.
    pub fn new(
        #[comptime] rows: usize,
        #[comptime] vectors: usize,
        #[comptime] stages: usize,
    ) -> CodeTile {
        let space = comptime!((stages * rows * row_pitch(vectors)).max(1));
        CodeTile {
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
        // The type of the factors is all the same to a matrix that is loaded.
        int8_product().load_matrix::<Sixteen, Const<1>>(row, ident, 4usize, false)
    }
}

/// How codes are multiplied: 16 rows by 8 columns, 32 of each.
#[cube]
pub(crate) trait CodeProduct: 'static + Send + Sync {
    /// The type of a sum.
    type Sum: Numeric;

    /// `sums += left right`, with the first or second of the two right factors.
    fn add(
        sums: &mut Array<Vector<Self::Sum, Const<2>>>,
        left: &Array<Four>,
        right: &Array<Four>,
        #[comptime] number: usize,
    );
}

/// INT8, summed in integers.
pub(crate) struct Int8;

#[cube]
fn int8_product() -> MmaDefinition<i8, i8, i32> {
    MmaDefinition::<i8, i8, i32>::new(16usize, 8usize, 32usize)
}

#[cube]
impl CodeProduct for Int8 {
    type Sum = i32;

    fn add(
        sums: &mut Array<Vector<i32, Const<2>>>,
        left: &Array<Four>,
        right: &Array<Four>,
        #[comptime] number: usize,
    ) {
        let mut a = Array::<Vector<i8, Const<4>>>::new(4usize);
        #[unroll]
        for i in 0..4usize {
            a[i] = Vector::reinterpret(left[i]);
        }
        let mut b = Array::<Vector<i8, Const<4>>>::new(2usize);
        #[unroll]
        for i in 0..2usize {
            b[i] = Vector::reinterpret(right[comptime!(2 * number + i)]);
        }
        int8_product().execute_inplace(&a, &b, sums);
    }
}

/// FP8 e4m3, summed in f32, of which tensor cores keep about 14 bits.
pub(crate) struct Fp8;

#[cube]
impl CodeProduct for Fp8 {
    type Sum = f32;

    // CubeCL spells this product as only compute capability 12.0 has it; all from 8.9 on have this one.
    fn add(
        sums: &mut Array<Vector<f32, Const<2>>>,
        left: &Array<Four>,
        right: &Array<Four>,
        #[comptime] number: usize,
    ) {
        let mut a = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            a.insert(i, left[i].extract(0usize));
        }
        let mut b = Vector::<u32, Const<2>>::empty();
        let mut c = Vector::<f32, Const<4>>::empty();
        #[unroll]
        for i in 0..2usize {
            b.insert(i, right[comptime!(2 * number + i)].extract(0usize));
            c.insert(comptime!(2 * i), sums[i].extract(0usize));
            c.insert(comptime!(2 * i + 1), sums[i].extract(1usize));
        }
        let (a, b, c) = (
            value::<Vector<u32, Const<4>>>(a),
            value::<Vector<u32, Const<2>>>(b),
            value::<Vector<f32, Const<4>>>(c),
        );
        let d: Vector<f32, Const<4>>;
        gpu_asm!(
            "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {d}, {a}, {b}, {c};",
            d = out(_) d, a = in(_) a, b = in(_) b, c = in(_) c,
            options(pure, nomem)
        );
        #[unroll]
        for i in 0..2usize {
            let mut pair = Vector::<f32, Const<2>>::empty();
            pair.insert(0usize, d.extract(comptime!(2 * i)));
            pair.insert(1usize, d.extract(comptime!(2 * i + 1)));
            sums[i] = pair;
        }
    }
}

/// Sums of products of codes, spread over lanes as an [`MmaFragment`] of so many times 8 columns.
#[derive(CubeType)]
pub(crate) struct CodeSums<P: CodeProduct> {
    tiles: Sequence<Array<Vector<P::Sum, Const<2>>>>,
    #[cube(comptime)]
    count: usize,
}

#[cube]
impl<P: CodeProduct> CodeSums<P> {
    /// All zeros.
    pub fn zeros(#[comptime] count: usize) -> CodeSums<P> {
        let mut tiles = Sequence::<Array<Vector<P::Sum, Const<2>>>>::new();
        #[unroll]
        for _ in 0..count {
            tiles.push(Array::<Vector<P::Sum, Const<2>>>::new(2usize));
        }
        let mut sums = CodeSums::<P> { tiles, count };
        sums.clear();
        sums
    }

    /// Sets them to zero.
    pub fn clear(&mut self) {
        #[unroll]
        for t in 0..self.count {
            let tile = self.tiles.index_mut(t);
            tile[0] = Vector::new(P::Sum::from_int(0));
            tile[1] = Vector::new(P::Sum::from_int(0));
        }
    }

    /// Adds the two products of `left` with `right` to the sums `first` and `first + 1`.
    pub fn add(&mut self, left: &Array<Four>, right: &Array<Four>, #[comptime] first: usize) {
        #[unroll]
        for number in 0..2usize {
            let tile = self.tiles.index_mut(comptime!(first + number));
            P::add(tile, left, right, number);
        }
    }

    /// The lane's sum `i`, of `[count, 2, 2]`.
    pub fn element(&self, #[comptime] i: usize) -> f32 {
        let pair = self.pair(comptime!(i / 4), comptime!(i / 2 % 2));
        pair.extract(comptime!(i % 2))
    }

    /// Those of 8 columns, of the lane's upper or lower row.
    fn pair(&self, #[comptime] tile: usize, #[comptime] row: usize) -> Vector<f32, Const<2>> {
        Vector::cast_from(self.tiles[tile][row])
    }
}

/// A shared tile of codes.
#[derive(CubeType)]
pub struct MmaCodes<F: Float> {
    integers: CodeTile,
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
            integers: CodeTile::new(comptime!(rows[0]), comptime!(dim / 16), 1usize),
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
fn mul_integers(dst: &mut MmaFragment, a: &CodeTile, b: &CodeTile) {
    let mut exact = CodeSums::<Int8>::zeros(dst.count);
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
