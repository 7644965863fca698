//! Gradients of the weights of blocks, from the sums that the warps of the queries' gradient wrote.

use cubecl::prelude::*;
use cubesla_kernels::block_list::{BlockListView, BlockWeightsView};

/// Units of a cube.
pub(super) const UNITS: usize = 256;

/// `dm = sum dS / m`, 0 for a weight of 0. One unit to an entry of the list.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn weight_gradients(
    sums: &[f32], // [B, Hq, M, N, parts]
    list: &BlockListView,
    weights: &BlockWeightsView, // [B, Hq, M, N]
    grad: &mut [f32],           // [B, Hq, M, N]
    #[comptime] parts: usize,
) {
    let width = list.width as usize;
    let at = CUBE_POS_X as usize * UNITS + UNIT_POS as usize;
    let row = at / width;
    if row < list.counts.len() && at % width < list.counts[row] as usize {
        let block = row * weights.key_blocks as usize + list.indices[at] as usize;
        let mut total = 0.0f32;
        #[unroll]
        for part in 0..parts {
            total += sums[block * parts + part];
        }
        let weight = weights.values[block];
        grad[block] = select(weight > 0.0, total / weight, 0.0);
    }
}
