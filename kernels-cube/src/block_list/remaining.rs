//! The blocks that lists leave.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{BlockList, BlockListView};
use crate::ProblemError;
use crate::limits::{expect_buffer, expect_loop_budget, line_grid};
use crate::select::{Appender, RowGroup, RowShape, elements, row_of_group};

impl BlockList {
    /// The key blocks that are in neither list: with critical and negligible blocks, the marginal.
    ///
    /// # Errors
    /// [`ProblemError`] for lists of different problems or more than 8192 key blocks.
    pub fn remaining(
        &self,
        client: &Client,
        other: Option<&BlockList>,
    ) -> Result<BlockList, ProblemError> {
        if let Some(other) = other {
            self.expect_same(other)?;
        }
        let device = client.properties();
        let [.., key_blocks] = self.shape();
        let (rows, width) = (self.rows(), key_blocks);
        let shape = RowShape::new(device, key_blocks)?;
        let search = self.width().max(other.map_or(1, BlockList::width)).ilog2() as usize + 2;
        expect_loop_budget(
            device,
            "the remaining blocks",
            shape.count * (2 * search + shape.width),
        )?;
        expect_buffer(device, "block list", rows * width * 4)?;
        let buffer = |handle: &Handle, len| {
            // SAFETY: allocated below with this length.
            unsafe { BufferArg::from_raw_parts(handle.clone(), len) }
        };
        let indices = client.empty(rows * width * 4);
        let counts = client.empty(rows * 4);
        // SAFETY: a row has room for all key blocks, and takes each at most once, ascending.
        unsafe {
            remaining_rows::launch_unchecked(
                client,
                line_grid(device, "rows of the block list", rows.div_ceil(shape.rows))?,
                shape.cube_dim(),
                self.launch_arg(),
                other.unwrap_or(self).launch_arg(),
                buffer(&indices, rows * width),
                buffer(&counts, rows),
                rows as u32,
                key_blocks as u32,
                shape,
            );
            Ok(BlockList::from_handles(
                indices,
                counts,
                self.shape(),
                width,
            ))
        }
    }
}

#[cube(launch_unchecked)]
fn remaining_rows(
    list: &BlockListView,
    other: &BlockListView,
    indices: &mut [u32],
    counts: &mut [u32],
    rows: u32,
    key_blocks: u32,
    #[comptime] shape: RowShape,
) {
    let row = row_of_group(shape);
    // Whole groups stop together, and with them a cube that is one group.
    if row < rows {
        let mut group = RowGroup::new(shape.width, shape.planes);
        let (head, query_block) = (row / list.query_blocks, row % list.query_blocks);
        let (one, two) = (list.row(head, query_block), other.row(head, query_block));
        let mut entries = Appender {
            start: row as usize * key_blocks as usize,
            len: 0,
        };
        #[unroll(shape.planes)]
        for c in 0..elements(key_blocks, shape) {
            let index = group.index(c);
            let mut left = index < key_blocks;
            if left {
                left = !list.selects(one, index) && !other.selects(two, index);
            }
            let place = entries.place(&mut group, left);
            if left {
                indices[place] = index;
            }
        }
        if group.unit == 0 {
            counts[row as usize] = entries.len;
        }
    }
}
