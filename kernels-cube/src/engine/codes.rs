//! Products of 8-bit codes, four to a word.

use cubecl::prelude::*;

use super::{Tile, TileEngine};
use crate::quantize::Format;

/// An engine that multiplies rows of codes too.
///
/// INT8 products are summed in integers, which f32 holds exactly up to 1040 of them. FP8 codes are
/// multiplied as the numbers they stand for.
#[cube]
pub trait CodeEngine<F: Float>: TileEngine<F> {
    /// A tile of codes in shared memory.
    type Codes: CubeType;

    /// A shared tile of `rows x dim` codes, not initialised.
    fn codes(
        #[comptime] rows: usize,
        #[comptime] dim: usize,
        #[comptime] format: Format,
        #[comptime] tile: Tile,
    ) -> Self::Codes;
    /// Begins to fill `dst` with the first `rows` rows of `words` from row `first` on, and zeros, as
    /// [`begin_load`](TileEngine::begin_load) does. Vectors of words are as long as the engine asks for:
    /// 1 for [`Simt`](super::Simt), 4 for [`Mma`](super::Mma).
    fn begin_codes<W: Size>(
        dst: &mut Self::Codes,
        words: &[Vector<u32, W>],
        first: usize,
        rows: u32,
        #[comptime] tile: Tile,
    );
    /// `dst = a b^T`, before the scales.
    fn mul_codes(dst: &mut Self::Fragment, a: &Self::Codes, b: &Self::Codes);
    /// Fills `dst` with the numbers, before their scales, of FP8 codes: the first `rows` rows of `words`
    /// from row `first` on, and zeros. Visible after the next [`await_loads`](TileEngine::await_loads) or
    /// `sync_cube`.
    fn load_numbers<W: Size>(
        dst: &mut Self::Operand,
        words: &[Vector<u32, W>],
        first: usize,
        rows: u32,
        #[comptime] tile: Tile,
    );
}
