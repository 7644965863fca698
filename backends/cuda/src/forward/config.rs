//! What the Hopper forward is compiled for, and where things lie in its shared memory.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use crate::ptx::wgmma::Products;

/// Sizes of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WgmmaTile {
    /// D, the width of queries and keys.
    pub head_dim: usize,
    /// Dv, the width of values.
    pub value_dim: usize,
    /// Whether elements are bf16 rather than f16.
    pub bf16: bool,
    /// Warpgroups that compute, 64 query rows each.
    pub consumers: usize,
    /// Keys of a tile.
    pub keys: usize,
    /// Tiles in flight.
    pub stages: usize,
    /// Whether the next tile's scores are multiplied during the softmax of this one, where a unit has
    /// registers for the scores of two tiles.
    pub ahead: bool,
}

impl WgmmaTile {
    /// Query rows of a cube.
    pub fn rows(&self) -> usize {
        64 * self.consumers
    }

    /// Units of a cube: the consumers and a warpgroup whose first unit is the producer.
    pub fn units(&self) -> usize {
        128 * (self.consumers + 1)
    }

    /// Bytes of shared memory.
    pub fn shared_memory(&self) -> usize {
        self.query_bytes()
            + self.stages * (self.key_bytes() + self.value_bytes())
            + self.consumers * self.out_bytes()
            + self.barriers() * 8
            + self.notes() * 8
    }

    /// Registers that a unit of the producer's warpgroup keeps and that a consumer unit takes, where
    /// consumers need more than the 168 of an even share.
    ///
    /// `setmaxnreg` waits for registers to come free, for ever if there are too few. With 384 units
    /// these numbers need a kernel of 152 registers, or 163, which one that needs them is;
    /// `cargo xtask cuda` checks it.
    pub(crate) fn registers(&self) -> Option<(u32, u32)> {
        let taken = if self.ahead { 240 } else { 216 };
        (self.consumers == 2 && self.named_registers() > 140).then_some((24, taken))
    }

    /// The same tile of a kernel that can look ahead.
    pub(crate) fn looking_ahead(self) -> Self {
        let ahead = self.consumers == 1 || self.registers().is_some();
        Self { ahead, ..self }
    }

    /// Accumulator and queries, scores of a tile, weights being used and weights being made.
    fn named_registers(&self) -> usize {
        let products = self.products();
        products.value_dim / 2 + products.head_dim / 4 + self.keys / 2 + self.keys / 2
    }

    pub(crate) fn products(&self) -> Products {
        Products {
            head_dim: self.head_dim.next_multiple_of(16),
            value_dim: self.value_dim.next_multiple_of(16),
            keys: self.keys,
            bf16: self.bf16,
        }
    }

    pub(crate) fn query_bytes(&self) -> usize {
        tile_bytes(self.rows(), self.head_dim)
    }

    pub(crate) fn key_bytes(&self) -> usize {
        tile_bytes(self.keys, self.head_dim)
    }

    pub(crate) fn value_bytes(&self) -> usize {
        tile_bytes(self.keys, self.value_dim)
    }

    /// Of one warpgroup.
    pub(crate) fn out_bytes(&self) -> usize {
        tile_bytes(64, self.value_dim)
    }

    pub(crate) fn barriers(&self) -> usize {
        2 + 4 * self.stages
    }

    /// What the producer tells consumers of items and of each stage's keys, four words each, counted in
    /// pairs.
    pub(crate) fn notes(&self) -> usize {
        2 * ITEM_NOTES + 2 * self.stages
    }
}

/// Bytes of a tile in boxes of 64 columns.
pub(crate) fn tile_bytes(rows: usize, width: usize) -> usize {
    width.div_ceil(64) * rows * 128
}

/// Notes on items: consumers finish one when they have begun the next, and the producer is ahead of
/// them by another.
const ITEM_NOTES: usize = 3;

/// The note after `note`.
#[cube]
pub(crate) fn next_note(note: u32) -> u32 {
    select(note == comptime!(ITEM_NOTES as u32 - 1), 0, note + 1)
}

/// Shared addresses.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Memory {
    pub queries: u32,
    pub keys: u32,
    pub values: u32,
    pub out: u32,
    pub barriers: u32,
    notes: u32,
}

#[cube]
impl Memory {
    /// Reserves the shared memory of a cube.
    pub fn new(#[comptime] tile: WgmmaTile) -> Memory {
        Memory::with_values(tile, tile.value_bytes())
    }

    /// As [`new`](Self::new), with tiles of values of `value_bytes`.
    pub fn with_values(#[comptime] tile: WgmmaTile, #[comptime] value_bytes: usize) -> Memory {
        let stages = comptime!(tile.stages);
        let queries =
            Shared::<[u32]>::new_aligned_slice(comptime!(tile.query_bytes() / 4), 1024usize);
        let keys =
            Shared::<[u32]>::new_aligned_slice(comptime!(stages * tile.key_bytes() / 4), 1024usize);
        let values =
            Shared::<[u32]>::new_aligned_slice(comptime!(stages * value_bytes / 4), 1024usize);
        let staging = Shared::<[u32]>::new_aligned_slice(
            comptime!(tile.consumers * tile.out_bytes() / 4),
            1024usize,
        );
        let barriers = Shared::<[u64]>::new_aligned_slice(tile.barriers(), 16usize);
        let notes = Shared::<[u64]>::new_aligned_slice(tile.notes(), 16usize);
        Memory {
            queries: generic_to_shared::<u32>(queries.as_ptr()),
            keys: generic_to_shared::<u32>(keys.as_ptr()),
            values: generic_to_shared::<u32>(values.as_ptr()),
            out: generic_to_shared::<u32>(staging.as_ptr()),
            barriers: generic_to_shared::<u64>(barriers.as_ptr()),
            notes: generic_to_shared::<u64>(notes.as_ptr()),
        }
    }

    /// Where an item is described, from its queries' arrival until those of the item after next arrive.
    pub fn item_note(&self, note: u32) -> u32 {
        self.notes + note * 16
    }

    /// Where a stage's keys are described, from their arrival until they have been read.
    pub fn key_note(&self, stage: u32) -> u32 {
        self.notes + comptime!(ITEM_NOTES as u32 * 16) + stage * 16
    }

    /// Completes when an item's queries have arrived.
    pub fn query_full(&self) -> u32 {
        self.barriers
    }

    /// Completes when every consumer warp has read them.
    pub fn query_empty(&self) -> u32 {
        self.barriers + 8
    }

    /// Completes when a stage's keys have arrived.
    pub fn key_full(&self, stage: u32) -> u32 {
        self.barriers + 16 + stage * 32
    }

    /// Completes when every consumer has read them.
    pub fn key_empty(&self, stage: u32) -> u32 {
        self.key_full(stage) + 8
    }

    /// Completes when a stage's values have arrived.
    pub fn value_full(&self, stage: u32) -> u32 {
        self.key_full(stage) + 16
    }

    /// Completes when every consumer has read them.
    pub fn value_empty(&self, stage: u32) -> u32 {
        self.key_full(stage) + 24
    }
}

/// A place in the ring of tiles, and the parity of its barriers' current phase.
#[derive(CubeType)]
pub(crate) struct Place {
    pub stage: u32,
    pub parity: u32,
    #[cube(comptime)]
    stages: usize,
}

#[cube]
impl Place {
    pub fn first(#[comptime] stages: usize) -> Place {
        Place {
            stage: 0,
            parity: 0,
            stages,
        }
    }

    pub fn advance(&mut self) {
        self.stage += 1;
        if self.stage == comptime!(self.stages as u32) {
            self.stage = 0;
            self.parity ^= 1;
        }
    }
}
