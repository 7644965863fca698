//! Weights in low bits.

use burn_core::backend::Dispatch;
use burn_core::tensor::{DType, Device, Int, Tensor, TensorData};
use cubesla::{Format, Granularity, ProblemError};

use crate::convert::{element_type, expect_device, expect_f32, expect_shape};
use crate::ops::{Form, Packed, QuantizedOps};
use crate::{Error, convert};

/// The weight of a linear layer in low bits: `[N, K]`, a row to each output, which is Burn's
/// `[d_input, d_output]` transposed.
///
/// Made by [`quantize_weight`](crate::quantize_weight), or of what a checkpoint holds.
///
/// | tensor | shape | type |
/// |---|---|---|
/// | words | `[N, words of a row]` | 32-bit integers, each of four INT8 or FP8 codes or eight INT4 codes, the first in the lowest bits |
/// | scales | [`Granularity::scales_shape`] of `[N, K]` | f32 |
/// | zero points, if any | that of the scales | f32, whole numbers |
///
/// A row's words are a multiple of four, and padding is 0. Nothing of it has a gradient: train the
/// float weight through [`fake_quantize`](crate::fake_quantize).
#[derive(Clone, Debug)]
pub struct QuantizedWeight {
    words: Tensor<2, Int>,
    scales: Tensor<2>,
    zeros: Option<Tensor<2>>,
    form: Form,
}

impl QuantizedWeight {
    /// A weight of tensors that were packed before, with rows of `columns` elements.
    ///
    /// # Errors
    /// [`Error::DType`] for words that are not 32-bit integers, or scales or zero points that are not
    /// f32; [`Error::Device`] for tensors of two devices; [`Error::NotDifferentiable`] for tracked
    /// scales or zero points; [`Error::Library`] for shapes that do not fit, groups that do not
    /// divide a row, a scale per column, and a zero point in FP8.
    pub fn from_tensors(
        words: Tensor<2, Int>,
        scales: Tensor<2>,
        zeros: Option<Tensor<2>>,
        columns: usize,
        format: Format,
        granularity: Granularity,
    ) -> Result<Self, Error> {
        let [rows, found] = words.dims();
        let matrix = [rows, columns];
        cubesla::expect_format("w", matrix, format, granularity, zeros.is_some())?;
        cubesla::expect_weights(granularity)?;
        if !matches!(words.dtype(), DType::I32 | DType::U32) {
            return Err(Error::DType {
                argument: "words",
                found: words.dtype(),
                takes: "i32 or u32",
            });
        }
        let expected = format.words_per_row(columns);
        if found != expected {
            return Err(ProblemError::ShapeMismatch {
                argument: "words",
                found: vec![rows, found],
                expected: vec![rows, expected],
            }
            .into());
        }
        let parts = [("scales", Some(&scales)), ("zeros", zeros.as_ref())];
        for (argument, tensor) in parts {
            let Some(tensor) = tensor else { continue };
            expect_device(&[("words", words.device()), (argument, tensor.device())])?;
            expect_f32(argument, tensor)?;
            expect_shape(argument, tensor, granularity.scales_shape(matrix))?;
            let hint = "train the float weight through `fake_quantize`";
            convert::expect_untracked("a product with low-bit weights", argument, tensor, hint)?;
        }
        let form = Form {
            format,
            granularity,
            columns,
        };
        Ok(Self {
            words,
            scales,
            zeros,
            form,
        })
    }

    /// A weight `[rows, columns]` of row-major `codes`, one to a byte, which are packed on the host
    /// and put on the device of `scales`. Negative integers are in two's complement.
    ///
    /// Codes are taken as they are: what a code means is its number, less the zero point if there is
    /// one, times the scale, whatever the scale was made from.
    ///
    /// # Errors
    /// [`cubesla::Error::Length`] for another number of codes than `shape` has, and as for
    /// [`from_tensors`](Self::from_tensors).
    pub fn from_codes(
        codes: &[u8],
        shape: [usize; 2],
        format: Format,
        granularity: Granularity,
        scales: Tensor<2>,
        zeros: Option<Tensor<2>>,
    ) -> Result<Self, Error> {
        let [rows, columns] = shape;
        if codes.len() != rows * columns {
            return Err(Error::Library(cubesla::Error::Length {
                argument: "codes",
                found: codes.len(),
                expected: rows * columns,
            }));
        }
        cubesla::expect_format("w", shape, format, granularity, zeros.is_some())?;
        let words = pack(codes, shape, format, &scales.device());
        Self::from_tensors(words, scales, zeros, columns, format, granularity)
    }

    /// What [`quantize_weight`](crate::quantize_weight) made.
    pub(crate) fn from_dispatch(packed: Packed<Dispatch>, form: Form) -> Self {
        let (words, scales, zeros) = match packed {
            Packed::Symmetric { words, scales } => (words, scales, None),
            Packed::ZeroPoint {
                words,
                scales,
                zeros,
            } => (words, scales, Some(zeros)),
        };
        Self {
            words: Tensor::from_dispatch(words),
            scales: Tensor::from_dispatch(scales),
            zeros: zeros.map(Tensor::from_dispatch),
            form,
        }
    }

    pub(crate) fn to_dispatch(&self) -> (Packed<Dispatch>, Form) {
        let words = self.words.clone().into_dispatch();
        let scales = self.scales.clone().into_dispatch();
        let packed = match &self.zeros {
            None => Packed::Symmetric { words, scales },
            Some(zeros) => Packed::ZeroPoint {
                words,
                scales,
                zeros: zeros.clone().into_dispatch(),
            },
        };
        (packed, self.form)
    }

    /// The values, `[N, K]` in `dtype`, which is f32, f16 or bf16.
    ///
    /// # Errors
    /// [`Error::DType`] for another type, [`Error::Library`] for one that the device lacks.
    ///
    /// # Panics
    /// Where only a launch can tell; with fusion that is when the result is read.
    pub fn try_dequantize(&self, dtype: DType) -> Result<Tensor<2>, Error> {
        let client = convert::client(&self.device())?;
        let element = element_type(dtype).ok_or(Error::DType {
            argument: "dtype",
            found: dtype,
            takes: "f32, f16 or bf16",
        })?;
        convert::expect_supported(element, &client)?;
        let (packed, form) = self.to_dispatch();
        let values = Dispatch::cubesla_dequantize(packed, form, dtype);
        Ok(Tensor::from_dispatch(values))
    }

    /// [`try_dequantize`](Self::try_dequantize) that panics with the message of its error.
    ///
    /// # Panics
    /// Where [`try_dequantize`](Self::try_dequantize) returns an error.
    #[track_caller]
    pub fn dequantize(&self, dtype: DType) -> Tensor<2> {
        crate::error::unwrap("dequantize", self.try_dequantize(dtype))
    }

    /// The packed codes, `[N, words of a row]`, 32-bit integers.
    pub fn words(&self) -> &Tensor<2, Int> {
        &self.words
    }

    /// The scales, f32.
    pub fn scales(&self) -> &Tensor<2> {
        &self.scales
    }

    /// The zero points, f32, if the weight has them.
    pub fn zeros(&self) -> Option<&Tensor<2>> {
        self.zeros.as_ref()
    }

    /// `[N, K]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.words.dims()[0], self.form.columns]
    }

    /// How an element is stored.
    pub fn format(&self) -> Format {
        self.form.format
    }

    /// Which elements share a scale.
    pub fn granularity(&self) -> Granularity {
        self.form.granularity
    }

    /// Where the weight is.
    pub fn device(&self) -> Device {
        self.words.device()
    }
}

/// Codes in words, each row padded with 0.
fn pack(
    codes: &[u8],
    [rows, columns]: [usize; 2],
    format: Format,
    device: &Device,
) -> Tensor<2, Int> {
    let pitch = format.words_per_row(columns);
    let mask = (1u32 << format.bits()) - 1;
    let mut words = Vec::with_capacity(rows * pitch);
    for (row, codes) in codes.chunks(columns).enumerate() {
        words.extend(codes.chunks(format.per_word()).map(|codes| {
            let add = |word: u32, &code: &u8| word << format.bits() | u32::from(code) & mask;
            codes.iter().rev().fold(0, add) as i32
        }));
        words.resize((row + 1) * pitch, 0);
    }
    let data = TensorData::new(words, [rows, pitch]);
    Tensor::from_data(data, (device, DType::I32))
}
