//! Hopper's instructions as CubeCL functions, each a line or two of PTX with its layout.
//!
//! Accumulators and operands of `wgmma` live in *named PTX registers*, declared once at the top of a
//! kernel and known to no one but these functions. CubeCL's own variables would be copied in and out
//! of every inline-PTX statement, and the compiler may move such copies into the time that an
//! asynchronous `wgmma` is still writing them. Named registers never move, so groups of products can
//! stay in flight across CubeCL statements.

pub(crate) mod backward;
pub(crate) mod barrier;
pub(crate) mod cluster;
pub(crate) mod linear;
pub(crate) mod low_bit;
pub(crate) mod math;
pub(crate) mod matmul;
mod product;
pub(crate) mod tma;
pub(crate) mod wgmma;

pub(crate) use cubesla_kernels::asm::value;
