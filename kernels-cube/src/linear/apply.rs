//! phi of every row of a tensor.

use cubecl::prelude::*;

use super::FeatureMap;
use crate::engine::*;
use crate::limits::{expect_dtype, expect_loop_budget, grid};
use crate::rows::RowRange;
use crate::{DeviceTensor, ProblemError};

/// phi of each row of `x [B, H, L, D]`, contiguous, rounded to its type.
///
/// # Errors
/// [`ProblemError`] for a type that the device lacks or a width that is no multiple of 8 up to 256.
pub fn feature_rows(
    client: &Client,
    x: &DeviceTensor<4>,
    phi: FeatureMap,
) -> Result<DeviceTensor<4>, ProblemError> {
    if x.is_empty() {
        return Err(ProblemError::ZeroSize {
            argument: "x",
            shape: x.shape().to_vec(),
        });
    }
    let [batch, heads, len, dim] = x.shape();
    if dim > 256 || !dim.is_multiple_of(8) {
        return Err(ProblemError::HeadDim { argument: "x", dim });
    }
    let device = client.properties();
    expect_dtype(device, x.dtype())?;
    let needs = TileNeeds {
        owned: vec![dim],
        streamed: vec![],
        accumulators: vec![],
        lefts: 0,
        max_rows: 32,
        max_cols: 32,
        max_stages: 1,
        unit_bytes: 0,
    };
    let tile = simt_tile(&needs, &device.hardware).ok_or_else(|| ProblemError::NoPlan {
        device: device.identity.name.clone(),
        reason: "no tile of this head dimension fits the shared memory".into(),
    })?;
    expect_loop_budget(device, "a feature map", 4 * dim)?;
    let out = DeviceTensor::empty(client, x.shape(), x.dtype());
    // SAFETY: rows past the length read as zeros and are not stored.
    unsafe {
        feature_rows_kernel::launch_unchecked(
            client,
            grid(
                device,
                [
                    ("tiles of rows", len.div_ceil(tile.rows)),
                    ("H", heads),
                    ("B", batch),
                ],
            )?,
            CubeDim::new_1d(tile.units as u32),
            AddressType::from_len(x.extent()),
            if x.is_aligned() { 4 } else { 1 },
            4,
            x.tensor_arg(),
            out.buffer_arg(),
            tile,
            dim,
            phi,
            x.dtype().elem_type(),
        );
    }
    Ok(out)
}

/// Grid: x = tiles of rows, y = head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
fn feature_rows_kernel<F: Float, N: Size, V: Size>(
    x: &Tensor<Vector<F, N>>,
    out: &mut [Vector<F, V>],
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
    #[comptime] phi: FeatureMap,
    #[define(F)] _dtype: ElemType,
) {
    let first = CUBE_POS_X * comptime!(tile.rows as u32);
    let (batch, head) = (CUBE_POS_Z as usize, CUBE_POS_Y as usize);
    let rows = RowRange::new::<F, N>(x, batch, head, first, x.shape(2) as u32);
    let mut data = <Simt as TileEngine<F>>::operand(tile.rows, dim, tile);
    <Simt as TileEngine<F>>::begin_load::<N>(&mut data, x, rows, tile);
    <Simt as TileEngine<F>>::await_loads(0usize);
    <Simt as TileEngine<F>>::apply_feature_map(&mut data, rows.len, phi, tile);
    let start = (batch * x.shape(1) + head) * x.shape(2) + first as usize;
    let vectors = comptime!(dim / 4);
    let total = comptime!(tile.rows * vectors);
    for step in 0..comptime!(total.div_ceil(tile.units)) {
        let at = step * comptime!(tile.units) + UNIT_POS as usize;
        let row = at / vectors;
        if at < total && (row as u32) < rows.len {
            let values = data.read(row, at % vectors);
            let mut vector = Vector::<F, V>::empty();
            #[unroll]
            for e in 0..4usize {
                vector.insert(e, F::cast_from(values[e]));
            }
            out[(start + row) * vectors + at % vectors] = vector;
        }
    }
}
