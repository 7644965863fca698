//! `delta = rowsum(dO * O)`, what the softmax's gradient subtracts from each row.

use cubecl::prelude::*;

use crate::limits::{expect_loop_budget, grid};
use crate::rows::RowRange;
use crate::{DType, DeviceTensor, ProblemError};

/// Units that share a row.
const LANES: usize = 8;

/// Rows of a cube.
const ROWS: usize = 32;

/// The dot products of the rows of `out` and `grad`, both `[B, H, L, D]` of any strides; f32
/// `[B, H, L]`.
///
/// # Errors
/// A [`ProblemError`] if the grid is larger than the device's.
pub fn row_dots(
    client: &Client,
    out: &DeviceTensor<4>,
    grad: &DeviceTensor<4>,
) -> Result<DeviceTensor<3>, ProblemError> {
    let [batch, heads, len, width] = out.shape();
    let device = client.properties();
    expect_loop_budget(device, "row products", width)?;
    let dots = DeviceTensor::empty(client, [batch, heads, len], DType::F32);
    let vector = if out.is_aligned() && grad.is_aligned() {
        4
    } else {
        1
    };
    // SAFETY: both tensors have the shape that the grid covers; rows past the length are skipped.
    unsafe {
        row_dots_kernel::launch_unchecked(
            client,
            grid(
                device,
                [
                    ("rows / 32", len.div_ceil(ROWS)),
                    ("Hq", heads),
                    ("B", batch),
                ],
            )?,
            CubeDim::new_1d((ROWS * LANES) as u32),
            AddressType::from_len(out.extent().max(grad.extent())),
            vector,
            out.tensor_arg(),
            grad.tensor_arg(),
            dots.buffer_arg(),
            width,
            out.dtype().elem_type(),
        );
    }
    Ok(dots)
}

/// Grid: x = rows, y = head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
fn row_dots_kernel<F: Float, N: Size>(
    out: &Tensor<Vector<F, N>>,
    grad: &Tensor<Vector<F, N>>,
    dots: &mut [f32],
    #[comptime] width: usize,
    #[define(F)] _dtype: ElemType,
) {
    let (batch, head) = (CUBE_POS_Z as usize, CUBE_POS_Y as usize);
    let len = out.shape(2) as u32;
    let row = CUBE_POS_X * comptime!(ROWS as u32) + UNIT_POS / comptime!(LANES as u32);
    let lane = UNIT_POS as usize % LANES;
    let size = out.vector_size();
    let mut sum = 0.0f32;
    if row < len {
        let left = RowRange::new::<F, N>(out, batch, head, row, len);
        let right = RowRange::new::<F, N>(grad, batch, head, row, len);
        let mut at = lane * size;
        while at < width {
            let x = out[(left.base + at * left.col_stride) / size];
            let y = grad[(right.base + at * right.col_stride) / size];
            #[unroll]
            for e in 0..size {
                sum += f32::cast_from(x.extract(e)) * f32::cast_from(y.extract(e));
            }
            at += size * LANES;
        }
    }
    let mut partial = Shared::<[f32]>::new_slice(comptime!(ROWS * LANES));
    partial[UNIT_POS as usize] = sum;
    sync_cube();
    if lane == 0 && row < len {
        let mut total = 0.0f32;
        #[unroll]
        for i in 0..LANES {
            total += partial[UNIT_POS as usize + i];
        }
        dots[(batch * out.shape(1) + head) * out.shape(2) + row as usize] = total;
    }
}
