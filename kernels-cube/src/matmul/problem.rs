use crate::quantize::{Format, Granularity, QuantizedTensor};
use crate::{DType, DeviceTensor};

/// How a matrix is held in low bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LowBitForm {
    /// How elements are stored.
    pub format: Format,
    /// Which elements share a scale.
    pub granularity: Granularity,
    /// Whether there are zero points.
    pub zero_point: bool,
}

impl LowBitForm {
    fn of<const R: usize>(tensor: &QuantizedTensor<R>) -> Self {
        Self {
            format: tensor.format(),
            granularity: tensor.granularity(),
            zero_point: tensor.zeros().is_some(),
        }
    }
}

/// What the choice of an engine for [`quantized_matmul`](super::quantized_matmul) looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatmulProblem {
    /// M, N, K.
    pub size: [usize; 3],
    /// Of the activations.
    pub x: LowBitForm,
    /// Of the weights.
    pub w: LowBitForm,
    /// Whether there is a bias.
    pub bias: bool,
    /// Type of the result.
    pub dtype: DType,
    /// Whether both operands begin at multiples of 16 bytes; their rows do then.
    pub aligned: bool,
}

impl MatmulProblem {
    /// The problem of these operands.
    pub fn new<const R: usize>(
        x: &QuantizedTensor<R>,
        w: &QuantizedTensor<2>,
        bias: Option<&DeviceTensor<1>>,
        dtype: DType,
    ) -> Self {
        let [rows, len] = x.matrix();
        let aligned =
            |handle: &cubecl::server::Handle| handle.offset_start.unwrap_or(0).is_multiple_of(16);
        Self {
            size: [rows, w.shape()[0], len],
            x: LowBitForm::of(x),
            w: LowBitForm::of(w),
            bias: bias.is_some(),
            dtype,
            aligned: aligned(x.words()) && aligned(w.words()),
        }
    }
}
