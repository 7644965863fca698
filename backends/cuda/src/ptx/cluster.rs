//! Clusters: neighbouring cubes that reach each other's shared memory.

use cubecl::prelude::*;

use super::value;

/// Waits for all units of the cluster, whose writes are then visible.
#[cube]
pub(crate) fn sync() {
    gpu_asm!("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;");
}

/// The address of what cube `rank` of the cluster has where this one has `at`; what lies further, lies
/// as much further there.
#[cube]
pub(crate) fn address_in(at: u32, rank: u32) -> u32 {
    let (at, rank) = (value::<u32>(at), value::<u32>(rank));
    let there: u32;
    gpu_asm!(
        "mapa.shared::cluster.u32 {there}, {at}, {rank};",
        there = out(_) there, at = in(_) at, rank = in(_) rank, options(pure, nomem)
    );
    there
}

/// Arrives once at the `mbarrier` at an [address in](address_in()) any cube of the cluster.
///
/// For units that only read: a release of the unit's writes to the cluster would wait for all of its
/// memory accesses.
#[cube]
pub(crate) fn arrive(there: u32) {
    let there = value::<u32>(there);
    gpu_asm!(
        "mbarrier.arrive.shared::cluster.b64 _, [{there}];",
        there = in(_) there
    );
}
