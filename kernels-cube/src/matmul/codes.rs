//! INT8 by INT8 and FP8 by FP8 on warp-level tensor cores: 16x8x32 products of words as they lie.
//!
//! A ring of shared tiles is filled with asynchronous copies while the oldest is multiplied. INT8 sums are
//! integers; scales that change along the sum are applied where they change. Of FP8 sums tensor cores keep
//! about 14 bits: those of a tile are added up in f32.

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;

use super::integer::step;
use super::{Product, sums_integers};
use crate::engine::{
    CodeProduct, CodeSums, CodeTile, Four, Fp8, Int8, Sixteen, copies, mma_codes_supported,
};
use crate::limits::expect_loop_budget;
use crate::quantize::{Format, Granularity, QuantizedTensor, Regions};
use crate::{DType, ProblemError};

/// Tiles in shared memory at once.
const STAGES: usize = 3;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct CodesConfig {
    /// Times 16 rows of the result that a warp holds.
    left: usize,
    /// Times 16 columns.
    right: usize,
    /// Warps that share columns.
    down: usize,
    /// Warps that share rows.
    across: usize,
    /// Vectors of 16 codes of a row of a shared tile.
    depth: usize,
    /// Whether scales change along the sum.
    grouped: bool,
    fp8: bool,
    bias: bool,
}

impl CodesConfig {
    /// Few rows leave no use for a tall tile; narrow ones are more cubes, and deep ones more bytes on
    /// their way.
    fn new(rows: usize, grouped: bool, fp8: bool, bias: bool) -> Self {
        let (left, right, down, across, depth) = match rows {
            0..=32 => (1, 1, 1, 4, 8),
            // With scales, totals beside the sums of 64 columns would not fit the registers.
            _ if fp8 && grouped => (2, 3, 4, 2, 4),
            _ => (2, 4, 4, 2, 4),
        };
        Self {
            left,
            right,
            down,
            across,
            depth,
            grouped,
            fp8,
            bias,
        }
    }

    /// Rows of a cube's tile.
    fn rows(self) -> usize {
        16 * self.left * self.down
    }

    /// Columns of a cube's tile.
    fn columns(self) -> usize {
        16 * self.right * self.across
    }

    fn units(self) -> usize {
        32 * self.down * self.across
    }

    /// Sums of 8 columns of a warp, of all its rows.
    fn sums(self) -> usize {
        2 * self.left * self.right
    }

    /// Sums that are added up in f32 on the way.
    fn totals(self) -> usize {
        if self.grouped || self.fp8 {
            4 * self.sums()
        } else {
            1
        }
    }

    /// Bytes of shared memory, with a vector of padding to a row.
    fn shared_memory(self) -> usize {
        STAGES * (self.rows() + self.columns()) * (self.depth + 1) * 16
    }
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct CodesScalars {
    /// M.
    rows: u32,
    /// N.
    columns: u32,
    /// Vectors of a row of either operand.
    pitch: u32,
    /// Shared tiles that share their scales.
    tiles: u32,
}

/// Codes after which scales change, and the configuration.
fn plan<const R: usize>(
    x: &QuantizedTensor<R>,
    w: &QuantizedTensor<2>,
    bias: bool,
) -> Result<(usize, CodesConfig), ProblemError> {
    let [rows, len] = x.matrix();
    let fp8 = x.format() == Format::Fp8;
    let step = if fp8 {
        x.scale_len().min(w.scale_len()).min(len)
    } else {
        step(x.scale_len(), w.scale_len(), len)?
    };
    Ok((step, CodesConfig::new(rows, step < len, fp8, bias)))
}

/// Whether the kernel takes these operands, for a result of this type.
pub(super) fn takes<const R: usize>(
    device: &DeviceProperties,
    x: &QuantizedTensor<R>,
    w: &QuantizedTensor<2>,
    dtype: DType,
) -> bool {
    let fp8 = x.format() == Format::Fp8 && w.format() == Format::Fp8;
    let takes = if fp8 {
        // What is left of their sums is enough for 16 bits.
        dtype != DType::F32 && x.granularity() != Granularity::Column
    } else {
        sums_integers(x, w)
    };
    let fits = |(step, config): (usize, CodesConfig)| {
        (!config.grouped || step.is_multiple_of(16 * config.depth))
            && config.shared_memory() <= device.hardware.max_shared_memory_size
    };
    takes
        && mma_codes_supported(w.format(), device).is_ok()
        && w.words_per_row().is_multiple_of(4)
        && plan(x, w, false).is_ok_and(fits)
}

pub(super) fn launch<const R: usize>(
    client: &Client,
    x: &QuantizedTensor<R>,
    product: Product<'_>,
) -> Result<(), ProblemError> {
    let [rows, columns, len] = product.size;
    let w = product.w;
    let (step, config) = plan(x, w, product.bias.is_some())?;
    let device = client.properties();
    let tiles = len.div_ceil(16 * config.depth);
    expect_loop_budget(device, "a product of 8 bits", tiles)?;
    let grid = product.grid(device, [config.rows(), config.columns()])?;
    let launch = match config.fp8 {
        false => code_matmul::launch_unchecked::<Int8>,
        true => code_matmul::launch_unchecked::<Fp8>,
    };
    // SAFETY: vectors past the ends read as 0, and results past them are not stored.
    unsafe {
        launch(
            client,
            grid,
            CubeDim::new_1d(config.units() as u32),
            AddressType::from_len((rows * columns).max(rows.max(columns) * w.words_per_row())),
            x.words_arg(),
            x.scales().buffer_arg(),
            w.words_arg(),
            w.scales().buffer_arg(),
            product.bias_arg(),
            product.out,
            x.regions(),
            w.regions(),
            CodesScalarsLaunch::new(
                rows as u32,
                columns as u32,
                w.words_per_row() as u32 / 4,
                step.div_ceil(16 * config.depth) as u32,
            ),
            config,
            DType::elem_type(product.dtype),
        );
    }
    Ok(())
}

/// One cube computes a tile of the result.
///
/// Grid: x = tiles of columns, y = tiles of rows.
#[cube(launch_unchecked, address_type = "dynamic")]
fn code_matmul<P: CodeProduct, F: Float>(
    x: &[Sixteen],
    x_scales: &[f32],
    w: &[Sixteen],
    w_scales: &[f32],
    bias: &[f32],
    out: &mut [F],
    x_regions: Regions,
    w_regions: Regions,
    scalars: CodesScalars,
    #[comptime] config: CodesConfig,
    #[define(F)] _dtype: ElemType,
) {
    let warp = UNIT_POS / 32;
    let first_row = CUBE_POS_Y * comptime!(config.rows() as u32);
    let first_column = CUBE_POS_X * comptime!(config.columns() as u32);
    // The warp's own part of the tile.
    let row = warp % comptime!(config.down as u32) * comptime!(16 * config.left as u32);
    let column = warp / comptime!(config.down as u32) * comptime!(16 * config.right as u32);
    let own = Own {
        row: first_row + row + UNIT_POS_PLANE / 4,
        column: first_column + column + UNIT_POS_PLANE % 4 * 2,
    };

    let mut ring = Ring::new(first_row, first_column, scalars, config);
    let mut sums = CodeSums::<P>::zeros(config.sums());
    let mut totals = Array::<f32>::new(config.totals());
    #[unroll]
    for i in 0..comptime!(config.totals()) {
        totals[i] = 0.0;
    }

    let tiles = scalars.pitch.div_ceil(comptime!(config.depth as u32));
    #[unroll]
    for t in 0..comptime!(STAGES as u32 - 1) {
        ring.begin(x, w, t, config);
    }
    for t in 0..tiles {
        copies::wait(comptime!(STAGES - 2));
        // Also: every unit is done with the tile that the next copies go to.
        sync_cube();
        ring.begin(x, w, t + comptime!(STAGES as u32 - 1), config);
        ring.turn(t);
        #[unroll]
        for step in 0..comptime!(config.depth / 2) {
            let mut lefts = Sequence::<Array<Four>>::new();
            #[unroll]
            for i in 0..config.left {
                lefts.push(ring.x.left(row as usize + comptime!(16 * i), step));
            }
            #[unroll]
            for j in 0..config.right {
                let right = ring.w.right(column as usize + comptime!(16 * j), step);
                #[unroll]
                for i in 0..config.left {
                    let first = comptime!(2 * (i * config.right + j));
                    sums.add(lefts.index(i), &right, first);
                }
            }
        }
        if comptime!(config.grouped) {
            if (t + 1) % scalars.tiles == 0 || t + 1 == tiles || config.fp8 {
                let element = t * comptime!(16 * config.depth as u32);
                #[unroll]
                for i in 0..comptime!(4 * config.sums()) {
                    let (row, column) = own.place(i, config);
                    let scale = x_scales[x_regions.index(min(row, scalars.rows - 1), element)]
                        * w_scales[w_regions.index(min(column, scalars.columns - 1), element)];
                    totals[i] += sums.element(i) * scale;
                }
                sums.clear();
            }
        } else if comptime!(config.fp8) {
            #[unroll]
            for i in 0..comptime!(4 * config.sums()) {
                totals[i] += sums.element(i);
            }
            sums.clear();
        }
    }

    #[unroll]
    for i in 0..comptime!(4 * config.sums()) {
        let (row, column) = own.place(i, config);
        if row < scalars.rows && column < scalars.columns {
            let mut sum = totals[comptime!(if config.totals() == 1 { 0 } else { i })];
            if comptime!(!config.grouped) {
                let scale =
                    x_scales[x_regions.index(row, 0)] * w_scales[w_regions.index(column, 0)];
                if comptime!(config.fp8) {
                    sum *= scale;
                } else {
                    // Added to 0 as the other engines do, so that their results are the same bits.
                    sum = fma(sums.element(i), scale, sum);
                }
            }
            if config.bias {
                sum += bias[column as usize];
            }
            out[row as usize * scalars.columns as usize + column as usize] = F::cast_from(sum);
        }
    }
}

/// Where a lane's first sum lies in the result.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Own {
    row: u32,
    column: u32,
}

#[cube]
impl Own {
    /// Row and column of the lane's sum `i`, of `[left, 2 right, 2, 2]`.
    fn place(self, #[comptime] i: usize, #[comptime] config: CodesConfig) -> (u32, u32) {
        let tile = comptime!(i / 4 % (2 * config.right));
        let block = comptime!(i / 4 / (2 * config.right));
        let row = self.row + comptime!((16 * block + i / 2 % 2 * 8) as u32);
        let column = self.column + comptime!((8 * tile + i % 2) as u32);
        (row, column)
    }
}

/// The shared tiles of both operands.
#[derive(CubeType)]
struct Ring {
    x: CodeTile,
    w: CodeTile,
    first_row: u32,
    first_column: u32,
    scalars: CodesScalars,
}

#[cube]
impl Ring {
    fn new(
        first_row: u32,
        first_column: u32,
        scalars: CodesScalars,
        #[comptime] config: CodesConfig,
    ) -> Ring {
        Ring {
            x: CodeTile::new(config.rows(), config.depth, STAGES),
            w: CodeTile::new(config.columns(), config.depth, STAGES),
            first_row,
            first_column,
            scalars,
        }
    }

    /// Turns to tile `t`.
    fn turn(&mut self, t: u32) {
        let stage = t % comptime!(STAGES as u32);
        self.x.turn(stage);
        self.w.turn(stage);
    }

    /// Begins to load tile `t`: zeros if there is none.
    fn begin(&mut self, x: &[Sixteen], w: &[Sixteen], t: u32, #[comptime] config: CodesConfig) {
        self.turn(t);
        let pitch = self.scalars.pitch as usize;
        let first = min(t as usize * config.depth, pitch);
        let rows = self.scalars.rows - self.first_row;
        let columns = self.scalars.columns - self.first_column;
        self.x.begin_load::<Const<4>>(
            x,
            self.first_row as usize,
            rows,
            first,
            pitch - first,
            pitch,
            config.units(),
        );
        self.w.begin_load::<Const<4>>(
            w,
            self.first_column as usize,
            columns,
            first,
            pitch - first,
            pitch,
            config.units(),
        );
        copies::commit();
    }
}
