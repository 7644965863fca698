//! The engine for warp-level tensor cores: CubeCL's `mma` of 16x8x16, 16-bit operands, f32 sums.
//!
//! A warp owns 16 rows of the tile and all its columns, so that every reduction along a row stays
//! within four lanes. A lane holds rows `l/4` and `l/4 + 8` of its warp's 16 and, of each 8 columns,
//! `2(l%4)` and the next. Weights never leave registers: a pair of score fragments is the left side
//! of the next product as it lies. Shared tiles keep the element type, 8 elements of padding a row,
//! and are filled with asynchronous copies, a group to a load.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::features::MmaConfig;
use cubecl::ir::{DeviceProperties, ElemType, FloatKind};
use cubecl::prelude::barrier::copy_async_checked;
use cubecl::prelude::*;

use super::copies;
use super::vectors::{add_column_sums, apply_feature_map, apply_normalised};
use super::*;
use crate::DType;

/// Elements of a 16-byte vector.
const WIDE: usize = 8;

type Pair<F> = Vector<F, Const<2>>;
type Wide<F> = Vector<F, Const<8>>;

/// The engine of `mma.sync` and its like.
pub struct Mma;

/// Shared tiles of `[rows, pitch]` vectors of eight, one of which is turned to.
#[derive(CubeType)]
pub struct MmaOperand<F: Float> {
    data: Shared<[Wide<F>]>,
    /// First vector of the tile.
    first: usize,
    #[cube(comptime)]
    rows: usize,
    #[cube(comptime)]
    width: usize,
}

/// A fragment as one array of two pairs for each 8 columns.
#[derive(CubeType)]
pub struct MmaFragment {
    tiles: Sequence<Array<Pair<f32>>>,
    first_row: u32,
    #[cube(comptime)]
    count: usize,
}

/// Columns that products contract over, a multiple of 16.
fn padded(width: usize) -> usize {
    width.next_multiple_of(16)
}

/// Vectors from one row of a shared tile to the next: odd, so that the eight rows of a matrix lie in
/// different banks.
fn pitch(width: usize) -> usize {
    padded(width) / WIDE + 1
}

#[cube]
impl MmaFragment {
    fn zeros(#[comptime] cols: usize) -> Self {
        let count = comptime!(cols / 8);
        let mut tiles = Sequence::<Array<Pair<f32>>>::new();
        #[unroll]
        for _ in 0..count {
            let mut tile = Array::<Pair<f32>>::new(2usize);
            tile[0] = Vector::new(0.0f32);
            tile[1] = Vector::new(0.0f32);
            tiles.push(tile);
        }
        MmaFragment {
            tiles,
            first_row: UNIT_POS / 32 * 16 + UNIT_POS_PLANE / 4,
            count,
        }
    }
}

#[cube]
impl Fragment for MmaFragment {
    fn rows(&self) -> comptime_type!(usize) {
        2usize
    }

    fn cols(&self) -> comptime_type!(usize) {
        comptime!(2 * self.count)
    }

    fn run(&self) -> comptime_type!(usize) {
        2usize
    }

    fn get(&self, #[comptime] r: usize, #[comptime] c: usize) -> f32 {
        self.tiles[comptime!(c / 2)][r].extract(comptime!(c % 2))
    }

    fn set(&mut self, #[comptime] r: usize, #[comptime] c: usize, value: f32) {
        let tile = self.tiles.index_mut(comptime!(c / 2));
        let mut pair = tile[r];
        pair.insert(comptime!(c % 2), value);
        tile[r] = pair;
    }

    fn row(&self, #[comptime] r: usize) -> u32 {
        self.first_row + comptime!(8 * r as u32)
    }

    fn col(&self, #[comptime] c: usize) -> u32 {
        UNIT_POS_PLANE % 4 * 2 + comptime!((c / 2 * 8 + c % 2) as u32)
    }
}

#[cube]
impl<F: Float> MmaOperand<F> {
    fn new(#[comptime] rows: usize, #[comptime] width: usize, #[comptime] stages: usize) -> Self {
        MmaOperand::<F> {
            data: Shared::new_aligned_slice(
                comptime!((stages * rows * pitch(width)).max(1)),
                16usize,
            ),
            first: 0usize.runtime(),
            rows,
            width,
        }
    }

    /// Where a vector of the tile lies.
    fn at(&self, row: usize, vector: usize) -> usize {
        self.first + row * comptime!(pitch(self.width)) + vector
    }

    /// Begins to fill one vector of the tile.
    fn load<N: Size>(
        &mut self,
        row: usize,
        vector: usize,
        src: &Tensor<Vector<F, N>>,
        rows: RowRange,
    ) {
        let exists = (row as u32) < rows.len && vector < comptime!(self.width / WIDE);
        let to = self.at(row, vector);
        let start = rows.base + row * rows.row_stride;
        if src.vector_size() == 8 {
            // Nothing is read of a vector that does not exist: it becomes zeros.
            let from = (start + vector * WIDE) / WIDE;
            let source = &src.as_slice()[from..from + select(exists, 1usize, 0usize)];
            copy_async_checked(source.downcast(), &mut self.data[to..to + 1], 8u32);
        } else {
            let mut value = Wide::<F>::new(F::new(0.0));
            if exists {
                #[unroll]
                for e in 0..WIDE {
                    let x = src[start + (vector * WIDE + e) * rows.col_stride];
                    value.insert(e, x.extract(0usize));
                }
            }
            self.data[to] = value;
        }
    }
}

#[cube]
impl<F: Float> VectorRows for MmaOperand<F> {
    fn rows(&self) -> comptime_type!(usize) {
        self.rows
    }

    fn vectors(&self) -> comptime_type!(usize) {
        comptime!(self.width / WIDE)
    }

    fn size(&self) -> comptime_type!(usize) {
        WIDE
    }

    fn read(&self, row: usize, vector: usize) -> Array<f32> {
        let x = self.data[self.at(row, vector)];
        let mut values = Array::<f32>::new(WIDE);
        #[unroll]
        for e in 0..WIDE {
            values[e] = f32::cast_from(x.extract(e));
        }
        values
    }

    fn write(&mut self, row: usize, vector: usize, values: &Array<f32>) {
        let mut x = Wide::<F>::empty();
        #[unroll]
        for e in 0..WIDE {
            x.insert(e, F::cast_from(values[e]));
        }
        let at = self.at(row, vector);
        self.data[at] = x;
    }
}

#[cube]
impl<F: Float> TileEngine<F> for Mma {
    type Operand = MmaOperand<F>;
    type Fragment = MmaFragment;
    type Left = Sequence<Array<Pair<F>>>;
    type Scratch = ();

    fn operand(
        #[comptime] rows: usize,
        #[comptime] width: usize,
        #[comptime] _tile: Tile,
    ) -> MmaOperand<F> {
        MmaOperand::<F>::new(rows, width, 1usize)
    }

    fn ring(#[comptime] width: usize, #[comptime] tile: Tile) -> MmaOperand<F> {
        MmaOperand::<F>::new(tile.cols, width, tile.stages)
    }

    fn turn(ring: &mut MmaOperand<F>, stage: u32) {
        ring.first = stage as usize * comptime!(ring.rows * pitch(ring.width));
    }

    fn left(#[comptime] tile: Tile) -> Sequence<Array<Pair<F>>> {
        let mut steps = Sequence::<Array<Pair<F>>>::new();
        #[unroll]
        for _ in 0..comptime!(tile.cols / 16) {
            steps.push(Array::<Pair<F>>::new(4usize));
        }
        steps
    }

    fn scratch(#[comptime] _tile: Tile) {}

    fn scores(#[comptime] tile: Tile) -> MmaFragment {
        MmaFragment::zeros(tile.cols)
    }

    fn accumulator(#[comptime] width: usize, #[comptime] _tile: Tile) -> MmaFragment {
        MmaFragment::zeros(width)
    }

    fn begin_load<N: Size>(
        dst: &mut MmaOperand<F>,
        src: &Tensor<Vector<F, N>>,
        rows: RowRange,
        #[comptime] tile: Tile,
    ) {
        let vectors = comptime!(padded(dst.width) / WIDE);
        let total = comptime!(dst.rows * vectors);
        // Steps of whole rows keep a unit to its column, but their addresses take registers, of which
        // programs without stages have none to spare.
        let whole =
            comptime!(tile.units.is_multiple_of(vectors) && total.is_multiple_of(tile.units));
        let mut at = UNIT_POS as usize;
        if comptime!(whole && tile.stages > 1) {
            #[unroll]
            for step in 0..comptime!(total / tile.units) {
                let row = at / vectors + comptime!(step * tile.units / vectors);
                dst.load::<N>(row, at % vectors, src, rows);
            }
        } else {
            while at < total {
                dst.load::<N>(at / vectors, at % vectors, src, rows);
                at += tile.units;
            }
        }
        copies::commit();
    }

    fn await_loads(#[comptime] newer: usize) {
        copies::wait(newer);
        sync_cube();
    }

    fn mul_nt(dst: &mut MmaFragment, a: &MmaOperand<F>, b: &MmaOperand<F>) {
        let mma = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
        #[unroll]
        for t in 0..comptime!(dst.count) {
            let tile = dst.tiles.index_mut(t);
            tile[0] = Vector::new(0.0f32);
            tile[1] = Vector::new(0.0f32);
        }
        let lane = UNIT_POS_PLANE as usize;
        let a_row = (UNIT_POS / 32 * 16) as usize + lane % 16;
        // Matrices of b: rows 0-7 of both halves of the 16 columns, then rows 8-15.
        let b_row = lane % 8 + lane / 16 * 8;
        #[unroll]
        for step in 0..comptime!(padded(a.width) / 16) {
            let from = a.at(a_row, comptime!(2 * step) + lane / 16);
            let left = mma.load_matrix::<Wide<F>, Const<2>>(
                &a.data[from..from + 1],
                MatrixIdent::A,
                4usize,
                false,
            );
            #[unroll]
            for t in 0..comptime!(dst.count / 2) {
                let from = b.at(
                    b_row + comptime!(16 * t),
                    comptime!(2 * step) + lane / 8 % 2,
                );
                let right = mma.load_matrix::<Wide<F>, Const<2>>(
                    &b.data[from..from + 1],
                    MatrixIdent::B,
                    4usize,
                    false,
                );
                multiply_two::<F>(&mma, &left, &right, dst, comptime!(2 * t));
            }
        }
    }

    fn stage(dst: &mut Sequence<Array<Pair<F>>>, p: &MmaFragment) {
        #[unroll]
        for step in 0..comptime!(p.count / 2) {
            let left = dst.index_mut(step);
            #[unroll]
            for half in 0..2usize {
                #[unroll]
                for r in 0..2usize {
                    let pair = p.tiles[comptime!(2 * step + half)][r];
                    left[comptime!(2 * half + r)] = Vector::cast_from(pair);
                }
            }
        }
    }

    // A unit's left side is in its own registers.
    fn sync_left() {}

    fn mul_nn(acc: &mut MmaFragment, p: &Sequence<Array<Pair<F>>>, b: &MmaOperand<F>) {
        let mma = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
        let lane = UNIT_POS_PLANE as usize;
        // Transposed matrices of b: rows 0-7 and 8-15 of 8 columns, then of the next 8.
        let row = lane % 16;
        #[unroll]
        for step in 0..comptime!(b.rows / 16) {
            #[unroll]
            for t in 0..comptime!(acc.count.div_ceil(2)) {
                let from = b.at(row + comptime!(16 * step), comptime!(2 * t) + lane / 16);
                let right = mma.load_matrix::<Wide<F>, Const<2>>(
                    &b.data[from..from + 1],
                    MatrixIdent::B,
                    4usize,
                    true,
                );
                multiply_two::<F>(&mma, &p[step], &right, acc, comptime!(2 * t));
            }
        }
    }

    fn mul_tn(acc: &mut MmaFragment, a: &MmaOperand<F>, b: &MmaOperand<F>) {
        let mma = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
        let lane = UNIT_POS_PLANE as usize;
        // Transposed matrices of a: columns 0-7 and 8-15 of 8 rows, then of the next 8.
        let a_row = lane % 8 + lane / 16 * 8;
        let a_vector = (UNIT_POS / 32 * 2) as usize + lane / 8 % 2;
        let b_row = lane % 16;
        #[unroll]
        for step in 0..comptime!(a.rows / 16) {
            let from = a.at(a_row + comptime!(16 * step), a_vector);
            let left = mma.load_matrix::<Wide<F>, Const<2>>(
                &a.data[from..from + 1],
                MatrixIdent::A,
                4usize,
                true,
            );
            #[unroll]
            for t in 0..comptime!(acc.count.div_ceil(2)) {
                let from = b.at(b_row + comptime!(16 * step), comptime!(2 * t) + lane / 16);
                let right = mma.load_matrix::<Wide<F>, Const<2>>(
                    &b.data[from..from + 1],
                    MatrixIdent::B,
                    4usize,
                    true,
                );
                multiply_two::<F>(&mma, &left, &right, acc, comptime!(2 * t));
            }
        }
    }

    fn mul_on(acc: &mut MmaFragment, a: &MmaOperand<F>, first: u32, b: &MmaOperand<F>) {
        let mma = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
        let lane = UNIT_POS_PLANE as usize;
        let a_row = (UNIT_POS / 32 * 16) as usize + lane % 16;
        let b_row = lane % 16;
        #[unroll]
        for step in 0..comptime!(b.rows / 16) {
            let vector = first as usize / WIDE + comptime!(2 * step) + lane / 16;
            let from = a.at(a_row, vector);
            let left = mma.load_matrix::<Wide<F>, Const<2>>(
                &a.data[from..from + 1],
                MatrixIdent::A,
                4usize,
                false,
            );
            #[unroll]
            for t in 0..comptime!(acc.count.div_ceil(2)) {
                let from = b.at(b_row + comptime!(16 * step), comptime!(2 * t) + lane / 16);
                let right = mma.load_matrix::<Wide<F>, Const<2>>(
                    &b.data[from..from + 1],
                    MatrixIdent::B,
                    4usize,
                    true,
                );
                multiply_two::<F>(&mma, &left, &right, acc, comptime!(2 * t));
            }
        }
    }

    fn apply_feature_map(
        a: &mut MmaOperand<F>,
        len: u32,
        #[comptime] phi: FeatureMap,
        #[comptime] tile: Tile,
    ) {
        apply_feature_map::<MmaOperand<F>>(a, len, phi, tile, true);
    }

    fn apply_normalised(
        a: &mut MmaOperand<F>,
        len: u32,
        vector: &[f32],
        #[comptime] phi: FeatureMap,
        #[comptime] tile: Tile,
    ) {
        apply_normalised::<MmaOperand<F>>(a, len, vector, phi, tile, true);
    }

    fn elements(a: &MmaOperand<F>, _p: &MmaFragment, #[comptime] step: usize) -> Array<f32> {
        let mma = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
        let lane = UNIT_POS_PLANE as usize;
        let row = (UNIT_POS / 32 * 16) as usize + lane % 16;
        let from = row * comptime!(pitch(a.width)) + comptime!(2 * step) + lane / 16;
        // A left side's 16 columns lie as those of two fragments of 8 do.
        let pairs = mma.load_matrix::<Wide<F>, Const<2>>(
            &a.data[from..from + 1],
            MatrixIdent::A,
            4usize,
            false,
        );
        let mut values = Array::<f32>::new(8usize);
        #[unroll]
        for r in 0..2usize {
            #[unroll]
            for i in 0..4usize {
                let x = pairs[comptime!(i / 2 * 2 + r)].extract(comptime!(i % 2));
                values[comptime!(4 * r + i)] = f32::cast_from(x);
            }
        }
        values
    }

    fn put(dst: &mut MmaOperand<F>, p: &MmaFragment) {
        #[unroll]
        for r in 0..2usize {
            #[unroll]
            for t in 0..comptime!(p.count) {
                // Four lanes hold a row's eight columns: each gathers all of them and the first
                // writes, as a vector is the smallest thing that a shared tile stores.
                let pair = p.tiles[t][r];
                let mut wide = Wide::<F>::empty();
                #[unroll]
                for l in 0..4usize {
                    let from = UNIT_POS_PLANE / 4 * 4 + comptime!(l as u32);
                    let low = plane_shuffle(pair.extract(0usize), from);
                    let high = plane_shuffle(pair.extract(1usize), from);
                    wide.insert(comptime!(2 * l), F::cast_from(low));
                    wide.insert(comptime!(2 * l + 1), F::cast_from(high));
                }
                if UNIT_POS_PLANE % 4 == 0 {
                    let at = dst.at(p.row(r) as usize, t);
                    dst.data[at] = wide;
                }
            }
            // Products contract over whole 16s.
            if comptime!(p.count % 2 == 1) {
                let at = dst.at(p.row(r) as usize, comptime!(p.count));
                dst.data[at] = Vector::new(F::new(0.0));
            }
        }
    }

    fn row_dot(rows: &mut Array<f32>, a: &MmaOperand<F>, vector: &[f32], #[comptime] _tile: Tile) {
        let lane = UNIT_POS_PLANE as usize % 4;
        let first = (UNIT_POS / 32 * 16 + UNIT_POS_PLANE / 4) as usize;
        let vectors = comptime!(a.width / WIDE);
        #[unroll]
        for i in 0..comptime!(vectors.div_ceil(4)) {
            let at = lane + comptime!(4 * i);
            if at < vectors {
                #[unroll]
                for r in 0..2usize {
                    let x = a.data[a.at(first + comptime!(8 * r), at)];
                    #[unroll]
                    for e in 0..WIDE {
                        let y = vector[WIDE * at + e];
                        rows[r] = fma(f32::cast_from(x.extract(e)), y, rows[r]);
                    }
                }
            }
        }
    }

    fn vector_len() -> comptime_type!(usize) {
        WIDE
    }

    fn add_column_sums(
        sums: &mut Array<f32>,
        a: &MmaOperand<F>,
        weights: &Shared<[f32]>,
        vector: usize,
        first: usize,
        #[comptime] step: usize,
    ) {
        add_column_sums::<MmaOperand<F>>(sums, a, weights, vector, first, step);
    }

    fn row_max(rows: &mut Array<f32>, _scratch: &mut (), #[comptime] _tile: Tile) {
        #[unroll]
        for r in 0..2usize {
            rows[r] = max(rows[r], plane_shuffle_xor(rows[r], 1));
            rows[r] = max(rows[r], plane_shuffle_xor(rows[r], 2));
        }
    }

    fn row_sum(rows: &mut Array<f32>, _scratch: &mut (), #[comptime] _tile: Tile) {
        #[unroll]
        for r in 0..2usize {
            rows[r] += plane_shuffle_xor(rows[r], 1);
            rows[r] += plane_shuffle_xor(rows[r], 2);
        }
    }
}

/// `acc += left right` for the fragments `first` and `first + 1`, whose right sides lie one after the
/// other; the second is left out past the last fragment.
#[cube]
fn multiply_two<F: Float>(
    mma: &MmaDefinition<F, F, f32>,
    left: &Array<Pair<F>>,
    right: &Array<Pair<F>>,
    acc: &mut MmaFragment,
    #[comptime] first: usize,
) {
    let count = comptime!((acc.count - first).min(2));
    #[unroll]
    for half in 0..count {
        let mut side = Array::<Pair<F>>::new(2usize);
        side[0] = right[comptime!(2 * half)];
        side[1] = right[comptime!(2 * half + 1)];
        mma.execute_inplace(left, &side, acc.tiles.index_mut(comptime!(first + half)));
    }
}

/// Whether the device can run this engine on 16-bit elements, or why not.
pub(crate) fn mma_supported(dtype: DType, device: &DeviceProperties) -> Result<(), &'static str> {
    if dtype == DType::F32 {
        return Err("the tensor cores would round f32 to tf32");
    }
    let elem = dtype.elem_type();
    let config = MmaConfig {
        a_type: elem,
        b_type: elem,
        cd_type: ElemType::Float(FloatKind::F32),
        m: 16,
        n: 8,
        k: 16,
    };
    let matmul = &device.features.matmul;
    if !matmul.mma.contains(&config) || !matmul.ldmatrix.contains(&elem) {
        return Err("the device has no 16x8x16 product of this type");
    }
    if device.hardware.plane_size_min != 32 || device.hardware.plane_size_max != 32 {
        return Err("fragments are laid out for planes of 32 units");
    }
    if !device.features.copy_async {
        return Err("the device has no asynchronous copies to shared memory");
    }
    Ok(())
}

/// The tile program of this engine, or why it cannot run.
///
/// # Errors
/// The reason, in a few words.
pub fn mma_tile(
    needs: &TileNeeds,
    dtype: DType,
    device: &DeviceProperties,
) -> Result<Tile, &'static str> {
    let tiles = mma_tiles(needs, dtype, device)?;
    // Of 128 rows, half as many cubes fit a multiprocessor, each of which waits as one.
    tiles
        .into_iter()
        .find(|tile| tile.rows <= 64)
        .ok_or("no tile fits the shared memory")
}

/// All tile programs of this engine that the device can run, larger tiles first; of each size the one
/// with the most stages that are worth their memory.
///
/// # Errors
/// Why it can run none, in a few words.
pub fn mma_tiles(
    needs: &TileNeeds,
    dtype: DType,
    device: &DeviceProperties,
) -> Result<Vec<Tile>, &'static str> {
    mma_supported(dtype, device)?;
    let columns: usize = needs.accumulators.iter().sum();
    if columns > 256 {
        return Err("the accumulators do not fit the registers");
    }
    let most_cols = if columns > 128 { 32 } else { 64 };
    let sizes = [128, 64, 32, 16].map(|rows| [64, 32, 16].map(|cols| (rows, cols)));
    let tiles = sizes
        .into_iter()
        .flatten()
        .filter(|(rows, cols)| {
            *rows <= needs.max_rows && *cols <= most_cols && needs.max_cols.is_multiple_of(*cols)
        })
        .filter_map(|size| staged(needs, size, device.hardware.max_shared_memory_size))
        .collect();
    Ok(tiles)
}

/// A tile program of so many rows and columns in `memory` bytes, or none if it does not fit.
///
/// Two stages hide a copy behind a tile's products. A third hides what is left of it, if 16 planes
/// still fit a multiprocessor, whose memory is about what one cube may have.
fn staged(needs: &TileNeeds, (rows, cols): (usize, usize), memory: usize) -> Option<Tile> {
    let tile = |stages| Tile {
        rows,
        cols,
        units: rows * 2,
        stages,
    };
    let planes = |tile: &Tile| memory / shared_memory(needs, *tile).max(1) * (tile.units / 32);
    let third = Some(tile(3)).filter(|tile| planes(tile) >= 16);
    third
        .into_iter()
        .chain([tile(2), tile(1)])
        .find(|tile| tile.stages <= needs.max_stages && planes(tile) > 0)
}

/// Bytes of shared memory of a tile program.
fn shared_memory(needs: &TileNeeds, tile: Tile) -> usize {
    let operands = |rows: usize, widths: &[usize]| -> usize {
        widths.iter().map(|&width| rows * pitch(width) * 16).sum()
    };
    operands(tile.rows, &needs.owned) + tile.stages * operands(tile.cols, &needs.streamed)
}
