//! Scales and zero points from the extremes of the elements that share them.

use cubecl::prelude::*;

use super::codes::{is_infinite, is_nan, magnitude, nearest};
use super::{Format, Granularity, Regions, regions};
use crate::limits::{expect_loop_budget, line_grid};
use crate::{DType, DeviceTensor, ProblemError};

/// Units of a cube.
const UNITS: usize = 256;
/// Chunks that a whole tensor is reduced in, at most.
const CHUNKS: usize = 256;

/// Which units work on which elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Layout {
    /// Units that share a region.
    lanes: usize,
    /// Whether neighbouring units have neighbouring regions, for columns, instead of the same one.
    side_by_side: bool,
    /// Whether a NaN makes its region NaN.
    keep_nan: bool,
}

impl Layout {
    /// Distance between the lanes of a region.
    fn pitch(self) -> usize {
        if self.side_by_side {
            UNITS / self.lanes
        } else {
            1
        }
    }
}

/// Scales of `x`, and zero points.
pub(super) fn scales(
    client: &Client,
    x: &DeviceTensor<2>,
    format: Format,
    granularity: Granularity,
    zero_point: bool,
) -> Result<(DeviceTensor<2>, DeviceTensor<2>), ProblemError> {
    let device = client.properties();
    let matrix = x.shape();
    let shape = granularity.scales_shape(matrix);
    // A whole tensor goes in chunks of rows, whose extremes are folded with the scale.
    let region = match granularity {
        Granularity::Tensor => [matrix[0].div_ceil(CHUNKS), matrix[1]],
        _ => granularity.region(matrix),
    };
    let count = matrix[0].div_ceil(region[0]) * matrix[1].div_ceil(region[1]);
    let fold = count / (shape[0] * shape[1]);
    let (lanes, side_by_side) = match granularity {
        Granularity::Group(_) => (32, false),
        Granularity::Column => (8, true),
        _ => (UNITS, false),
    };
    let layout = Layout {
        lanes,
        side_by_side,
        keep_nan: format != Format::Fp8,
    };
    let iterations = (region[0] * region[1]).div_ceil(lanes) + 8;
    expect_loop_budget(device, "scales", iterations.max(fold))?;
    let grid = line_grid(device, "scales", count.div_ceil(UNITS / lanes))?;
    let [highs, lows] = [(); 2].map(|()| DeviceTensor::empty(client, [1, count], DType::F32));
    let scales = DeviceTensor::empty(client, shape, DType::F32);
    let zeros = DeviceTensor::empty(client, shape, DType::F32);
    // SAFETY: units past the last region or the matrix's ends read and write nothing.
    unsafe {
        extremes::launch_unchecked(
            client,
            grid,
            CubeDim::new_1d(UNITS as u32),
            AddressType::from_len(x.extent()),
            x.tensor_arg(),
            highs.buffer_arg(),
            lows.buffer_arg(),
            regions(region, matrix),
            count as u32,
            layout,
            x.dtype().elem_type(),
        );
        finish::launch_unchecked(
            client,
            line_grid(device, "scales", scales.len().div_ceil(UNITS))?,
            CubeDim::new_1d(UNITS as u32),
            highs.buffer_arg(),
            lows.buffer_arg(),
            scales.buffer_arg(),
            zeros.buffer_arg(),
            scales.len() as u32,
            fold as u32,
            format,
            zero_point,
        );
    }
    Ok((scales, zeros))
}

/// The largest finite element of each region and the largest finite negated one, as bits, 0 at least.
#[cube(launch_unchecked, address_type = "dynamic")]
fn extremes<F: Float>(
    x: &Tensor<F>,
    highs: &mut [u32],
    lows: &mut [u32],
    regions: Regions,
    count: u32,
    #[comptime] layout: Layout,
    #[define(F)] _dtype: ElemType,
) {
    let lanes = comptime!(layout.lanes as u32);
    let pitch = comptime!(layout.pitch());
    let at_once = comptime!((UNITS / layout.lanes) as u32);
    let cube = CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X;
    let (inner, lane) = if comptime!(layout.side_by_side) {
        (UNIT_POS % at_once, UNIT_POS / at_once)
    } else {
        (UNIT_POS / lanes, UNIT_POS % lanes)
    };
    let region = cube * at_once + inner;
    let (mut high, mut low) = (0u32.runtime(), 0u32.runtime());
    if region < count {
        let first_row = region / regions.across * regions.rows;
        let first_column = region % regions.across * regions.columns;
        let rows = min(regions.rows, x.shape(0) as u32 - first_row);
        let columns = min(regions.columns, x.shape(1) as u32 - first_column);
        let steps = (rows * columns).div_ceil(lanes);
        for step in 0..steps {
            let at = step * lanes + lane;
            if at < rows * columns {
                let row = (first_row + at / columns) as usize;
                let column = (first_column + at % columns) as usize;
                let value = f32::cast_from(x[row * x.stride(0) + column * x.stride(1)]);
                let size = magnitude(value);
                let finite = !is_nan(size) && !is_infinite(size);
                let positive = u32::reinterpret(value) == size;
                high = max(high, select(finite && positive, size, 0));
                low = max(low, select(finite && !positive, size, 0));
                if comptime!(layout.keep_nan) {
                    high = max(high, select(is_nan(size), size, 0));
                }
            }
        }
    }
    let mut highest = Shared::<[u32]>::new_slice(UNITS);
    let mut lowest = Shared::<[u32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    highest[unit] = high;
    lowest[unit] = low;
    #[unroll]
    for step in 0..comptime!(layout.lanes.ilog2() as usize) {
        let half = comptime!(layout.lanes >> (step + 1));
        sync_cube();
        if (lane as usize) < half {
            let other = unit + comptime!(half * pitch);
            highest[unit] = max(highest[unit], highest[other]);
            lowest[unit] = max(lowest[unit], lowest[other]);
        }
    }
    if lane == 0 && region < count {
        highs[region as usize] = highest[unit];
        lows[region as usize] = lowest[unit];
    }
}

/// A scale and a zero point from the extremes of `fold` neighbours.
#[cube(launch_unchecked)]
fn finish(
    highs: &[u32],
    lows: &[u32],
    scales: &mut [u32],
    zeros: &mut [f32],
    count: u32,
    fold: u32,
    #[comptime] format: Format,
    #[comptime] zero_point: bool,
) {
    let at = (CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) * CUBE_DIM + UNIT_POS;
    if at < count {
        let (mut high, mut low) = (0u32.runtime(), 0u32.runtime());
        for i in 0..fold {
            high = max(high, highs[(at * fold + i) as usize]);
            low = max(low, lows[(at * fold + i) as usize]);
        }
        let scale = if comptime!(zero_point) {
            // Divided before they are added: their sum may overflow.
            let levels = comptime!(format.levels());
            f32::reinterpret(high) / levels + f32::reinterpret(low) / levels
        } else {
            f32::reinterpret(max(high, low)) / comptime!(format.top())
        };
        let usable = u32::reinterpret(scale) >= 0x0080_0000;
        let scale = select(usable, scale, 1.0);
        let mut zero = 0.0f32.runtime();
        if comptime!(zero_point) {
            let quotient = min(f32::reinterpret(low) / scale, 512.0);
            let nearest = min(nearest(quotient), comptime!(format.levels() as i32));
            zero = select(usable && !is_nan(high), f32::cast_from(nearest), 0.0);
        }
        scales[at as usize] = select(is_nan(high), 0x7FC0_0000, u32::reinterpret(scale));
        zeros[at as usize] = zero;
    }
}
