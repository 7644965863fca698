//! How rows are shared out over units.

use cubecl::features::Plane;
use cubecl::ir::DeviceProperties;
use cubecl::prelude::*;

use crate::ProblemError;

/// Longest row that a cube can hold in registers.
pub const MAX_ROW: usize = 8192;

/// Rows of a cube and elements of a unit, fixed when a kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RowShape {
    /// Units that share a row.
    pub width: usize,
    /// Elements of a row that each of them holds.
    pub count: usize,
    /// Whether they are a plane. Loops over a unit's elements are then unrolled, for the elements to
    /// stay in registers; elsewhere they are not, for kernels to compile in seconds.
    pub planes: bool,
    /// Rows of a cube.
    pub rows: usize,
}

impl RowShape {
    /// The shape for rows of `len`.
    ///
    /// # Errors
    /// [`ProblemError::RowTooLong`] for more than [`MAX_ROW`] elements.
    pub fn new(device: &DeviceProperties, len: usize) -> Result<Self, ProblemError> {
        if len > MAX_ROW {
            return Err(ProblemError::RowTooLong {
                len,
                limit: MAX_ROW,
            });
        }
        let hardware = &device.hardware;
        let planes = device.features.plane.contains(Plane::Ops)
            && device.features.plane.contains(Plane::NonUniformControlFlow)
            && (hardware.plane_size_min, hardware.plane_size_max) == (32, 32);
        if planes && len <= 64 * 32 {
            return Ok(Self {
                width: 32,
                count: rounded(len.div_ceil(32)),
                planes,
                rows: 4,
            });
        }
        let width = [32, 64, 128]
            .into_iter()
            .find(|width| len <= 32 * width)
            .unwrap_or(256);
        Ok(Self {
            width,
            count: len.div_ceil(width).next_power_of_two(),
            planes: false,
            rows: 1,
        })
    }

    pub fn cube_dim(&self) -> CubeDim {
        CubeDim::new_1d((self.width * self.rows) as u32)
    }
}

/// `count`, or a little more: so that rows of similar lengths share a kernel.
fn rounded(count: usize) -> usize {
    count.next_multiple_of((count.next_power_of_two() / 8).max(1))
}

/// Elements of a row of `len` that a unit has to look at. Without planes a number that no compiler
/// knows: Mesa's unrolls loops with barriers in them, and then takes minutes.
#[cube]
pub(crate) fn elements(len: u32, #[comptime] shape: RowShape) -> usize {
    if comptime!(shape.planes) {
        shape.count.runtime()
    } else {
        len.div_ceil(comptime!(shape.width as u32)) as usize
    }
}

/// The row of this unit's group.
#[cube]
pub(crate) fn row_of_group(#[comptime] shape: RowShape) -> u32 {
    let cube = CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X;
    cube * comptime!(shape.rows as u32) + UNIT_POS / comptime!(shape.width as u32)
}
