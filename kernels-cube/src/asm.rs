//! What inline assembly needs.

use cubecl::prelude::*;

/// The value of a variable, which inline assembly would otherwise receive as a pointer.
#[cube]
#[allow(
    unused_variables,
    reason = "`intrinsic!` uses them in the expanded kernel alone"
)]
pub fn value<T: CubePrimitive>(x: T) -> T {
    intrinsic!(|scope| x.read_value(scope).into())
}
