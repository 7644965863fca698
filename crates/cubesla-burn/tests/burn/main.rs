//! The operations and modules on a device of CubeCL's, against the formulas in Burn's operations and
//! their gradients by Burn's autodiff.
//!
//! `cargo test -p cubesla-burn`, and again with `--features fusion`; `CUBESLA_DEVICE` chooses the
//! device.

mod attention;
mod checkpoint;
mod common;
mod errors;
mod formula;
mod linear;
mod modules;
mod pytorch_file;
mod quantized;
mod quantized_modules;
mod records;
mod router;
mod select;
mod sla;
mod soft;
mod stages;
mod training;
