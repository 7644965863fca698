//! Burn's tensors as the library's, and back, without copies where strides will do.

use burn_core::backend::TensorMetadata;
use burn_core::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::server::Handle;
use cubesla::{BlockList, DeviceTensor, Error};

use crate::convert::element_type;

/// The tensor as it lies.
///
/// # Errors
/// [`Error::Problem`] if the buffer is too small for the view.
///
/// # Panics
/// For types that the callers refuse.
pub(super) fn view<const R: usize>(tensor: CubeTensor) -> Result<DeviceTensor<R>, Error> {
    // Rows tiled in memory have no strides to speak of.
    let tensor = if tensor.meta.is_tiled() {
        into_contiguous(tensor)
    } else {
        tensor
    };
    let dtype = element_type(tensor.dtype).expect("callers refuse other types");
    let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
    Ok(DeviceTensor::new(
        tensor.handle.clone(),
        std::array::from_fn(|axis| shape[axis]),
        std::array::from_fn(|axis| strides[axis]),
        dtype,
    )?)
}

/// The tensor in row-major order, as weights, rows and gradients of rows must be.
pub(super) fn contiguous<const R: usize>(tensor: CubeTensor) -> Result<DeviceTensor<R>, Error> {
    view(into_contiguous(tensor))
}

/// A result as Burn's tensor, on the device of `like`.
pub(super) fn wrap<const R: usize>(like: &CubeTensor, tensor: &DeviceTensor<R>) -> CubeTensor {
    let dtype = match tensor.dtype() {
        cubesla::DType::F32 => DType::F32,
        cubesla::DType::F16 => DType::F16,
        cubesla::DType::BF16 => DType::BF16,
    };
    wrap_handle(like, tensor.handle(), tensor.shape(), dtype)
}

/// Row-major elements as Burn's tensor, on the device of `like`.
pub(super) fn wrap_handle<const R: usize>(
    like: &CubeTensor,
    handle: &Handle,
    shape: [usize; R],
    dtype: DType,
) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    CubeTensor::new_contiguous(client, device, shape.into(), handle.clone(), dtype)
}

/// The list of `key_blocks` blocks that these tensors hold.
pub(super) fn block_list(indices: CubeTensor, counts: CubeTensor, key_blocks: usize) -> BlockList {
    let (indices, counts) = (into_contiguous(indices), into_contiguous(counts));
    let shape = indices.shape();
    // SAFETY: lists come from `select` or from a checked upload; only those that their maker vouched
    // for in `BlockList::from_tensors` come from anywhere else.
    unsafe {
        BlockList::from_handles(
            indices.handle.clone(),
            counts.handle.clone(),
            [shape[0], shape[1], shape[2], key_blocks],
            shape[3],
        )
    }
}
