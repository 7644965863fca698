//! Warpgroup matrix products (`wgmma`) on named registers.
//!
//! A warpgroup of 128 units multiplies 64 rows. Its registers, by name:
//!
//! | name | holds | layout in unit `l` of warp `w` |
//! |---|---|---|
//! | `acc<N/2>` | f32 accumulator `[64, N]` | register `i`: row `16w + l/4 + 8((i/2)%2)`, column `8(i/4) + 2(l%4) + i%2` |
//! | `sco<K/2>` | f32 scores `[64, K]` | the same |
//! | `nxt<K/2>` | f32 scores of the tile after it | the same |
//! | `prb<K/4>` | probabilities `[64, K]`, 16 bits, A operand | scores' registers `2i` and `2i+1` are the halves of register `i` |
//! | `prn<K/4>` | those of the tile after it | the same |
//! | `qry<D/4>` | queries `[64, D]`, 16 bits, A operand | as `prb` |
//!
//! B operands are shared tiles with the 128-byte swizzle, in boxes of 64 columns.

use cubecl::prelude::*;

use super::product::{Elements, First, Product, add_product, list};
use super::value;

/// Sizes of the products of one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Products {
    /// Width of queries and keys, padded to a multiple of 16.
    pub head_dim: usize,
    /// Width of values, padded to a multiple of 16.
    pub value_dim: usize,
    /// Keys of a tile.
    pub keys: usize,
    /// Whether elements are bf16 rather than f16.
    pub bf16: bool,
}

impl Products {
    /// The element type's name in PTX.
    pub fn format(&self) -> &'static str {
        if self.bf16 { "bf16" } else { "f16" }
    }
}

/// Declares the named registers. Once, at the top of a kernel.
#[cube]
pub(crate) fn declare_registers(#[comptime] products: Products) {
    let text = comptime!(declare_text(products));
    gpu_asm!("{text}");
}

fn declare_text(p: Products) -> String {
    format!(
        ".reg .f32 acc<{}>; .reg .f32 sco<{}>; .reg .f32 nxt<{}>; .reg .b32 prb<{}>; \
         .reg .b32 prn<{}>; .reg .b32 qry<{}>;",
        p.value_dim / 2,
        p.keys / 2,
        p.keys / 2,
        p.keys / 4,
        p.keys / 4,
        p.head_dim / 4,
    )
}

/// A descriptor of a shared tile in boxes of 64 columns, whose rows are the contracted dimension's
/// other side (K-major): 8 rows of 128 bytes lie 1024 bytes from the next 8. Addresses count 16 bytes, and
/// have the 14 bits that shared memory needs.
#[cube]
pub(crate) fn descriptor(at: u32) -> u64 {
    u64::cast_from(at >> 4) | comptime!(DESCRIPTION)
}

/// What a [`descriptor`] says beside the address.
pub(crate) const DESCRIPTION: u64 = (1 << 62) | (64 << 32) | (1 << 16);

/// A descriptor of a shared tile in boxes of 64 columns, whose rows are contracted over (MN-major):
/// as [`descriptor`], and the next 64 columns lie one box of `rows` rows further.
#[cube]
pub(crate) fn descriptor_transposed(at: u32, #[comptime] rows: usize) -> u64 {
    u64::cast_from(at >> 4) | comptime!(description_transposed(rows))
}

/// What a [`descriptor_transposed`] says beside the address.
pub(crate) fn description_transposed(rows: usize) -> u64 {
    (1 << 62) | (64 << 32) | ((rows as u64 * 8) << 16)
}

/// The descriptors of a ring of tiles, each in one instruction.
#[derive(CubeType)]
pub(crate) struct Descriptors {
    /// Lower half of the first tile's.
    low: u32,
    #[cube(comptime)]
    high: u32,
    /// From one to the next, in bytes.
    #[cube(comptime)]
    step: usize,
}

#[cube]
impl Descriptors {
    /// Of tiles of `bytes`, the first one `at`, that are as `description` says.
    pub fn new(at: u32, #[comptime] description: u64, #[comptime] bytes: usize) -> Descriptors {
        Descriptors {
            low: (at >> 4) | comptime!(description as u32),
            high: comptime!((description >> 32) as u32),
            step: bytes,
        }
    }

    /// That of tile `index`.
    pub fn at(&self, index: u32) -> u64 {
        let low = value::<u32>(self.low + index * comptime!((self.step / 16) as u32));
        let high = comptime!(self.high);
        let descriptor: u64;
        gpu_asm!(
            "mov.b64 {descriptor}, {{{low}, {high}}};",
            descriptor = out(_) descriptor, low = in(_) low, high = const high,
            options(pure, nomem)
        );
        descriptor
    }
}

/// Orders the registers before the products that follow.
#[cube]
pub(crate) fn fence() {
    gpu_asm!("wgmma.fence.sync.aligned;");
}

/// Closes a group of products.
#[cube]
pub(crate) fn commit() {
    gpu_asm!("wgmma.commit_group.sync.aligned;");
}

/// Waits until at most `pending` groups are unfinished.
#[cube]
pub(crate) fn wait(#[comptime] pending: u32) {
    gpu_asm!("wgmma.wait_group.sync.aligned {pending};", pending = const pending);
}

/// The registers of a buffer of scores: `sco` or `nxt`.
pub(super) fn score_buffer(buffer: usize) -> &'static str {
    ["sco", "nxt"][buffer]
}

/// The registers of a buffer of probabilities: `prb` or `prn`.
pub(super) fn probability_buffer(buffer: usize) -> &'static str {
    ["prb", "prn"][buffer]
}

/// Begins `S = Q K^T`, with `Q` the registers `qry` and `K` the tile that `keys` describes, into
/// buffer 0 or 1: `sco` or `nxt`.
#[cube]
pub(crate) fn scores(keys: u64, #[comptime] buffer: usize, #[comptime] products: Products) {
    let keys = value::<u64>(keys);
    let text = comptime!(
        product_with_keys(products, score_buffer(buffer), products.head_dim).of_registers("qry")
    );
    gpu_asm!("/* {keys} */ {text}", keys = in(_) keys);
}

/// The same for queries in shared memory: a tile of 64 rows in one box of 64 columns.
#[cube]
pub(crate) fn scores_of_shared(queries: u64, keys: u64, #[comptime] products: Products) {
    let (queries, keys) = (value::<u64>(queries), value::<u64>(keys));
    let text =
        comptime!(product_with_keys(products, "sco", products.head_dim).of_tiles(products.keys));
    gpu_asm!("/* {queries} {keys} */ {text}", queries = in(_) queries, keys = in(_) keys);
}

/// A product over `depth` columns whose B operand's rows are those of keys.
pub(super) fn product_with_keys(p: Products, to: &str, depth: usize) -> Product<'_> {
    Product {
        to,
        columns: p.keys,
        steps: depth / 16,
        elements: Elements::Half(p.format()),
        first: First::Replaces,
    }
}

/// Begins `acc += P V` with `P` the registers of a buffer of probabilities and `V` the tile that `values`
/// describes; `acc = P V` with `anew`.
#[cube]
pub(crate) fn accumulate(
    values: u64,
    anew: bool,
    #[comptime] buffer: usize,
    #[comptime] products: Products,
) {
    let p = products;
    add_product(
        values,
        anew,
        "acc",
        comptime!(probability_buffer(buffer)),
        p.value_dim,
        p.keys,
        comptime!(p.format()),
    );
}

/// Gives registers of this warpgroup back, down to `count` a unit.
#[cube]
pub(crate) fn shrink_registers(#[comptime] count: u32) {
    gpu_asm!("setmaxnreg.dec.sync.aligned.u32 {count};", count = const count);
}

/// Takes registers that other warpgroups gave back, up to `count` a unit.
#[cube]
pub(crate) fn grow_registers(#[comptime] count: u32) {
    gpu_asm!("setmaxnreg.inc.sync.aligned.u32 {count};", count = const count);
}

/// Has ptxas believe in [`grow_registers`] in a kernel whose products are all narrower than 128 columns:
/// a product of 128 that is never begun.
///
/// It ignores `setmaxnreg` where it is not certain of the registers at entry (C7508), as where two cubes
/// might share a multiprocessor, and it is if a product's registers leave room for one only.
#[cube]
pub(crate) fn claim_registers() {
    let never = value::<u32>(u32::cast_from(UNIT_POS_Y));
    let text = comptime!({
        let zeros = moves(64, |i| format!("mov.f32 wide{i}, 0f00000000; "));
        let stores = moves(64, |i| format!("st.volatile.shared.f32 [%0], wide{i}; "));
        let wide = list("wide", 0..64);
        format!(
            "{{ .reg .f32 wide<64>; .reg .pred never; .reg .u64 at; setp.eq.u32 never, %0, 0; \
             @never bra SKIP; {zeros} cvt.u64.u32 at, %0; wgmma.fence.sync.aligned; \
             wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {wide}, at, at, 1, 1, 1, 0, 0; \
             wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; {stores} SKIP: }}"
        )
    });
    gpu_asm!("/* {never} */ {text}", never = in(_) never);
}

/// Eight neighbouring registers of a buffer of scores, of a finished product: keys
/// `16 group..16 group + 16`.
#[cube]
pub(crate) fn read_score_step(
    #[comptime] buffer: usize,
    #[comptime] group: usize,
) -> Vector<f32, Const<8>> {
    read_eight(comptime!(score_buffer(buffer)), group)
}

/// Lets nothing that `bits` depends on be computed later than here. The sign bit of `bits` is 0, as
/// weights are never negative.
///
/// An instruction under a condition that never holds: without it ptxas moves the arithmetic of a tile
/// behind the wait that it is meant to overlap with. It is one that ends nothing, as with a `trap`
/// ptxas does not believe in registers beyond an even share; and a condition on bits, as ptxas knows
/// itself that sums of exponentials are not negative.
#[cube]
pub(crate) fn compute_before(bits: u32) {
    let bits = value::<u32>(bits);
    gpu_asm!(
        "{{ .reg .pred p; setp.eq.u32 p, {bits}, 0xFFFFFFFF; @p nanosleep.u32 1; }}",
        bits = in(_) bits
    );
}

/// Replaces four registers of a buffer of probabilities, of keys `16 group..16 group + 16`; no product
/// may be reading them.
#[cube]
pub(crate) fn write_probability_step(
    packed: Vector<u32, Const<4>>,
    #[comptime] buffer: usize,
    #[comptime] group: usize,
) {
    write_four(comptime!(probability_buffer(buffer)), packed, group);
}

/// Multiplies `acc` by `upper` in the unit's upper row and by `lower` in its lower row.
#[cube]
pub(crate) fn scale_accumulator(upper: f32, lower: f32, #[comptime] products: Products) {
    let (upper, lower) = (value::<f32>(upper), value::<f32>(lower));
    let text = comptime!(moves(products.value_dim / 2, |i| {
        format!("mul.f32 acc{i}, acc{i}, %{}; ", i / 2 % 2)
    }));
    gpu_asm!("/* {upper} {lower} */ {text}", upper = in(_) upper, lower = in(_) lower);
}

/// Sets `acc` to zero.
#[cube]
pub(crate) fn clear_accumulator(#[comptime] products: Products) {
    clear("acc", comptime!(products.value_dim / 2));
}

/// Eight neighbouring registers of `acc`: columns `16 group..16 group + 16` of the unit's two rows.
#[cube]
pub(crate) fn read_accumulator(#[comptime] group: usize) -> Vector<f32, Const<8>> {
    read_eight("acc", group)
}

/// Replaces eight neighbouring registers of `acc`, as [`read_accumulator`] reads them.
#[cube]
pub(crate) fn write_accumulator(values: Vector<f32, Const<8>>, #[comptime] group: usize) {
    let values = value::<Vector<f32, Const<8>>>(values);
    let text = comptime!(moves(8, |i| format!(
        "mov.f32 acc{}, %{i}; ",
        8 * group + i
    )));
    gpu_asm!("/* {values} */ {text}", values = in(_) values);
}

/// Loads the registers `qry` from a tile of queries with the 128-byte swizzle: `at` is the tile's
/// first row of the warp's 16, in boxes of `rows` rows.
#[cube]
pub(crate) fn load_queries(at: u32, #[comptime] rows: usize, #[comptime] products: Products) {
    load_rows("qry", at, rows, products.head_dim);
}

/// Loads the A operand `name`, `width` columns, as [`load_queries`] does.
#[cube]
pub(super) fn load_rows(
    #[comptime] name: &'static str,
    at: u32,
    #[comptime] rows: usize,
    #[comptime] width: usize,
) {
    // Four 8x8 matrices: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
    let lane = UNIT_POS % 32;
    let row = lane % 16;
    let base = at + row * 128;
    // Chunks are counted from here on, each time: addresses of all would be kept in registers.
    let first = here((lane / 16) ^ (row % 8));
    #[unroll]
    for step in 0..comptime!(width / 16) {
        let chunk = first ^ comptime!((step % 4 * 2) as u32);
        let from = base + comptime!((step / 4 * rows * 128) as u32) + chunk * 16;
        load_step(name, from, step);
    }
}

/// `x`, of which the compiler knows nothing before here, so that it computes nothing from it earlier.
#[cube]
pub(crate) fn here(x: u32) -> u32 {
    let x = value::<u32>(x);
    let y: u32;
    gpu_asm!("mov.u32 {y}, {x};", y = out(_) y, x = in(_) x);
    y
}

#[cube]
fn load_step(#[comptime] name: &'static str, from: u32, #[comptime] step: usize) {
    let from = value::<u32>(from);
    let registers = comptime!(list(name, 4 * step..4 * step + 4));
    gpu_asm!(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {registers}, [{from}];",
        from = in(_) from
    );
}

/// Eight neighbouring f32 registers `name`.
#[cube]
pub(super) fn read_eight(
    #[comptime] name: &'static str,
    #[comptime] group: usize,
) -> Vector<f32, Const<8>> {
    let text = comptime!(moves(8, |i| format!(
        "mov.b32 %{i}, {name}{}; ",
        8 * group + i
    )));
    let values: Vector<f32, Const<8>>;
    gpu_asm!("/* {values} */ {text}", values = out(_) values);
    values
}

/// Four neighbouring packed registers `name`.
#[cube]
pub(super) fn read_four(
    #[comptime] name: &'static str,
    #[comptime] group: usize,
) -> Vector<u32, Const<4>> {
    let text = comptime!(moves(4, |i| format!(
        "mov.b32 %{i}, {name}{}; ",
        4 * group + i
    )));
    let words: Vector<u32, Const<4>>;
    gpu_asm!("/* {words} */ {text}", words = out(_) words);
    words
}

/// Replaces four neighbouring packed registers `name`.
#[cube]
pub(super) fn write_four(
    #[comptime] name: &'static str,
    words: Vector<u32, Const<4>>,
    #[comptime] group: usize,
) {
    let words = value::<Vector<u32, Const<4>>>(words);
    let text = comptime!(moves(4, |i| format!(
        "mov.b32 {name}{}, %{i}; ",
        4 * group + i
    )));
    gpu_asm!("/* {words} */ {text}", words = in(_) words);
}

/// Sets the first `count` f32 registers `name` to zero.
#[cube]
pub(super) fn clear(#[comptime] name: &'static str, #[comptime] count: usize) {
    let text = comptime!(moves(count, |i| format!("mov.f32 {name}{i}, 0f00000000; ")));
    gpu_asm!("{text}");
}

pub(super) fn moves(count: usize, line: impl Fn(usize) -> String) -> String {
    (0..count).map(line).collect()
}
