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
    /// Warpgroups that compute an item, 64 query rows each.
    pub consumers: usize,
    /// Items that a cube computes at a time, each with consumers, a producer and shared memory of its own.
    pub streams: usize,
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

    /// Units of a cube: the consumers of all streams and a warpgroup, one warp of which is the producer of
    /// each.
    pub fn units(&self) -> usize {
        self.consumer_units() + 128
    }

    /// Units that compute.
    pub(crate) fn consumer_units(&self) -> usize {
        128 * self.consumers * self.streams
    }

    /// Bytes of shared memory.
    pub fn shared_memory(&self) -> usize {
        self.streams * self.layout(self.query_bytes(), self.value_bytes()).bytes
    }

    /// Tiles of queries of a stream: where they stay in shared memory, those of its next item come while
    /// it computes one.
    pub(crate) fn query_tiles(&self) -> usize {
        if self.streams > 1 { 2 } else { 1 }
    }

    /// Where the tiles of a stream lie, with tiles of queries and of values of so many bytes.
    fn layout(&self, query_bytes: usize, value_bytes: usize) -> Layout {
        let keys = self.query_tiles() * query_bytes;
        let values = keys + self.stages * self.key_bytes();
        // Tiles of FP8 values may be shorter than the swizzle of outputs repeats itself.
        let out = (values + self.stages * value_bytes).next_multiple_of(1024);
        let barriers = out + self.consumers * self.out_bytes();
        let notes = barriers + (self.barriers() * 8).next_multiple_of(16);
        let bytes = notes + self.notes() * 8;
        Layout {
            keys,
            values,
            out,
            barriers,
            notes,
            // Swizzled tiles begin at multiples of 1024.
            bytes: bytes.next_multiple_of(1024),
        }
    }

    /// Registers that a unit of the producer's warpgroup keeps and that a consumer unit takes, where
    /// consumers need more than the 168 of an even share, or the 96 of two streams.
    ///
    /// `setmaxnreg` waits for registers to come free, for ever if there are too few. With 384 units
    /// these numbers need a kernel of 152 registers, or 161, which one that needs them is; with 640 units
    /// of 89. `cargo xtask cuda` checks it.
    pub(crate) fn registers(&self) -> Option<(u32, u32)> {
        if self.streams == 2 {
            return Some((32, 112));
        }
        let taken = if self.ahead { 240 } else { 216 };
        (self.consumers == 2 && (self.ahead || self.named_registers() > 140)).then_some((24, taken))
    }

    /// The same tile of a kernel that computes two items at a time, if a unit's share of the registers is
    /// enough for it.
    pub(crate) fn in_streams(self) -> Self {
        let narrow = self.head_dim <= 64 && self.value_dim <= 64;
        if narrow && self.consumers == 2 {
            return Self {
                streams: 2,
                ahead: false,
                ..self
            };
        }
        self
    }

    /// Whether a unit has registers for two tiles' weights, those in use and those being made, beside the
    /// scores of the next one.
    pub(crate) fn two_weights(&self) -> bool {
        self.tile_registers() + 2 * self.weight_words() < 176
    }

    /// A unit's words of a tile's weights.
    pub(crate) fn weight_words(&self) -> usize {
        self.keys / 4
    }

    /// Accumulator, queries, and scores of a tile or two.
    fn tile_registers(&self) -> usize {
        let products = self.products();
        let scores = self.keys / 2 * if self.ahead { 2 } else { 1 };
        products.value_dim / 2 + products.head_dim / 4 + scores
    }

    fn named_registers(&self) -> usize {
        let tiles_of_weights = if self.two_weights() { 2 } else { 1 };
        self.tile_registers() + tiles_of_weights * self.weight_words()
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
        4 + 4 * self.stages
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

/// Notes on items: consumers finish one when they have begun the next, and the producer is ahead of them by
/// another, or by as many as there are stages where it loads no queries; an even number to each of two slots
/// of queries.
pub(crate) const ITEM_NOTES: usize = 8;

/// The note after `note`.
#[cube]
pub(crate) fn next_note(note: u32) -> u32 {
    select(note == comptime!(ITEM_NOTES as u32 - 1), 0, note + 1)
}

/// Where tiles of keys, of values and so on begin in a stream's shared memory, after its queries, and how
/// long that is.
#[derive(Clone, Copy)]
struct Layout {
    keys: usize,
    values: usize,
    out: usize,
    barriers: usize,
    notes: usize,
    bytes: usize,
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
    /// Reserves the shared memory of a cube, and takes that of its first stream.
    pub fn new(#[comptime] tile: WgmmaTile) -> Memory {
        Memory::with_tiles(tile, tile.query_bytes(), tile.value_bytes())
    }

    /// As [`new`](Self::new), with tiles of queries and of values of so many bytes.
    pub fn with_tiles(
        #[comptime] tile: WgmmaTile,
        #[comptime] query_bytes: usize,
        #[comptime] value_bytes: usize,
    ) -> Memory {
        let layout = comptime!(tile.layout(query_bytes, value_bytes));
        let words = comptime!(tile.streams * layout.bytes / 4);
        let all = Shared::<[u32]>::new_aligned_slice(words, 1024usize);
        Memory::at(generic_to_shared::<u32>(all.as_ptr()), layout)
    }

    fn at(first: u32, #[comptime] layout: Layout) -> Memory {
        Memory {
            queries: first,
            keys: first + comptime!(layout.keys as u32),
            values: first + comptime!(layout.values as u32),
            out: first + comptime!(layout.out as u32),
            barriers: first + comptime!(layout.barriers as u32),
            notes: first + comptime!(layout.notes as u32),
        }
    }

    /// The memory of another stream of 16-bit values, of the first one's.
    pub fn of_stream(&self, stream: u32, #[comptime] tile: WgmmaTile) -> Memory {
        let layout = comptime!(tile.layout(tile.query_bytes(), tile.value_bytes()));
        Memory::at(
            self.queries + stream * comptime!(layout.bytes as u32),
            layout,
        )
    }

    /// Where an item is described, from its queries' arrival until those of the item after next arrive.
    pub fn item_note(&self, note: u32) -> u32 {
        self.notes + note * 16
    }

    /// Where a stage's keys are described, from their arrival until they have been read.
    pub fn key_note(&self, stage: u32) -> u32 {
        self.notes + comptime!(ITEM_NOTES as u32 * 16) + stage * 16
    }

    /// Completes when an item's queries have arrived in slot 0 or 1.
    pub fn query_full(&self, slot: u32) -> u32 {
        self.barriers + slot * 16
    }

    /// Completes when every consumer warp has read them.
    pub fn query_empty(&self, slot: u32) -> u32 {
        self.query_full(slot) + 8
    }

    /// Completes when the queries in slot 0 have been measured, where a kernel does that: slot 1 is not in
    /// use there.
    pub fn measured(&self) -> u32 {
        self.query_full(1u32)
    }

    /// Completes when a stage's keys have arrived.
    pub fn key_full(&self, stage: u32) -> u32 {
        self.barriers + 32 + stage * 32
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

    /// The place before [`first`](Self::first).
    pub fn before_first(#[comptime] stages: usize) -> Place {
        Place {
            stage: comptime!(stages as u32 - 1),
            parity: 1,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Tiles with the 128-byte swizzle begin where it repeats itself, whatever comes before them.
    #[test]
    fn tiles_begin_where_their_swizzle_does() {
        for (head_dim, value_dim) in [(8, 8), (24, 72), (48, 40), (64, 128), (128, 96)] {
            for (keys, stages) in [(16, 4), (32, 5), (64, 4), (64, 5)] {
                let tile = WgmmaTile {
                    head_dim,
                    value_dim,
                    bf16: true,
                    consumers: 2,
                    streams: 1,
                    keys,
                    stages,
                    ahead: true,
                };
                // In 16 bits, and transposed in 8.
                let fp8 = tile.products().value_dim * keys;
                for value_bytes in [tile.value_bytes(), fp8] {
                    let layout = tile.layout(tile.query_bytes(), value_bytes);
                    for start in [layout.keys, layout.values, layout.out] {
                        assert_eq!(start % 1024, 0, "{tile:?}, {value_bytes} bytes of values");
                    }
                }
            }
        }
    }
}
