//! Products of 8-bit matrices (`wgmma`), both operands in shared memory with the 128-byte swizzle.
//!
//! A warpgroup multiplies 64 rows by 256 columns. Its registers, by name:
//!
//! | name | holds | layout |
//! |---|---|---|
//! | `prd<128>` | s32 sums `[64, 256]`, of sums under one pair of scales | as `acc` of [`super::wgmma`] |
//! | `prd<64>` | f32 or s32 sums `[64, 128]` of a step or two, otherwise | the same |
//! | `tot<128>` | f32 sums `[64, 256]` over steps | the same |

use cubecl::prelude::*;

use super::product::{Elements, First, Product};
use super::value;
use super::wgmma::{clear, moves};

/// Contracted elements of a step, a byte each: the width of the swizzle.
pub(crate) const DEPTH: usize = 128;

/// What is multiplied and how it is summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sums {
    /// FP8 e4m3 rather than INT8.
    pub fp8: bool,
    /// Whether scales change from step to step.
    pub scaled_steps: bool,
}

impl Sums {
    /// Whether sums of one or two steps are added to totals in f32. FP8's are, for tensor cores keep
    /// about 14 bits of them.
    pub fn has_totals(self) -> bool {
        self.fp8 || self.scaled_steps
    }

    /// Columns of a product.
    pub fn columns(self) -> usize {
        if self.has_totals() { 128 } else { 256 }
    }
}

/// Declares the named registers. Once, at the top of a kernel.
#[cube]
pub(crate) fn declare(#[comptime] sums: Sums) {
    let text = comptime!({
        let element = if sums.fp8 { "f32" } else { "s32" };
        let totals = if sums.has_totals() {
            ".reg .f32 tot<128>;"
        } else {
            ""
        };
        format!(".reg .{element} prd<{}>; {totals}", sums.columns() / 2)
    });
    gpu_asm!("{text}");
}

/// Begins `prd = X W^T`, or `prd += X W^T` if `add` is not 0, over a step, with tiles that the
/// descriptors are of.
#[cube]
pub(crate) fn multiply(x: u64, w: u64, add: u32, #[comptime] sums: Sums) {
    let (x, w, add) = (value::<u64>(x), value::<u64>(w), value::<u32>(add));
    let text = comptime!(multiply_text(sums));
    gpu_asm!("/* {x} {w} {add} */ {text}", x = in(_) x, w = in(_) w, add = in(_) add);
}

fn multiply_text(sums: Sums) -> String {
    let product = Product {
        to: "prd",
        columns: sums.columns(),
        steps: DEPTH / 32,
        elements: if sums.fp8 {
            Elements::Fp8
        } else {
            Elements::Int8
        },
        first: First::AddsIf("ne.u32", "%2"),
    };
    product.of_tiles(sums.columns())
}

/// Sets `tot` to zero.
#[cube]
pub(crate) fn clear_totals() {
    clear("tot", 128usize);
}

/// Adds a finished product to columns `128 half..128 half + 128` of `tot`.
#[cube]
pub(crate) fn add_to_totals(#[comptime] half: usize) {
    let text = comptime!(moves(64, |i| {
        let at = 64 * half + i;
        format!("add.f32 tot{at}, tot{at}, prd{i}; ")
    }));
    gpu_asm!("{text}");
}

/// The same, with the product multiplied by `upper` in the unit's upper row and by `lower` in its lower
/// row.
#[cube]
pub(crate) fn scale_to_totals(
    upper: f32,
    lower: f32,
    #[comptime] half: usize,
    #[comptime] sums: Sums,
) {
    let (upper, lower) = (value::<f32>(upper), value::<f32>(lower));
    let text = comptime!({
        let lines = moves(64, |i| {
            let (at, row) = (64 * half + i, i / 2 % 2);
            if sums.fp8 {
                format!("fma.rn.f32 tot{at}, prd{i}, %{row}, tot{at}; ")
            } else {
                format!("cvt.rn.f32.s32 x, prd{i}; fma.rn.f32 tot{at}, x, %{row}, tot{at}; ")
            }
        });
        format!("{{ .reg .f32 x; {lines} }}")
    });
    gpu_asm!("/* {upper} {lower} */ {text}", upper = in(_) upper, lower = in(_) lower);
}

/// Eight neighbouring registers of the finished sums, as f32: columns `16 group..16 group + 16` of the
/// unit's two rows.
#[cube]
pub(crate) fn read_sums(#[comptime] group: usize, #[comptime] sums: Sums) -> Vector<f32, Const<8>> {
    let text = comptime!(moves(8, |i| {
        let at = 8 * group + i;
        if sums.has_totals() {
            format!("mov.f32 %{i}, tot{at}; ")
        } else {
            format!("cvt.rn.f32.s32 %{i}, prd{at}; ")
        }
    }));
    let values: Vector<f32, Const<8>>;
    gpu_asm!("/* {values} */ {text}", values = out(_) values);
    values
}
