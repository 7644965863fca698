//! What engines do to shared tiles element by element.

use cubecl::prelude::*;

use super::Tile;
use crate::linear::{FeatureMap, feature};
use crate::quantize::{Format, number};

/// Units that share a row.
const LANES: usize = 8;

/// A shared tile as rows of short vectors.
#[cube]
pub(crate) trait VectorRows: CubeType {
    /// Rows of the tile.
    fn rows(&self) -> comptime_type!(usize);
    /// Vectors of a row that hold data.
    fn vectors(&self) -> comptime_type!(usize);
    /// Elements of a vector.
    fn size(&self) -> comptime_type!(usize);
    /// A vector's elements.
    fn read(&self, row: usize, vector: usize) -> Array<f32>;
    /// Replaces a vector's elements.
    fn write(&mut self, row: usize, vector: usize, values: &Array<f32>);
}

/// Writes the numbers of FP8 codes to the tile, before their scales: the first `rows` rows of `words` from
/// row `first` on, and zeros. Vectors of words have no fewer codes than the tile's have elements.
#[cube]
pub(crate) fn load_numbers<R: VectorRows, W: Size>(
    dst: &mut R,
    words: &[Vector<u32, W>],
    first: usize,
    rows: u32,
    #[comptime] tile: Tile,
) {
    let (tile_rows, size) = (dst.rows(), dst.size());
    let vectors = dst.vectors();
    let codes = W::value().comptime() * 4;
    let chunks = comptime!(vectors * size / codes);
    for step in 0..comptime!((tile_rows * chunks).div_ceil(tile.units)) {
        let at = step * tile.units + UNIT_POS as usize;
        if at < comptime!(tile_rows * chunks) {
            let (row, chunk) = (at / chunks, at % chunks);
            let mut bits = Vector::<u32, W>::new(0u32);
            if (row as u32) < rows {
                bits = words[(first + row) * chunks + chunk];
            }
            #[unroll]
            for vector in 0..comptime!(codes / size) {
                let mut values = Array::<f32>::new(size);
                #[unroll]
                for e in 0..size {
                    let code = comptime!(vector * size + e);
                    let word = bits.extract(comptime!(code / 4));
                    values[e] = number(word, comptime!(code as u32 % 4), 0.0, Format::Fp8, false);
                }
                dst.write(row, chunk * comptime!(codes / size) + vector, &values);
            }
        }
    }
}

/// Applies `phi` to the first `len` rows and sets the others to 0. Eight units share a row; they
/// talk through shuffles if `planes` says that the device has them.
#[cube]
pub(crate) fn apply_feature_map<R: VectorRows>(
    a: &mut R,
    len: u32,
    #[comptime] phi: FeatureMap,
    #[comptime] tile: Tile,
    #[comptime] planes: bool,
) {
    let rows = a.rows();
    let rows_at_once = comptime!(tile.units / LANES);
    let mut lanes = Lanes::new(planes, tile);
    for step in 0..comptime!(rows.div_ceil(rows_at_once)) {
        let row = step * rows_at_once + UNIT_POS as usize / LANES;
        map_row::<R>(a, row, len, &mut lanes, phi);
    }
    sync_cube();
}

/// As [`apply_feature_map`], then divides each row by its product with `vector`; a row whose product
/// is 0 becomes 0.
#[cube]
pub(crate) fn apply_normalised<R: VectorRows>(
    a: &mut R,
    len: u32,
    vector: &[f32],
    #[comptime] phi: FeatureMap,
    #[comptime] tile: Tile,
    #[comptime] planes: bool,
) {
    let rows = a.rows();
    let vectors = a.vectors();
    let size = a.size();
    let rows_at_once = comptime!(tile.units / LANES);
    let per_lane = comptime!(vectors.div_ceil(LANES));
    let lane = UNIT_POS as usize % LANES;
    let mut lanes = Lanes::new(planes, tile);
    for step in 0..comptime!(rows.div_ceil(rows_at_once)) {
        let row = step * rows_at_once + UNIT_POS as usize / LANES;
        map_row::<R>(a, row, len, &mut lanes, phi);
        // A unit reads what it wrote itself.
        let mut dot = 0.0f32;
        #[unroll]
        for i in 0..per_lane {
            let at = lane + comptime!(i * LANES);
            if row < rows && at < vectors {
                let x = a.read(row, at);
                #[unroll]
                for e in 0..size {
                    dot = fma(x[e], vector[at * size + e], dot);
                }
            }
        }
        let n = lanes.sum(dot);
        let factor = select(n == 0.0, 0.0, 1.0 / n);
        #[unroll]
        for i in 0..per_lane {
            let at = lane + comptime!(i * LANES);
            if row < rows && at < vectors {
                let mut x = a.read(row, at);
                #[unroll]
                for e in 0..size {
                    x[e] *= factor;
                }
                a.write(row, at, &x);
            }
        }
    }
    sync_cube();
}

/// Applies `phi` to one row, or sets it to 0 past `len`; nothing to one past the tile.
#[cube]
fn map_row<R: VectorRows>(
    a: &mut R,
    row: usize,
    len: u32,
    lanes: &mut Lanes,
    #[comptime] phi: FeatureMap,
) {
    let vectors = a.vectors();
    let size = a.size();
    let per_lane = comptime!(vectors.div_ceil(LANES));
    let lane = UNIT_POS as usize % LANES;
    let inside = row < a.rows();
    let mut shift = 0.0f32;
    let mut factor = 1.0f32.runtime();
    if comptime!(phi == FeatureMap::Softmax) {
        let mut largest = f32::min_value();
        #[unroll]
        for i in 0..per_lane {
            let vector = lane + comptime!(i * LANES);
            if inside && vector < vectors {
                let x = a.read(row, vector);
                #[unroll]
                for e in 0..size {
                    largest = max(largest, x[e]);
                }
            }
        }
        shift = lanes.max(largest);
        let mut sum = 0.0f32;
        #[unroll]
        for i in 0..per_lane {
            let vector = lane + comptime!(i * LANES);
            if inside && vector < vectors {
                let x = a.read(row, vector);
                #[unroll]
                for e in 0..size {
                    sum += (x[e] - shift).exp();
                }
            }
        }
        factor = 1.0 / lanes.sum(sum);
    }
    #[unroll]
    for i in 0..per_lane {
        let vector = lane + comptime!(i * LANES);
        if inside && vector < vectors {
            let mut x = a.read(row, vector);
            #[unroll]
            for e in 0..size {
                let y = feature(x[e] - shift, phi) * factor;
                x[e] = select((row as u32) < len, y, 0.0);
            }
            a.write(row, vector, &x);
        }
    }
}

/// Adds the sums over the rows `first`, `first + step` and so on of the columns of one vector, each
/// row times its weight.
#[cube]
pub(crate) fn add_column_sums<R: VectorRows>(
    sums: &mut Array<f32>,
    a: &R,
    weights: &Shared<[f32]>,
    vector: usize,
    first: usize,
    #[comptime] step: usize,
) {
    let rows = a.rows();
    #[unroll]
    for i in 0..comptime!(rows.div_ceil(step)) {
        let row = first + comptime!(i * step);
        if row < rows {
            let x = a.read(row, vector);
            #[unroll]
            for e in 0..a.size() {
                sums[e] = fma(x[e], weights[row], sums[e]);
            }
        }
    }
}

/// The eight units of a row.
#[derive(CubeType)]
struct Lanes {
    partial: Shared<[f32]>,
    #[cube(comptime)]
    planes: bool,
}

#[cube]
impl Lanes {
    fn new(#[comptime] planes: bool, #[comptime] tile: Tile) -> Lanes {
        Lanes {
            partial: Shared::new_slice(comptime!(if planes { 1 } else { tile.units })),
            planes,
        }
    }

    fn max(&mut self, x: f32) -> f32 {
        let mut largest = x;
        if self.planes {
            largest = max(largest, plane_shuffle_xor(largest, 1));
            largest = max(largest, plane_shuffle_xor(largest, 2));
            largest = max(largest, plane_shuffle_xor(largest, 4));
        } else {
            self.share(x);
            #[unroll]
            for i in 0..LANES {
                largest = max(largest, self.partial[UNIT_POS as usize / LANES * LANES + i]);
            }
        }
        largest
    }

    fn sum(&mut self, x: f32) -> f32 {
        let mut sum = x;
        if self.planes {
            sum += plane_shuffle_xor(sum, 1);
            sum += plane_shuffle_xor(sum, 2);
            sum += plane_shuffle_xor(sum, 4);
        } else {
            self.share(x);
            sum = 0.0f32.runtime();
            #[unroll]
            for i in 0..LANES {
                sum += self.partial[UNIT_POS as usize / LANES * LANES + i];
            }
        }
        sum
    }

    fn share(&mut self, x: f32) {
        sync_cube();
        self.partial[UNIT_POS as usize] = x;
        sync_cube();
    }
}
