//! Small batched products in f32: pooled scores and the router's projections.

use cubecl::ir::HardwareProperties;
use cubecl::prelude::*;

use crate::engine::*;
use crate::limits::{expect_loop_budget, grid};
use crate::rows::RowRange;
use crate::{DType, DeviceTensor, ProblemError};

/// `scale a b^T` for each (batch, head): `a [B, H, M, D]` and `b [B', H', N, D]` f32, where `H'`
/// divides `H` and a size of 1 for `B'` is shared by all batches. Returns `[B, H, M, N]`.
pub(crate) fn product(
    client: &Client,
    a: &DeviceTensor<4>,
    b: &DeviceTensor<4>,
    scale: f32,
) -> Result<DeviceTensor<4>, ProblemError> {
    let [batch, heads, rows, dim] = a.shape();
    let [b_batch, b_heads, columns, _] = b.shape();
    let device = client.properties();
    let tile = product_tile(dim, &device.hardware).ok_or_else(|| ProblemError::NoPlan {
        device: device.identity.name.clone(),
        reason: "no tile of pooled rows fits the shared memory".into(),
    })?;
    expect_loop_budget(device, "pooled scores", 3 * dim)?;
    let out = DeviceTensor::empty(client, [batch, heads, rows, columns], DType::F32);
    // SAFETY: rows past the ends read as zeros and are not stored.
    unsafe {
        product_kernel::launch_unchecked(
            client,
            grid(
                device,
                [
                    ("tiles of rows", rows.div_ceil(tile.rows)),
                    ("tiles of columns", columns.div_ceil(tile.cols)),
                    ("B * H", batch * heads),
                ],
            )?,
            CubeDim::new_1d(tile.units as u32),
            4,
            a.tensor_arg(),
            b.tensor_arg(),
            out.buffer_arg(),
            ProductScalarsLaunch::new(scale, (heads / b_heads) as u32, u32::from(b_batch > 1)),
            tile,
            dim,
        );
    }
    Ok(out)
}

/// The largest tile that fits the device. One has twice the columns of those of attention: it is nothing but
/// a product, whose units hold that many more sums for what they load.
fn product_tile(dim: usize, hardware: &HardwareProperties) -> Option<Tile> {
    let needs = TileNeeds::of_product(dim, 32);
    let wide = Tile {
        rows: 64,
        cols: 64,
        units: 128,
        stages: 1,
    };
    if simt_fits(&needs, wide, hardware) {
        Some(wide)
    } else {
        simt_tile(&needs, hardware)
    }
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct ProductScalars {
    scale: f32,
    /// Heads of `a` to a head of `b`.
    group: u32,
    /// 1 if every batch of `a` has its own `b`, 0 if they share one.
    own_batch: u32,
}

/// Grid: x = tiles of rows, y = tiles of columns, z = (batch, head).
#[cube(launch_unchecked)]
fn product_kernel<N: Size>(
    a: &Tensor<Vector<f32, N>>,
    b: &Tensor<Vector<f32, N>>,
    out: &mut [f32],
    scalars: ProductScalars,
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
) {
    let batch = CUBE_POS_Z as usize / a.shape(1);
    let head = CUBE_POS_Z as usize % a.shape(1);
    let first_row = CUBE_POS_X * comptime!(tile.rows as u32);
    let first_column = CUBE_POS_Y * comptime!(tile.cols as u32);
    let (rows, columns) = (a.shape(2) as u32, b.shape(2) as u32);

    let mut left = <Simt as TileEngine<f32>>::operand(tile.rows, dim, tile);
    let mut right = <Simt as TileEngine<f32>>::operand(tile.cols, dim, tile);
    let mut scores = <Simt as TileEngine<f32>>::scores(tile);
    let range = RowRange::new::<f32, N>(a, batch, head, first_row, rows);
    left.load_at_once::<f32, N>(a, range, tile);
    let range = RowRange::new::<f32, N>(
        b,
        batch * scalars.own_batch as usize,
        head / scalars.group as usize,
        first_column,
        columns,
    );
    right.load_at_once::<f32, N>(b, range, tile);
    <Simt as TileEngine<f32>>::await_loads(0usize);
    <Simt as TileEngine<f32>>::mul_nt(&mut scores, &left, &right);

    let start = CUBE_POS_Z as usize * rows as usize;
    #[unroll]
    for r in 0..scores.rows() {
        #[unroll]
        for c in 0..scores.cols() {
            let row = first_row + scores.row(r);
            let column = first_column + scores.col(c);
            if row < rows && column < columns {
                let at = (start + row as usize) * columns as usize + column as usize;
                out[at] = scores.get(r, c) * scalars.scale;
            }
        }
    }
}
