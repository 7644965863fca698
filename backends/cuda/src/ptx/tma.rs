//! Bulk tensor copies (TMA) between global tensors `[B, H, L, D]` and shared tiles.
//!
//! A box is 64 columns by some rows, 128 bytes a row, and lies in shared memory with the 128-byte
//! swizzle: the 16-byte chunk `c` of row `r` is at `128 r + 16 (c ^ (r % 8))`, if the tile begins at
//! a multiple of 1024. Rows past `L` and columns past `D` read as zeros and are not written.

use cubecl::prelude::*;

use super::value;

/// What the L2 cache makes of the lines of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum L2 {
    /// Kept as long as others.
    Normal,
    /// Given up first: no one reads them again.
    EvictFirst,
}

impl L2 {
    /// What comes before a copy, the modifier of its instruction, its operand, and what comes after it.
    fn parts(self) -> [&'static str; 4] {
        match self {
            Self::Normal => ["", "", "", ""],
            Self::EvictFirst => [
                "{ .reg .b64 first; createpolicy.fractional.L2::evict_first.b64 first, 1.0; ",
                ".L2::cache_hint",
                ", first",
                " }",
            ],
        }
    }
}

/// Begins to load the box at `(column, row, head, batch)` to shared address `to`; its bytes count
/// towards the phase of `barrier`.
#[cube]
pub(crate) fn load(
    to: u32,
    map: u64,
    barrier: u32,
    column: u32,
    row: u32,
    head: u32,
    batch: u32,
    #[comptime] l2: L2,
) {
    let (to, map, barrier) = (value::<u32>(to), value::<u64>(map), value::<u32>(barrier));
    let (column, row) = (value::<u32>(column), value::<u32>(row));
    let (head, batch) = (value::<u32>(head), value::<u32>(batch));
    let [before, hint, policy, after] = comptime!(l2.parts());
    gpu_asm!(
        "{before}cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{hint} \
         [{to}], [{map}, {{{column}, {row}, {head}, {batch}}}], [{barrier}]{policy};{after}",
        to = in(_) to, map = in(_) map, column = in(_) column, row = in(_) row,
        head = in(_) head, batch = in(_) batch, barrier = in(_) barrier,
        before = const before, hint = const hint, policy = const policy, after = const after
    );
}

/// Begins to load the box to where `to` is in both cubes of a cluster of two, and to count its bytes
/// towards the phase of each one's `barrier`.
#[cube]
pub(crate) fn load_to_both(
    to: u32,
    map: u64,
    barrier: u32,
    column: u32,
    row: u32,
    head: u32,
    batch: u32,
) {
    let (to, map, barrier) = (value::<u32>(to), value::<u64>(map), value::<u32>(barrier));
    let (column, row) = (value::<u32>(column), value::<u32>(row));
    let (head, batch) = (value::<u32>(head), value::<u32>(batch));
    gpu_asm!(
        "{{ .reg .b16 both; mov.b16 both, 3; \
         cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes\
         .multicast::cluster \
         [{to}], [{map}, {{{column}, {row}, {head}, {batch}}}], [{barrier}], both; }}",
        to = in(_) to, map = in(_) map, column = in(_) column, row = in(_) row,
        head = in(_) head, batch = in(_) batch, barrier = in(_) barrier
    );
}

/// Begins to store the box at shared address `from` to `(column, row, head, batch)`.
#[cube]
pub(crate) fn store(
    from: u32,
    map: u64,
    column: u32,
    row: u32,
    head: u32,
    batch: u32,
    #[comptime] l2: L2,
) {
    let (from, map) = (value::<u32>(from), value::<u64>(map));
    let (column, row) = (value::<u32>(column), value::<u32>(row));
    let (head, batch) = (value::<u32>(head), value::<u32>(batch));
    let [before, hint, policy, after] = comptime!(l2.parts());
    gpu_asm!(
        "{before}cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group{hint} \
         [{map}, {{{column}, {row}, {head}, {batch}}}], [{from}]{policy};{after}",
        map = in(_) map, column = in(_) column, row = in(_) row, head = in(_) head,
        batch = in(_) batch, from = in(_) from,
        before = const before, hint = const hint, policy = const policy, after = const after
    );
}

/// Closes the group of the unit's stores.
#[cube]
pub(crate) fn commit_stores() {
    gpu_asm!("cp.async.bulk.commit_group;");
}

/// Waits until the unit's stores have read their shared tiles.
#[cube]
pub(crate) fn wait_stores_read() {
    gpu_asm!("cp.async.bulk.wait_group.read 0;");
}

/// Waits until all but the newest group of the unit's stores have read their shared tiles.
#[cube]
pub(crate) fn wait_stores_read_but_one() {
    gpu_asm!("cp.async.bulk.wait_group.read 1;");
}

/// Makes the unit's writes to shared memory visible to bulk copies and `wgmma`.
#[cube]
pub(crate) fn fence_writes() {
    gpu_asm!("fence.proxy.async.shared::cta;");
}
