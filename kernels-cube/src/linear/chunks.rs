//! Sums over chunks.

use cubecl::prelude::*;

use crate::limits::{expect_loop_budget, line_grid};
use crate::{DeviceTensor, ProblemError};

/// `out = scale * sum of the chunks` that f32 `partial` begins with, or for each chunk of those before
/// it.
///
/// # Errors
/// A [`ProblemError`] if there are more chunks than the device adds up.
pub fn add_chunks(
    client: &Client,
    partial: &DeviceTensor<4>,
    out: &DeviceTensor<4>,
    chunks: usize,
    scale: f32,
    prefix: bool,
) -> Result<(), ProblemError> {
    let elements = partial.len() / chunks;
    let units = 256;
    expect_loop_budget(client.properties(), "adding states", chunks)?;
    // SAFETY: one unit to an element, which it reads from and writes to every chunk.
    unsafe {
        add_chunks_kernel::launch_unchecked(
            client,
            line_grid(
                client.properties(),
                "elements of the states",
                elements.div_ceil(units),
            )?,
            CubeDim::new_1d(units as u32),
            partial.buffer_arg(),
            out.buffer_arg(),
            elements as u32,
            chunks as u32,
            scale,
            prefix,
            out.dtype().elem_type(),
        );
    }
    Ok(())
}

#[cube(launch_unchecked)]
fn add_chunks_kernel<F: Float>(
    partial: &[f32],
    out: &mut [F],
    elements: u32,
    chunks: u32,
    scale: f32,
    #[comptime] prefix: bool,
    #[define(F)] _dtype: ElemType,
) {
    let element = (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) * CUBE_DIM + UNIT_POS;
    if element < elements {
        let mut sum = 0.0f32;
        for chunk in 0..chunks {
            let at = (chunk * elements + element) as usize;
            if prefix {
                out[at] = F::cast_from(sum * scale);
            }
            sum += partial[at];
        }
        if comptime!(!prefix) {
            out[element as usize] = F::cast_from(sum * scale);
        }
    }
}
