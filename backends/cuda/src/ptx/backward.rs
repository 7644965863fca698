//! Products of the backward, on registers beside those of [`super::wgmma`].
//!
//! | name | holds | layout |
//! |---|---|---|
//! | `dpr<K/2>` | f32 gradients of probabilities `[64, K]` | as `sco` |
//! | `grd<Dv/4>` | gradients of the output `[64, Dv]`, 16 bits, A operand | as `qry` |
//! | `dsc<K/4>` | gradients of scores `[64, K]`, 16 bits, A operand | as `prb` |
//! | `dka<D/2>` | f32 accumulator `[64, D]` | as `acc` |

use cubecl::prelude::*;

use super::product::add_product;
use super::value;
use super::wgmma::{Products, clear, load_rows, product_with_keys, read_eight, write_four};

/// Declares `dpr` and `grd` or, for keys, `dsc` and `dka`. Once, at the top of a kernel.
#[cube]
pub(crate) fn declare(#[comptime] products: Products, #[comptime] keys: bool) {
    let text = comptime!({
        let p = products;
        if keys {
            let (packed, accumulator) = (p.keys / 4, p.head_dim / 2);
            format!(".reg .b32 dsc<{packed}>; .reg .f32 dka<{accumulator}>;")
        } else {
            let (gradients, packed) = (p.keys / 2, p.value_dim / 4);
            format!(".reg .f32 dpr<{gradients}>; .reg .b32 grd<{packed}>;")
        }
    });
    gpu_asm!("{text}");
}

/// Begins `dpr = dO V^T` with `dO` the registers `grd` and `V` the tile that `values` describes.
#[cube]
pub(crate) fn probability_gradients(values: u64, #[comptime] products: Products) {
    let values = value::<u64>(values);
    let text = comptime!({
        let p = products;
        product_with_keys(p, "dpr", p.value_dim).of_registers("grd")
    });
    gpu_asm!("/* {values} */ {text}", values = in(_) values);
}

/// Begins `sco = K Q^T` with a shared tile of 64 keys and one of queries in boxes of `rows` rows.
#[cube]
pub(crate) fn key_scores(
    keys: u64,
    queries: u64,
    #[comptime] rows: usize,
    #[comptime] products: Products,
) {
    let (keys, queries) = (value::<u64>(keys), value::<u64>(queries));
    let text = comptime!(product_with_keys(products, "sco", products.head_dim).of_tiles(rows));
    gpu_asm!("/* {keys} {queries} */ {text}", keys = in(_) keys, queries = in(_) queries);
}

/// Begins `sco = V dO^T` with a shared tile of 64 values and one of output gradients in boxes of
/// `rows` rows.
#[cube]
pub(crate) fn key_probability_gradients(
    values: u64,
    grads: u64,
    #[comptime] rows: usize,
    #[comptime] products: Products,
) {
    let (values, grads) = (value::<u64>(values), value::<u64>(grads));
    let text = comptime!(product_with_keys(products, "sco", products.value_dim).of_tiles(rows));
    gpu_asm!("/* {values} {grads} */ {text}", values = in(_) values, grads = in(_) grads);
}

/// Begins `dka += dS Q` with `dS` the registers `dsc` and `Q` the tile that `queries` describes,
/// transposed.
#[cube]
pub(crate) fn accumulate_key_gradient(queries: u64, #[comptime] products: Products) {
    let p = products;
    add_product(
        queries,
        false,
        "dka",
        "dsc",
        p.head_dim,
        p.keys,
        comptime!(p.format()),
    );
}

/// Sets `dka` to zero.
#[cube]
pub(crate) fn clear_key_gradient(#[comptime] products: Products) {
    clear("dka", comptime!(products.head_dim / 2));
}

/// Eight neighbouring registers of `dka`.
#[cube]
pub(crate) fn read_key_gradient(#[comptime] group: usize) -> Vector<f32, Const<8>> {
    read_eight("dka", group)
}

/// Eight neighbouring registers of `dpr`, of a finished product.
#[cube]
pub(crate) fn read_gradient_step(#[comptime] group: usize) -> Vector<f32, Const<8>> {
    read_eight("dpr", group)
}

/// Replaces four registers of `dsc`; no product may be reading them.
#[cube]
pub(crate) fn write_score_gradient_step(packed: Vector<u32, Const<4>>, #[comptime] group: usize) {
    write_four("dsc", packed, group);
}

/// Loads the registers `grd` as [`super::wgmma::load_queries`] loads `qry`.
#[cube]
pub(crate) fn load_gradients(at: u32, #[comptime] rows: usize, #[comptime] products: Products) {
    load_rows("grd", at, rows, products.value_dim);
}
