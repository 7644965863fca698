//! Sums of rows over blocks, and of blocks over lists: the vectors `z` and their gradients.

use cubecl::prelude::*;

use super::Taken;
use crate::block_list::{BlockListView, InverseListView};
use crate::limits::{expect_loop_budget, line_grid};
use crate::{BlockList, DType, DeviceTensor, InverseBlockList, ProblemError};

const UNITS: usize = 256;

/// The unit's number in a line of cubes.
#[cube]
fn line_position() -> usize {
    ((CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) * CUBE_DIM + UNIT_POS) as usize
}

/// Sums of each `block` rows of `x [B, H, L, D]`, contiguous, each row times its `weight [B, H, L]`
/// if there are weights: f32 `[B, H, ceil(L / block), D]`.
pub(crate) fn block_sums(
    client: &Client,
    x: &DeviceTensor<4>,
    weights: Option<&DeviceTensor<3>>,
    block: usize,
) -> Result<DeviceTensor<4>, ProblemError> {
    let [batch, heads, len, dim] = x.shape();
    let device = client.properties();
    expect_loop_budget(device, "sums over blocks", block)?;
    let sums = DeviceTensor::empty(client, [batch, heads, len.div_ceil(block), dim], DType::F32);
    let cubes = sums.len().div_ceil(UNITS);
    // SAFETY: one unit to a sum; rows past the length are not read.
    unsafe {
        block_sums_kernel::launch_unchecked(
            client,
            line_grid(device, "sums over blocks", cubes)?,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(x.len()),
            x.buffer_arg(),
            weights.map_or(sums.buffer_arg(), DeviceTensor::buffer_arg),
            sums.buffer_arg(),
            len,
            dim,
            block,
            weights.is_some(),
            x.dtype().elem_type(),
        );
    }
    Ok(sums)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn block_sums_kernel<F: Float>(
    x: &[F],
    weights: &[f32],
    sums: &mut [f32],
    len: usize,
    dim: usize,
    block: usize,
    #[comptime] weighted: bool,
    #[define(F)] _dtype: ElemType,
) {
    let at = line_position();
    if at < sums.len() {
        let blocks = len.div_ceil(block);
        let (column, index) = (at % dim, at / dim);
        let (head, first) = (index / blocks, index % blocks * block);
        let mut sum = 0.0f32;
        for row in first..min(first + block, len) {
            let row = head * len + row;
            let mut term = f32::cast_from(x[row * dim + column]);
            if weighted {
                term *= weights[row];
            }
            sum += term;
        }
        sums[at] = sum;
    }
}

/// Whether a block that is `listed`, or not, is taken.
#[cube]
fn takes(listed: bool, #[comptime] taken: Taken) -> bool {
    match comptime!(taken) {
        Taken::Listed => listed,
        Taken::Unlisted => !listed,
    }
}

/// For each query block `factor` times the sum of the vectors of the key blocks that it takes:
/// `z [B, Hkv, N, D]` gives `[B, Hq, M, D]`.
pub(crate) fn sums_by_query(
    client: &Client,
    z: &DeviceTensor<4>,
    list: &BlockList,
    taken: Taken,
    factor: f32,
) -> Result<DeviceTensor<4>, ProblemError> {
    let [batch, heads, query_blocks, key_blocks] = list.shape();
    let [_, kv_heads, _, dim] = z.shape();
    let device = client.properties();
    expect_loop_budget(device, "sums over lists", key_blocks)?;
    let sums = DeviceTensor::empty(client, [batch, heads, query_blocks, dim], DType::F32);
    let cubes = sums.len().div_ceil(UNITS);
    // SAFETY: one unit to a sum; it reads vectors of its own batch and key head.
    unsafe {
        sums_by_query_kernel::launch_unchecked(
            client,
            line_grid(device, "sums over lists", cubes)?,
            CubeDim::new_1d(UNITS as u32),
            z.buffer_arg(),
            list.launch_arg(),
            sums.buffer_arg(),
            key_blocks as u32,
            dim,
            heads / kv_heads,
            factor,
            taken,
        );
    }
    Ok(sums)
}

#[cube(launch_unchecked)]
fn sums_by_query_kernel(
    z: &[f32],
    list: &BlockListView,
    sums: &mut [f32],
    key_blocks: u32,
    dim: usize,
    group: usize,
    factor: f32,
    #[comptime] taken: Taken,
) {
    let at = line_position();
    if at < sums.len() {
        let (column, index) = (at % dim, at / dim);
        let head = index as u32 / list.query_blocks;
        let row = list.row(head, index as u32 % list.query_blocks);
        // Batches hold whole groups, so that a key head's number is its query heads' over the group.
        let first = head as usize / group * key_blocks as usize;
        let mut next = 0u32;
        let mut sum = 0.0f32;
        for j in 0..key_blocks {
            let mut listed = false.runtime();
            if next < row.count {
                listed = list.key_block(row, next) == j;
            }
            if listed {
                next += 1;
            }
            if takes(listed, taken) {
                sum += z[(first + j as usize) * dim + column];
            }
        }
        sums[at] = sum * factor;
    }
}

/// For each key block `factor` times the sum of the vectors of the query blocks that take it, of all
/// heads of the group: `y [B, Hq, M, D]` gives `[B, Hkv, N, D]`.
pub(crate) fn sums_by_key(
    client: &Client,
    y: &DeviceTensor<4>,
    inverse: &InverseBlockList,
    kv_heads: usize,
    taken: Taken,
    factor: f32,
) -> Result<DeviceTensor<4>, ProblemError> {
    let [batch, heads, query_blocks, key_blocks] = inverse.shape();
    let dim = y.shape()[3];
    let group = heads / kv_heads;
    let device = client.properties();
    expect_loop_budget(device, "sums over lists", group * (query_blocks + 1))?;
    let sums = DeviceTensor::empty(client, [batch, kv_heads, key_blocks, dim], DType::F32);
    let cubes = sums.len().div_ceil(UNITS);
    // SAFETY: as for the queries.
    unsafe {
        sums_by_key_kernel::launch_unchecked(
            client,
            line_grid(device, "sums over lists", cubes)?,
            CubeDim::new_1d(UNITS as u32),
            y.buffer_arg(),
            inverse.launch_arg(),
            sums.buffer_arg(),
            query_blocks as u32,
            dim,
            group,
            factor,
            taken,
        );
    }
    Ok(sums)
}

#[cube(launch_unchecked)]
fn sums_by_key_kernel(
    y: &[f32],
    inverse: &InverseListView,
    sums: &mut [f32],
    query_blocks: u32,
    dim: usize,
    group: usize,
    factor: f32,
    #[comptime] taken: Taken,
) {
    let at = line_position();
    if at < sums.len() {
        let (column, index) = (at % dim, at / dim);
        let key_block = index as u32 % inverse.key_blocks;
        let kv_head = index / inverse.key_blocks as usize;
        let mut sum = 0.0f32;
        for member in 0..group {
            let head = kv_head * group + member;
            let row = inverse.row(head as u32, key_block);
            let first = head * query_blocks as usize;
            let mut next = 0u32;
            for i in 0..query_blocks {
                let mut listed = false.runtime();
                if next < row.count {
                    listed = inverse.query_block(row, next) == i;
                }
                if listed {
                    next += 1;
                }
                if takes(listed, taken) {
                    sum += y[(first + i as usize) * dim + column];
                }
            }
        }
        sums[at] = sum * factor;
    }
}

/// For each query block `factor sum_j w_ij z_j` over all key blocks, or with `1 - w` for `w` if
/// `rest`: `weights [B, Hq, M, N]` and `z [B, Hkv, N, D]` give `[B, Hq, M, D]`, all f32 and
/// contiguous.
pub(crate) fn weighted_by_query(
    client: &Client,
    weights: &DeviceTensor<4>,
    z: &DeviceTensor<4>,
    rest: bool,
    factor: f32,
) -> Result<DeviceTensor<4>, ProblemError> {
    let [batch, heads, query_blocks, key_blocks] = weights.shape();
    let [_, kv_heads, _, dim] = z.shape();
    let device = client.properties();
    expect_loop_budget(device, "sums over blocks", key_blocks)?;
    let sums = DeviceTensor::empty(client, [batch, heads, query_blocks, dim], DType::F32);
    let cubes = sums.len().div_ceil(UNITS);
    // SAFETY: one unit to a sum; it reads vectors of its own batch and key head.
    unsafe {
        weighted_by_query_kernel::launch_unchecked(
            client,
            line_grid(device, "sums over blocks", cubes)?,
            CubeDim::new_1d(UNITS as u32),
            weights.buffer_arg(),
            z.buffer_arg(),
            sums.buffer_arg(),
            WeightedSizesLaunch::new(query_blocks, key_blocks, dim, heads / kv_heads),
            factor,
            rest,
        );
    }
    Ok(sums)
}

/// Sizes that all units share.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct WeightedSizes {
    query_blocks: usize,
    key_blocks: usize,
    dim: usize,
    /// Query heads to a key head.
    group: usize,
}

#[cube(launch_unchecked)]
fn weighted_by_query_kernel(
    weights: &[f32],
    z: &[f32],
    sums: &mut [f32],
    sizes: WeightedSizes,
    factor: f32,
    #[comptime] rest: bool,
) {
    let at = line_position();
    if at < sums.len() {
        let (column, row) = (at % sizes.dim, at / sizes.dim);
        let first = row / sizes.query_blocks / sizes.group * sizes.key_blocks;
        let mut sum = 0.0f32;
        for j in 0..sizes.key_blocks {
            let mut weight = weights[row * sizes.key_blocks + j];
            if rest {
                weight = 1.0 - weight;
            }
            sum += weight * z[(first + j) * sizes.dim + column];
        }
        sums[at] = sum * factor;
    }
}

/// For each key block `factor sum_i w_ij y_i` over all query blocks of the heads of its group, or
/// with `1 - w` for `w` if `rest`: `weights [B, Hq, M, N]` and `y [B, Hq, M, D]` give
/// `[B, Hkv, N, D]`, all f32 and contiguous.
pub(crate) fn weighted_by_key(
    client: &Client,
    weights: &DeviceTensor<4>,
    y: &DeviceTensor<4>,
    kv_heads: usize,
    rest: bool,
    factor: f32,
) -> Result<DeviceTensor<4>, ProblemError> {
    let [batch, heads, query_blocks, key_blocks] = weights.shape();
    let dim = y.shape()[3];
    let device = client.properties();
    let group = heads / kv_heads;
    expect_loop_budget(device, "sums over blocks", group * query_blocks)?;
    let sums = DeviceTensor::empty(client, [batch, kv_heads, key_blocks, dim], DType::F32);
    let cubes = sums.len().div_ceil(UNITS);
    // SAFETY: as for the queries.
    unsafe {
        weighted_by_key_kernel::launch_unchecked(
            client,
            line_grid(device, "sums over blocks", cubes)?,
            CubeDim::new_1d(UNITS as u32),
            weights.buffer_arg(),
            y.buffer_arg(),
            sums.buffer_arg(),
            WeightedSizesLaunch::new(query_blocks, key_blocks, dim, group),
            factor,
            rest,
        );
    }
    Ok(sums)
}

#[cube(launch_unchecked)]
fn weighted_by_key_kernel(
    weights: &[f32],
    y: &[f32],
    sums: &mut [f32],
    sizes: WeightedSizes,
    factor: f32,
    #[comptime] rest: bool,
) {
    let at = line_position();
    if at < sums.len() {
        let (column, key) = (at % sizes.dim, at / sizes.dim);
        let (kv_head, key_block) = (key / sizes.key_blocks, key % sizes.key_blocks);
        // The query blocks of a group's heads follow each other.
        let rows = sizes.group * sizes.query_blocks;
        let first = kv_head * rows;
        let mut sum = 0.0f32;
        for i in 0..rows {
            let mut weight = weights[(first + i) * sizes.key_blocks + key_block];
            if rest {
                weight = 1.0 - weight;
            }
            sum += weight * y[(first + i) * sizes.dim + column];
        }
        sums[at] = sum * factor;
    }
}
