//! Groups of asynchronous copies to shared memory: `cp.async` of NVIDIA's devices from compute
//! capability 8.0 on, which is where CubeCL has `copy_async`.
//!
//! A unit's copies complete in the order of its groups, so that waiting for all but the newest few
//! needs no barrier object.

use cubecl::prelude::*;

/// Ends a group: all copies that the unit began since the last one, perhaps none.
#[cube]
pub(crate) fn commit() {
    gpu_asm!("cp.async.commit_group;");
}

/// Waits until all of the unit's groups but the `newer` newest are complete.
#[cube]
pub(crate) fn wait(#[comptime] newer: usize) {
    gpu_asm!("cp.async.wait_group {newer};", newer = const newer);
}
