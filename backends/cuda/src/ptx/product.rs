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
    pub elements: Elements,
    pub first: First,
}

/// What is multiplied.
#[derive(Clone, Copy)]
pub(super) enum Elements {
    /// 16 bits of this format, `bf16` or `f16`.
    Half(&'static str),
    Int8,
    /// e4m3.
    Fp8,
}

/// What the first step does with what is in the result's registers: later ones add to it.
pub(super) enum First {
    Replaces,
    Adds,
    /// Adds if a comparison with 0 holds for an operand of the statement.
    AddsIf(&'static str, &'static str),
}

impl Product<'_> {
    /// Of the A operand `left` and the K-major tile that the descriptor `%0` is of, in boxes of as many rows as
    /// there are columns.
    pub fn of_registers(&self, left: &str) -> String {
        self.text(&[false], |step| {
            let b = tile("b", "%0", in_rows(step, self.columns));
            (b, registers(left, step))
        })
    }

    /// Of the A operand `left` and the tile that the descriptor `%0` is of, whose rows are contracted over; it
    /// begins `start` units of 16 bytes further.
    pub fn of_registers_and_columns(&self, left: &str, start: usize) -> String {
        self.text(&[true], |step| {
            let b = tile("b", "%0", start + in_columns(step));
            (b, registers(left, step))
        })
    }

    /// Of the K-major tiles that `%0` and `%1` are of, in boxes of 64 and of `rows` rows.
    pub fn of_tiles(&self, rows: usize) -> String {
        self.text(&[false, false], |step| {
            let a = tile("a", "%0", in_rows(step, 64));
            let b = tile("b", "%1", in_rows(step, rows));
            (a + &b, "a".to_owned())
        })
    }

    /// All steps, of which `operands` gives what comes before the instruction, and its A operand; of each tile,
    /// whether it is `transposed`.
    fn text(&self, transposed: &[bool], operands: impl Fn(usize) -> (String, String)) -> String {
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
            let (before, a) = operands(step);
            text += &format!(
                "{before}wgmma.mma_async.sync.aligned.m64n{}{} {to}, {a}, b, {}{}; ",
                self.columns,
                self.elements.types(),
                if step == 0 { "first" } else { "more" },
                self.elements.flags(transposed),
            );
        }
        text + "}"
    }
}

impl Elements {
    /// The width of a step and the types of result and operands, as the instruction's name has them.
    fn types(self) -> String {
        match self {
            Self::Half(format) => format!("k16.f32.{format}.{format}"),
            Self::Int8 => "k32.s32.s8.s8".to_owned(),
            Self::Fp8 => "k32.f32.e4m3.e4m3".to_owned(),
        }
    }

    /// What follows the predicate: signs, and of 16 bits, which tiles are transposed.
    fn flags(self, transposed: &[bool]) -> String {
        match self {
            Self::Half(_) => transposed.iter().fold(", 1, 1".to_owned(), |flags, &tile| {
                flags + if tile { ", 1" } else { ", 0" }
            }),
            Self::Int8 => String::new(),
            Self::Fp8 => ", 1, 1".to_owned(),
        }
    }
}

/// Brings the descriptor `of`, moved on by `offset` units of 16 bytes, to `register`.
fn tile(register: &str, of: &str, offset: usize) -> String {
    format!("add.u64 {register}, {of}, {offset}; ")
}

/// A step's registers of an A operand.
fn registers(name: &str, step: usize) -> String {
    list(name, 4 * step..4 * step + 4)
}

/// Where a step's part of a K-major tile lies, in boxes of 128 bytes a row and `rows` rows, which four steps are.
/// Offsets count 16 bytes.
fn in_rows(step: usize, rows: usize) -> usize {
    step / 4 * rows * 8 + step % 4 * 2
}

/// Where a step's part of a tile of 16 bits lies whose rows are contracted over: 16 rows of 128 bytes.
pub(super) fn in_columns(step: usize) -> usize {
    step * 128
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
            elements: Elements::Half(format),
            first: First::AddsIf("eq.b32", "%1"),
        };
        product.of_registers_and_columns(left, 0)
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

    fn product(elements: Elements, first: First) -> Product<'static> {
        Product {
            to: "acc",
            columns: 8,
            steps: 2,
            elements,
            first,
        }
    }

    #[test]
    fn a_product_is_an_instruction_a_step() {
        let product = product(Elements::Half("bf16"), First::AddsIf("eq.b32", "%1"));
        let instruction =
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {acc0, acc1, acc2, acc3},";
        assert_eq!(
            product.of_registers("prb"),
            format!(
                "{{ .reg .pred first, more; setp.eq.b32 first, %1, 0; setp.ne.b32 more, 1, 0; \
                 .reg .u64 a, b; \
                 add.u64 b, %0, 0; {instruction} {{prb0, prb1, prb2, prb3}}, b, first, 1, 1, 0; \
                 add.u64 b, %0, 2; {instruction} {{prb4, prb5, prb6, prb7}}, b, more, 1, 1, 0; }}"
            )
        );
    }

    /// Only tiles of 16 bits may be transposed, and the instruction asks of each tile.
    #[test]
    fn flags_are_those_of_elements_and_tiles() {
        let half = product(Elements::Half("f16"), First::Replaces);
        assert!(half.of_tiles(64).ends_with("a, b, more, 1, 1, 0, 0; }"));
        let columns = half.of_registers_and_columns("qry", 8);
        assert!(columns.contains("add.u64 b, %0, 136; "));
        assert!(columns.ends_with("b, more, 1, 1, 1; }"));
        let int8 = product(Elements::Int8, First::Adds).of_tiles(8);
        assert!(int8.contains("setp.ne.b32 first, 1, 0;") && int8.ends_with("a, b, more; }"));
        let fp8 = product(Elements::Fp8, First::Replaces).of_registers("qry");
        assert!(fp8.ends_with("b, more, 1, 1; }"));
    }

    #[test]
    fn four_steps_are_a_box_of_rows() {
        assert_eq!(in_rows(3, 64), 6);
        assert_eq!(in_rows(5, 64) * 16, 64 * 128 + 32);
        assert_eq!(in_columns(2) * 16, 32 * 128);
    }
}
