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
