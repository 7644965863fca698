//! Products with low-bit matrices: `Y = X W^T + b`, as a linear layer computes it.
//!
//! `W` is held as `[N, K]`, a row to each output, so that the scales of its rows are those of the
//! outputs and groups lie along the sum. A weight `[K, N]` is quantized as its `permute([1, 0])`.
//!
//! | activations | weights | kernel |
//! |---|---|---|
//! | INT8, FP8 | the same | `codes`: warp-level tensor cores; exact 32-bit sums of INT8; FP8 for 16-bit results |
//! | INT8 | INT8 | `integer`: exact sums of products of words, where there are none or groups are short |
//! | f32, f16, bf16, and other low-bit formats, decoded once | any | `decoded`: f32 products of tiles decoded into shared memory |
//! | f16, bf16, at most 64 rows | any | `mma`: warp-level tensor cores, weights decoded in registers |
//! | the same as `decoded`, at most four rows | any | `rows`: no tiles, weights read once |
//!
//! Supported: any number of rows, any N and K; scales of weights per tensor, row, group and block, with
//! or without zero points; f32, f16 and bf16 activations and results; strided activations whose leading
//! axes can be flattened.
//! Rejected, with a [`ProblemError`]: weights with a scale per column, which is one per summand; sums
//! of more than 133144 INT8 products under one scale, which could overflow.

mod codes;
mod decoded;
mod integer;
mod mma;
mod problem;
mod rows;

pub use problem::{LowBitForm, MatmulProblem};

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;

use crate::limits::{expect_buffer, expect_dtype, grid};
use crate::problem::{expect_f32, expect_shape};
use crate::quantize::{
    Format, Granularity, QuantizedTensor, dequantize, expect_format, flattened, matrix_shape,
};
use crate::{DType, DeviceTensor, ProblemError};

/// Units of a cube, 16 by 16 in kernels with tiles.
const UNITS: usize = 256;
/// Units along each side of a tile.
const SIDE: usize = 16;

/// What a kernel with tiles is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct TileConfig {
    /// Rows of the result that a unit holds.
    unit_rows: usize,
    /// Columns of the result that a unit holds.
    unit_columns: usize,
    /// Whether there is a bias.
    bias: bool,
}

impl TileConfig {
    /// Larger tiles read their operands fewer times; few rows leave no use for them.
    fn new([rows, columns]: [usize; 2], bias: bool) -> Self {
        let (unit_rows, unit_columns) = match rows {
            0..=16 => (1, 4),
            1024.. if columns >= 1024 => (8, 8),
            _ => (4, 4),
        };
        Self {
            unit_rows,
            unit_columns,
            bias,
        }
    }

    /// Rows of a cube's tile.
    fn rows(self) -> usize {
        SIDE * self.unit_rows
    }

    /// Columns of a cube's tile.
    fn columns(self) -> usize {
        SIDE * self.unit_columns
    }
}

/// A product that was checked: what its kernels share.
struct Product<'a> {
    w: &'a QuantizedTensor<2>,
    bias: Option<&'a DeviceTensor<1>>,
    /// M, N, K.
    size: [usize; 3],
    /// `[M, N]`, contiguous.
    out: BufferArg,
    dtype: DType,
}

impl Product<'_> {
    /// A cube to each tile of so many rows and columns of the result: x = tiles of columns, y = tiles of
    /// rows.
    fn grid(
        &self,
        device: &DeviceProperties,
        [tile_rows, tile_columns]: [usize; 2],
    ) -> Result<CubeCount, ProblemError> {
        let [rows, columns, _] = self.size;
        grid(
            device,
            [
                ("tiles of columns", columns.div_ceil(tile_columns)),
                ("tiles of rows", rows.div_ceil(tile_rows)),
                ("", 1),
            ],
        )
    }

    /// The bias as a kernel's argument; the scales where there is none, which are then not read.
    fn bias_arg(&self) -> BufferArg {
        match self.bias {
            Some(bias) => bias.buffer_arg(),
            None => self.w.scales().buffer_arg(),
        }
    }
}

/// `X W^T + b` of low-bit activations `x [.., K]` and weights `w [N, K]`: `[.., N]`, contiguous, in
/// `dtype`.
///
/// INT8 by INT8 without zero points is summed in integers, exactly; of other formats the activations
/// are decoded to f32 first. `bias` is contiguous f32 `[N]`.
///
/// # Errors
/// The [module](crate::matmul)'s refusals; a type that the device lacks; shapes that do not fit.
pub fn quantized_matmul<const R: usize>(
    client: &Client,
    x: &QuantizedTensor<R>,
    w: &QuantizedTensor<2>,
    bias: Option<&DeviceTensor<1>>,
    dtype: DType,
) -> Result<DeviceTensor<R>, ProblemError> {
    let codes = codes::takes(client.properties(), x, w, dtype);
    if !codes && !sums_integers(x, w) {
        let decoded = dequantize(client, x, DType::F32)?;
        return weight_only_matmul(client, &decoded, w, bias, dtype);
    }
    let out = quantized_out(client, x, w, bias, dtype)?;
    let [rows, columns] = x.matrix();
    let product = Product {
        w,
        bias,
        size: [rows, w.shape()[0], columns],
        out: out.buffer_arg(),
        dtype,
    };
    if codes {
        codes::launch(client, x, product)?;
    } else {
        integer::launch(client, x, product)?;
    }
    Ok(out)
}

/// Whether products of `x` and `w` are summed in integers.
fn sums_integers<const R: usize>(x: &QuantizedTensor<R>, w: &QuantizedTensor<2>) -> bool {
    x.format() == Format::Int8
        && w.format() == Format::Int8
        && x.zeros().is_none()
        && w.zeros().is_none()
        && x.granularity() != Granularity::Column
}

/// The result of [`quantized_matmul`], not computed yet: for engines that compute it themselves, after
/// everything that it refuses.
///
/// # Errors
/// As for [`quantized_matmul`].
pub fn quantized_out<const R: usize>(
    client: &Client,
    x: &QuantizedTensor<R>,
    w: &QuantizedTensor<2>,
    bias: Option<&DeviceTensor<1>>,
    dtype: DType,
) -> Result<DeviceTensor<R>, ProblemError> {
    let matrix = x.matrix();
    expect_shape("w", w.shape(), [w.shape()[0], matrix[1]])?;
    if sums_integers(x, w) && w.granularity() != Granularity::Column {
        integer::step(x.scale_len(), w.scale_len(), matrix[1])?;
    }
    empty_out(client, x.shape(), w, bias, dtype)
}

/// `X W^T + b` of activations `x [.., K]` and low-bit weights `w [N, K]`: `[.., N]`, contiguous, in
/// `dtype`.
///
/// Weights are decoded to f32 on the way, products and sums are f32. `bias` is contiguous f32 `[N]`.
///
/// # Errors
/// As for [`quantized_matmul`].
pub fn weight_only_matmul<const R: usize>(
    client: &Client,
    x: &DeviceTensor<R>,
    w: &QuantizedTensor<2>,
    bias: Option<&DeviceTensor<1>>,
    dtype: DType,
) -> Result<DeviceTensor<R>, ProblemError> {
    expect_activations(client, "x", x)?;
    let [rows, columns] = matrix_shape(x.shape());
    expect_shape("w", w.shape(), [w.shape()[0], columns])?;
    let view = flattened("x", x)?;
    let out = empty_out(client, x.shape(), w, bias, dtype)?;
    let product = Product {
        w,
        bias,
        size: [rows, w.shape()[0], columns],
        out: out.buffer_arg(),
        dtype,
    };
    if mma::takes(client.properties(), &view, w) {
        mma::launch(client, &view, product)?;
    } else if rows <= rows::MAX_ROWS {
        rows::launch(client, &view, product)?;
    } else {
        decoded::launch(client, &view, product, false)?;
    }
    Ok(out)
}

/// How activations that are quantized in the call share their scales, for weights that share theirs
/// like this.
pub fn activation_granularity(weights: Granularity) -> Granularity {
    match weights {
        Granularity::Block => Granularity::Group(128),
        _ => Granularity::Row,
    }
}

/// An error unless activations of `[rows, K]` can be quantized like this and multiplied with such
/// weights: what is refused whatever the device, for callers that launch later.
///
/// # Errors
/// As for [`quantized_matmul`]; and weights of blocks with a K that 128 does not divide.
pub fn expect_dynamic(
    x: [usize; 2],
    format: Format,
    granularity: Granularity,
    zero_point: bool,
) -> Result<(), ProblemError> {
    expect_weights(granularity)?;
    let shared = activation_granularity(granularity);
    expect_format("x", x, format, shared, false)?;
    if format == Format::Int8 && !zero_point {
        // A row of weights has the scales that any number of rows has.
        let weights = granularity.region([1, x[1]]);
        integer::step(shared.region(x)[1], weights[1], x[1])?;
    }
    Ok(())
}

/// The gradient of these products with respect to `X`: `dX = dY W [.., K]`, from `dy [.., N]`, in
/// `dy`'s type.
///
/// Where the activations were quantized, this is the straight-through gradient.
///
/// # Errors
/// As for [`weight_only_matmul`].
pub fn quantized_matmul_backward<const R: usize>(
    client: &Client,
    dy: &DeviceTensor<R>,
    w: &QuantizedTensor<2>,
) -> Result<DeviceTensor<R>, ProblemError> {
    expect_activations(client, "dy", dy)?;
    let [rows, columns] = matrix_shape(dy.shape());
    let [outputs, inputs] = w.shape();
    let mut expected = dy.shape();
    expected[R - 1] = outputs;
    expect_shape("dy", dy.shape(), expected)?;
    expect_weights(w.granularity())?;
    let view = flattened("dy", dy)?;
    let mut shape = dy.shape();
    shape[R - 1] = inputs;
    expect_buffer(client.properties(), "dx", rows * inputs * dy.dtype().size())?;
    let out = DeviceTensor::empty(client, shape, dy.dtype());
    let product = Product {
        w,
        bias: None,
        size: [rows, inputs, columns],
        out: out.buffer_arg(),
        dtype: dy.dtype(),
    };
    decoded::launch(client, &view, product, true)?;
    Ok(out)
}

fn expect_activations<const R: usize>(
    client: &Client,
    argument: &'static str,
    x: &DeviceTensor<R>,
) -> Result<(), ProblemError> {
    if x.is_empty() {
        return Err(ProblemError::ZeroSize {
            argument,
            shape: x.shape().to_vec(),
        });
    }
    expect_dtype(client.properties(), x.dtype())
}

/// An error unless products take weights that share their scales like this.
///
/// # Errors
/// [`ProblemError::NotSupported`] for a scale per column.
pub fn expect_weights(granularity: Granularity) -> Result<(), ProblemError> {
    match granularity {
        Granularity::Column => Err(ProblemError::NotSupported {
            what: "a product with weights that have a scale per column".into(),
            why: "columns are what is summed over: quantize by row, group or block",
        }),
        _ => Ok(()),
    }
}

/// The result of activations of `shape`, after the checks that all products share.
fn empty_out<const R: usize>(
    client: &Client,
    shape: [usize; R],
    w: &QuantizedTensor<2>,
    bias: Option<&DeviceTensor<1>>,
    dtype: DType,
) -> Result<DeviceTensor<R>, ProblemError> {
    let device = client.properties();
    expect_dtype(device, dtype)?;
    expect_weights(w.granularity())?;
    let outputs = w.shape()[0];
    if let Some(bias) = bias {
        expect_f32("bias", bias, [outputs])?;
    }
    let mut out_shape = shape;
    out_shape[R - 1] = outputs;
    let bytes = out_shape.iter().product::<usize>() * dtype.size();
    expect_buffer(device, "the product", bytes)?;
    Ok(DeviceTensor::empty(client, out_shape, dtype))
}
