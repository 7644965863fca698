//! Prefix sums within a cube.

use cubecl::prelude::*;

/// Replaces `data[start..start + len]` by its exclusive prefix sums. Called by every unit of a cube
/// of `units`, a power of two.
#[cube]
pub(crate) fn exclusive_scan(data: &mut [u32], start: usize, len: u32, #[comptime] units: usize) {
    let mut shared: Shared<[u32]> = Shared::new_slice(units);
    let mut carry = 0u32;
    for chunk in 0..len.div_ceil(comptime!(units as u32)) {
        let at = chunk * comptime!(units as u32) + UNIT_POS;
        let mut value = 0u32;
        if at < len {
            value = data[start + at as usize];
        }
        let inclusive = inclusive_scan_units(value, &mut shared, units);
        if at < len {
            data[start + at as usize] = carry + inclusive - value;
        }
        carry += shared[units - 1];
        // The next chunk overwrites the sum that others may still read.
        sync_cube();
    }
}

/// Inclusive prefix sum over the units of a cube; afterwards `shared[units - 1]` is the total.
#[cube]
pub(crate) fn inclusive_scan_units(
    value: u32,
    shared: &mut Shared<[u32]>,
    #[comptime] units: usize,
) -> u32 {
    let unit = UNIT_POS as usize;
    shared[unit] = value;
    sync_cube();
    let steps = comptime!(units.ilog2());
    #[unroll]
    for step in 0..steps {
        let distance = comptime!(1usize << step);
        let mut left = 0u32;
        if unit >= distance {
            left = shared[unit - distance];
        }
        sync_cube();
        shared[unit] += left;
        sync_cube();
    }
    shared[unit]
}
