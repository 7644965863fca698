//! What differs between factors of 16 bits and of tf32.

use cubecl::prelude::*;

use super::{MmaFragment, MmaOperand};

/// How elements of shared tiles become the factors of products of 16 rows by 8 columns, which
/// contract over two vectors, `2 N` elements.
///
/// A lane's four registers of a left factor are rows `l/4` and `l/4 + 8` of its first half, then of
/// its second; the two of a right factor are those of column `l/4`. Both sides of a product must take
/// its summands in the same order: see [`Order`].
#[cube]
pub trait Factors<F: Float, N: Size>: 'static + Send + Sync {
    /// A left factor.
    type Left: CubeType;
    /// The right factors of two products.
    type Right: CubeType;

    /// A left factor whose rows are rows of a shared tile, in [`Order::Neighbours`]; lanes pass where
    /// its rows 0 to 15 of the first vector begin, then those of the second.
    fn left_rows(a: &MmaOperand<F, N>, at: usize) -> Self::Left;
    /// Right factors whose columns are rows of a shared tile, likewise; lanes pass where rows 0 to 7
    /// of both vectors begin, then rows 8 to 15.
    fn right_rows(b: &MmaOperand<F, N>, at: usize) -> Self::Right;
    /// The plane's left factor whose rows are columns of a shared tile, its summands the tile's rows
    /// from `2 N step` on, in [`Order::Fragment`].
    fn left_columns(a: &MmaOperand<F, N>, #[comptime] step: usize) -> Self::Left;
    /// `count` right factors, 1 or 2, whose columns are the shared tile's from `8 first` on, their
    /// summands its rows from `2 N step` on.
    fn right_columns(
        b: &MmaOperand<F, N>,
        #[comptime] step: usize,
        #[comptime] first: usize,
        #[comptime] count: usize,
        #[comptime] order: Order,
    ) -> Self::Right;

    /// A left factor, not initialised.
    fn empty() -> Self::Left;
    /// Makes the columns of `p` from `2 N step` on a left factor, in [`Order::Fragment`].
    fn stage(dst: &mut Self::Left, p: &MmaFragment, #[comptime] step: usize);
    /// `acc += left right`, with the right factor of that number.
    fn multiply(
        left: &Self::Left,
        right: &Self::Right,
        #[comptime] number: usize,
        acc: &mut Array<super::Pair<f32>>,
    );

    /// The elements of `a` that lie where columns `4 step` to `4 step + 3` of a fragment do.
    fn elements(a: &MmaOperand<F, N>, #[comptime] step: usize) -> Array<f32>;
}

/// Which summands of a product a lane holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// As rows of shared tiles are loaded.
    Neighbours,
    /// As the columns of fragments lie.
    Fragment,
}
