//! Low-bit storage of tensors: INT8, INT4 and FP8 e4m3, packed into 32-bit words.
//!
//! Formulas, and what becomes of zeros, infinities and NaN: `cubesla_reference::quantize`. Codes and
//! scales are made with integer arithmetic and single roundings, so that they are the reference's bit
//! by bit wherever f32 division is IEEE's: on CUDA and on software Vulkan. A Vulkan GPU may divide
//! with an error of two units in the last place, and then a value halfway between two codes may get
//! the other one.
//!
//! Supported: f32, f16 and bf16 inputs of any rank; any strides along the last axis and between rows,
//! if the leading axes can be flattened into rows.
//! Rejected, with a [`ProblemError`]: empty axes; groups that are not 32, 64 or 128 or do not divide
//! the last axis; a zero point in FP8; leading axes that no single stride walks.

mod codes;
#[allow(missing_docs, reason = "`CubeLaunch` derives a struct of its own")]
mod convert;
mod rows;
mod scales;

pub(crate) use codes::{code, code_of_quotient, is_nan, number, round_e4m3};
pub use codes::{finite_magnitude, reciprocal_of_scale, scale_of};
pub use convert::{dequantize, fake_quantize, quantize};

use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::problem::expect_contiguous;
use crate::{DType, DeviceTensor, ProblemError};

/// How an element is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// 8-bit integers: -127 to 127, or 0 to 255 with a zero point.
    Int8,
    /// 4-bit integers: -7 to 7, or 0 to 15 with a zero point.
    Int4,
    /// FP8 e4m3: 4 bits of exponent, 3 of mantissa, up to 448, no infinities.
    Fp8,
}

impl Format {
    /// Bits of an element.
    pub fn bits(self) -> usize {
        match self {
            Format::Int8 | Format::Fp8 => 8,
            Format::Int4 => 4,
        }
    }

    /// Elements of a 32-bit word; the first is in the lowest bits.
    pub fn per_word(self) -> usize {
        32 / self.bits()
    }

    /// Words of a row of so many elements: whole groups of 16 bytes, so that any row can be read in
    /// vectors.
    pub fn words_per_row(self, columns: usize) -> usize {
        columns.div_ceil(self.per_word()).next_multiple_of(4)
    }

    /// The largest magnitude without a zero point.
    pub fn top(self) -> f32 {
        match self {
            Format::Int8 => 127.0,
            Format::Int4 => 7.0,
            Format::Fp8 => 448.0,
        }
    }

    /// The largest code with a zero point.
    pub(crate) fn levels(self) -> f32 {
        ((1u32 << self.bits()) - 1) as f32
    }
}

/// Which elements share a scale. Leading axes count as rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Granularity {
    /// All of them.
    Tensor,
    /// Those of a row.
    Row,
    /// Those of a column.
    Column,
    /// So many neighbours of a row: 32, 64 or 128, which must divide the last axis.
    Group(usize),
    /// Blocks of 128 rows and 128 columns; the last ones may be short.
    Block,
}

/// Rows and columns of the [`Granularity::Block`]s.
const BLOCK: usize = 128;

impl Granularity {
    /// Rows and columns of the elements that share a scale, in a matrix of `[rows, columns]`.
    pub fn region(self, [rows, columns]: [usize; 2]) -> [usize; 2] {
        match self {
            Granularity::Tensor => [rows, columns],
            Granularity::Row => [1, columns],
            Granularity::Column => [rows, 1],
            Granularity::Group(group) => [1, group],
            Granularity::Block => [BLOCK, BLOCK],
        }
    }

    /// Shape of the scales of a matrix of `[rows, columns]`.
    pub fn scales_shape(self, matrix: [usize; 2]) -> [usize; 2] {
        let region = self.region(matrix);
        [matrix[0].div_ceil(region[0]), matrix[1].div_ceil(region[1])]
    }

    fn expect_matrix(self, [_, columns]: [usize; 2]) -> Result<(), ProblemError> {
        match self {
            Granularity::Group(group)
                if ![32, 64, 128].contains(&group) || !columns.is_multiple_of(group) =>
            {
                Err(ProblemError::Group { group, columns })
            }
            _ => Ok(()),
        }
    }
}

/// A tensor of rank `R` in a low-bit format, contiguous.
///
/// With all axes but the last taken as rows: each row is [`words_per_row`](Self::words_per_row) words,
/// a multiple of four, whose elements past the row's end are 0.
#[derive(Clone, Debug)]
pub struct QuantizedTensor<const R: usize> {
    words: Handle,
    scales: DeviceTensor<2>,
    zeros: Option<DeviceTensor<2>>,
    shape: [usize; R],
    format: Format,
    granularity: Granularity,
}

impl<const R: usize> QuantizedTensor<R> {
    /// A tensor of what a program or a checkpoint has quantized.
    ///
    /// `scales`, and `zeros` if there are zero points, are contiguous f32 of
    /// [`Granularity::scales_shape`]; zero points are whole numbers.
    ///
    /// # Errors
    /// [`ProblemError::PackedLength`] for a buffer of another length than the shape calls for,
    /// [`ProblemError::ShapeMismatch`] for scales or zero points of another shape, and the module's
    /// refusals.
    pub fn new(
        words: Handle,
        scales: DeviceTensor<2>,
        zeros: Option<DeviceTensor<2>>,
        shape: [usize; R],
        format: Format,
        granularity: Granularity,
    ) -> Result<Self, ProblemError> {
        expect_format("words", shape, format, granularity, zeros.is_some())?;
        let matrix = matrix_shape(shape);
        let expected = matrix[0] * format.words_per_row(matrix[1]) * 4;
        let found = words.size_in_used() as usize;
        if found != expected {
            return Err(ProblemError::PackedLength { found, expected });
        }
        let scales_shape = granularity.scales_shape(matrix);
        expect_contiguous("scales", &scales, scales_shape, DType::F32)?;
        if let Some(zeros) = &zeros {
            expect_contiguous("zeros", zeros, scales_shape, DType::F32)?;
        }
        Ok(Self {
            words,
            scales,
            zeros,
            shape,
            format,
            granularity,
        })
    }

    /// The packed elements.
    pub fn words(&self) -> &Handle {
        &self.words
    }

    /// The scales, f32.
    pub fn scales(&self) -> &DeviceTensor<2> {
        &self.scales
    }

    /// The zero points, f32, if the tensor has them.
    pub fn zeros(&self) -> Option<&DeviceTensor<2>> {
        self.zeros.as_ref()
    }

    /// Elements along each axis.
    pub fn shape(&self) -> [usize; R] {
        self.shape
    }

    /// The shape with all axes but the last flattened.
    pub fn matrix(&self) -> [usize; 2] {
        matrix_shape(self.shape)
    }

    /// How elements are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Which elements share a scale.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Neighbours in a row that share a scale.
    pub(crate) fn scale_len(&self) -> usize {
        self.granularity.region(self.matrix())[1]
    }

    /// Words of a row.
    pub fn words_per_row(&self) -> usize {
        self.format.words_per_row(self.shape[R - 1])
    }

    /// Bytes of the elements, the scales and the zero points.
    pub fn bytes(&self) -> usize {
        let scales = 4 * self.scales.len();
        let zeros = self.zeros.as_ref().map_or(0, |zeros| 4 * zeros.len());
        self.matrix()[0] * self.words_per_row() * 4 + scales + zeros
    }

    /// The words as a kernel's argument.
    pub(crate) fn words_arg(&self) -> BufferArg {
        let len = self.matrix()[0] * self.words_per_row();
        // SAFETY: every constructor keeps this many words in the buffer.
        unsafe { BufferArg::from_raw_parts(self.words.clone(), len) }
    }

    /// The zero points as a kernel's argument; the scales where there are none, which such kernels
    /// do not read.
    pub(crate) fn zeros_arg(&self) -> BufferArg {
        self.zeros.as_ref().unwrap_or(&self.scales).buffer_arg()
    }

    /// Rows and columns of a scale's elements, and scales of a row of them.
    pub(crate) fn regions(&self) -> RegionsLaunch {
        let matrix = self.matrix();
        regions(self.granularity.region(matrix), matrix)
    }
}

/// Which scale an element has.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Regions {
    pub rows: u32,
    pub columns: u32,
    /// Regions side by side.
    pub across: u32,
}

#[cube]
impl Regions {
    /// The number of the scale of an element.
    pub fn index(self, row: u32, column: u32) -> usize {
        (row / self.rows * self.across + self.along(column)) as usize
    }

    /// Of the scales of a row, the number of an element's.
    pub fn along(self, column: u32) -> u32 {
        column / self.columns
    }
}

fn regions([rows, columns]: [usize; 2], matrix: [usize; 2]) -> RegionsLaunch {
    let across = matrix[1].div_ceil(columns);
    RegionsLaunch::new(rows as u32, columns as u32, across as u32)
}

/// `shape` with all axes but the last flattened.
pub(crate) fn matrix_shape<const R: usize>(shape: [usize; R]) -> [usize; 2] {
    let (columns, rows) = shape.split_last().expect("rank is at least 1");
    [rows.iter().product(), *columns]
}

/// An error unless a tensor of `shape` can be held like this: what [`quantize`] and
/// [`QuantizedTensor::new`] refuse whatever the device, for callers that launch later.
///
/// # Errors
/// [`ProblemError::ZeroSize`], [`ProblemError::TooLong`], [`ProblemError::Group`], and
/// [`ProblemError::NotSupported`] for a zero point in FP8.
pub fn expect_format<const R: usize>(
    argument: &'static str,
    shape: [usize; R],
    format: Format,
    granularity: Granularity,
    zero_point: bool,
) -> Result<(), ProblemError> {
    if shape.contains(&0) {
        return Err(ProblemError::ZeroSize {
            argument,
            shape: shape.to_vec(),
        });
    }
    if zero_point && format == Format::Fp8 {
        return Err(ProblemError::NotSupported {
            what: "a zero point in FP8".into(),
            why: "its values are symmetric; use INT8 or INT4",
        });
    }
    let [rows, columns] = matrix_shape(shape);
    for len in [rows, columns] {
        if len > i32::MAX as usize - 1024 {
            return Err(ProblemError::TooLong { argument, len });
        }
    }
    granularity.expect_matrix([rows, columns])
}

/// `x` with all axes but the last flattened, as it lies.
pub(crate) fn flattened<const R: usize>(
    argument: &'static str,
    x: &DeviceTensor<R>,
) -> Result<DeviceTensor<2>, ProblemError> {
    let (shape, strides) = (x.shape(), x.strides());
    let [rows, columns] = matrix_shape(shape);
    // The innermost leading axis that is not trivial has the stride of the rows.
    let mut row_stride = None;
    let mut below = 1;
    for axis in (0..R - 1).rev().filter(|&axis| shape[axis] > 1) {
        let stride = *row_stride.get_or_insert(strides[axis]);
        if strides[axis] != stride * below {
            return Err(ProblemError::NotContiguous { argument });
        }
        below *= shape[axis];
    }
    let strides = [row_stride.unwrap_or(columns), strides[R - 1]];
    DeviceTensor::new(x.handle().clone(), [rows, columns], strides, x.dtype())
}
