//! The inverse of a block list: for each key block, the query blocks that selected it.
//!
//! Three small kernels: count the query blocks of every key block, sum the counts to offsets, write
//! the query blocks. Each (head, key block) is one unit that searches the ascending rows, so nothing
//! is written twice, no atomics are needed and the result is the same on every device and every run.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{BlockList, BlockListView, InverseListView, InverseListViewLaunch};
use crate::ProblemError;
use crate::limits::{expect_buffer, expect_loop_budget, grid};
use crate::scan::exclusive_scan;

/// Units of a cube of these kernels.
const UNITS: usize = 128;

/// For each (batch, query head, key block) the query blocks that selected it, in device memory, in
/// compressed-row form.
///
/// `offsets` is u32 `[B, Hq, N + 1]`. The query blocks of key block `j` are entries
/// `offsets[j]..offsets[j + 1]`, ascending, of that head's part of `rows`, u32 `[B, Hq, M * width]`;
/// what lies past `offsets[N]` is undefined.
#[derive(Clone, Debug)]
pub struct InverseBlockList {
    offsets: Handle,
    rows: Handle,
    shape: [usize; 4],
    capacity: usize,
}

impl InverseBlockList {
    /// u32 `[B, Hq, N + 1]`.
    pub fn offsets(&self) -> &Handle {
        &self.offsets
    }

    /// u32 `[B, Hq, capacity]`.
    pub fn rows(&self) -> &Handle {
        &self.rows
    }

    /// `[B, Hq, M, N]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Entries of `rows` that a (batch, head) has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The inverse as kernels take it.
    pub fn launch_arg(&self) -> RuntimeArg<InverseListView> {
        let [batch, heads, _, key_blocks] = self.shape;
        let buffer = |handle: &Handle, len| {
            // SAFETY: allocated with these lengths.
            unsafe { BufferArg::from_raw_parts(handle.clone(), len) }
        };
        InverseListViewLaunch::new(
            buffer(&self.offsets, batch * heads * (key_blocks + 1)),
            buffer(&self.rows, batch * heads * self.capacity),
            key_blocks as u32,
            self.capacity as u32,
        )
    }

    /// Builds the inverse of `list` on the device, without a read-back.
    ///
    /// # Errors
    /// [`ProblemError`] if the result is too large for the device, or the lists too long for a
    /// software device.
    pub fn new(client: &Client, list: &BlockList) -> Result<Self, ProblemError> {
        let [batch, heads, query_blocks, key_blocks] = list.shape();
        let device = client.properties();
        let capacity = query_blocks * list.width();
        let search = list.width().ilog2() as usize + 2;
        expect_loop_budget(device, "building the inverse list", query_blocks * search)?;
        expect_buffer(device, "inverse list", batch * heads * capacity * 4)?;

        let offsets_len = batch * heads * (key_blocks + 1);
        let offsets = client.empty(offsets_len * 4);
        let rows = client.empty(batch * heads * capacity * 4);
        let per_key_block = grid(
            device,
            [
                ("key blocks / 128", key_blocks.div_ceil(UNITS)),
                ("Hq", heads),
                ("B", batch),
            ],
        )?;
        let per_head = grid(device, [("B * Hq", batch * heads), ("", 1), ("", 1)])?;
        let dim = CubeDim::new_1d(UNITS as u32);
        // SAFETY: both handles were allocated above with these lengths.
        let (offsets_arg, rows_arg) = unsafe {
            (
                || BufferArg::from_raw_parts(offsets.clone(), offsets_len),
                BufferArg::from_raw_parts(rows.clone(), batch * heads * capacity),
            )
        };
        // SAFETY: units past the last key block do nothing; the others index by (head, key block)
        // and by entries counted before.
        unsafe {
            count_rows::launch_unchecked(
                client,
                per_key_block.clone(),
                dim,
                list.launch_arg(),
                offsets_arg(),
                key_blocks as u32,
            );
            scan_counts::launch_unchecked(client, per_head, dim, offsets_arg(), key_blocks as u32);
            fill_rows::launch_unchecked(
                client,
                per_key_block,
                dim,
                list.launch_arg(),
                offsets_arg(),
                rows_arg,
                key_blocks as u32,
                capacity as u32,
            );
        }
        Ok(Self {
            offsets,
            rows,
            shape: list.shape(),
            capacity,
        })
    }
}

/// The (batch, head) pair and the key block of a unit.
#[cube]
fn unit_position() -> (u32, u32) {
    (CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y, ABSOLUTE_POS_X)
}

/// `counts[b, h, j]` = query blocks that selected `j`; the last entry of a head is 0.
#[cube(launch_unchecked)]
fn count_rows(list: &BlockListView, counts: &mut [u32], key_blocks: u32) {
    let (head, key_block) = unit_position();
    let mut count = 0u32;
    if key_block < key_blocks {
        for i in 0..list.query_blocks {
            if list.selects(list.row(head, i), key_block) {
                count += 1;
            }
        }
        counts[(head * (key_blocks + 1) + key_block) as usize] = count;
    }
    if key_block == 0 {
        counts[(head * (key_blocks + 1) + key_blocks) as usize] = 0;
    }
}

/// Turns the counts of one head into offsets, in place.
#[cube(launch_unchecked)]
fn scan_counts(counts: &mut [u32], key_blocks: u32) {
    let len = key_blocks + 1;
    exclusive_scan(counts, (CUBE_POS_X * len) as usize, len, UNITS);
}

/// Writes the query blocks of each key block, ascending.
#[cube(launch_unchecked)]
fn fill_rows(
    list: &BlockListView,
    offsets: &[u32],
    rows: &mut [u32],
    key_blocks: u32,
    capacity: u32,
) {
    let (head, key_block) = unit_position();
    if key_block < key_blocks {
        let mut at = head * capacity + offsets[(head * (key_blocks + 1) + key_block) as usize];
        for i in 0..list.query_blocks {
            if list.selects(list.row(head, i), key_block) {
                rows[at as usize] = i;
                at += 1;
            }
        }
    }
}
