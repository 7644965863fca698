//! How products of a warpgroup are spelled: an instruction to each step of 32 bytes of the dimension that is
//! contracted.

use cubecl::prelude::*;

use super::value;

/// A product `[64, columns]` of what a statement's descriptors and named registers hold.
pub(super) struct Product<'a> {
    /// The registers that it comes to: `columns / 2` of them.
    pub to: &'a str,
    pub columns: usize,
    pub steps: usize,
    /// The width of a step and the types of result and operands, as the instruction's name has them.
    pub types: String,
    /// What follows the predicate: signs, and where tiles may be transposed, whether they are.
    pub flags: &'a str,
    pub first: First,
}

/// What the first step does with what is in the result's registers: later ones add to it.
pub(super) enum First {
    Replaces,
    Adds,
    /// Adds if a comparison with 0 holds for an operand of the statement.
    AddsIf(&'static str, &'static str),
}

/// An operand of a step.
pub(super) enum Operand {
    /// Four registers of an A operand of this name: those of the step.
    Registers(&'static str),
    /// A tile whose descriptor is an operand of the statement, and by how many bytes, counted in 16, the step's
    /// part of it lies behind its beginning.
    Tile(&'static str, usize),
}

impl Product<'_> {
    /// The text of all steps, of which `operands` gives both sides.
    pub fn text(&self, operands: impl Fn(usize) -> (Operand, Operand)) -> String {
        let mut text = format!(
            "{{ .reg .pred first, more; {} setp.ne.b32 more, 1, 0; .reg .u64 a, b; ",
            match self.first {
                First::Replaces => "setp.ne.b32 first, 0, 0;".to_owned(),
                First::Adds => "setp.ne.b32 first, 1, 0;".to_owned(),
                First::AddsIf(comparison, operand) =>
                    format!("setp.{comparison} first, {operand}, 0;"),
            }
        );
        let to = list(self.to, 0..self.columns / 2);
        for step in 0..self.steps {
            let (a, b) = operands(step);
            let (a, b) = (a.text("a", step, &mut text), b.text("b", step, &mut text));
            let predicate = if step == 0 { "first" } else { "more" };
            text += &format!(
                "wgmma.mma_async.sync.aligned.m64n{}{} {to}, {a}, {b}, {predicate}{}; ",
                self.columns, self.types, self.flags
            );
        }
        text + "}"
    }
}

impl Operand {
    /// How the instruction names it; a tile's descriptor comes to `register` first.
    fn text(&self, register: &str, step: usize, before: &mut String) -> String {
        match self {
            Self::Registers(name) => list(name, 4 * step..4 * step + 4),
            Self::Tile(descriptor, offset) => {
                *before += &format!("add.u64 {register}, {descriptor}, {offset}; ");
                register.to_owned()
            }
        }
    }
}

/// Where a step's part of a K-major tile lies, in boxes of 64 columns and `rows` rows: of 16-bit elements a step
/// is 16 columns.
pub(super) fn in_rows(step: usize, rows: usize) -> usize {
    // Four steps are a box of 128 bytes a row. Offsets count 16 bytes.
    step / 4 * rows * 8 + step % 4 * 2
}

/// Where a step's part of a tile lies whose rows are contracted over: 16 rows of 128 bytes.
pub(super) fn in_columns(step: usize) -> usize {
    step * 128
}

/// The types of products of 16-bit elements of `format` in [`Product::types`].
pub(super) fn half_types(format: &str) -> String {
    format!("k16.f32.{format}.{format}")
}

/// Begins `to += left B`, `columns` wide, with `left` an A operand of `depth` columns and `B` the tile
/// of `depth` rows that `tile`, transposed, describes; `to = left B` with `anew`.
#[cube]
pub(super) fn add_product(
    tile: u64,
    anew: bool,
    #[comptime] to: &'static str,
    #[comptime] left: &'static str,
    #[comptime] columns: usize,
    #[comptime] depth: usize,
    #[comptime] format: &'static str,
) {
    let tile = value::<u64>(tile);
    let anew = value::<u32>(u32::cast_from(anew));
    let text = comptime!({
        let product = Product {
            to,
            columns,
            steps: depth / 16,
            types: half_types(format),
            flags: ", 1, 1, 1",
            first: First::AddsIf("eq.b32", "%1"),
        };
        product.text(|step| {
            (
                Operand::Registers(left),
                Operand::Tile("%0", in_columns(step)),
            )
        })
    });
    gpu_asm!("/* {tile} {anew} */ {text}", tile = in(_) tile, anew = in(_) anew);
}

/// Registers `name` with these numbers.
pub(super) fn list(name: &str, range: std::ops::Range<usize>) -> String {
    let names: Vec<String> = range.map(|i| format!("{name}{i}")).collect();
    format!("{{{}}}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_an_instruction_a_step() {
        let product = Product {
            to: "acc",
            columns: 8,
            steps: 2,
            types: half_types("bf16"),
            flags: ", 1, 1, 0",
            first: First::AddsIf("eq.b32", "%1"),
        };
        let text = product.text(|step| {
            (
                Operand::Registers("prb"),
                Operand::Tile("%0", in_rows(step, 64)),
            )
        });
        let instruction =
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {acc0, acc1, acc2, acc3},";
        assert_eq!(
            text,
            format!(
                "{{ .reg .pred first, more; setp.eq.b32 first, %1, 0; setp.ne.b32 more, 1, 0; \
                 .reg .u64 a, b; \
                 add.u64 b, %0, 0; {instruction} {{prb0, prb1, prb2, prb3}}, b, first, 1, 1, 0; \
                 add.u64 b, %0, 2; {instruction} {{prb4, prb5, prb6, prb7}}, b, more, 1, 1, 0; }}"
            )
        );
    }

    #[test]
    fn four_steps_are_a_box_of_rows() {
        assert_eq!(in_rows(3, 64), 6);
        assert_eq!(in_rows(5, 64) * 16, 64 * 128 + 32);
        assert_eq!(in_columns(2) * 16, 32 * 128);
    }
}
