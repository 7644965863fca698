//! Factors of 16 bits, as they lie in shared tiles.
//!
//! A register holds two neighbours, and so does a fragment: a lane has the same summands in either
//! order.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use super::{Factors, MmaFragment, MmaOperand, Order, Pair};

/// Factors of type f16 or bf16, eight to a vector.
pub struct Half;

type Wide = Const<8>;

#[cube]
fn product<F: Float>() -> MmaDefinition<F, F, f32> {
    MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize)
}

#[cube]
fn load<F: Float>(
    a: &MmaOperand<F, Wide>,
    at: usize,
    #[comptime] ident: MatrixIdent,
    #[comptime] transposed: bool,
) -> Array<Pair<F>> {
    product::<F>().load_matrix::<Vector<F, Wide>, Const<2>>(
        &a.data[at..at + 1],
        ident,
        4usize,
        transposed,
    )
}

#[cube]
impl<F: Float> Factors<F, Wide> for Half {
    type Left = Array<Pair<F>>;
    type Right = Array<Pair<F>>;

    fn left_rows(a: &MmaOperand<F, Wide>, at: usize) -> Array<Pair<F>> {
        load::<F>(a, at, MatrixIdent::A, false)
    }

    fn right_rows(b: &MmaOperand<F, Wide>, at: usize) -> Array<Pair<F>> {
        load::<F>(b, at, MatrixIdent::B, false)
    }

    fn left_columns(a: &MmaOperand<F, Wide>, #[comptime] step: usize) -> Array<Pair<F>> {
        let lane = UNIT_POS_PLANE as usize;
        // Transposed matrices: columns 0-7 and 8-15 of 8 rows, then of the next 8.
        let row = lane % 8 + lane / 16 * 8;
        let vector = (UNIT_POS / 32 * 2) as usize + lane / 8 % 2;
        let at = a.at(row + comptime!(16 * step), vector);
        load::<F>(a, at, MatrixIdent::A, true)
    }

    fn right_columns(
        b: &MmaOperand<F, Wide>,
        #[comptime] step: usize,
        #[comptime] first: usize,
        #[comptime] _count: usize,
        #[comptime] _order: Order,
    ) -> Array<Pair<F>> {
        let lane = UNIT_POS_PLANE as usize;
        // Transposed matrices: rows 0-7 and 8-15 of 8 columns, then of the next 8. Rows are padded to
        // whole 16s, so that these are there.
        let at = b.at(lane % 16 + comptime!(16 * step), first + lane / 16);
        load::<F>(b, at, MatrixIdent::B, true)
    }

    fn empty() -> Array<Pair<F>> {
        Array::<Pair<F>>::new(4usize)
    }

    fn stage(dst: &mut Array<Pair<F>>, p: &MmaFragment, #[comptime] step: usize) {
        #[unroll]
        for half in 0..2usize {
            #[unroll]
            for r in 0..2usize {
                let pair = p.tiles[comptime!(2 * step + half)][r];
                dst[comptime!(2 * half + r)] = Vector::cast_from(pair);
            }
        }
    }

    fn multiply(
        left: &Array<Pair<F>>,
        right: &Array<Pair<F>>,
        #[comptime] number: usize,
        acc: &mut Array<Pair<f32>>,
    ) {
        let mut side = Array::<Pair<F>>::new(2usize);
        side[0] = right[comptime!(2 * number)];
        side[1] = right[comptime!(2 * number + 1)];
        product::<F>().execute_inplace(left, &side, acc);
    }

    fn elements(a: &MmaOperand<F, Wide>, #[comptime] step: usize) -> Array<f32> {
        let lane = UNIT_POS_PLANE as usize;
        let row = (UNIT_POS / 32 * 16) as usize + lane % 16;
        let at = a.at(row, comptime!(2 * step) + lane / 16);
        // A left factor's 16 columns lie as those of two fragments of 8 do.
        let pairs = load::<F>(a, at, MatrixIdent::A, false);
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
}
