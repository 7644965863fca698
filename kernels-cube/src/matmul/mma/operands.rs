//! What a lane reads for a step of a product.

use cubecl::prelude::*;

use super::{COLUMNS, MmaConfig, MmaScalars, ROWS, step_len};
use crate::quantize::Regions;

/// A lane's weights of a step, 16 bytes of two rows of weights in each tile, with scales and zero
/// points.
#[derive(CubeType)]
pub(super) struct Step {
    pub words: Array<Vector<u32, Const<4>>>,
    pub scales: Array<f32>,
    pub zeros: Array<f32>,
}

#[cube]
impl Step {
    pub fn empty(#[comptime] config: MmaConfig) -> Step {
        let count = comptime!(2 * config.column_tiles);
        let mut words = Array::<Vector<u32, Const<4>>>::new(count);
        let mut scales = Array::<f32>::new(count);
        let mut zeros = Array::<f32>::new(count);
        #[unroll]
        for c in 0..count {
            words[c] = Vector::new(0u32);
            scales[c] = 0.0;
            zeros[c] = 0.0;
        }
        Step {
            words,
            scales,
            zeros,
        }
    }
}

/// Where the weights of a lane's columns are.
#[derive(CubeType)]
pub(super) struct Columns {
    /// The number of each column's first chunk.
    chunks: Array<usize>,
    /// The number of each column's first scale.
    scales: Array<u32>,
}

#[cube]
impl Columns {
    /// Every eighth column from `first` on; the last one in the place of those past the end, whose
    /// results are not stored.
    pub fn new(
        first: u32,
        regions: Regions,
        scalars: MmaScalars,
        #[comptime] config: MmaConfig,
    ) -> Columns {
        let count = comptime!(2 * config.column_tiles);
        let mut chunks = Array::<usize>::new(count);
        let mut scales = Array::<u32>::new(count);
        #[unroll]
        for c in 0..count {
            let column = first + comptime!((COLUMNS / 2 * c) as u32);
            let column = min(column, scalars.columns - 1);
            chunks[c] = column as usize * scalars.chunks as usize;
            scales[c] = regions.index(column, 0) as u32;
        }
        Columns { chunks, scales }
    }

    /// Reads a step, if there is such a step. What it says past the end of the summands meets
    /// activations that are 0.
    pub fn read(
        &self,
        into: &mut Step,
        w: &[Vector<u32, Const<4>>],
        scales: &[f32],
        zeros: &[f32],
        step: u32,
        scalars: MmaScalars,
        #[comptime] config: MmaConfig,
    ) {
        if 4 * step < scalars.chunks {
            let mut chunk = 4 * step + UNIT_POS % 4;
            if config.ragged {
                chunk = min(chunk, scalars.chunks - 1);
            }
            let along = step >> scalars.scale_shift;
            #[unroll]
            for c in 0..comptime!(2 * config.column_tiles) {
                into.words[c] = w[self.chunks[c] + chunk as usize];
                let scale = (self.scales[c] + along) as usize;
                into.scales[c] = scales[scale];
                if config.zero_point {
                    into.zeros[c] = zeros[scale];
                }
            }
        }
    }
}

/// Where a lane's activations are.
#[derive(CubeType)]
pub(super) struct Activations {
    /// The number of the first chunk of each row.
    chunks: Array<usize>,
    /// Whether each row exists.
    exist: Array<bool>,
    /// Elements of a row.
    len: u32,
}

#[cube]
impl Activations {
    /// Every eighth row from `first` on.
    pub fn new(first: u32, scalars: MmaScalars, #[comptime] config: MmaConfig) -> Activations {
        let mut chunks = Array::<usize>::new(config.row_tiles);
        let mut exist = Array::<bool>::new(config.row_tiles);
        #[unroll]
        for r in 0..config.row_tiles {
            let row = first + comptime!((ROWS * r) as u32);
            chunks[r] = row as usize * scalars.stride as usize;
            exist[r] = row < scalars.rows;
        }
        Activations {
            chunks,
            exist,
            len: scalars.len,
        }
    }

    /// What a lane has before its first step.
    pub fn zeros(&self, #[comptime] config: MmaConfig) -> Array<Vector<u32, Const<4>>> {
        let count = comptime!(config.row_tiles * config.own() / 8);
        let mut values = Array::<Vector<u32, Const<4>>>::new(count);
        #[unroll]
        for i in 0..count {
            values[i] = Vector::new(0u32);
        }
        values
    }

    /// Reads a lane's activations of a step, row by row. Those past the end of the summands become 0,
    /// those of rows that do not exist stay 0.
    pub fn read(
        &self,
        into: &mut Array<Vector<u32, Const<4>>>,
        x: &[Vector<u32, Const<4>>],
        step: u32,
        #[comptime] config: MmaConfig,
    ) {
        let count = comptime!(config.own() / 8);
        let first = step * comptime!(step_len(config.format) as u32)
            + UNIT_POS % 4 * comptime!(config.own() as u32);
        #[unroll]
        for r in 0..config.row_tiles {
            if self.exist[r] {
                let chunk = self.chunks[r] + first as usize / 8;
                #[unroll]
                for i in 0..count {
                    let at = comptime!(r * count + i);
                    if config.ragged {
                        let mut eight = Vector::<u32, Const<4>>::new(0u32);
                        if first + comptime!(8 * i as u32) < self.len {
                            eight = x[chunk + i];
                        }
                        into[at] = eight;
                    } else {
                        into[at] = x[chunk + i];
                    }
                }
            }
        }
    }
}
