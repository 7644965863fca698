//! What every kernel here needs of a device and of its inputs.

use cubecl::ir::DeviceProperties;
use cubesla_kernels::{AttentionProblem, DType};

/// An error unless `wgmma` and bulk copies can work on the tensors of `problem`: why not, in a few
/// words.
pub(crate) fn expect_hopper(
    problem: &AttentionProblem,
    device: &DeviceProperties,
) -> Result<(), &'static str> {
    if device.identity.fingerprint != "ptx_sm90" {
        return Err("wgmma needs compute capability 9.0");
    }
    if problem.dtype() == DType::F32 {
        return Err("wgmma multiplies 16-bit elements");
    }
    if !problem.is_aligned() {
        return Err("bulk copies need contiguous rows with strides that are multiples of 16 bytes");
    }
    Ok(())
}

pub(crate) fn multiprocessors(device: &DeviceProperties) -> usize {
    let known = device.hardware.num_streaming_multiprocessors;
    known.unwrap_or(132) as usize
}
