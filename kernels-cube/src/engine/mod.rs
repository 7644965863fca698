//! Tile engines: what an algorithm needs from a device, and nothing else.
//!
//! A *tile program* is what one cube does: it owns a tile of rows, streams tiles of other rows past
//! it, and keeps its results in registers. Two products are enough to write attention forward and
//! backward, if the rows that a program owns are always the left operand:
//!
//! | product | forward | dQ | dK, dV |
//! |---|---|---|---|
//! | [`mul_nt`](TileEngine::mul_nt): `scores = A Bᵀ` over the head dimension | `Q Kᵀ` | `Q Kᵀ`, `dO Vᵀ` | `K Qᵀ`, `V dOᵀ` |
//! | [`mul_nn`](TileEngine::mul_nn): `acc += P B` over the streamed rows | `P V` | `dS K` | `Pᵀ dO`, `dSᵀ Q` |
//!
//! Linear attention needs three more: [`mul_tn`](TileEngine::mul_tn) for the states `phi(K)ᵀ V`,
//! [`mul_on`](TileEngine::mul_on) for `phi(Q) H`, and the feature map itself.
//!
//! An engine says how a tile lies in shared memory, how a fragment is spread over registers, and how
//! the two products are made. Algorithms reach elements of a fragment through [`Fragment`] only, so
//! they never know which unit holds what.

mod codes;
pub(crate) mod copies;
mod mma;
mod simt;
mod stream;
mod vectors;

pub use codes::CodeEngine;
pub(crate) use mma::{
    CodeProduct, CodeSums, CodeTile, Four, Fp8, Int8, Sixteen, mma_codes_supported, mma_supported,
};
pub use mma::{Mma, MmaTf32, mma_tile, mma_tiles};
pub use simt::{Simt, simt_tile, simt_tiles};
pub(crate) use simt::{simt_fits, simt_shared_memory, simt_supported};
pub use stream::Streams;
pub(crate) use vectors::{VectorRows, VectorRowsExpand};

use std::fmt;

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;

use crate::linear::FeatureMap;
use crate::rows::RowRange;
use crate::{FactorType, ProblemError};

/// Which engine runs a tile program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum EngineKind {
    Simt,
    Mma,
    MmaTf32,
}

impl EngineKind {
    /// The engine of warp-level tensor cores for these factors.
    pub fn mma(factors: FactorType) -> Self {
        match factors {
            FactorType::Tf32 => Self::MmaTf32,
            FactorType::F32 | FactorType::F16 | FactorType::BF16 => Self::Mma,
        }
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Simt => "simt",
            Self::Mma => "mma",
            Self::MmaTf32 => "mma tf32",
        })
    }
}

/// Sizes of a tile program, fixed when a kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Rows that the program owns.
    pub rows: usize,
    /// Rows of a streamed tile, the columns of its scores.
    pub cols: usize,
    /// Units of a cube.
    pub units: usize,
    /// Streamed tiles in shared memory at once: the one that is multiplied, and those on their way.
    pub stages: usize,
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            rows,
            cols,
            units,
            stages,
        } = self;
        write!(f, "{rows}x{cols}, {units} units")?;
        match stages {
            1 => Ok(()),
            _ => write!(f, ", {stages} stages"),
        }
    }
}

/// What a tile program keeps in shared memory and in registers, for the choice of its sizes.
#[derive(Clone, Debug)]
pub struct TileNeeds {
    /// Widths of the operands that it owns.
    pub owned: Vec<usize>,
    /// Widths of the operands that stream past it.
    pub streamed: Vec<usize>,
    /// Widths of the accumulators that it keeps in registers.
    pub accumulators: Vec<usize>,
    /// Left sides that it keeps.
    pub lefts: usize,
    /// Most rows that a tile may have: the block size of the owned side.
    pub max_rows: usize,
    /// Most rows that a streamed tile may have: the block size of the streamed side.
    pub max_cols: usize,
    /// Most stages that the program makes use of: 1 unless it reads through [`Streams`].
    pub max_stages: usize,
    /// Bytes of shared memory that each unit takes besides, for sums over units.
    pub unit_bytes: usize,
}

impl TileNeeds {
    /// Those of a product alone, of rows of `width` elements, in tiles of at most `max_cols` columns.
    pub(crate) fn of_product(width: usize, max_cols: usize) -> Self {
        Self {
            owned: vec![width],
            streamed: vec![width],
            accumulators: vec![],
            lefts: 0,
            max_rows: 64,
            max_cols,
            max_stages: 1,
            unit_bytes: 0,
        }
    }
}

/// The fastest engine that can run tiles of these needs, with its sizes.
pub(crate) fn engine_tile(
    needs: &TileNeeds,
    factors: FactorType,
    device: &DeviceProperties,
) -> Result<(EngineKind, Tile), ProblemError> {
    let reason = match mma_tile(needs, factors, device) {
        Ok(tile) => return Ok((EngineKind::mma(factors), tile)),
        Err(reason) => reason,
    };
    expect_simt(factors, reason, device)?;
    let tile = simt_tile(needs, &device.hardware).ok_or_else(|| no_tile(device))?;
    Ok((EngineKind::Simt, tile))
}

/// An error unless the portable engine makes products of these factors, which tensor cores do not for
/// the reason `mma`.
pub(crate) fn expect_simt(
    factors: FactorType,
    mma: &str,
    device: &DeviceProperties,
) -> Result<(), ProblemError> {
    simt_supported(factors).map_err(|simt| ProblemError::NoPlan {
        device: device.identity.name.clone(),
        reason: format!("not mma: {mma}; not simt: {simt}"),
    })
}

pub(crate) fn no_tile(device: &DeviceProperties) -> ProblemError {
    ProblemError::NoPlan {
        device: device.identity.name.clone(),
        reason: "no tile of these head dimensions fits the shared memory".into(),
    }
}

/// A tile of f32 values spread over the registers of a cube.
///
/// A unit holds a grid of `rows() x cols()` elements; `row` and `col` say
/// where they lie in the tile. Columns come in runs of `run()` neighbours.
#[cube]
pub trait Fragment: CubeType + Sized {
    /// Rows that a unit holds.
    fn rows(&self) -> comptime_type!(usize);
    /// Columns that a unit holds of each of its rows.
    fn cols(&self) -> comptime_type!(usize);
    /// Length of the runs of neighbouring columns; divides `cols()`.
    fn run(&self) -> comptime_type!(usize);
    /// The element at the unit's row `r` and column `c`.
    fn get(&self, #[comptime] r: usize, #[comptime] c: usize) -> f32;
    /// Replaces the element at the unit's row `r` and column `c`.
    fn set(&mut self, #[comptime] r: usize, #[comptime] c: usize, value: f32);
    /// The tile's row of the unit's row `r`.
    fn row(&self, #[comptime] r: usize) -> u32;
    /// The tile's column of the unit's column `c`.
    fn col(&self, #[comptime] c: usize) -> u32;
}

/// How tiles of element type `F` are held and multiplied; see the module's table.
#[cube]
pub trait TileEngine<F: Float>: 'static + Send + Sync {
    /// A tile in shared memory.
    type Operand: CubeType;
    /// A tile of scores or of an accumulator, in registers.
    type Fragment: Fragment;
    /// A fragment made ready to be the left side of [`mul_nn`](Self::mul_nn).
    type Left: CubeType;
    /// Shared memory for reductions across the units of a row.
    type Scratch: CubeType;

    /// A shared tile of `rows x width`, not initialised.
    fn operand(
        #[comptime] rows: usize,
        #[comptime] width: usize,
        #[comptime] tile: Tile,
    ) -> Self::Operand;
    /// As [`operand`](Self::operand), `tile.stages` tiles of `tile.cols x width`, of which the
    /// engine's methods see one: the first until it is [turned](Self::turn).
    fn ring(#[comptime] width: usize, #[comptime] tile: Tile) -> Self::Operand;
    /// Turns to another tile of a ring.
    fn turn(ring: &mut Self::Operand, stage: u32);
    /// Space for a left side of `tile.rows x tile.cols`.
    fn left(#[comptime] tile: Tile) -> Self::Left;
    /// Space for [`row_max`](Self::row_max) and [`row_sum`](Self::row_sum).
    fn scratch(#[comptime] tile: Tile) -> Self::Scratch;
    /// Scores of the tile, zero.
    fn scores(#[comptime] tile: Tile) -> Self::Fragment;
    /// An accumulator of `tile.rows x width`, zero.
    fn accumulator(#[comptime] width: usize, #[comptime] tile: Tile) -> Self::Fragment;

    /// Begins to fill `dst` from `src`. The tile may be read after an
    /// [`await_loads`](Self::await_loads) that leaves it no longer among the newer ones; it may be
    /// filled again once every unit has passed a later `await_loads` or `sync_cube`.
    fn begin_load<N: Size>(
        dst: &mut Self::Operand,
        src: &Tensor<Vector<F, N>>,
        rows: RowRange,
        #[comptime] tile: Tile,
    );
    /// Waits until all loads but the `newer` newest are complete. Every unit of the cube must call
    /// it, and what any unit [staged](Self::stage) before it is visible after it.
    fn await_loads(#[comptime] newer: usize);

    /// `dst = a bᵀ`, the sum running over the width of both.
    fn mul_nt(dst: &mut Self::Fragment, a: &Self::Operand, b: &Self::Operand);
    /// `acc += aᵀ b`, the sum running over the rows of both; `tile.rows` is the width of `a`.
    fn mul_tn(acc: &mut Self::Fragment, a: &Self::Operand, b: &Self::Operand);
    /// `acc += a' b`, the sum running over the rows of `b`, with `a'` that many columns of `a` from
    /// `first` on, a multiple of 16 if `b` has 16 rows or more, else of 8.
    fn mul_on(acc: &mut Self::Fragment, a: &Self::Operand, first: u32, b: &Self::Operand);
    /// Makes `p` ready as a left side; usable after the next [`sync_left`](Self::sync_left) or
    /// [`await_loads`](Self::await_loads).
    fn stage(dst: &mut Self::Left, p: &Self::Fragment);
    /// Shows staged left sides to the units that read them. Every unit of the cube must call it.
    fn sync_left();
    /// `acc += p b`, the sum running over the rows of `b`.
    fn mul_nn(acc: &mut Self::Fragment, p: &Self::Left, b: &Self::Operand);

    /// Applies `phi` to each of the first `len` rows of `a` and sets the others to 0. Every unit of
    /// the cube must call it, after the tile has arrived; it may be read at once afterwards.
    fn apply_feature_map(
        a: &mut Self::Operand,
        len: u32,
        #[comptime] phi: FeatureMap,
        #[comptime] tile: Tile,
    );
    /// As [`apply_feature_map`](Self::apply_feature_map), then divides each row by its product with
    /// `vector`; a row whose product is 0 becomes 0.
    fn apply_normalised(
        a: &mut Self::Operand,
        len: u32,
        vector: &[f32],
        #[comptime] phi: FeatureMap,
        #[comptime] tile: Tile,
    );
    /// The elements of `a`, a tile of `tile.rows`, that lie where the unit's columns `4 step` to
    /// `4 step + 3` of `p` do: element `4 r + i` is of its row `r`.
    fn elements(a: &Self::Operand, p: &Self::Fragment, #[comptime] step: usize) -> Array<f32>;
    /// Writes `p`, rounded, over the first columns of `dst`; visible after the next
    /// [`await_loads`](Self::await_loads) or `sync_cube`.
    fn put(dst: &mut Self::Operand, p: &Self::Fragment);
    /// Adds the unit's part of `a . vector` to each of its rows, for [`row_sum`](Self::row_sum).
    fn row_dot(rows: &mut Array<f32>, a: &Self::Operand, vector: &[f32], #[comptime] tile: Tile);
    /// Elements of a vector of a tile's row.
    fn vector_len() -> comptime_type!(usize);
    /// Adds the sums over the rows `first`, `first + step` and so on of `a` of the columns of its
    /// vector number `vector`, each row times its weight.
    fn add_column_sums(
        sums: &mut Array<f32>,
        a: &Self::Operand,
        weights: &Shared<[f32]>,
        vector: usize,
        first: usize,
        #[comptime] step: usize,
    );

    /// Replaces each unit's value of each of its rows by the maximum over the units of the row.
    fn row_max(rows: &mut Array<f32>, scratch: &mut Self::Scratch, #[comptime] tile: Tile);
    /// Replaces each unit's value of each of its rows by the sum over the units of the row.
    fn row_sum(rows: &mut Array<f32>, scratch: &mut Self::Scratch, #[comptime] tile: Tile);
}
