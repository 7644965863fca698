//! The product: a producer that loads, and warpgroups that multiply.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;

use super::config::{COLUMNS, MatmulTile, Memory, ROWS};
use super::consumer::consume;
use super::producer::produce;
use crate::ptx::{cluster, matmul, wgmma};

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct MatmulScalars {
    /// M - 1.
    pub last_row: u32,
    /// N - 1.
    pub last_column: u32,
    /// Steps of 128 along K.
    pub steps: u32,
    /// Clusters' tiles along M.
    pub row_tiles: u32,
    /// Tiles along N.
    pub column_tiles: u32,
    /// Tiles along M whose clusters run at the same time.
    pub band: u32,
    pub x_scales: ScaleOrder,
    pub w_scales: ScaleOrder,
}

/// Which scale a row has in a step.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct ScaleOrder {
    /// Rows that share a scale.
    pub rows: u32,
    /// Scales side by side along K.
    pub across: u32,
    /// The last of them.
    pub last: u32,
}

#[cube]
impl ScaleOrder {
    /// Where the scales of a row begin.
    pub fn first(self, row: u32) -> u32 {
        row / self.rows * self.across
    }

    /// How far from there a step's is. Scales that change along K change with every step.
    pub fn offset(self, step: u32) -> u32 {
        min(step, self.last)
    }
}

/// `X W^T` with its scales and bias.
///
/// Each cluster takes every so many-th tile of the result. Those that run at the same time lie in a
/// band of rows, whose operands then stay in the L2 cache.
#[cube(
    launch_unchecked,
    address_type = "dynamic",
    cluster_dim = CubeDim::new_1d(tile.cluster as u32)
)]
pub(crate) fn low_bit_matmul_wgmma<F: Float>(
    x: &TensorMap<u32, Tiled>, // [M, K], 8 bits
    w: &TensorMap<u32, Tiled>, // [N, K], 8 bits
    out: &TensorMap<F, Tiled>, // [M, N]
    x_scales: &[f32],
    w_scales: &[f32],
    bias: &[f32],
    scalars: MatmulScalars,
    #[comptime] tile: MatmulTile,
    #[define(F)] _dtype: ElemType,
) {
    let memory = Memory::new(tile);
    matmul::declare(tile.sums());
    sync(tile);

    let producer = comptime!(tile.producer() as u32);
    let registers = comptime!(tile.registers());
    if UNIT_POS >= producer {
        wgmma::shrink_registers(comptime!(registers.0));
        if UNIT_POS == producer {
            produce(
                tensor_map_address(x),
                tensor_map_address(w),
                memory,
                scalars,
                tile,
            );
        }
    } else {
        wgmma::grow_registers(comptime!(registers.1));
        consume(
            tensor_map_address(out),
            x_scales,
            w_scales,
            bias,
            memory,
            scalars,
            tile,
        );
    }
    // No cube may end while others of the cluster load into it or arrive at its barriers.
    if comptime!(tile.cluster > 1) {
        cluster::sync();
    }
}

#[cube]
fn sync(#[comptime] tile: MatmulTile) {
    if comptime!(tile.cluster > 1) {
        cluster::sync();
    } else {
        sync_cube();
    }
}

/// Where a cube's tile of the result begins.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Item {
    pub row: u32,
    pub column: u32,
}

#[cube]
impl Item {
    /// Of the `index`-th tile of all clusters: band after band, and in each column after column.
    pub fn new(index: u32, scalars: MatmulScalars, #[comptime] tile: MatmulTile) -> Item {
        let in_band = scalars.band * scalars.column_tiles;
        let first = index / in_band * scalars.band;
        let height = min(scalars.band, scalars.row_tiles - first);
        let inner = index % in_band;
        let row_tile = first + inner % height;
        Item {
            row: row_tile * comptime!(tile.cluster_rows() as u32) + rank(tile) * ROWS as u32,
            column: inner / height * COLUMNS as u32,
        }
    }
}

/// The cube's place in its cluster.
#[cube]
pub(crate) fn rank(#[comptime] tile: MatmulTile) -> u32 {
    CUBE_POS_X % comptime!(tile.cluster as u32)
}

/// The first tile of a cluster, and how far its next one is.
#[cube]
pub(crate) fn first_item(#[comptime] tile: MatmulTile) -> u32 {
    CUBE_POS_X / comptime!(tile.cluster as u32)
}

#[cube]
pub(crate) fn item_stride(#[comptime] tile: MatmulTile) -> u32 {
    CUBE_COUNT_X / comptime!(tile.cluster as u32)
}
