//! What only NVIDIA has.

pub mod backward;
pub mod forward;
mod hopper;
pub mod linear;
mod ptx;
pub mod sla;
