//! Products of the linear branch, on the registers of [`super::wgmma`] after an item's keys are done.
//!
//! Scores are no longer needed then, so `phi(Q) H` comes into `sco`, a pass of columns at a time. `lin<Dv/4>`
//! holds the linear branch `[64, Dv]`, 16 bits, as an A operand.

use cubecl::prelude::*;

use super::product::{Elements, First, Product, add_product, in_columns, list};
use super::value;
use super::wgmma::{Products, clear, moves, read_four, write_four};

/// Declares `lin`. Once, at the top of a kernel that projects or stores the linear branch from them.
#[cube]
pub(crate) fn declare_linear(#[comptime] products: Products) {
    let count = comptime!(products.value_dim / 4);
    gpu_asm!(".reg .b32 lin<{count}>;", count = const count);
}

/// Declares `sum<4>`, the products of [`add_state`] with ones: every column of a row is the same.
#[cube]
pub(crate) fn declare_sums() {
    gpu_asm!(".reg .f32 sum<4>;");
}

/// Sets `sum` to zero.
#[cube]
pub(crate) fn clear_sums() {
    clear("sum", 4usize);
}

/// `sum` of the unit's upper and lower row, of a finished product.
#[cube]
pub(crate) fn read_sums() -> Vector<f32, Const<2>> {
    let sums: Vector<f32, Const<2>>;
    gpu_asm!("/* {sums} */ mov.f32 %0, sum0; mov.f32 %1, sum2;", sums = out(_) sums);
    sums
}

/// Begins `acc += K^T V` and `sum += K^T 1` with 64 columns of `phi(K)` and the tile of values that
/// the transposed descriptors are of, and a kilobyte of ones.
#[cube]
pub(crate) fn add_state(keys: u64, values: u64, ones: u64, #[comptime] products: Products) {
    let (keys, values, ones) = (value::<u64>(keys), value::<u64>(values), value::<u64>(ones));
    let text = comptime!(add_state_text(products));
    gpu_asm!(
        "/* {keys} {values} {ones} */ {text}",
        keys = in(_) keys, values = in(_) values, ones = in(_) ones
    );
}

fn add_state_text(p: Products) -> String {
    let format = p.format();
    let mut text = String::from("{ .reg .pred more; setp.ne.b32 more, 1, 0; .reg .u64 a, b; ");
    for step in 0..p.keys / 16 {
        let rows = in_columns(step);
        text += &format!(
            "add.u64 a, %0, {rows}; add.u64 b, %1, {rows}; \
             wgmma.mma_async.sync.aligned.m64n{}k16.f32.{format}.{format} {}, a, b, more, 1, 1, 1, 1; \
             wgmma.mma_async.sync.aligned.m64n8k16.f32.{format}.{format} {}, a, %2, more, 1, 1, 1, 0; ",
            p.value_dim,
            list("acc", 0..p.value_dim / 2),
            list("sum", 0..4),
        );
    }
    text + "}"
}

/// Columns of a pass: as many as scores have, and the same in each, for ptxas gives the passes the
/// same registers only then.
pub(crate) fn pass_columns(p: Products) -> usize {
    [64, 32]
        .into_iter()
        .find(|&columns| columns <= p.keys && p.value_dim.is_multiple_of(columns))
        .unwrap_or(16)
}

/// Passes over the columns of a state.
pub(crate) fn passes(p: Products) -> usize {
    p.value_dim / pass_columns(p)
}

/// Begins `sco = A H` for the columns of `pass`, with `A` the registers `qry` and `H` the tile of
/// D rows at shared address `state`.
#[cube]
pub(crate) fn state_columns(state: u64, #[comptime] pass: usize, #[comptime] products: Products) {
    let state = value::<u64>(state);
    let text = comptime!(state_columns_text(products, pass));
    gpu_asm!("/* {state} */ {text}", state = in(_) state);
}

fn state_columns_text(p: Products, pass: usize) -> String {
    let columns = pass_columns(p);
    let first_column = pass * columns;
    let start = first_column / 64 * p.head_dim * 8 + first_column % 64 / 8;
    let product = Product {
        to: "sco",
        columns,
        steps: p.head_dim / 16,
        elements: Elements::Half(p.format()),
        first: First::Replaces,
    };
    product.of_registers_and_columns("qry", start)
}

/// Begins `acc += O^l W` with `O^l` the registers `lin` and `W` the tile of Dv rows that `weights`
/// describes.
#[cube]
pub(crate) fn project(weights: u64, #[comptime] products: Products) {
    let p = products;
    add_product(
        weights,
        false,
        "acc",
        "lin",
        p.value_dim,
        p.value_dim,
        comptime!(p.format()),
    );
}

/// Four registers of `qry`: columns `16 step..16 step + 16` of the unit's two rows.
#[cube]
pub(crate) fn read_query_step(#[comptime] step: usize) -> Vector<u32, Const<4>> {
    read_four("qry", step)
}

/// Replaces four registers of `qry`.
#[cube]
pub(crate) fn write_query_step(words: Vector<u32, Const<4>>, #[comptime] step: usize) {
    write_four("qry", words, step);
}

/// Four registers of `lin`.
#[cube]
pub(crate) fn read_linear_step(#[comptime] step: usize) -> Vector<u32, Const<4>> {
    read_four("lin", step)
}

/// Replaces four registers of `lin`.
#[cube]
pub(crate) fn write_linear_step(words: Vector<u32, Const<4>>, #[comptime] step: usize) {
    write_four("lin", words, step);
}

/// Adds the columns of `pass` in `sco` to `acc`, multiplied by `upper` in the unit's upper row and by
/// `lower` in its lower row.
#[cube]
pub(crate) fn add_pass(
    upper: f32,
    lower: f32,
    #[comptime] pass: usize,
    #[comptime] products: Products,
) {
    let (upper, lower) = (value::<f32>(upper), value::<f32>(lower));
    let text = comptime!({
        let first = pass * pass_columns(products) / 2;
        moves(pass_columns(products) / 2, |i| {
            let at = first + i;
            format!("fma.rn.f32 acc{at}, sco{i}, %{}, acc{at}; ", i / 2 % 2)
        })
    });
    gpu_asm!("/* {upper} {lower} */ {text}", upper = in(_) upper, lower = in(_) lower);
}

/// Adds `values` to columns `16 group..16 group + 16` of `acc`: the unit's two neighbouring columns,
/// and those 8 further.
#[cube]
pub(crate) fn add_columns(values: Vector<f32, Const<4>>, #[comptime] group: usize) {
    let values = value::<Vector<f32, Const<4>>>(values);
    let text = comptime!(moves(8, |i| {
        let at = 8 * group + i;
        format!("add.f32 acc{at}, acc{at}, %{}; ", i % 2 + i / 4 * 2)
    }));
    gpu_asm!("/* {values} */ {text}", values = in(_) values);
}
