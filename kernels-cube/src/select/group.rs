//! Units that work on one row together.

use cubecl::prelude::*;

/// A group of `width` units: a plane where the device has plane operations, else a whole cube that
/// talks through shared memory.
#[derive(CubeType)]
pub(crate) struct RowGroup {
    /// The unit's number in its group.
    pub unit: u32,
    counts: Shared<[u32]>,
    sums: Shared<[f32]>,
    #[cube(comptime)]
    width: usize,
    #[cube(comptime)]
    planes: bool,
}

#[cube]
impl RowGroup {
    /// The group of this unit.
    pub fn new(#[comptime] width: usize, #[comptime] planes: bool) -> RowGroup {
        let space = comptime!(if planes { 1 } else { width });
        RowGroup {
            unit: UNIT_POS % comptime!(width as u32),
            counts: Shared::new_slice(space),
            sums: Shared::new_slice(space),
            width,
            planes,
        }
    }

    /// The index in its row of the unit's `c`-th element: `unit`, `unit + width`, ...
    pub fn index(&self, c: usize) -> u32 {
        u32::cast_from(c) * comptime!(self.width as u32) + self.unit
    }

    /// Sum over the group.
    pub fn sum(&mut self, x: u32) -> u32 {
        let mut total = 0u32;
        if self.planes {
            total = plane_sum(x);
        } else {
            self.share(x);
            for i in 0..self.width {
                total += self.counts[i];
            }
        }
        total
    }

    /// Sum over the group, always added in the same order.
    pub fn sum_f32(&mut self, x: f32) -> f32 {
        let mut total = 0.0f32;
        if self.planes {
            total = plane_sum(x);
        } else {
            sync_cube();
            self.sums[self.unit as usize] = x;
            sync_cube();
            for i in 0..self.width {
                total += self.sums[i];
            }
        }
        total
    }

    /// Largest over the group.
    pub fn max_f32(&mut self, x: f32) -> f32 {
        let mut largest = x;
        if self.planes {
            largest = plane_max(x);
        } else {
            sync_cube();
            self.sums[self.unit as usize] = x;
            sync_cube();
            for i in 0..self.width {
                largest = max(largest, self.sums[i]);
            }
        }
        largest
    }

    /// Largest over the group.
    pub fn max(&mut self, x: u32) -> u32 {
        let mut largest = x;
        if self.planes {
            largest = plane_max(x);
        } else {
            self.share(x);
            for i in 0..self.width {
                largest = max(largest, self.counts[i]);
            }
        }
        largest
    }

    /// How many units before this one pass `flag`, and how many of all do.
    pub fn count_before(&mut self, flag: bool) -> (u32, u32) {
        let mut before = 0u32;
        let mut total = 0u32;
        if self.planes {
            let votes = plane_ballot(flag).extract(0usize);
            before = (votes & ((1u32 << self.unit) - 1)).count_ones();
            total = votes.count_ones();
        } else {
            self.share(u32::cast_from(flag));
            for i in 0..self.width {
                let vote = self.counts[i];
                total += vote;
                if i < self.unit as usize {
                    before += vote;
                }
            }
        }
        (before, total)
    }

    /// Shows each unit's number to the others.
    fn share(&mut self, x: u32) {
        // What was shared before may still be being read.
        sync_cube();
        self.counts[self.unit as usize] = x;
        sync_cube();
    }
}
