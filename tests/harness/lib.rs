//! What the cross-backend tests share: a device, inputs that both sides see alike, and bounds.
//!
//! The device is the one that `CUBESLA_DEVICE` names, or the best of the machine. Inputs are rounded
//! to the type under test before the reference sees them, outputs are poisoned with NaN and padded
//! with guards before a launch.

pub mod backward;
pub mod case;
pub mod device;
pub mod golden;
pub mod low_bit;
pub mod plain;
pub mod quantize;
pub mod select;
pub mod sla;
pub mod sla_backward;
pub mod soft;
pub mod values;

pub use case::{AttentionCase, Lists};
pub use device::{client, dtypes};
pub use sla::SlaCase;
pub use values::{Rng, rounded};
