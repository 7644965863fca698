//! Factors of tf32: f32 in shared tiles, rounded to the nearest of 10 bits of mantissa, ties away from
//! zero, on their way to a product.
//!
//! Rows come four elements to a matrix of `ldmatrix`, which moves 16 bytes of whatever type. It can
//! transpose elements of 16 bits only, so columns are read one by one: with the summands of
//! [`Order::Fragment`] a plane's 32 lie in different banks. That order also makes a fragment a left
//! factor as it lies: its neighbours `2t` and `2t + 1` become the summands `t` and `t + 4`.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;
use cubecl::tf32;

use super::{Factors, MmaFragment, MmaOperand, Order, Pair};

/// Factors of f32 elements, four to a vector.
pub struct Tf32;

type Wide = Const<4>;
type One<F> = Vector<F, Const<1>>;

#[cube]
fn product() -> MmaDefinition<tf32, tf32, f32> {
    MmaDefinition::<tf32, tf32, f32>::new(16usize, 8usize, 8usize)
}

#[cube]
fn load<F: Float>(
    a: &MmaOperand<F, Wide>,
    at: usize,
    #[comptime] ident: MatrixIdent,
) -> Array<One<tf32>> {
    let row = &a.data[at..at + 1];
    let exact = product().load_matrix::<Vector<F, Wide>, Const<1>>(row, ident, 4usize, false);
    let mut rounded = Array::<One<tf32>>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        rounded[i] = Vector::cast_from(exact[i]);
    }
    rounded
}

/// One element of a tile.
#[cube]
fn element<F: Float>(a: &MmaOperand<F, Wide>, row: usize, column: usize) -> One<F> {
    let elements = a.data.with_vector_size::<Const<1>>();
    elements[a.at(row, 0usize) * 4 + column]
}

#[cube]
impl<F: Float> Factors<F, Wide> for Tf32 {
    type Left = Array<One<tf32>>;
    type Right = Array<One<tf32>>;

    fn left_rows(a: &MmaOperand<F, Wide>, at: usize) -> Array<One<tf32>> {
        load::<F>(a, at, MatrixIdent::A)
    }

    fn right_rows(b: &MmaOperand<F, Wide>, at: usize) -> Array<One<tf32>> {
        load::<F>(b, at, MatrixIdent::B)
    }

    fn left_columns(a: &MmaOperand<F, Wide>, #[comptime] step: usize) -> Array<One<tf32>> {
        let lane = UNIT_POS_PLANE as usize;
        let row = lane % 4 * 2 + comptime!(8 * step);
        let column = (UNIT_POS / 32 * 16) as usize + lane / 4;
        let mut left = Array::<One<tf32>>::new(4usize);
        #[unroll]
        for i in 0..4usize {
            let x = element::<F>(a, row + comptime!(i / 2), column + comptime!(i % 2 * 8));
            left[i] = Vector::cast_from(x);
        }
        left
    }

    fn right_columns(
        b: &MmaOperand<F, Wide>,
        #[comptime] step: usize,
        #[comptime] first: usize,
        #[comptime] count: usize,
        #[comptime] order: Order,
    ) -> Array<One<tf32>> {
        let lane = UNIT_POS_PLANE as usize;
        // Rows of a lane's two registers: its first, and how far the second is.
        let (apart, between) = comptime!(match order {
            Order::Neighbours => (1, 4),
            Order::Fragment => (2, 1),
        });
        let row = lane % 4 * apart + comptime!(8 * step);
        let column = lane / 4 + comptime!(8 * first);
        let mut right = Array::<One<tf32>>::new(4usize);
        #[unroll]
        for i in 0..comptime!(2 * count) {
            let row = row + comptime!(i % 2 * between);
            let x = element::<F>(b, row, column + comptime!(i / 2 * 8));
            right[i] = Vector::cast_from(x);
        }
        right
    }

    fn empty() -> Array<One<tf32>> {
        Array::<One<tf32>>::new(4usize)
    }

    fn stage(dst: &mut Array<One<tf32>>, p: &MmaFragment, #[comptime] step: usize) {
        #[unroll]
        for i in 0..4usize {
            let x = p.tiles[step][comptime!(i % 2)].extract(comptime!(i / 2));
            dst[i] = Vector::cast_from(x);
        }
    }

    fn multiply(
        left: &Array<One<tf32>>,
        right: &Array<One<tf32>>,
        #[comptime] number: usize,
        acc: &mut Array<Pair<f32>>,
    ) {
        let mut side = Array::<One<tf32>>::new(2usize);
        side[0] = right[comptime!(2 * number)];
        side[1] = right[comptime!(2 * number + 1)];
        product().execute_inplace(left, &side, acc);
    }

    fn elements(a: &MmaOperand<F, Wide>, #[comptime] step: usize) -> Array<f32> {
        let lane = UNIT_POS_PLANE as usize;
        let row = (UNIT_POS / 32 * 16) as usize + lane / 4;
        let column = lane % 4 * 2 + comptime!(16 * step);
        let mut values = Array::<f32>::new(8usize);
        #[unroll]
        for i in 0..8usize {
            let column = column + comptime!(i % 4 / 2 * 8 + i % 2);
            let x = element::<F>(a, row + comptime!(i / 4 * 8), column);
            values[i] = f32::cast_from(x.extract(0usize));
        }
        values
    }
}
