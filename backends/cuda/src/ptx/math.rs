//! Arithmetic that CubeCL spells otherwise.

use cubecl::prelude::*;

use super::value;

/// `2^x` in one instruction, relative error 2^-22; results below 2^-126 are 0.
#[cube]
pub(crate) fn exp2(x: f32) -> f32 {
    let x = value::<f32>(x);
    let y: f32;
    gpu_asm!("ex2.approx.ftz.f32 {y}, {x};", y = out(_) y, x = in(_) x, options(pure, nomem));
    y
}

/// `log2(x)` in one instruction, relative error 2^-22, absolute near 1; of 0 negative infinity.
#[cube]
pub(crate) fn log2(x: f32) -> f32 {
    let x = value::<f32>(x);
    let y: f32;
    gpu_asm!("lg2.approx.ftz.f32 {y}, {x};", y = out(_) y, x = in(_) x, options(pure, nomem));
    y
}

/// `1 / x` in one instruction, to a unit in the last place; results below 2^-126 are 0.
#[cube]
pub(crate) fn reciprocal(x: f32) -> f32 {
    let x = value::<f32>(x);
    let y: f32;
    gpu_asm!("rcp.approx.ftz.f32 {y}, {x};", y = out(_) y, x = in(_) x, options(pure, nomem));
    y
}

/// Two f32 rounded to 16 bits, `low` in the low half. `format` is `bf16` or `f16`.
#[cube]
pub(crate) fn pack(low: f32, high: f32, #[comptime] format: &'static str) -> u32 {
    let (low, high) = (value::<f32>(low), value::<f32>(high));
    let y: u32;
    gpu_asm!(
        "cvt.rn.{format}x2.f32 {y}, {high}, {low};",
        y = out(_) y, high = in(_) high, low = in(_) low, format = const format,
        options(pure, nomem)
    );
    y
}

/// Whether this is the unit of its warp that is chosen to act for all: the same each time. ptxas knows that it
/// is one only, so that copies which it begins need not be told apart by their operands.
#[cube]
pub(crate) fn elected() -> bool {
    let chosen: u32;
    gpu_asm!(
        "{{ .reg .pred p; elect.sync _|p, 0xFFFFFFFF; selp.u32 {chosen}, 1, 0, p; }}",
        chosen = out(_) chosen
    );
    chosen != 0
}

/// The halves of `x`, low first, 16-bit numbers of `format`, as f32.
#[cube]
pub(crate) fn unpack(x: u32, #[comptime] format: &'static str) -> Vector<f32, Const<2>> {
    let x = value::<u32>(x);
    let y: Vector<f32, Const<2>>;
    gpu_asm!(
        "/* {y} */ {{ .reg .b16 low, high; mov.b32 {{low, high}}, {x}; \
         cvt.f32.{format} %0, low; cvt.f32.{format} %1, high; }}",
        y = out(_) y, x = in(_) x, format = const format,
        options(pure, nomem)
    );
    y
}

/// The same in fewer instructions for bf16, whose bits are the upper half of a f32's. Where registers are scarce
/// ptxas needs more of them for it.
#[cube]
pub(crate) fn widen(x: u32, #[comptime] format: &'static str) -> Vector<f32, Const<2>> {
    if comptime!(format == "bf16") {
        let x = value::<u32>(x);
        let y: Vector<f32, Const<2>>;
        gpu_asm!(
            "/* {y} */ {{ .reg .b32 low, high; shl.b32 low, {x}, 16; and.b32 high, {x}, 0xFFFF0000; \
             mov.b32 %0, low; mov.b32 %1, high; }}",
            y = out(_) y, x = in(_) x,
            options(pure, nomem)
        );
        y
    } else {
        unpack(x, format)
    }
}

/// Stores four 8x8 matrices of 16-bit elements: lane `i` gives the shared address of row `i % 8` of
/// matrix `i / 8`, and holds elements `2(i % 4)` and `2(i % 4) + 1` of row `i / 4` of each.
#[cube]
pub(crate) fn store_matrices(to: u32, words: Vector<u32, Const<4>>) {
    let (to, words) = (value::<u32>(to), value::<Vector<u32, Const<4>>>(words));
    gpu_asm!(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{to}], {words};",
        to = in(_) to, words = in(_) words
    );
}

/// Loads four 8x8 matrices of 16-bit elements: addresses and elements as [`store_matrices`] has them.
#[cube]
pub(crate) fn load_matrices(from: u32) -> Vector<u32, Const<4>> {
    let from = value::<u32>(from);
    let words: Vector<u32, Const<4>>;
    gpu_asm!(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {words}, [{from}];",
        words = out(_) words, from = in(_) from
    );
    words
}

/// Loads 16 bytes from shared memory.
#[cube]
pub(crate) fn load_chunk(from: u32) -> Vector<u32, Const<4>> {
    let from = value::<u32>(from);
    let words: Vector<u32, Const<4>>;
    gpu_asm!("ld.shared.v4.b32 {words}, [{from}];", words = out(_) words, from = in(_) from);
    words
}

/// Loads a f32 from shared memory.
#[cube]
pub(crate) fn load_f32(from: u32) -> f32 {
    let from = value::<u32>(from);
    let x: f32;
    gpu_asm!("ld.shared.f32 {x}, [{from}];", x = out(_) x, from = in(_) from);
    x
}

/// Stores a word to shared memory.
#[cube]
pub(crate) fn store_word(to: u32, word: u32) {
    let (to, word) = (value::<u32>(to), value::<u32>(word));
    gpu_asm!("st.shared.b32 [{to}], {word};", to = in(_) to, word = in(_) word);
}

/// Stores 16 bytes to shared memory.
#[cube]
pub(crate) fn store_chunk(to: u32, words: Vector<u32, Const<4>>) {
    let (to, words) = (value::<u32>(to), value::<Vector<u32, Const<4>>>(words));
    gpu_asm!("st.shared.v4.b32 [{to}], {words};", to = in(_) to, words = in(_) words);
}

/// Loads 8 bytes from shared memory.
#[cube]
pub(crate) fn load_pair(from: u32) -> Vector<u32, Const<2>> {
    let from = value::<u32>(from);
    let words: Vector<u32, Const<2>>;
    gpu_asm!("ld.shared.v2.b32 {words}, [{from}];", words = out(_) words, from = in(_) from);
    words
}

/// Stores 8 bytes to shared memory.
#[cube]
pub(crate) fn store_pair(to: u32, low: u32, high: u32) {
    let (to, low, high) = (value::<u32>(to), value::<u32>(low), value::<u32>(high));
    gpu_asm!(
        "st.shared.v2.b32 [{to}], {{{low}, {high}}};",
        to = in(_) to, low = in(_) low, high = in(_) high
    );
}

/// `x y`, rounded before anything is added to it.
#[cube]
pub(crate) fn rounded_product(x: f32, y: f32) -> f32 {
    let (x, y) = (value::<f32>(x), value::<f32>(y));
    let z: f32;
    gpu_asm!(
        "mul.rn.f32 {z}, {x}, {y};",
        z = out(_) z, x = in(_) x, y = in(_) y, options(pure, nomem)
    );
    z
}

/// Whether `x` holds for a unit of the warp, all of whose units ask.
#[cube]
pub(crate) fn any(x: bool) -> bool {
    let x = value::<u32>(u32::cast_from(x));
    let y: u32;
    gpu_asm!(
        "{{ .reg .pred p; setp.ne.u32 p, {x}, 0; vote.sync.any.pred p, p, -1; selp.u32 {y}, 1, 0, p; }}",
        y = out(_) y, x = in(_) x
    );
    y != 0
}
