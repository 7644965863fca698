//! What only NVIDIA has.

pub mod backward;
pub mod forward;
mod hopper;
pub mod linear;
pub mod low_bit;
mod ptx;
pub mod sla;
