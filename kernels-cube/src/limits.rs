//! What a device refuses silently or late, checked before a launch.

use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;

use crate::{DType, ProblemError};

/// Loop iterations after which llvmpipe leaves a shader's loops, whatever their condition says.
///
/// One budget serves all loops of an invocation. Past it results are wrong without any error, so a
/// launch that could get there is refused.
const LLVMPIPE_LOOP_BUDGET: usize = 65_535;

/// An error unless kernels can use `dtype` on the device.
pub(crate) fn expect_dtype(device: &DeviceProperties, dtype: DType) -> Result<(), ProblemError> {
    if dtype.is_supported(device) {
        return Ok(());
    }
    let supported = DType::ALL
        .into_iter()
        .filter(|other| other.is_supported(device));
    Err(ProblemError::UnsupportedDType {
        dtype,
        device: device.identity.name.clone(),
        instead: supported
            .map(|other| other.to_string())
            .collect::<Vec<_>>()
            .join(" or "),
    })
}

/// An error unless one invocation's loops stay within what the device carries out.
pub(crate) fn expect_loop_budget(
    device: &DeviceProperties,
    operation: &'static str,
    iterations: usize,
) -> Result<(), ProblemError> {
    if !device.identity.name.starts_with("llvmpipe") || iterations <= LLVMPIPE_LOOP_BUDGET {
        return Ok(());
    }
    Err(ProblemError::LoopBudget {
        operation,
        iterations,
        budget: LLVMPIPE_LOOP_BUDGET,
    })
}

/// An error unless a kernel may have so many `buffers`; CubeCL adds one of its own.
pub(crate) fn expect_bindings(
    device: &DeviceProperties,
    operation: &'static str,
    buffers: usize,
) -> Result<(), ProblemError> {
    let limit = (device.hardware.max_bindings as usize).saturating_sub(1);
    if buffers <= limit {
        return Ok(());
    }
    Err(ProblemError::Bindings {
        operation,
        device: device.identity.name.clone(),
        buffers,
        limit,
    })
}

/// A grid of cubes, each axis with what it counts, or an error if an axis is too long.
pub(crate) fn grid(
    device: &DeviceProperties,
    axes: [(&'static str, usize); 3],
) -> Result<CubeCount, ProblemError> {
    let (x, y, z) = device.hardware.max_cube_count;
    for ((what, count), limit) in axes.into_iter().zip([x, y, z]) {
        if count > limit as usize {
            return Err(ProblemError::GridTooLarge {
                what,
                count,
                limit: limit as usize,
            });
        }
    }
    let [x, y, z] = axes.map(|(_, count)| count as u32);
    Ok(CubeCount::Static(x, y, z))
}

/// A grid of `cubes` cubes for kernels that number them along x, then y.
pub(crate) fn line_grid(
    device: &DeviceProperties,
    what: &'static str,
    cubes: usize,
) -> Result<CubeCount, ProblemError> {
    let x = cubes
        .min(device.hardware.max_cube_count.0.min(65_535) as usize)
        .max(1);
    grid(device, [(what, x), (what, cubes.div_ceil(x)), (what, 1)])
}

/// An error unless the device can hold `bytes` in one buffer, and 32 bits count its 4-byte words.
pub(crate) fn expect_buffer(
    device: &DeviceProperties,
    what: &'static str,
    bytes: usize,
) -> Result<(), ProblemError> {
    let limit = (device.memory.max_page_size as usize).min(u32::MAX as usize * 4);
    if bytes <= limit {
        return Ok(());
    }
    Err(ProblemError::BufferTooLarge { what, bytes, limit })
}
