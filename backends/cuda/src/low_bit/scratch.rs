//! What the warps of the low-bit kernel tell each other, in shared memory.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use super::config::LowBitConfig;
use crate::forward::config::ITEM_NOTES;
use crate::ptx::{low_bit, math};

/// Shared addresses.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct Scratch {
    first: u32,
    #[cube(comptime)]
    config: LowBitConfig,
}

/// Where tiles' lookups begin, and where the mean key does.
const LOOKUPS: usize = 32;
const MEAN: usize = LOOKUPS + 32 * 16;

/// Bytes of it all.
fn bytes(config: LowBitConfig) -> usize {
    shift(config) + ITEM_NOTES * config.forward.tile.rows() * 4
}

/// Where shifts begin.
fn shift(config: LowBitConfig) -> usize {
    MEAN + config.boxed_dim() * 4
}

#[cube]
impl Scratch {
    /// Reserves it.
    pub fn new(#[comptime] config: LowBitConfig) -> Scratch {
        let words = comptime!(bytes(config) / 4);
        let all = Shared::<[u32]>::new_aligned_slice(words, 16usize);
        Scratch {
            first: generic_to_shared::<u32>(all.as_ptr()),
            config,
        }
    }

    /// Four words that integer scores begin with.
    pub fn bias(&self) -> u32 {
        self.first
    }

    /// To be called by one unit, before the others read it.
    pub fn init(&self) {
        low_bit::write_bias(self.bias());
    }

    /// Of an item's queries: their scale, its reciprocal, and whether some are infinite.
    pub fn write_scale(&self, scale: f32, inverse: f32, infinite: bool) {
        let mut words = Vector::<u32, Const<4>>::empty();
        words.insert(0usize, u32::reinterpret(scale));
        words.insert(1usize, u32::reinterpret(inverse));
        words.insert(2usize, u32::cast_from(infinite));
        words.insert(3usize, 0u32);
        math::store_chunk(self.first + 16, words);
    }

    pub fn read_scale(&self) -> Vector<u32, Const<4>> {
        math::load_chunk(self.first + 16)
    }

    /// What the producer's unit `unit` has looked up of a tile.
    pub fn lookup(&self, unit: u32) -> u32 {
        self.first + comptime!(LOOKUPS as u32) + unit * 16
    }

    /// The mean key's f32 in `column`.
    pub fn mean(&self, column: u32) -> u32 {
        self.first + comptime!(MEAN as u32) + column * 4
    }

    /// What smoothing took from scores of a row of the item of `note`.
    pub fn write_shift(&self, note: u32, row: u32, shift: f32) {
        math::store_word(self.shift(note, row), u32::reinterpret(shift));
    }

    pub fn read_shift(&self, note: u32, row: u32) -> f32 {
        math::load_f32(self.shift(note, row))
    }

    fn shift(&self, note: u32, row: u32) -> u32 {
        let config = comptime!(self.config);
        let rows = comptime!(config.forward.tile.rows() as u32);
        self.first + comptime!(shift(config) as u32) + (note * rows + row) * 4
    }
}
