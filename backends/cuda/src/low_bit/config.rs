//! What the low-bit kernels are compiled for.

use cubesla_kernels::quantize::Format;

use crate::forward::config::tile_bytes;
use crate::forward::kernel::ForwardConfig;
use crate::ptx::low_bit::LowBitProducts;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LowBitConfig {
    /// Sizes as of 16-bit attention; `head_dim` counts pairs of the 8-bit elements of queries and keys,
    /// which fill what one 16-bit element does.
    pub forward: ForwardConfig,
    /// Whether queries and keys are INT8 rather than FP8.
    pub int8: bool,
    /// Whether weights and values are FP8 rather than 16 bits.
    pub fp8: bool,
}

impl LowBitConfig {
    pub fn products(&self) -> LowBitProducts {
        let products = self.forward.tile.products();
        LowBitProducts {
            head_dim: 2 * products.head_dim,
            value_dim: products.value_dim,
            keys: products.keys,
            int8: self.int8,
            format: (!self.fp8).then_some(products.format()),
        }
    }

    /// Width of queries and keys.
    pub fn head_dim(&self) -> usize {
        2 * self.forward.tile.head_dim
    }

    /// Of queries and keys.
    pub fn scores(&self) -> Format {
        if self.int8 { Format::Int8 } else { Format::Fp8 }
    }

    /// Width of queries in boxes of 64 columns.
    pub fn boxed_dim(&self) -> usize {
        self.head_dim().next_multiple_of(64)
    }

    /// Of a tile of queries, in 16 bits.
    pub fn query_bytes(&self) -> usize {
        tile_bytes(self.forward.tile.rows(), self.head_dim())
    }

    /// What tensor cores call the inputs' type.
    pub fn products_format(&self) -> &'static str {
        self.forward.tile.products().format()
    }

    /// The bits of infinity in the inputs' type.
    pub fn infinity(&self) -> u32 {
        if self.forward.tile.bf16 {
            0x7F80
        } else {
            0x7C00
        }
    }

    /// Of a tile of values; FP8 values are transposed.
    pub fn value_bytes(&self) -> usize {
        if self.fp8 {
            self.products().value_dim * self.forward.tile.keys
        } else {
            self.forward.tile.value_bytes()
        }
    }

    /// Words of a unit's weights of a tile.
    pub fn weight_words(&self) -> usize {
        let keys = self.forward.tile.keys;
        if self.fp8 { keys / 8 } else { keys / 4 }
    }

    /// Whether the next tile's scores are multiplied during the softmax of this one. The second
    /// accumulator of FP8 values leaves no registers for them.
    pub fn ahead(&self) -> bool {
        self.forward.tile.ahead && !self.fp8
    }

    /// As for 16-bit attention: registers that a unit of the producer's warpgroup keeps and that a
    /// consumer unit takes. FP8 values need a second accumulator, and then a kernel of 168 registers.
    pub fn registers(&self) -> Option<(u32, u32)> {
        let p = self.products();
        let accumulators = p.value_dim / 2 * if self.fp8 { 2 } else { 1 };
        let scores = p.keys / 2 * if self.ahead() { 2 } else { 1 };
        let named = accumulators + scores + 2 * self.weight_words() + p.head_dim / 8;
        (self.forward.tile.consumers == 2 && (self.ahead() || named >= 120)).then_some((24, 240))
    }
}
