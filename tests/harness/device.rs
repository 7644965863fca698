//! The device under test.

use std::sync::Once;

use cubesla::{Client, DType};

/// A client of the device under test.
///
/// # Panics
/// If there is no such device: a test suite that runs nothing must not pass.
pub fn client() -> Client {
    static HOOK: Once = Once::new();
    HOOK.call_once(exit_when_a_device_thread_panics);
    cubesla::device::from_env()
        .unwrap_or_else(|error| panic!("the tests need a device: {error}"))
        .client()
}

/// CubeCL runs each device on a thread of its own. If that thread panics, reads return old bytes and
/// tests may pass on them, so the whole run ends instead.
fn exit_when_a_device_thread_panics() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        let thread = std::thread::current();
        if thread.name().is_some_and(|name| name.starts_with("DSD-")) {
            eprintln!("a device thread panicked: results after this mean nothing");
            std::process::exit(101);
        }
    }));
}

/// The types that the device has.
pub fn dtypes(client: &Client) -> Vec<DType> {
    DType::ALL
        .into_iter()
        .filter(|dtype| dtype.is_supported(client.properties()))
        .collect()
}
