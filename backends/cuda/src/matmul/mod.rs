//! Products of 8-bit matrices on Hopper: `wgmma`, bulk tensor copies, a producer and consumers.
//!
//! Supported: INT8 by INT8 and FP8 by FP8, without zero points; any M, N and K; scales of X per tensor,
//! row, group of 128 or block, of W per tensor, row or block; a bias; f32, f16 and bf16 results, of FP8
//! f16 and bf16 ones.
//! Rejected by [`WgmmaMatmulPlan::new`], with the reason: other products, and few rows. The portable
//! kernels take those.
//!
//! What it does, and why:
//! - A cube computes 128x256 of the result, two warpgroups 64 rows each; two cubes, one below the other,
//!   are a cluster and load W for each other, so that the L2 cache is read a third less.
//! - INT8 sums stay where the tensor cores leave them: 32-bit integers, exact, scaled once at the end.
//! - FP8 sums of 128 products are added up in f32, since the tensor cores keep about 14 bits of a sum;
//!   of 256 where one scale serves all of K and the result is bf16. They come in halves of 128 columns,
//!   as the totals take most registers, and one warpgroup adds while the other multiplies. Scales that
//!   change along K are applied on this way, of both formats.
//! - Cubes stay and take one tile after another: the producer loads the next one's operands while the
//!   last is being stored.

mod config;
mod consumer;
mod epilogue;
mod kernel;
mod producer;

pub use config::MatmulTile;

use std::fmt;

use cubecl::ir::{DeviceProperties, ElemType, UIntKind};
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubesla_kernels::matmul::MatmulProblem;
use cubesla_kernels::quantize::{Format, Granularity, QuantizedTensor};
use cubesla_kernels::{DType, DeviceTensor};

use crate::hopper::multiprocessors;
use config::{COLUMNS, ROWS};
use kernel::{MatmulScalarsLaunch, ScaleOrderLaunch, low_bit_matmul_wgmma};

/// Rows for which tiles of 64 columns, which are more cubes, are faster: by a quarter of the time for a W of
/// 8192x8192, in INT8 on an H200, in FP8 on an H100.
const FEW_ROWS: usize = 32;
/// Clusters' tiles along M of a band.
const BAND: usize = 8;

/// How the Hopper product is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WgmmaMatmulPlan {
    /// Sizes and arithmetic of the kernel.
    pub tile: MatmulTile,
    /// Cubes, at most one to a multiprocessor.
    pub cubes: usize,
}

impl WgmmaMatmulPlan {
    /// The plan for `problem`.
    ///
    /// # Errors
    /// Why the product is not one for this kernel, in a few words.
    pub fn new(problem: &MatmulProblem, device: &DeviceProperties) -> Result<Self, &'static str> {
        let [rows, columns, _] = problem.size;
        let (x, w, dtype) = (problem.x, problem.w, problem.dtype);
        if device.identity.fingerprint != "ptx_sm90" {
            return Err("wgmma needs compute capability 9.0");
        }
        if x.format != w.format || x.format == Format::Int4 {
            return Err("wgmma multiplies INT8 by INT8 or FP8 by FP8");
        }
        if x.zero_point || w.zero_point {
            return Err("zero points need sums of codes");
        }
        if x.format == Format::Fp8 && dtype == DType::F32 {
            return Err("tensor cores keep about 14 bits of a sum of FP8 products");
        }
        if !problem.aligned || !(columns * dtype.size()).is_multiple_of(16) {
            return Err("bulk copies need rows that are multiples of 16 bytes");
        }
        let x_steps = steps(x.granularity).ok_or("scales of X change within a step of 128")?;
        let w_steps = match w.granularity {
            Granularity::Group(_) => Err("scales of W change from column to column of a step"),
            other => steps(other).ok_or("scales of W change within a step of 128"),
        }?;
        if rows <= FEW_ROWS {
            return Err("of so few rows, warp-level products read W faster");
        }
        let row_tiles = rows.div_ceil(ROWS);
        let tile = MatmulTile {
            fp8: x.format == Format::Fp8,
            steps: x_steps || w_steps,
            w_steps,
            bias: problem.bias,
            // The last cluster's second cube has no work if their number is odd.
            cluster: if row_tiles.is_multiple_of(2) || row_tiles > 8 {
                2
            } else {
                1
            },
            dtype,
        };
        let clusters = row_tiles.div_ceil(tile.cluster) * columns.div_ceil(COLUMNS);
        Ok(Self {
            tile,
            cubes: tile.cluster * clusters.min(multiprocessors(device) / tile.cluster),
        })
    }
}

/// Whether scales change along K, each 128 elements; nothing if they do so at other places.
fn steps(granularity: Granularity) -> Option<bool> {
    match granularity {
        Granularity::Tensor | Granularity::Row => Some(false),
        Granularity::Block | Granularity::Group(128) => Some(true),
        Granularity::Column | Granularity::Group(_) => None,
    }
}

impl fmt::Display for WgmmaMatmulPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rows, stages) = (self.tile.cluster_rows(), self.tile.stages());
        write!(
            f,
            "wgmma {rows}x{COLUMNS}, {stages} stages, {} cubes",
            self.cubes
        )
    }
}

/// Computes `out = X W^T + bias` as `plan` says, which is the one of these very tensors; they were
/// checked.
pub fn launch_matmul_wgmma<const R: usize>(
    client: &Client,
    plan: &WgmmaMatmulPlan,
    x: &QuantizedTensor<R>,
    w: &QuantizedTensor<2>,
    bias: Option<&DeviceTensor<1>>,
    out: &DeviceTensor<R>,
) {
    let [rows, len] = x.matrix();
    let [columns, _] = w.matrix();
    let tile = plan.tile;
    let row_tiles = rows.div_ceil(tile.cluster_rows());
    // SAFETY: bulk copies stay inside the tensors by themselves; rows and columns past the ends are
    // given the scales of the last.
    unsafe {
        low_bit_matmul_wgmma::launch_unchecked(
            client,
            CubeCount::Static(plan.cubes as u32, 1, 1),
            CubeDim::new_1d(tile.units() as u32),
            AddressType::U32,
            words_map(x),
            words_map(w),
            out_map(out, [rows, columns], tile),
            x.scales().buffer_arg(),
            w.scales().buffer_arg(),
            match bias {
                Some(bias) => bias.buffer_arg(),
                None => w.scales().buffer_arg(),
            },
            MatmulScalarsLaunch::new(
                rows as u32 - 1,
                columns as u32 - 1,
                len.div_ceil(128) as u32,
                row_tiles as u32,
                columns.div_ceil(COLUMNS) as u32,
                BAND as u32,
                scale_order(x),
                scale_order(w),
            ),
            tile,
            tile.dtype.elem_type(),
        );
    }
}

fn scale_order<const R: usize>(tensor: &QuantizedTensor<R>) -> ScaleOrderLaunch {
    let matrix = tensor.matrix();
    let [rows, columns] = tensor.granularity().region(matrix);
    let across = matrix[1].div_ceil(columns) as u32;
    ScaleOrderLaunch::new(rows as u32, across, across - 1)
}

/// A map of the words of `tensor` in boxes of 128 rows and 32 words, swizzled.
fn words_map<const R: usize>(tensor: &QuantizedTensor<R>) -> TensorMapArg<Tiled> {
    let shape = [1, 1, tensor.matrix()[0], tensor.words_per_row()];
    // SAFETY: a quantized tensor holds this many words.
    let words = unsafe { matrix_arg(tensor.words(), shape) };
    map(words, ElemType::UInt(UIntKind::U32), [ROWS, 32])
}

/// A map of the result, a matrix, in boxes of 64 rows and 128 bytes, swizzled.
fn out_map<const R: usize>(
    out: &DeviceTensor<R>,
    [rows, columns]: [usize; 2],
    tile: MatmulTile,
) -> TensorMapArg<Tiled> {
    // SAFETY: the result is contiguous and has this many elements.
    let matrix = unsafe { matrix_arg(out.handle(), [1, 1, rows, columns]) };
    map(matrix, tile.dtype.elem_type(), [64, tile.out_columns()])
}

/// # Safety
/// `handle` holds the elements of `shape`.
unsafe fn matrix_arg(handle: &Handle, shape: [usize; 4]) -> TensorArg {
    let [_, _, rows, columns] = shape;
    let strides = [rows * columns, rows * columns, columns, 1];
    // SAFETY: the caller's.
    unsafe { TensorArg::from_raw_parts(handle.clone(), strides.into(), shape.into()) }
}

fn map(tensor: TensorArg, elem: ElemType, [rows, columns]: [usize; 2]) -> TensorMapArg<Tiled> {
    TensorMapArg::new(
        TiledArgs {
            tile_size: [1, 1, rows, columns].into(),
        },
        tensor,
        elem,
    )
    .with_swizzle(TensorMapSwizzle::B128)
    .with_prefetch(TensorMapPrefetch::B256)
}
