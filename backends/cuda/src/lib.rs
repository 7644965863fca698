//! What only NVIDIA has.

pub mod backward;
pub mod forward;
mod hopper;
pub mod linear;
pub mod low_bit;
pub mod matmul;
mod ptx;
pub mod sla;
