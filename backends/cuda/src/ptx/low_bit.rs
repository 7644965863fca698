//! `wgmma` on 8-bit operands, and conversions to 8 bits.
//!
//! Registers as in [`super::wgmma`], and:
//!
//! | name | holds | layout in unit `l` of warp `w` |
//! |---|---|---|
//! | `qry<D/8>` | queries `[64, D]`, 8 bits, A operand | as `prb` of FP8 weights |
//! | `sco<K/2>` | s32 or f32 scores `[64, K]` | as `acc` |
//! | `nxt<K/2>` | scores of the tile after it | the same |
//! | `par<N/2>` | f32 product of one tile `[64, N]` | as `acc` |
//! | `prb<K/8>` | weights `[64, K]`, FP8, A operand | register `i`: row `16w + l/4 + 8(i%2)`, columns `32(i/4) + 16(i/2%2) + 4(l%4)` and three more; as in [`super::wgmma`] for 16-bit weights |
//! | `prn<K/8>` | those of the tile after it | the same |
//!
//! Both operands of an 8-bit product are K-major: values come transposed, `[N, K]`. Within 32 keys
//! they lie in the order in which a unit's scores fill its registers `prb`: see [`key_of_slot`].

use cubecl::prelude::*;

use super::math::store_chunk;
use super::product::{Elements, First, Product, add_product, list};
use super::value;
use super::wgmma::{clear, moves, probability_buffer, score_buffer, write_four};

/// Sizes of the products of one kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LowBitProducts {
    /// Width of queries and keys, padded to a multiple of 32.
    pub head_dim: usize,
    /// Width of values, padded to a multiple of 16.
    pub value_dim: usize,
    /// Keys of a tile, a multiple of 32 if values are FP8.
    pub keys: usize,
    /// Whether queries and keys are INT8 rather than FP8.
    pub int8: bool,
    /// 16-bit weights and values, `bf16` or `f16`; FP8 if there is no such format.
    pub format: Option<&'static str>,
}

/// The key, of 32, whose values lie in `slot`: four slots are the two and two scores that a unit holds
/// of 16 keys.
#[cfg(test)]
fn key_of_slot(slot: usize) -> usize {
    let (half, quarter, element) = (slot / 16, slot % 16 / 4, slot % 4);
    16 * half + 2 * quarter + 8 * (element / 2) + element % 2
}

/// Declares the named registers. Once, at the top of a kernel.
#[cube]
pub(crate) fn declare_registers(#[comptime] products: LowBitProducts) {
    let text = comptime!(declare_text(products));
    gpu_asm!("{text}");
}

fn declare_text(p: LowBitProducts) -> String {
    let scores = if p.int8 { "s32" } else { "f32" };
    let (weights, parts) = match p.format {
        Some(_) => (p.keys / 4, 1),
        None => (p.keys / 8, p.value_dim / 2),
    };
    format!(
        ".reg .b32 qry<{}>; .reg .f32 acc<{}>; .reg .f32 par<{parts}>; .reg .{scores} sco<{}>; \
         .reg .{scores} nxt<{}>; .reg .b32 prb<{weights}>; .reg .b32 prn<{weights}>;",
        p.head_dim / 8,
        p.value_dim / 2,
        p.keys / 2,
        p.keys / 2,
    )
}

/// What a descriptor of a shared tile of FP8 values `[N, keys]` says, K-major, whose rows of `keys` bytes
/// have the swizzle of that width.
pub(crate) fn description_of_values(keys: usize) -> u64 {
    // Eight rows lie next to eight rows; offsets count 16 bytes.
    let swizzle: u64 = if keys == 64 { 2 } else { 3 };
    (swizzle << 62) | ((keys as u64 / 2) << 32) | (1 << 16)
}

/// The larger magnitudes of 16-bit numbers, by halves, of `largest`, which are magnitudes, and of `word`: as
/// bits, so that NaN is larger than all others.
#[cube]
pub(crate) fn max_halves(largest: u32, word: u32) -> u32 {
    let (largest, word) = (value::<u32>(largest), value::<u32>(word));
    let y: u32;
    gpu_asm!(
        "{{ .reg .b32 size; and.b32 size, {word}, 0x7FFF7FFF; max.u16x2 {y}, {largest}, size; }}",
        y = out(_) y, largest = in(_) largest, word = in(_) word,
        options(pure, nomem)
    );
    y
}

/// The magnitudes of the halves of `word`, with 0 for those that are `infinity`.
#[cube]
pub(crate) fn without_halves(word: u32, infinity: u32) -> u32 {
    let low = word & 0x7FFF;
    let high = word >> 16 & 0x7FFF;
    select(low == infinity, 0, low) | select(high == infinity, 0, high) << 16
}

/// Sets the registers of queries that hold 32 columns.
#[cube]
pub(crate) fn write_queries(words: Vector<u32, Const<4>>, #[comptime] group: usize) {
    write_four("qry", words, group);
}

/// Begins `S = Q K^T` with the tile that `keys` describes, into buffer 0 or 1: `sco` or `nxt`.
#[cube]
pub(crate) fn scores(keys: u64, #[comptime] buffer: usize, #[comptime] p: LowBitProducts) {
    let keys = value::<u64>(keys);
    let text = comptime!(scores_text(p, score_buffer(buffer)));
    gpu_asm!("/* {keys} */ {text}", keys = in(_) keys);
}

fn scores_text(p: LowBitProducts, to: &str) -> String {
    let (elements, first) = if p.int8 {
        (Elements::Int8, First::Adds)
    } else {
        (Elements::Fp8, First::Replaces)
    };
    let product = Product {
        to,
        columns: p.keys,
        steps: p.head_dim / 32,
        elements,
        first,
    };
    product.of_registers("qry")
}

/// Integer scores are added to the bits of this f32. As sums of up to 256 products of codes are below
/// 2^22, that gives the bits of the f32 with the score added: there is nothing to convert.
pub(crate) const SCORE_BIAS: f32 = 12_582_912.0;

/// Writes four times [`SCORE_BIAS`] to shared address `to`.
#[cube]
pub(crate) fn write_bias(to: u32) {
    let mut words = Vector::<u32, Const<4>>::empty();
    #[unroll]
    for i in 0..4usize {
        words.insert(i, comptime!(SCORE_BIAS.to_bits()));
    }
    store_chunk(to, words);
}

/// Has the next scores that come into `buffer`, if they are integers, added to [`SCORE_BIAS`], which the
/// four words at shared address `bias` are. To be followed by a fence.
#[cube]
pub(crate) fn bias_scores(bias: u32, #[comptime] buffer: usize, #[comptime] p: LowBitProducts) {
    if comptime!(p.int8) {
        let bias = value::<u32>(bias);
        let text = comptime!(bias_text(score_buffer(buffer), p.keys / 2));
        gpu_asm!("/* {bias} */ {text}", bias = in(_) bias);
    }
}

/// Volatile, or one load would be moved to all registers, which takes more instructions than loads do.
fn bias_text(to: &str, count: usize) -> String {
    (0..count / 4)
        .map(|i| {
            let registers = list(to, 4 * i..4 * i + 4);
            format!("ld.volatile.shared.v4.b32 {registers}, [%0]; ")
        })
        .collect()
}

/// Begins `par = P V` with `P` the registers `prb` and `V` the tile that `values` describes.
#[cube]
pub(crate) fn multiply_values(values: u64, #[comptime] p: LowBitProducts) {
    let values = value::<u64>(values);
    let text = comptime!(values_text(p));
    gpu_asm!("/* {values} */ {text}", values = in(_) values);
}

fn values_text(p: LowBitProducts) -> String {
    let product = Product {
        to: "par",
        columns: p.value_dim,
        steps: p.keys / 32,
        elements: Elements::Fp8,
        first: First::Replaces,
    };
    product.of_registers("prb")
}

/// Begins `acc += P V` with `P` a buffer of weights, 16 bits, and `V` the tile that `values` describes;
/// `acc = P V` with `anew`.
#[cube]
pub(crate) fn accumulate(
    values: u64,
    anew: bool,
    #[comptime] buffer: usize,
    #[comptime] p: LowBitProducts,
) {
    let format = comptime!(p.format.unwrap());
    let left = comptime!(probability_buffer(buffer));
    add_product(values, anew, "acc", left, p.value_dim, p.keys, format);
}

/// `acc = acc factor + par`, with a factor to each of the unit's two rows.
#[cube]
pub(crate) fn promote(upper: f32, lower: f32, #[comptime] p: LowBitProducts) {
    let (upper, lower) = (value::<f32>(upper), value::<f32>(lower));
    let text = comptime!(moves(p.value_dim / 2, |i| {
        format!("fma.rn.f32 acc{i}, acc{i}, %{}, par{i}; ", i / 2 % 2)
    }));
    gpu_asm!("/* {upper} {lower} */ {text}", upper = in(_) upper, lower = in(_) lower);
}

/// Multiplies `acc` by `upper` in the unit's upper row and by `lower` in its lower row.
#[cube]
pub(crate) fn scale_accumulator(upper: f32, lower: f32, #[comptime] p: LowBitProducts) {
    let (upper, lower) = (value::<f32>(upper), value::<f32>(lower));
    let text = comptime!(moves(p.value_dim / 2, |i| {
        format!("mul.f32 acc{i}, acc{i}, %{}; ", i / 2 % 2)
    }));
    gpu_asm!("/* {upper} {lower} */ {text}", upper = in(_) upper, lower = in(_) lower);
}

/// Sets `acc` to zero.
#[cube]
pub(crate) fn clear_accumulator(#[comptime] p: LowBitProducts) {
    clear("acc", comptime!(p.value_dim / 2));
}

/// Sets `par` to zero.
#[cube]
pub(crate) fn clear_product(#[comptime] p: LowBitProducts) {
    clear("par", comptime!(p.value_dim / 2));
}

/// Replaces four neighbouring registers of a buffer of weights; no product may be reading them.
#[cube]
pub(crate) fn write_weights(
    words: Vector<u32, Const<4>>,
    #[comptime] buffer: usize,
    #[comptime] group: usize,
) {
    write_four(comptime!(probability_buffer(buffer)), words, group);
}

/// Four f32 rounded to e4m3, to even, saturating at 448; NaN stays NaN. The first is in the lowest byte.
#[cube]
pub(crate) fn pack_e4m3(a: f32, b: f32, c: f32, d: f32) -> u32 {
    let (a, b) = (value::<f32>(a), value::<f32>(b));
    let (c, d) = (value::<f32>(c), value::<f32>(d));
    let word: u32;
    gpu_asm!(
        "{{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, {b}, {a}; \
         cvt.rn.satfinite.e4m3x2.f32 high, {d}, {c}; mov.b32 {word}, {{low, high}}; }}",
        word = out(_) word, a = in(_) a, b = in(_) b, c = in(_) c, d = in(_) d,
        options(pure, nomem)
    );
    word
}

/// The lowest bytes of four words, the first in the lowest.
#[cube]
pub(crate) fn pack_bytes(a: u32, b: u32, c: u32, d: u32) -> u32 {
    let (a, b) = (value::<u32>(a), value::<u32>(b));
    let (c, d) = (value::<u32>(c), value::<u32>(d));
    let word: u32;
    gpu_asm!(
        "{{ .reg .b32 low, high; prmt.b32 low, {a}, {b}, 0x0040; prmt.b32 high, {c}, {d}, 0x0040; \
         prmt.b32 {word}, low, high, 0x5410; }}",
        word = out(_) word, a = in(_) a, b = in(_) b, c = in(_) c, d = in(_) d,
        options(pure, nomem)
    );
    word
}

/// The larger of `largest` and the magnitude of `x`; NaN if one of them is NaN.
#[cube]
pub(crate) fn max_magnitude(largest: f32, x: f32) -> f32 {
    let (largest, x) = (value::<f32>(largest), value::<f32>(x));
    let y: f32;
    gpu_asm!(
        "{{ .reg .f32 size; abs.f32 size, {x}; max.NaN.f32 {y}, {largest}, size; }}",
        y = out(_) y, largest = in(_) largest, x = in(_) x,
        options(pure, nomem)
    );
    y
}

/// `x` between `-bound` and `bound`; NaN stays NaN.
#[cube]
pub(crate) fn clamp_magnitude(x: f32, bound: f32) -> f32 {
    let (x, bound) = (value::<f32>(x), value::<f32>(bound));
    let y: f32;
    gpu_asm!(
        "{{ .reg .f32 least; neg.f32 least, {bound}; min.NaN.f32 {y}, {x}, {bound}; \
         max.NaN.f32 {y}, {y}, least; }}",
        y = out(_) y, x = in(_) x, bound = in(_) bound,
        options(pure, nomem)
    );
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What scores' and A operands' layouts say of the keys of a unit's bytes.
    #[test]
    fn slots_follow_the_registers_of_scores() {
        for lane in 0..4 {
            // Upper row: scores 0 and 1, 4 and 5 of 16 go to the first register.
            let scores = [0, 1, 4, 5].map(|i| 8 * (i / 4) + 2 * lane + i % 2);
            let slots = [0, 1, 2, 3].map(|byte| 4 * lane + byte);
            assert_eq!(slots.map(key_of_slot), scores);
            assert_eq!(
                slots.map(|slot| key_of_slot(slot + 16)),
                scores.map(|k| k + 16)
            );
        }
    }
}
