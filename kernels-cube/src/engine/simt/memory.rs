//! Tiles, left sides and fragments of the portable engine.

use cubecl::prelude::*;

use super::sizes::{pitch, rows_per_unit};
use super::{LANES, Vec4};
use crate::engine::*;

/// Shared tiles of `[rows, pitch]` vectors of four, one of which is turned to.
#[derive(CubeType)]
pub struct SimtOperand {
    pub(super) data: Shared<[Vec4]>,
    /// First vector of the tile.
    pub(super) first: usize,
    #[cube(comptime)]
    pub(super) rows: usize,
    /// Vectors of a row that hold data.
    #[cube(comptime)]
    pub(super) vectors: usize,
    /// Vectors from one row to the next.
    #[cube(comptime)]
    pub(super) pitch: usize,
}

#[cube]
impl SimtOperand {
    /// As [`TileEngine::begin_load`], with several loads of a unit under way: for a unit that holds little
    /// else.
    pub(crate) fn load_at_once<F: Float, N: Size>(
        &mut self,
        src: &Tensor<Vector<F, N>>,
        rows: RowRange,
        #[comptime] tile: Tile,
    ) {
        let batch = 8usize;
        let vectors = comptime!(self.pitch - 1);
        let total = comptime!(self.rows * vectors);
        for step in 0..comptime!(total.div_ceil(batch * tile.units)) {
            let first = step * comptime!(batch * tile.units) + UNIT_POS as usize;
            let mut values = Array::<Vec4>::new(batch);
            #[unroll]
            for i in 0..batch {
                let at = first + comptime!(i * tile.units);
                values[i] = self.fetch::<F, N>(src, rows, at / vectors, at % vectors);
            }
            #[unroll]
            for i in 0..batch {
                let at = first + comptime!(i * tile.units);
                if at < total {
                    let to = self.at(at / vectors, at % vectors);
                    self.data[to] = values[i];
                }
            }
        }
    }

    /// A vector of a row of the tile in `src`, zeros where there is none.
    pub(super) fn fetch<F: Float, N: Size>(
        &self,
        src: &Tensor<Vector<F, N>>,
        rows: RowRange,
        row: usize,
        vector: usize,
    ) -> Vec4 {
        let mut value = Vec4::new(0.0f32);
        if (row as u32) < rows.len && vector < comptime!(self.vectors) {
            let start = rows.base + row * rows.row_stride;
            value = read_four::<F, N>(src, start, vector * 4, rows.col_stride);
        }
        value
    }
}

/// Four neighbouring elements as f32, from vectors of four or, for strided data, from scalars.
#[cube]
fn read_four<F: Float, N: Size>(
    src: &Tensor<Vector<F, N>>,
    start: usize,
    col: usize,
    col_stride: usize,
) -> Vec4 {
    let mut value = Vec4::new(0.0f32);
    if src.vector_size() == 4 {
        value = Vec4::cast_from(src[(start + col) / 4]);
    } else {
        #[unroll]
        for e in 0..4usize {
            let x = src[start + (col + e) * col_stride].extract(0usize);
            value.insert(e, f32::cast_from(x));
        }
    }
    value
}

/// A left side in shared memory, `[rows, pitch]`.
#[derive(CubeType)]
pub struct SimtLeft {
    pub(super) data: Shared<[f32]>,
    #[cube(comptime)]
    pub(super) pitch: usize,
}

/// A fragment in a local array.
#[derive(CubeType)]
pub struct SimtFragment {
    pub(super) data: Array<f32>,
    pub(super) first_row: u32,
    pub(super) lane: u32,
    #[cube(comptime)]
    pub(super) rows: usize,
    #[cube(comptime)]
    pub(super) cols: usize,
    #[cube(comptime)]
    run: usize,
}

#[cube]
impl SimtFragment {
    /// All zeros, columns in runs of `run`.
    pub(super) fn zeros(
        #[comptime] tile: Tile,
        #[comptime] cols: usize,
        #[comptime] run: usize,
    ) -> Self {
        let rows = comptime!(rows_per_unit(tile));
        let mut data = Array::<f32>::new(comptime!(rows * cols));
        #[unroll]
        for i in 0..comptime!(rows * cols) {
            data[i] = 0.0;
        }
        SimtFragment {
            data,
            first_row: UNIT_POS / comptime!(LANES as u32) * comptime!(rows as u32),
            lane: UNIT_POS % comptime!(LANES as u32),
            rows,
            cols,
            run,
        }
    }
}

#[cube]
impl Fragment for SimtFragment {
    fn rows(&self) -> comptime_type!(usize) {
        self.rows
    }

    fn cols(&self) -> comptime_type!(usize) {
        self.cols
    }

    fn run(&self) -> comptime_type!(usize) {
        self.run
    }

    fn get(&self, #[comptime] r: usize, #[comptime] c: usize) -> f32 {
        self.data[comptime!(r * self.cols + c)]
    }

    fn set(&mut self, #[comptime] r: usize, #[comptime] c: usize, value: f32) {
        self.data[comptime!(r * self.cols + c)] = value;
    }

    fn row(&self, #[comptime] r: usize) -> u32 {
        self.first_row + comptime!(r as u32)
    }

    fn col(&self, #[comptime] c: usize) -> u32 {
        let group = comptime!((c / self.run * LANES) as u32) + self.lane;
        group * comptime!(self.run as u32) + comptime!((c % self.run) as u32)
    }
}

#[cube]
impl SimtOperand {
    /// `stages` tiles.
    pub(super) fn new(
        #[comptime] rows: usize,
        #[comptime] width: usize,
        #[comptime] stages: usize,
    ) -> Self {
        let pitch = comptime!(pitch(width));
        SimtOperand {
            // An operand of no rows is never touched, but WGSL has no empty arrays.
            data: Shared::new_slice(comptime!((stages * rows * pitch).max(1))),
            first: 0usize.runtime(),
            rows,
            vectors: comptime!(width / 4),
            pitch,
        }
    }

    /// Where a vector of the tile lies.
    pub(super) fn at(&self, row: usize, vector: usize) -> usize {
        self.first + row * comptime!(self.pitch) + vector
    }
}

#[cube]
impl VectorRows for SimtOperand {
    fn rows(&self) -> comptime_type!(usize) {
        self.rows
    }

    fn vectors(&self) -> comptime_type!(usize) {
        self.vectors
    }

    fn size(&self) -> comptime_type!(usize) {
        4usize
    }

    fn read(&self, row: usize, vector: usize) -> Array<f32> {
        let x = self.data[self.at(row, vector)];
        let mut values = Array::<f32>::new(4usize);
        #[unroll]
        for e in 0..4usize {
            values[e] = x.extract(e);
        }
        values
    }

    fn write(&mut self, row: usize, vector: usize, values: &Array<f32>) {
        let mut x = Vec4::new(0.0f32);
        #[unroll]
        for e in 0..4usize {
            x.insert(e, values[e]);
        }
        let at = self.at(row, vector);
        self.data[at] = x;
    }
}
