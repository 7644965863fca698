use core::fmt;

use cubecl::ir::{DeviceProperties, ElemType, FloatKind};

/// Element types of attention inputs and outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
}

impl DType {
    /// Every type, widest first.
    pub const ALL: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// CubeCL's name of the type.
    pub fn elem_type(self) -> ElemType {
        ElemType::Float(match self {
            DType::F32 => FloatKind::F32,
            DType::F16 => FloatKind::F16,
            DType::BF16 => FloatKind::BF16,
        })
    }

    /// Whether kernels on the device can read and write buffers of this type.
    pub fn is_supported(self, device: &DeviceProperties) -> bool {
        device.supports_type(self.elem_type())
    }
}

impl TryFrom<ElemType> for DType {
    type Error = ElemType;

    fn try_from(elem: ElemType) -> Result<Self, ElemType> {
        DType::ALL
            .into_iter()
            .find(|dtype| dtype.elem_type() == elem)
            .ok_or(elem)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        })
    }
}

/// How products of f32 factors are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum F32Products {
    /// In f32.
    #[default]
    F32,
    /// By tensor cores, which round the factors to tf32: to the nearest number of f32's range with 10
    /// bits of mantissa, ties away from zero. Sums are f32.
    Tf32,
}

/// What the factors of a product are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FactorType {
    /// f32 as it is.
    F32,
    /// f32 rounded to tf32 on its way.
    Tf32,
    /// f16 as it is.
    F16,
    /// bf16 as it is.
    BF16,
}

impl FactorType {
    /// CubeCL's name of the type.
    pub fn elem_type(self) -> ElemType {
        ElemType::Float(match self {
            FactorType::F32 => FloatKind::F32,
            FactorType::Tf32 => FloatKind::TF32,
            FactorType::F16 => FloatKind::F16,
            FactorType::BF16 => FloatKind::BF16,
        })
    }

    /// Bytes of an element as tiles hold it.
    pub(crate) fn stored_size(self) -> usize {
        match self {
            FactorType::F32 | FactorType::Tf32 => 4,
            FactorType::F16 | FactorType::BF16 => 2,
        }
    }
}

impl fmt::Display for FactorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FactorType::F32 => "f32",
            FactorType::Tf32 => "tf32",
            FactorType::F16 => "f16",
            FactorType::BF16 => "bf16",
        })
    }
}

impl From<DType> for FactorType {
    /// Factors as they are.
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => FactorType::F32,
            DType::F16 => FactorType::F16,
            DType::BF16 => FactorType::BF16,
        }
    }
}
