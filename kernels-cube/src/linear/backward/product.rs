//! Rows times a state, and their sum with what is there.

use cubecl::prelude::*;

use crate::engine::*;
use crate::limits::{expect_loop_budget, grid};
use crate::rows::{RowRange, RowTarget, add_rows, store_rows};
use crate::{DeviceTensor, FactorType, ProblemError};

/// `out = factor a b^T`, added to what `out` holds if `accumulate`: `a [B, H, L, W]` and
/// `b [B', H', C, W]` of one type and any strides, where `H'` divides `H` and a size of 1 for `B'`
/// is shared by all batches; `out [B, H, L, C]` contiguous, f32 or of their type.
pub(crate) fn multiply_rows(
    client: &Client,
    a: &DeviceTensor<4>,
    b: &DeviceTensor<4>,
    out: &DeviceTensor<4>,
    factor: f32,
    accumulate: bool,
    factors: FactorType,
) -> Result<(), ProblemError> {
    let width = a.shape()[3];
    let device = client.properties();
    let needs = TileNeeds::of_product(width, 64);
    let (engine, tile) = engine_tile(&needs, factors, device)?;
    let loads = (tile.rows.max(tile.cols) * width / 4).div_ceil(tile.units);
    expect_loop_budget(device, "rows times a state", 2 * loads + width)?;
    let job = ProductJob {
        a,
        b,
        out,
        factor,
        config: ProductConfig {
            tile,
            width,
            columns: out.shape()[3],
            accumulate,
        },
    };
    match engine {
        EngineKind::Simt => job.launch::<Simt>(client, [4, 1]),
        EngineKind::Mma => job.launch::<Mma>(client, [8, 2]),
        EngineKind::MmaTf32 => job.launch::<MmaTf32>(client, [4, 2]),
    }
}

struct ProductJob<'a> {
    a: &'a DeviceTensor<4>,
    b: &'a DeviceTensor<4>,
    out: &'a DeviceTensor<4>,
    factor: f32,
    config: ProductConfig,
}

impl ProductJob<'_> {
    fn launch<E: TileEngine<multiply_rows_kernel::F>>(
        &self,
        client: &Client,
        [load, store]: [usize; 2],
    ) -> Result<(), ProblemError> {
        let [batch, heads, rows, _] = self.a.shape();
        let [b_batch, b_heads, ..] = self.b.shape();
        let ProductConfig { tile, columns, .. } = self.config;
        let extent = [self.a, self.b, self.out].map(DeviceTensor::extent);
        let aligned = self.a.is_aligned() && self.b.is_aligned();
        // SAFETY: rows past the ends read as zeros and are not stored.
        unsafe {
            multiply_rows_kernel::launch_unchecked::<E>(
                client,
                grid(
                    client.properties(),
                    [
                        ("tiles of rows", rows.div_ceil(tile.rows)),
                        ("tiles of columns", columns.div_ceil(tile.cols)),
                        ("B * H", batch * heads),
                    ],
                )?,
                CubeDim::new_1d(tile.units as u32),
                AddressType::from_len(extent.into_iter().max().unwrap_or(0)),
                if aligned { load } else { 1 },
                store,
                self.a.tensor_arg(),
                self.b.tensor_arg(),
                self.out.buffer_arg(),
                ProductScalarsLaunch::new(
                    self.factor,
                    (heads / b_heads) as u32,
                    u32::from(b_batch > 1),
                ),
                self.config,
                self.a.dtype().elem_type(),
                self.out.dtype().elem_type(),
            );
        }
        Ok(())
    }
}

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct ProductConfig {
    tile: Tile,
    width: usize,
    columns: usize,
    accumulate: bool,
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct ProductScalars {
    factor: f32,
    /// Heads of `a` to a head of `b`.
    group: u32,
    /// 1 if every batch of `a` has its own `b`, 0 if they share one.
    own_batch: u32,
}

/// Grid: x = tiles of rows, y = tiles of columns, z = (batch, head).
#[cube(launch_unchecked, address_type = "dynamic")]
fn multiply_rows_kernel<E: TileEngine<F>, F: Float, G: Float, N: Size, V: Size>(
    a: &Tensor<Vector<F, N>>,
    b: &Tensor<Vector<F, N>>,
    out: &mut [Vector<G, V>],
    scalars: ProductScalars,
    #[comptime] config: ProductConfig,
    #[define(F)] _dtype: ElemType,
    #[define(G)] _out_dtype: ElemType,
) {
    let tile = comptime!(config.tile);
    let batch = CUBE_POS_Z as usize / a.shape(1);
    let head = CUBE_POS_Z as usize % a.shape(1);
    let first = CUBE_POS_X * comptime!(tile.rows as u32);
    let first_column = CUBE_POS_Y * comptime!(tile.cols as u32);

    let mut left = E::operand(tile.rows, config.width, tile);
    let mut right = E::operand(tile.cols, config.width, tile);
    let mut products = E::scores(tile);
    let rows = RowRange::new::<F, N>(a, batch, head, first, a.shape(2) as u32);
    E::begin_load::<N>(&mut left, a, rows, tile);
    let columns = RowRange::new::<F, N>(
        b,
        batch * scalars.own_batch as usize,
        head / scalars.group as usize,
        first_column,
        b.shape(2) as u32,
    );
    E::begin_load::<N>(&mut right, b, columns, tile);
    E::await_loads(0usize);
    E::mul_nt(&mut products, &left, &right);
    #[unroll]
    for r in 0..products.rows() {
        #[unroll]
        for c in 0..products.cols() {
            products.set(r, c, products.get(r, c) * scalars.factor);
        }
    }
    let target = RowTarget {
        first_row: CUBE_POS_Z as usize * a.shape(2) + first as usize,
        len: rows.len,
        first_column,
        end_column: comptime!(config.columns as u32),
    };
    if config.accumulate {
        add_rows::<G, V, E::Fragment>(&mut products, &*out, target, config.columns);
    }
    store_rows::<G, V, E::Fragment>(out, &products, target, config.columns);
}
