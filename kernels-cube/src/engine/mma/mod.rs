//! The engine for warp-level tensor cores: CubeCL's `mma` of 16x8x16 with 16-bit factors, of 16x8x8 with
//! factors of tf32, f32 sums.
//!
//! A warp owns 16 rows of the tile and all its columns, so that every reduction along a row stays
//! within four lanes. A lane holds rows `l/4` and `l/4 + 8` of its warp's 16 and, of each 8 columns,
//! `2(l%4)` and the next. Weights never leave registers: score fragments are left sides of the next
//! product as they lie. Shared tiles keep the element type, a vector of padding a row, and are filled
//! with asynchronous copies, a group to a load. How elements become factors is up to [`Factors`].

mod codes;
mod factors;
mod fragment;
mod half;
mod operand;
mod sizes;
mod tf32;

pub(crate) use codes::{CodeProduct, CodeSums, CodeTile, Four, Fp8, Int8, Sixteen};
pub use factors::{Factors, Order};
pub use fragment::MmaFragment;
pub use half::Half;
pub use operand::MmaOperand;
pub(crate) use sizes::{mma_codes_supported, mma_supported};
pub use sizes::{mma_tile, mma_tiles};
pub use tf32::Tf32;

use std::marker::PhantomData;

use cubecl::prelude::*;
use operand::{padded, pitch};

use super::copies;
use super::vectors::{add_column_sums, apply_feature_map, apply_normalised};
use super::*;

type Pair<F> = Vector<F, Const<2>>;

/// The engine of `mma.sync` and its like, for tiles of vectors of `N` elements that become factors as
/// `X` says.
pub struct MmaEngine<N, X>(PhantomData<(N, X)>);

/// The engine for f16 and bf16.
pub type Mma = MmaEngine<Const<8>, Half>;
/// The engine that rounds f32 to tf32.
pub type MmaTf32 = MmaEngine<Const<4>, Tf32>;

#[cube]
impl<F: Float, N: Size, X: Factors<F, N>> TileEngine<F> for MmaEngine<N, X> {
    type Operand = MmaOperand<F, N>;
    type Fragment = MmaFragment;
    type Left = Sequence<X::Left>;
    type Scratch = ();

    fn operand(
        #[comptime] rows: usize,
        #[comptime] width: usize,
        #[comptime] _tile: Tile,
    ) -> MmaOperand<F, N> {
        MmaOperand::<F, N>::new(rows, width, 1usize)
    }

    fn ring(#[comptime] width: usize, #[comptime] tile: Tile) -> MmaOperand<F, N> {
        MmaOperand::<F, N>::new(tile.cols, width, tile.stages)
    }

    fn turn(ring: &mut MmaOperand<F, N>, stage: u32) {
        ring.first = stage as usize * comptime!(ring.rows * pitch(ring.width, ring.wide));
    }

    fn left(#[comptime] tile: Tile) -> Sequence<X::Left> {
        let wide = N::value().comptime();
        let mut steps = Sequence::<X::Left>::new();
        #[unroll]
        for _ in 0..comptime!(tile.cols / (2 * wide)) {
            steps.push(X::empty());
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

    fn begin_load<S: Size>(
        dst: &mut MmaOperand<F, N>,
        src: &Tensor<Vector<F, S>>,
        rows: RowRange,
        #[comptime] tile: Tile,
    ) {
        let vectors = comptime!(padded(dst.width, dst.wide) / dst.wide);
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
                dst.load::<S>(row, at % vectors, src, rows);
            }
        } else {
            while at < total {
                dst.load::<S>(at / vectors, at % vectors, src, rows);
                at += tile.units;
            }
        }
        copies::commit();
    }

    fn await_loads(#[comptime] newer: usize) {
        copies::wait(newer);
        sync_cube();
    }

    fn mul_nt(dst: &mut MmaFragment, a: &MmaOperand<F, N>, b: &MmaOperand<F, N>) {
        #[unroll]
        for t in 0..comptime!(dst.count) {
            let tile = dst.tiles.index_mut(t);
            tile[0] = Vector::new(0.0f32);
            tile[1] = Vector::new(0.0f32);
        }
        let lane = UNIT_POS_PLANE as usize;
        let a_row = (UNIT_POS / 32 * 16) as usize + lane % 16;
        let b_row = lane % 8 + lane / 16 * 8;
        #[unroll]
        for step in 0..comptime!(padded(a.width, a.wide) / (2 * a.wide)) {
            let at = a.at(a_row, comptime!(2 * step) + lane / 16);
            let left = X::left_rows(a, at);
            #[unroll]
            for t in 0..comptime!(dst.count / 2) {
                let at = b.at(
                    b_row + comptime!(16 * t),
                    comptime!(2 * step) + lane / 8 % 2,
                );
                let right = X::right_rows(b, at);
                multiply_two::<F, N, X>(&left, &right, dst, comptime!(2 * t));
            }
        }
    }

    fn stage(dst: &mut Sequence<X::Left>, p: &MmaFragment) {
        let wide = N::value().comptime();
        #[unroll]
        for step in 0..comptime!(8 * p.count / (2 * wide)) {
            X::stage(dst.index_mut(step), p, step);
        }
    }

    // A unit's left side is in its own registers.
    fn sync_left() {}

    fn mul_nn(acc: &mut MmaFragment, p: &Sequence<X::Left>, b: &MmaOperand<F, N>) {
        #[unroll]
        for step in 0..comptime!(b.rows / (2 * b.wide)) {
            multiply_columns::<F, N, X>(acc, &p[step], b, step, Order::Fragment);
        }
    }

    fn mul_tn(acc: &mut MmaFragment, a: &MmaOperand<F, N>, b: &MmaOperand<F, N>) {
        #[unroll]
        for step in 0..comptime!(a.rows / (2 * a.wide)) {
            let left = X::left_columns(a, step);
            multiply_columns::<F, N, X>(acc, &left, b, step, Order::Fragment);
        }
    }

    fn mul_on(acc: &mut MmaFragment, a: &MmaOperand<F, N>, first: u32, b: &MmaOperand<F, N>) {
        let lane = UNIT_POS_PLANE as usize;
        let a_row = (UNIT_POS / 32 * 16) as usize + lane % 16;
        #[unroll]
        for step in 0..comptime!(b.rows / (2 * b.wide)) {
            let vector = first as usize / a.wide + comptime!(2 * step) + lane / 16;
            let left = X::left_rows(a, a.at(a_row, vector));
            multiply_columns::<F, N, X>(acc, &left, b, step, Order::Neighbours);
        }
    }

    fn apply_feature_map(
        a: &mut MmaOperand<F, N>,
        len: u32,
        #[comptime] phi: FeatureMap,
        #[comptime] tile: Tile,
    ) {
        apply_feature_map::<MmaOperand<F, N>>(a, len, phi, tile, true);
    }

    fn apply_normalised(
        a: &mut MmaOperand<F, N>,
        len: u32,
        vector: &[f32],
        #[comptime] phi: FeatureMap,
        #[comptime] tile: Tile,
    ) {
        apply_normalised::<MmaOperand<F, N>>(a, len, vector, phi, tile, true);
    }

    fn elements(a: &MmaOperand<F, N>, _p: &MmaFragment, #[comptime] step: usize) -> Array<f32> {
        X::elements(a, step)
    }

    fn put(dst: &mut MmaOperand<F, N>, p: &MmaFragment) {
        let wide = comptime!(dst.wide);
        #[unroll]
        for r in 0..2usize {
            #[unroll]
            for t in 0..comptime!(p.count) {
                let pair = p.tiles[t][r];
                #[unroll]
                for vector in 0..comptime!(8 / wide) {
                    // Lanes hold a vector's columns two by two: each lane of a row gathers all of them
                    // and one writes, as a vector is the smallest thing that a shared tile stores.
                    let mut whole = Vector::<F, N>::empty();
                    #[unroll]
                    for l in 0..comptime!(wide / 2) {
                        let from =
                            UNIT_POS_PLANE / 4 * 4 + comptime!((vector * wide / 2 + l) as u32);
                        let low = plane_shuffle(pair.extract(0usize), from);
                        let high = plane_shuffle(pair.extract(1usize), from);
                        whole.insert(comptime!(2 * l), F::cast_from(low));
                        whole.insert(comptime!(2 * l + 1), F::cast_from(high));
                    }
                    if UNIT_POS_PLANE % 4 == comptime!(vector as u32) {
                        let at = dst.at(p.row(r) as usize, comptime!(8 / wide * t + vector));
                        dst.data[at] = whole;
                    }
                }
            }
            // Products contract over whole pairs of vectors.
            if comptime!(padded(8 * p.count, wide) > 8 * p.count) {
                let at = dst.at(p.row(r) as usize, comptime!(p.count));
                dst.data[at] = Vector::new(F::new(0.0));
            }
        }
    }

    fn row_dot(
        rows: &mut Array<f32>,
        a: &MmaOperand<F, N>,
        vector: &[f32],
        #[comptime] _tile: Tile,
    ) {
        let lane = UNIT_POS_PLANE as usize % 4;
        let first = (UNIT_POS / 32 * 16 + UNIT_POS_PLANE / 4) as usize;
        let vectors = comptime!(a.width / a.wide);
        #[unroll]
        for i in 0..comptime!(vectors.div_ceil(4)) {
            let at = lane + comptime!(4 * i);
            if at < vectors {
                #[unroll]
                for r in 0..2usize {
                    let x = a.data[a.at(first + comptime!(8 * r), at)];
                    #[unroll]
                    for e in 0..a.wide {
                        let y = vector[a.wide * at + e];
                        rows[r] = fma(f32::cast_from(x.extract(e)), y, rows[r]);
                    }
                }
            }
        }
    }

    fn vector_len() -> comptime_type!(usize) {
        N::value().comptime()
    }

    fn add_column_sums(
        sums: &mut Array<f32>,
        a: &MmaOperand<F, N>,
        weights: &Shared<[f32]>,
        vector: usize,
        first: usize,
        #[comptime] step: usize,
    ) {
        add_column_sums::<MmaOperand<F, N>>(sums, a, weights, vector, first, step);
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

/// `acc += left right` for all columns of `b`, the right factors.
#[cube]
fn multiply_columns<F: Float, N: Size, X: Factors<F, N>>(
    acc: &mut MmaFragment,
    left: &X::Left,
    b: &MmaOperand<F, N>,
    #[comptime] step: usize,
    #[comptime] order: Order,
) {
    #[unroll]
    for t in 0..comptime!(acc.count.div_ceil(2)) {
        let (first, count) = comptime!((2 * t, (acc.count - 2 * t).min(2)));
        let right = X::right_columns(b, step, first, count, order);
        multiply_two::<F, N, X>(left, &right, acc, first);
    }
}

/// `acc += left right` for the fragments `first` and `first + 1`; the second is left out past the last
/// fragment.
#[cube]
fn multiply_two<F: Float, N: Size, X: Factors<F, N>>(
    left: &X::Left,
    right: &X::Right,
    acc: &mut MmaFragment,
    #[comptime] first: usize,
) {
    let count = comptime!((acc.count - first).min(2));
    #[unroll]
    for number in 0..count {
        X::multiply(
            left,
            right,
            number,
            acc.tiles.index_mut(comptime!(first + number)),
        );
    }
}
