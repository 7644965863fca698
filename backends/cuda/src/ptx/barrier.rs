//! Barriers: `mbarrier` objects in shared memory, and named barriers of warpgroups.

use cubecl::prelude::*;

use super::value;

/// Initialises the `mbarrier` at shared address `at` for `arrivals` arrivals a phase.
#[cube]
pub(crate) fn init(at: u32, arrivals: u32) {
    let (at, arrivals) = (value::<u32>(at), value::<u32>(arrivals));
    gpu_asm!("mbarrier.init.shared::cta.b64 [{at}], {arrivals};", at = in(_) at, arrivals = in(_) arrivals);
}

/// Makes initialised barriers visible to the asynchronous copies of this cube.
#[cube]
pub(crate) fn fence_init() {
    gpu_asm!("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;");
}

/// Arrives once.
#[cube]
pub(crate) fn arrive(at: u32) {
    let at = value::<u32>(at);
    gpu_asm!("mbarrier.arrive.shared::cta.b64 _, [{at}];", at = in(_) at);
}

/// Arrives once and adds `bytes` to what the phase waits for.
#[cube]
pub(crate) fn arrive_expect(at: u32, bytes: u32) {
    let (at, bytes) = (value::<u32>(at), value::<u32>(bytes));
    gpu_asm!(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{at}], {bytes};",
        at = in(_) at, bytes = in(_) bytes
    );
}

/// Waits until the phase of `parity` is complete.
#[cube]
pub(crate) fn wait(at: u32, parity: u32) {
    wait_asking(at, parity, "");
}

/// The same for who waits long and may find out late: asks every 10 microseconds.
#[cube]
pub(crate) fn wait_long(at: u32, parity: u32) {
    wait_asking(at, parity, ", 10000");
}

#[cube]
fn wait_asking(at: u32, parity: u32, #[comptime] after: &'static str) {
    let (at, parity) = (value::<u32>(at), value::<u32>(parity));
    gpu_asm!(
        "{{ .reg .pred done; \
         AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [{at}], {parity}{after}; \
         @done bra END; bra AGAIN; END: }}",
        at = in(_) at, parity = in(_) parity, after = const after
    );
}

/// Waits for all `units` units that use named barrier `id`.
#[cube]
pub(crate) fn sync_named(id: u32, #[comptime] units: u32) {
    let id = value::<u32>(id);
    gpu_asm!("bar.sync {id}, {units};", id = in(_) id, units = const units);
}
