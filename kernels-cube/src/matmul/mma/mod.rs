//! A few rows of activations by low-bit weights, on warp-level tensor cores: bound by reading the
//! weights, once for each 16 rows.
//!
//! Weights become 16-bit numbers in registers, where they are the left side of a 16x8x16 product as
//! they lie: any order of the summands will do if both sides have the same, so a lane takes 16 bytes
//! of a row of the weights and the activations that belong to them. Products under one scale are
//! summed in f32 and then scaled. The result's columns are the rows of these products.

mod decode;
mod operands;

use cubecl::cmma::MmaDefinition;
use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;

use self::decode::{Origin, decode_pair};
use self::operands::{Activations, Columns, Step};
use super::Product;
use crate::engine::mma_supported;
use crate::limits::expect_loop_budget;
use crate::quantize::{Format, QuantizedTensor, Regions};
use crate::{DType, DeviceTensor, ProblemError};

/// Rows up to which this is better than tiles of decoded weights.
pub(super) const MAX_ROWS: usize = 64;
/// Columns of the result in a product.
const COLUMNS: usize = 16;
/// Rows of the result in a product.
const ROWS: usize = 8;

type Pair<F> = Vector<F, Const<2>>;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct MmaConfig {
    /// Products that share activations, 16 columns each.
    column_tiles: usize,
    /// Products that share weights, 8 rows each.
    row_tiles: usize,
    /// Warps of a cube, which share out the summands.
    warps: usize,
    /// Whether the last step has fewer summands than the others.
    ragged: bool,
    format: Format,
    zero_point: bool,
    bias: bool,
    bf16: bool,
}

impl MmaConfig {
    fn new(device: &DeviceProperties, x: &DeviceTensor<2>, product: &Product<'_>) -> Self {
        let [rows, columns, _] = product.size;
        let multiprocessors = device.hardware.num_streaming_multiprocessors.unwrap_or(1);
        // Wide cubes read the activations fewer times, and each lane has more loads in flight; narrow
        // ones are more.
        let enough = columns.div_ceil(2 * COLUMNS) > multiprocessors as usize;
        let (column_tiles, row_tiles, warps) = match rows {
            0..=ROWS if enough => (2, 1, 8),
            0..=ROWS => (1, 1, 8),
            _ if rows <= 2 * ROWS => (2, 2, 8),
            _ => (4, 2, 4),
        };
        Self {
            column_tiles,
            row_tiles,
            warps,
            ragged: !product.size[2].is_multiple_of(step_len(product.w.format())),
            format: product.w.format(),
            zero_point: product.w.zeros().is_some(),
            bias: product.bias.is_some(),
            bf16: x.dtype() == DType::BF16,
        }
    }

    /// Columns of a cube.
    fn columns(self) -> usize {
        COLUMNS * self.column_tiles
    }

    /// Rows of a cube.
    fn rows(self) -> usize {
        ROWS * self.row_tiles
    }

    fn units(self) -> usize {
        32 * self.warps
    }

    /// Elements of a lane's 16 bytes of a row of weights.
    fn own(self) -> usize {
        4 * self.format.per_word()
    }
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct MmaScalars {
    /// M.
    rows: u32,
    /// N.
    columns: u32,
    /// K.
    len: u32,
    /// 16-byte chunks from one row of activations to the next.
    stride: u32,
    /// 16-byte chunks of a row of weights.
    chunks: u32,
    /// Binary logarithm of the steps that share a scale; enough for all steps if a row has one.
    scale_shift: u32,
    /// [`MmaConfig::flip`]: as a constant it would take an instruction of its own for each pair.
    flip: u32,
}

/// Summands of a step: 16 bytes of weights in each of the four lanes of a column.
fn step_len(format: Format) -> usize {
    16 * format.per_word()
}

/// Whether the kernel takes these operands.
pub(super) fn takes<const R: usize>(
    device: &DeviceProperties,
    x: &DeviceTensor<2>,
    w: &QuantizedTensor<R>,
) -> bool {
    let [rows, len] = x.shape();
    let scale_len = w.scale_len();
    rows <= MAX_ROWS
        && mma_supported(x.dtype().into(), device).is_ok()
        && x.is_aligned()
        && len.is_multiple_of(8)
        && (scale_len >= len || scale_len.is_multiple_of(step_len(w.format())))
}

pub(super) fn launch(
    client: &Client,
    x: &DeviceTensor<2>,
    product: Product<'_>,
) -> Result<(), ProblemError> {
    let [rows, columns, len] = product.size;
    let w = product.w;
    let device = client.properties();
    let config = MmaConfig::new(device, x, &product);
    let rounds = len.div_ceil(step_len(w.format()) * config.warps);
    expect_loop_budget(device, "a product with low-bit weights", rounds)?;
    let grid = product.grid(device, [config.rows(), config.columns()])?;
    let scale_len = w.scale_len();
    let scale_shift = if scale_len >= len {
        31
    } else {
        // Groups and blocks are powers of two.
        (scale_len / step_len(w.format())).ilog2()
    };
    // SAFETY: nothing is read past a row's end nor of rows that do not exist, and results past the ends
    // are not stored.
    unsafe {
        mma_matmul::launch_unchecked(
            client,
            grid,
            CubeDim::new_1d(config.units() as u32),
            AddressType::from_len(x.extent().max(columns * w.words_per_row())),
            BufferArg::from_raw_parts(x.handle().clone(), x.extent() / 2),
            w.words_arg(),
            w.scales().buffer_arg(),
            w.zeros_arg(),
            product.bias_arg(),
            product.out,
            w.regions(),
            MmaScalarsLaunch::new(
                rows as u32,
                columns as u32,
                len as u32,
                (x.strides()[0] / 8) as u32,
                w.words_per_row() as u32 / 4,
                scale_shift,
                config.flip(),
            ),
            config,
            x.dtype().elem_type(),
            product.dtype.elem_type(),
        );
    }
    Ok(())
}

/// One cube computes 8 or 16 rows of 16 to 64 columns. Its warps take turns at the steps of the
/// summands; each has the weights of two of its steps on the way.
///
/// Grid: x = tiles of columns, y = tiles of rows.
#[cube(launch_unchecked, address_type = "dynamic")]
fn mma_matmul<F: Float, O: Float>(
    x: &[Vector<u32, Const<4>>],
    w: &[Vector<u32, Const<4>>],
    scales: &[f32],
    zeros: &[f32],
    bias: &[f32],
    out: &mut [O],
    regions: Regions,
    scalars: MmaScalars,
    #[comptime] config: MmaConfig,
    #[define(F)] _dtype: ElemType,
    #[define(O)] _out_dtype: ElemType,
) {
    let (warp, lane) = (UNIT_POS / 32, UNIT_POS % 32);
    let first_column = CUBE_POS_X * comptime!(config.columns() as u32);
    let first_row = CUBE_POS_Y * comptime!(config.rows() as u32);
    let columns = Columns::new(first_column + lane / 4, regions, scalars, config);
    let activations = Activations::new(first_row + lane / 4, scalars, config);
    let mut totals = Array::<f32>::new(comptime!(4 * config.column_tiles * config.row_tiles));
    #[unroll]
    for i in 0..comptime!(4 * config.column_tiles * config.row_tiles) {
        totals[i] = 0.0;
    }

    let warps = comptime!(config.warps as u32);
    let steps = scalars.chunks.div_ceil(4);
    let flip = scalars.flip;
    let mut own = activations.zeros(config);
    let mut even = Step::empty(config);
    let mut odd = Step::empty(config);
    columns.read(&mut even, w, scales, zeros, warp, scalars, config);
    columns.read(&mut odd, w, scales, zeros, warp + warps, scalars, config);
    for step in range_stepped(warp, steps, 2 * warps) {
        activations.read(&mut own, x, step, config);
        multiply::<F>(&even, &own, &mut totals, flip, config);
        columns.read(
            &mut even,
            w,
            scales,
            zeros,
            step + 2 * warps,
            scalars,
            config,
        );
        if step + warps < steps {
            activations.read(&mut own, x, step + warps, config);
            multiply::<F>(&odd, &own, &mut totals, flip, config);
            columns.read(
                &mut odd,
                w,
                scales,
                zeros,
                step + 3 * warps,
                scalars,
                config,
            );
        }
    }
    store::<O>(out, bias, &totals, first_row, first_column, scalars, config);
}

/// Adds the scaled products of a step to a lane's sums, `[column_tiles, row_tiles, 2, 2]`.
#[cube]
fn multiply<F: Float>(
    step: &Step,
    x: &Array<Vector<u32, Const<4>>>,
    totals: &mut Array<f32>,
    flip: u32,
    #[comptime] config: MmaConfig,
) {
    let (column_tiles, row_tiles) = (config.column_tiles, config.row_tiles);
    let per_word = comptime!(config.format.per_word());
    let own = comptime!(config.own());
    let mma = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    let mut origins = Sequence::<Origin<F>>::new();
    #[unroll]
    for c in 0..comptime!(2 * column_tiles) {
        origins.push(Origin::<F>::new(step.zeros[c], config));
    }
    let mut sums = Sequence::<Array<Pair<f32>>>::new();
    #[unroll]
    for _ in 0..comptime!(column_tiles * row_tiles) {
        let mut sum = Array::<Pair<f32>>::new(2usize);
        sum[0] = Vector::new(0.0f32);
        sum[1] = Vector::new(0.0f32);
        sums.push(sum);
    }
    #[unroll]
    for part in 0..comptime!(own / 4) {
        // The part's word, and its first element there.
        let word = comptime!(4 * part / per_word);
        let e = comptime!(4 * part % per_word / 2);
        let mut rights = Sequence::<Array<Pair<F>>>::new();
        #[unroll]
        for r in 0..row_tiles {
            let start = comptime!(r * own + word * per_word);
            let mut right = Array::<Pair<F>>::new(2usize);
            #[unroll]
            for half in 0..2usize {
                let low = comptime!(start + e + half);
                let high = comptime!(low + per_word / 2);
                let a = x[comptime!(low / 8)].extract(comptime!(low % 8 / 2));
                let b = x[comptime!(high / 8)].extract(comptime!(high % 8 / 2));
                // Of each word, the half that `low` and `high`, of the same parity, are.
                let pair = if comptime!(low % 2 == 0) {
                    (a & 0xffff) | (b << 16)
                } else {
                    (a >> 16) | (b & 0xffff_0000)
                };
                right[half] = Pair::<F>::reinterpret(pair);
            }
            rights.push(right);
        }
        #[unroll]
        for tile in 0..column_tiles {
            let mut left = Array::<Pair<F>>::new(4usize);
            #[unroll]
            for half in 0..2usize {
                #[unroll]
                for c in 0..2usize {
                    let column = comptime!(2 * tile + c);
                    let bits = step.words[column].extract(word);
                    let e = comptime!(e + half);
                    left[comptime!(2 * half + c)] =
                        decode_pair::<F>(bits, origins.index(column), flip, e, config);
                }
            }
            #[unroll]
            for r in 0..row_tiles {
                let sum = sums.index_mut(comptime!(tile * row_tiles + r));
                mma.execute_inplace(&left, rights.index(r), sum);
            }
        }
    }
    #[unroll]
    for tile in 0..column_tiles {
        #[unroll]
        for r in 0..row_tiles {
            let sum = comptime!(tile * row_tiles + r);
            #[unroll]
            for i in 0..4usize {
                let at = comptime!(4 * sum + i);
                let scale = step.scales[comptime!(2 * tile + i / 2)];
                let product = sums[sum][comptime!(i / 2)].extract(comptime!(i % 2));
                totals[at] = fma(product, scale, totals[at]);
            }
        }
    }
}

/// Adds the warps' sums and stores them.
#[cube]
fn store<O: Float>(
    out: &mut [O],
    bias: &[f32],
    totals: &Array<f32>,
    first_row: u32,
    first_column: u32,
    scalars: MmaScalars,
    #[comptime] config: MmaConfig,
) {
    let (height, width) = (comptime!(config.rows()), comptime!(config.columns()));
    // Four more than the width: the rows that lanes store lie in different banks.
    let pitch = comptime!(width + 4);
    let (warp, lane) = (UNIT_POS as usize / 32, UNIT_POS as usize % 32);
    let mut shared = Shared::<[f32]>::new_slice(comptime!(config.warps * height * pitch));
    #[unroll]
    for tile in 0..config.column_tiles {
        #[unroll]
        for r in 0..config.row_tiles {
            #[unroll]
            for i in 0..4usize {
                let column = lane / 4 + comptime!(COLUMNS * tile + 8 * (i / 2));
                let row = 2 * (lane % 4) + comptime!(ROWS * r + i % 2);
                shared[(warp * height + row) * pitch + column] =
                    totals[comptime!(4 * (tile * config.row_tiles + r) + i)];
            }
        }
    }
    sync_cube();
    let units = comptime!(config.units());
    #[unroll]
    for part in 0..comptime!((height * width).div_ceil(units)) {
        let at = comptime!(part * units) + UNIT_POS as usize;
        let (row, column) = (at / width, at % width);
        let (out_row, out_column) = (first_row + row as u32, first_column + column as u32);
        if row < height && out_row < scalars.rows && out_column < scalars.columns {
            let mut sum = 0.0f32.runtime();
            #[unroll]
            for warp in 0..config.warps {
                sum += shared[(comptime!(warp * height) + row) * pitch + column];
            }
            if config.bias {
                sum += bias[out_column as usize];
            }
            out[out_row as usize * scalars.columns as usize + out_column as usize] =
                O::cast_from(sum);
        }
    }
}
