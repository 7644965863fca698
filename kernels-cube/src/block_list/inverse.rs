//! The inverse of a block list: for each key block, the query blocks that selected it.
//!
//! Three small kernels: count the query blocks of every key block, sum the counts to offsets, write
//! the query blocks. The units of a (head, key block) search the ascending rows, each its share of
//! them, so nothing is written twice, no atomics are needed and the result is the same on every device
//! and every run.

use cubecl::prelude::*;
use cubecl::server::Handle;

use super::{BlockList, BlockListView, InverseListView, InverseListViewLaunch};
use crate::ProblemError;
use crate::limits::{expect_buffer, expect_loop_budget, grid};
use crate::scan::exclusive_scan;

/// Units of a cube of these kernels.
const UNITS: usize = 128;
/// Units that share a key block, each with its share of the query blocks.
const LANES: usize = 32;

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
        let own = query_blocks.div_ceil(LANES);
        expect_loop_budget(
            device,
            "building the inverse list",
            2 * own * search + LANES,
        )?;
        expect_buffer(device, "inverse list", batch * heads * capacity * 4)?;

        let offsets_len = batch * heads * (key_blocks + 1);
        let offsets = client.empty(offsets_len * 4);
        let rows = client.empty(batch * heads * capacity * 4);
        let per_key_block = grid(
            device,
            [
                ("key blocks / 4", key_blocks.div_ceil(UNITS / LANES)),
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

/// What a unit looks at: a share of the query blocks of a (batch, head) pair, for one key block.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Share {
    head: u32,
    key_block: u32,
    start: u32,
    end: u32,
}

#[cube]
impl Share {
    /// That of the unit, empty past the last key block.
    fn new(query_blocks: u32, key_blocks: u32) -> Share {
        let lanes = comptime!(LANES as u32);
        let key_block = CUBE_POS_X * comptime!((UNITS / LANES) as u32) + UNIT_POS / lanes;
        let own = select(key_block < key_blocks, query_blocks.div_ceil(lanes), 0);
        let start = min(UNIT_POS % lanes * own, query_blocks);
        Share {
            head: CUBE_POS_Z * CUBE_COUNT_Y + CUBE_POS_Y,
            key_block,
            start,
            end: min(start + own, query_blocks),
        }
    }

    /// How many of them selected the key block.
    fn count(self, list: &BlockListView) -> u32 {
        let mut count = 0u32;
        for i in self.start..self.end {
            if list.selects(list.row(self.head, i), self.key_block) {
                count += 1;
            }
        }
        count
    }
}

/// The sum over the first `lanes` units of those that share the unit's key block. All units of the cube
/// must call it, once.
#[cube]
fn sum_before(x: u32, lanes: u32) -> u32 {
    let mut shared = Shared::<[u32]>::new_slice(UNITS);
    shared[UNIT_POS as usize] = x;
    sync_cube();
    let first = UNIT_POS / comptime!(LANES as u32) * comptime!(LANES as u32);
    let mut sum = 0u32;
    for i in 0..lanes {
        sum += shared[(first + i) as usize];
    }
    sum
}

/// `counts[b, h, j]` = query blocks that selected `j`; the last entry of a head is 0.
#[cube(launch_unchecked)]
fn count_rows(list: &BlockListView, counts: &mut [u32], key_blocks: u32) {
    let share = Share::new(list.query_blocks, key_blocks);
    let count = sum_before(share.count(list), comptime!(LANES as u32));
    let first = share.head * (key_blocks + 1);
    if share.key_block < key_blocks && UNIT_POS % comptime!(LANES as u32) == 0 {
        counts[(first + share.key_block) as usize] = count;
    }
    if CUBE_POS_X == 0 && UNIT_POS == 0 {
        counts[(first + key_blocks) as usize] = 0;
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
    let share = Share::new(list.query_blocks, key_blocks);
    let before = sum_before(share.count(list), UNIT_POS % comptime!(LANES as u32));
    if share.key_block < key_blocks {
        let first = offsets[(share.head * (key_blocks + 1) + share.key_block) as usize];
        let mut at = share.head * capacity + first + before;
        for i in share.start..share.end {
            if list.selects(list.row(share.head, i), share.key_block) {
                rows[at as usize] = i;
                at += 1;
            }
        }
    }
}
