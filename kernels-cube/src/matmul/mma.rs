//! A few rows of activations by low-bit weights, on warp-level tensor cores: bound by reading the
//! weights, once for each 16 rows.
//!
//! Weights become 16-bit numbers in registers, where they are the right side of a 16x8x16 product as
//! they lie: any order of the summands will do if both sides have the same, so a lane takes 16 bytes
//! of a column and the activations that belong to them. Products under one scale are summed in f32
//! and then scaled.

use cubecl::cmma::MmaDefinition;
use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;

use super::{Product, UNITS};
use crate::engine::mma_supported;
use crate::limits::{expect_loop_budget, grid};
use crate::quantize::{Format, QuantizedTensor, Regions, number};
use crate::{DType, DeviceTensor, ProblemError};

/// Rows up to which this is better than tiles of decoded weights.
pub(super) const MAX_ROWS: usize = 64;
/// Rows of a product.
const ROWS: usize = 16;
/// Warps of a cube, which share out the summands.
const WARPS: usize = UNITS / 32;

type Pair<F> = Vector<F, Const<2>>;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct MmaConfig {
    /// Whether all activations are in the upper half of the product.
    upper: bool,
    /// Products beside each other, 8 columns each.
    tiles: usize,
    format: Format,
    zero_point: bool,
    bias: bool,
    bf16: bool,
}

impl MmaConfig {
    /// Columns of a cube.
    fn columns(self) -> usize {
        8 * self.tiles
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
    /// 16-byte chunks of a row of weights.
    chunks: u32,
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
    let scale_len = w.granularity().region(w.matrix())[1];
    rows <= MAX_ROWS
        && mma_supported(x.dtype(), device).is_ok()
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
    let steps = len.div_ceil(step_len(w.format()) * WARPS);
    expect_loop_budget(device, "a product with low-bit weights", steps + WARPS)?;
    let config = MmaConfig {
        upper: rows <= 8,
        // Wide cubes read the activations fewer times; narrow ones are more.
        tiles: if rows <= 8 { 2 } else { 4 },
        format: w.format(),
        zero_point: w.zeros().is_some(),
        bias: product.bias.is_some(),
        bf16: x.dtype() == DType::BF16,
    };
    let grid = grid(
        device,
        [
            ("tiles of columns", columns.div_ceil(config.columns())),
            ("tiles of rows", rows.div_ceil(ROWS)),
            ("", 1),
        ],
    )?;
    // SAFETY: rows, columns and chunks past the ends are not read, and results past them not stored.
    unsafe {
        mma_matmul::launch_unchecked(
            client,
            grid,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(x.extent().max(columns * w.words_per_row())),
            x.tensor_arg(),
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
                w.words_per_row() as u32 / 4,
            ),
            config,
            x.dtype().elem_type(),
            product.dtype.elem_type(),
        );
    }
    Ok(())
}

/// Elements `e` and `e + per_word / 2` of a word, less the zero point.
#[cube]
fn decode_pair<F: Float>(
    word: u32,
    zero: f32,
    #[comptime] e: usize,
    #[comptime] config: MmaConfig,
) -> Pair<F> {
    let half = comptime!(config.format.per_word() / 2);
    // 128 in bf16 and 1024 in f16 have whole numbers as their lowest bits, 7 and 10 of them.
    let fits = comptime!(match config.format {
        Format::Int4 => true,
        Format::Int8 => !config.bf16,
        Format::Fp8 => false,
    });
    if fits {
        let bits = comptime!(config.format.bits() as u32);
        let (power, base) = comptime!(if config.bf16 {
            (0x4300u32, 128.0f32)
        } else {
            (0x6400u32, 1024.0f32)
        });
        // Two's complement: flipping the sign bit adds half the range.
        let flip = comptime!(if config.zero_point {
            0
        } else {
            1u32 << (bits - 1)
        });
        let mask = comptime!(((1u32 << bits) - 1) * 0x1_0001);
        let numbers =
            ((word >> comptime!(e as u32 * bits)) & mask) ^ comptime!((power | flip) * 0x1_0001);
        let shift = if comptime!(config.zero_point) {
            zero + base
        } else {
            f32::new(comptime!(base + flip as f32))
        };
        Pair::<F>::reinterpret(numbers) - Pair::<F>::new(F::cast_from(shift))
    } else {
        let mut pair = Pair::<F>::empty();
        let (format, zero_point) = (config.format, config.zero_point);
        let low = number(word, comptime!(e as u32), zero, format, zero_point);
        let high = number(word, comptime!((e + half) as u32), zero, format, zero_point);
        pair.insert(0usize, F::cast_from(low));
        pair.insert(1usize, F::cast_from(high));
        pair
    }
}

/// Elements `first + e` and `first + e + per_word / 2` of a lane's activations.
#[cube]
fn activation_pair<F: Float>(
    x: &Array<Vector<F, Const<8>>>,
    #[comptime] first: usize,
    #[comptime] e: usize,
    #[comptime] config: MmaConfig,
) -> Pair<F> {
    let (low, high) = comptime!((first + e, first + e + config.format.per_word() / 2));
    let mut pair = Pair::<F>::empty();
    pair.insert(0usize, x[comptime!(low / 8)].extract(comptime!(low % 8)));
    pair.insert(1usize, x[comptime!(high / 8)].extract(comptime!(high % 8)));
    pair
}

/// A lane's weights of a step, 16 bytes of a column in each tile, and the scales of its two columns.
#[derive(CubeType)]
struct Step {
    words: Array<Vector<u32, Const<4>>>,
    scales: Array<f32>,
}

/// Where a lane's weights and scales are.
#[derive(CubeType)]
struct Columns {
    /// The first of the lane's columns as a right side.
    first: u32,
    /// The number of the first scale of each of its columns as a result.
    scales: Array<u32>,
    /// Of each of its columns as a right side, in weights with zero points.
    zeros: Array<u32>,
}

#[cube]
impl Columns {
    fn new(
        first_column: u32,
        regions: Regions,
        scalars: MmaScalars,
        #[comptime] config: MmaConfig,
    ) -> Columns {
        let (group, quad) = (UNIT_POS_PLANE / 4, UNIT_POS_PLANE % 4);
        let mut scales = Array::<u32>::new(comptime!(2 * config.tiles));
        let mut zeros = Array::<u32>::new(config.tiles);
        #[unroll]
        for tile in 0..config.tiles {
            let column = first_column + comptime!(8 * tile as u32);
            #[unroll]
            for c in 0..2usize {
                let column = min(column + 2 * quad + comptime!(c as u32), scalars.columns - 1);
                scales[comptime!(2 * tile + c)] = regions.index(column, 0) as u32;
            }
            zeros[tile] = regions.index(min(column + group, scalars.columns - 1), 0) as u32;
        }
        Columns {
            first: first_column + group,
            scales,
            zeros,
        }
    }

    /// Reads what a lane needs for a step; weights that do not exist are 0.
    fn read(
        &self,
        w: &[Vector<u32, Const<4>>],
        scales: &[f32],
        step: u32,
        regions: Regions,
        scalars: MmaScalars,
        #[comptime] config: MmaConfig,
    ) -> Step {
        let chunk = 4 * step + UNIT_POS_PLANE % 4;
        let along = scale_along(step, regions, scalars, config);
        let mut words = Array::<Vector<u32, Const<4>>>::new(config.tiles);
        let mut factors = Array::<f32>::new(comptime!(2 * config.tiles));
        #[unroll]
        for tile in 0..config.tiles {
            let column = self.first + comptime!(8 * tile as u32);
            let mut four = Vector::<u32, Const<4>>::new(0u32);
            if column < scalars.columns && chunk < scalars.chunks {
                four = w[column as usize * scalars.chunks as usize + chunk as usize];
            }
            words[tile] = four;
        }
        #[unroll]
        for c in 0..comptime!(2 * config.tiles) {
            factors[c] = scales[(self.scales[c] + along) as usize];
        }
        Step {
            words,
            scales: factors,
        }
    }
}

/// Of a row's scales, the number of those of a step; the last one's past the end.
#[cube]
fn scale_along(
    step: u32,
    regions: Regions,
    scalars: MmaScalars,
    #[comptime] config: MmaConfig,
) -> u32 {
    let len = comptime!(step_len(config.format) as u32);
    regions.along(min(step * len, scalars.len - 1))
}

/// One cube computes 16 rows of 16 or 32 columns; each of its warps takes every 8th step of the
/// summands, and reads the weights of two steps ahead.
///
/// Grid: x = tiles of columns, y = tiles of rows.
#[cube(launch_unchecked, address_type = "dynamic")]
fn mma_matmul<F: Float, O: Float>(
    x: &Tensor<Vector<F, Const<8>>>,
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
    let per_word = comptime!(config.format.per_word());
    // Elements of a lane's 16 bytes.
    let own = comptime!(4 * per_word);
    let (tiles, width) = (config.tiles, comptime!(config.columns()));
    let mma = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    let (warp, lane) = (UNIT_POS / 32, UNIT_POS_PLANE);
    let (group, quad) = (lane / 4, lane % 4);
    let first_column = CUBE_POS_X * comptime!(width as u32);
    let first_row = CUBE_POS_Y * comptime!(ROWS as u32);
    let columns = Columns::new(first_column, regions, scalars, config);
    let mut totals = Array::<f32>::new(comptime!(4 * tiles));
    #[unroll]
    for i in 0..comptime!(4 * tiles) {
        totals[i] = 0.0;
    }

    let warps = comptime!(WARPS as u32);
    let rounds = scalars.chunks.div_ceil(4).div_ceil(warps);
    let mut current = columns.read(w, scales, warp, regions, scalars, config);
    let mut next = columns.read(w, scales, warp + warps, regions, scalars, config);
    for round in 0..rounds {
        let step = round * warps + warp;
        let after = columns.read(w, scales, step + 2 * warps, regions, scalars, config);
        let first = (4 * step + quad) * comptime!(own as u32);
        let upper = read_activations::<F>(x, first_row + group, first, scalars, own);
        let lower = if comptime!(config.upper) {
            no_activations::<F>(own)
        } else {
            read_activations::<F>(x, first_row + group + 8, first, scalars, own)
        };
        let mut zero = Array::<f32>::new(tiles);
        #[unroll]
        for tile in 0..tiles {
            zero[tile] = 0.0;
            if config.zero_point {
                let along = scale_along(step, regions, scalars, config);
                zero[tile] = zeros[(columns.zeros[tile] + along) as usize];
            }
        }
        let mut sums = Sequence::<Array<Pair<f32>>>::new();
        #[unroll]
        for _ in 0..tiles {
            let mut sum = Array::<Pair<f32>>::new(2usize);
            sum[0] = Vector::new(0.0f32);
            sum[1] = Vector::new(0.0f32);
            sums.push(sum);
        }
        #[unroll]
        for part in 0..comptime!(own / 4) {
            // The part's first element, in its word and in the lane's 16 bytes.
            let word = comptime!(4 * part / per_word);
            let e = comptime!(4 * part % per_word / 2);
            let start = comptime!(word * per_word);
            let mut left = Array::<Pair<F>>::new(4usize);
            #[unroll]
            for half in 0..2usize {
                let e = comptime!(e + half);
                left[comptime!(2 * half)] = activation_pair::<F>(&upper, start, e, config);
                left[comptime!(2 * half + 1)] = activation_pair::<F>(&lower, start, e, config);
            }
            #[unroll]
            for tile in 0..tiles {
                let bits = current.words[tile].extract(word);
                let mut right = Array::<Pair<F>>::new(2usize);
                #[unroll]
                for half in 0..2usize {
                    right[half] = decode_pair::<F>(bits, zero[tile], comptime!(e + half), config);
                }
                mma.execute_inplace(&left, &right, sums.index_mut(tile));
            }
        }
        #[unroll]
        for tile in 0..tiles {
            #[unroll]
            for c in 0..2usize {
                let scale = current.scales[comptime!(2 * tile + c)];
                #[unroll]
                for half in 0..2usize {
                    let i = comptime!(4 * tile + 2 * half + c);
                    totals[i] = fma(sums[tile][half].extract(c), scale, totals[i]);
                }
            }
        }
        #[unroll]
        for tile in 0..tiles {
            current.words[tile] = next.words[tile];
            next.words[tile] = after.words[tile];
        }
        #[unroll]
        for c in 0..comptime!(2 * tiles) {
            current.scales[c] = next.scales[c];
            next.scales[c] = after.scales[c];
        }
    }

    let mut shared = Shared::<[f32]>::new_slice(comptime!(WARPS * ROWS * width));
    #[unroll]
    for tile in 0..tiles {
        #[unroll]
        for half in 0..2usize {
            #[unroll]
            for c in 0..2usize {
                let row = group as usize + comptime!(8 * half);
                let column = 2 * quad as usize + comptime!(8 * tile + c);
                shared[(warp as usize * ROWS + row) * width + column] =
                    totals[comptime!(4 * tile + 2 * half + c)];
            }
        }
    }
    sync_cube();
    #[unroll]
    for part in 0..comptime!(ROWS * width / UNITS) {
        let at = comptime!(part * UNITS) + UNIT_POS as usize;
        let row = first_row + (at / width) as u32;
        let column = first_column + (at % width) as u32;
        if row < scalars.rows && column < scalars.columns {
            let mut sum = 0.0f32.runtime();
            #[unroll]
            for warp in 0..WARPS {
                sum += shared[comptime!(warp * ROWS * width) + at];
            }
            if config.bias {
                sum += bias[column as usize];
            }
            out[row as usize * scalars.columns as usize + column as usize] = O::cast_from(sum);
        }
    }
}

/// `own` activations of a row from `first` on; those that do not exist are 0.
#[cube]
fn read_activations<F: Float>(
    x: &Tensor<Vector<F, Const<8>>>,
    row: u32,
    first: u32,
    scalars: MmaScalars,
    #[comptime] own: usize,
) -> Array<Vector<F, Const<8>>> {
    let mut values = Array::<Vector<F, Const<8>>>::new(comptime!(own / 8));
    #[unroll]
    for i in 0..comptime!(own / 8) {
        let at = first + comptime!(8 * i as u32);
        let mut eight = Vector::<F, Const<8>>::new(F::new(0.0));
        if row < scalars.rows && at < scalars.len {
            eight = x[(row as usize * x.stride(0) + at as usize) / 8];
        }
        values[i] = eight;
    }
    values
}

#[cube]
fn no_activations<F: Float>(#[comptime] own: usize) -> Array<Vector<F, Const<8>>> {
    let mut values = Array::<Vector<F, Const<8>>>::new(comptime!(own / 8));
    #[unroll]
    for i in 0..comptime!(own / 8) {
        values[i] = Vector::new(F::new(0.0));
    }
    values
}
