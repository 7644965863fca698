//! The portable engine: f32 arithmetic on any device, no matrix units, no plane operations.
//!
//! Eight neighbouring units share a row. A unit holds `rows / (units / 8)` consecutive rows; of the
//! scores it holds every eighth column, of an accumulator every eighth group of four, so that the
//! eight read eight neighbouring vectors of a shared tile. Tiles are kept as f32 vectors of four
//! with one vector of padding a row, which keeps the eight rows of a `mul_nt` in different banks.

mod codes;
mod memory;
mod sizes;

use memory::{SimtFragment, SimtLeft, SimtOperand};
use sizes::rows_per_unit;
pub(crate) use sizes::{simt_fits, simt_shared_memory, simt_supported};
pub use sizes::{simt_tile, simt_tiles};

use cubecl::prelude::*;

use super::vectors::{add_column_sums, apply_feature_map, apply_normalised};
use super::*;

type Vec4 = Vector<f32, Const<4>>;

/// Units that share a row.
const LANES: usize = 8;

/// The engine that needs nothing but shared memory.
pub struct Simt;

#[cube]
impl<F: Float> TileEngine<F> for Simt {
    type Operand = SimtOperand;
    type Fragment = SimtFragment;
    type Left = SimtLeft;
    type Scratch = Shared<[f32]>;

    fn operand(
        #[comptime] rows: usize,
        #[comptime] width: usize,
        #[comptime] _tile: Tile,
    ) -> SimtOperand {
        SimtOperand::new(rows, width, 1usize)
    }

    fn ring(#[comptime] width: usize, #[comptime] tile: Tile) -> SimtOperand {
        SimtOperand::new(tile.cols, width, tile.stages)
    }

    fn turn(ring: &mut SimtOperand, stage: u32) {
        ring.first = stage as usize * comptime!(ring.rows * ring.pitch);
    }

    fn left(#[comptime] tile: Tile) -> SimtLeft {
        let pitch = comptime!(tile.cols + 1);
        SimtLeft {
            data: Shared::new_slice(comptime!(tile.rows * pitch)),
            pitch,
        }
    }

    fn scratch(#[comptime] tile: Tile) -> Shared<[f32]> {
        Shared::new_slice(comptime!(tile.rows * LANES))
    }

    fn scores(#[comptime] tile: Tile) -> SimtFragment {
        SimtFragment::zeros(tile, comptime!(tile.cols / LANES), 1usize)
    }

    fn accumulator(#[comptime] width: usize, #[comptime] tile: Tile) -> SimtFragment {
        let groups = comptime!(width.div_ceil(4 * LANES));
        SimtFragment::zeros(tile, comptime!(groups * 4), 4usize)
    }

    fn begin_load<N: Size>(
        dst: &mut SimtOperand,
        src: &Tensor<Vector<F, N>>,
        rows: RowRange,
        #[comptime] tile: Tile,
    ) {
        // Columns past the width are zero, up to whole groups: `mul_on` reads them.
        let vectors = comptime!(dst.pitch - 1);
        let total = comptime!(dst.rows * vectors);
        let steps = comptime!(total.div_ceil(tile.units));
        for step in 0..steps {
            let at = step * comptime!(tile.units) + UNIT_POS as usize;
            let row = at / vectors;
            let vector = at % vectors;
            if at < total {
                let value = dst.fetch::<F, N>(src, rows, row, vector);
                let to = dst.at(row, vector);
                dst.data[to] = value;
            }
        }
    }

    // Loads are complete when they have begun.
    fn await_loads(#[comptime] _newer: usize) {
        sync_cube();
    }

    fn mul_nt(dst: &mut SimtFragment, a: &SimtOperand, b: &SimtOperand) {
        #[unroll]
        for i in 0..comptime!(dst.rows * dst.cols) {
            dst.data[i] = 0.0;
        }
        for vector in 0..comptime!(a.vectors) {
            let mut right = Array::<Vec4>::new(comptime!(dst.cols));
            #[unroll]
            for c in 0..comptime!(dst.cols) {
                right[c] = b.data[b.at(dst.col(c) as usize, vector)];
            }
            #[unroll]
            for r in 0..comptime!(dst.rows) {
                let left = a.data[a.at(dst.row(r) as usize, vector)];
                #[unroll]
                for c in 0..comptime!(dst.cols) {
                    let mut sum = dst.get(r, c);
                    #[unroll]
                    for e in 0..4usize {
                        sum = fma(left.extract(e), right[c].extract(e), sum);
                    }
                    dst.set(r, c, sum);
                }
            }
        }
    }

    fn stage(dst: &mut SimtLeft, p: &SimtFragment) {
        #[unroll]
        for r in 0..comptime!(p.rows) {
            #[unroll]
            for c in 0..comptime!(p.cols) {
                dst.data[p.row(r) as usize * comptime!(dst.pitch) + p.col(c) as usize] =
                    p.get(r, c);
            }
        }
    }

    fn sync_left() {
        sync_cube();
    }

    fn mul_nn(acc: &mut SimtFragment, p: &SimtLeft, b: &SimtOperand) {
        let groups = comptime!(acc.cols / 4);
        for k in 0..comptime!(b.rows) {
            let mut left = Array::<f32>::new(comptime!(acc.rows));
            #[unroll]
            for r in 0..comptime!(acc.rows) {
                left[r] = p.data[acc.row(r) as usize * comptime!(p.pitch) + k];
            }
            #[unroll]
            for g in 0..groups {
                // The last group of a width that is no multiple of 32 reads past the row's data:
                // it stays inside the tile's padded row and its columns are never stored.
                let right = b.data[b.at(k, comptime!(g * LANES) + acc.lane as usize)];
                #[unroll]
                for r in 0..comptime!(acc.rows) {
                    #[unroll]
                    for e in 0..4usize {
                        let c = comptime!(g * 4 + e);
                        let sum = fma(left[r], right.extract(e), acc.get(r, c));
                        acc.set(r, c, sum);
                    }
                }
            }
        }
    }

    fn mul_tn(acc: &mut SimtFragment, a: &SimtOperand, b: &SimtOperand) {
        let groups = comptime!(acc.cols / 4);
        for k in 0..comptime!(a.rows) {
            let mut right = Array::<Vec4>::new(groups);
            #[unroll]
            for g in 0..groups {
                right[g] = b.data[b.at(k, comptime!(g * LANES) + acc.lane as usize)];
            }
            // A unit's rows are consecutive and begin at a multiple of four.
            #[unroll]
            for quad in 0..comptime!(acc.rows / 4) {
                let at = acc.first_row as usize / 4 + quad;
                let left = a.data[a.at(k, at)];
                #[unroll]
                for i in 0..4usize {
                    #[unroll]
                    for c in 0..comptime!(acc.cols) {
                        let r = comptime!(4 * quad + i);
                        let x = right[comptime!(c / 4)].extract(comptime!(c % 4));
                        acc.set(r, c, fma(left.extract(i), x, acc.get(r, c)));
                    }
                }
            }
        }
    }

    fn mul_on(acc: &mut SimtFragment, a: &SimtOperand, first: u32, b: &SimtOperand) {
        let groups = comptime!(acc.cols / 4);
        for quad in 0..comptime!(b.rows / 4) {
            let mut left = Array::<Vec4>::new(comptime!(acc.rows));
            #[unroll]
            for r in 0..comptime!(acc.rows) {
                left[r] = a.data[a.at(acc.row(r) as usize, first as usize / 4 + quad)];
            }
            #[unroll]
            for i in 0..4usize {
                #[unroll]
                for g in 0..groups {
                    let at = b.at(4 * quad + i, comptime!(g * LANES) + acc.lane as usize);
                    let right = b.data[at];
                    #[unroll]
                    for r in 0..comptime!(acc.rows) {
                        #[unroll]
                        for e in 0..4usize {
                            let c = comptime!(4 * g + e);
                            let x = left[r].extract(i);
                            acc.set(r, c, fma(x, right.extract(e), acc.get(r, c)));
                        }
                    }
                }
            }
        }
    }

    fn apply_feature_map(
        a: &mut SimtOperand,
        len: u32,
        #[comptime] phi: FeatureMap,
        #[comptime] tile: Tile,
    ) {
        apply_feature_map::<SimtOperand>(a, len, phi, tile, false);
    }

    fn apply_normalised(
        a: &mut SimtOperand,
        len: u32,
        vector: &[f32],
        #[comptime] phi: FeatureMap,
        #[comptime] tile: Tile,
    ) {
        apply_normalised::<SimtOperand>(a, len, vector, phi, tile, false);
    }

    fn elements(a: &SimtOperand, p: &SimtFragment, #[comptime] step: usize) -> Array<f32> {
        let mut values = Array::<f32>::new(comptime!(4 * p.rows));
        #[unroll]
        for r in 0..comptime!(p.rows) {
            let at = p.row(r) as usize * comptime!(a.pitch) + comptime!(step * LANES);
            let x = a.data[at + p.lane as usize];
            #[unroll]
            for e in 0..4usize {
                values[comptime!(4 * r + e)] = x.extract(e);
            }
        }
        values
    }

    fn put(dst: &mut SimtOperand, p: &SimtFragment) {
        #[unroll]
        for r in 0..comptime!(p.rows) {
            #[unroll]
            for g in 0..comptime!(p.cols / 4) {
                let mut x = Vec4::new(0.0f32);
                #[unroll]
                for e in 0..4usize {
                    x.insert(e, p.get(r, comptime!(4 * g + e)));
                }
                let at = dst.at(p.row(r) as usize, p.col(comptime!(4 * g)) as usize / 4);
                dst.data[at] = x;
            }
        }
    }

    fn row_dot(rows: &mut Array<f32>, a: &SimtOperand, vector: &[f32], #[comptime] tile: Tile) {
        let lane = UNIT_POS as usize % LANES;
        let first = UNIT_POS as usize / LANES * comptime!(rows_per_unit(tile));
        #[unroll]
        for i in 0..comptime!(a.vectors.div_ceil(LANES)) {
            let at = lane + comptime!(i * LANES);
            if at < comptime!(a.vectors) {
                #[unroll]
                for r in 0..comptime!(rows_per_unit(tile)) {
                    let x = a.data[a.at(first + r, at)];
                    #[unroll]
                    for e in 0..4usize {
                        rows[r] = fma(x.extract(e), vector[4 * at + e], rows[r]);
                    }
                }
            }
        }
    }

    fn vector_len() -> comptime_type!(usize) {
        4usize
    }

    fn add_column_sums(
        sums: &mut Array<f32>,
        a: &SimtOperand,
        weights: &Shared<[f32]>,
        vector: usize,
        first: usize,
        #[comptime] step: usize,
    ) {
        add_column_sums::<SimtOperand>(sums, a, weights, vector, first, step);
    }

    fn row_max(rows: &mut Array<f32>, scratch: &mut Shared<[f32]>, #[comptime] tile: Tile) {
        publish(&*rows, scratch, tile);
        #[unroll]
        for r in 0..comptime!(rows_per_unit(tile)) {
            let start = row_start(r, tile);
            #[unroll]
            for lane in 0..LANES {
                rows[r] = max(rows[r], scratch[start + lane]);
            }
        }
    }

    fn row_sum(rows: &mut Array<f32>, scratch: &mut Shared<[f32]>, #[comptime] tile: Tile) {
        publish(&*rows, scratch, tile);
        #[unroll]
        for r in 0..comptime!(rows_per_unit(tile)) {
            let start = row_start(r, tile);
            let mut sum = 0.0f32;
            #[unroll]
            for lane in 0..LANES {
                sum += scratch[start + lane];
            }
            rows[r] = sum;
        }
    }
}

/// Where the partial results of the unit's row `r` begin in the scratch.
#[cube]
fn row_start(#[comptime] r: usize, #[comptime] tile: Tile) -> usize {
    let group = UNIT_POS as usize / LANES;
    (group * comptime!(rows_per_unit(tile)) + r) * LANES
}

/// Shows each unit's partial results to the other units of its rows.
#[cube]
fn publish(rows: &Array<f32>, scratch: &mut Shared<[f32]>, #[comptime] tile: Tile) {
    // The previous reduction may still be being read.
    sync_cube();
    #[unroll]
    for r in 0..comptime!(rows_per_unit(tile)) {
        scratch[row_start(r, tile) + UNIT_POS as usize % LANES] = rows[r];
    }
    sync_cube();
}
