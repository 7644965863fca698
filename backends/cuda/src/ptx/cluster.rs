//! Clusters: neighbouring cubes that reach each other's shared memory.

use cubecl::prelude::*;

use super::value;

/// Waits for all units of the cluster, whose writes are then visible.
#[cube]
pub(crate) fn sync() {
    gpu_asm!("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;");
}

/// Arrives once at the `mbarrier` that cube `rank` of the cluster has where this one has `at`.
#[cube]
pub(crate) fn arrive(at: u32, rank: u32) {
    let (at, rank) = (value::<u32>(at), value::<u32>(rank));
    gpu_asm!(
        "{{ .reg .b32 there; mapa.shared::cluster.u32 there, {at}, {rank}; \
         mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }}",
        at = in(_) at, rank = in(_) rank
    );
}
