//! What kernels that make states share: their sizes, and a ring of tiles of keys and values.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;

use crate::forward::config::tile_bytes;
use crate::ptx::wgmma::Products;
use crate::ptx::{barrier, tma};

/// Sizes of a state and of the tiles that it is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StateTile {
    pub head_dim: usize,
    pub value_dim: usize,
    pub bf16: bool,
    /// Keys of a tile.
    pub keys: usize,
    /// Tiles in flight.
    pub stages: usize,
}

impl StateTile {
    /// Warpgroups, 64 rows of the state each.
    pub fn consumers(&self) -> usize {
        self.head_dim.div_ceil(64)
    }

    /// Units of a cube: the consumers and a warp whose first unit is the producer.
    pub fn units(&self) -> usize {
        128 * self.consumers() + 32
    }

    pub fn products(&self) -> Products {
        Products {
            head_dim: self.head_dim.next_multiple_of(16),
            value_dim: self.value_dim.next_multiple_of(16),
            keys: self.keys,
            bf16: self.bf16,
        }
    }

    pub fn key_bytes(&self) -> usize {
        tile_bytes(self.keys, self.head_dim)
    }

    pub fn value_bytes(&self) -> usize {
        tile_bytes(self.keys, self.value_dim)
    }

    /// Two ones.
    pub fn ones(&self) -> u32 {
        if self.bf16 { 0x3F80_3F80 } else { 0x3C00_3C00 }
    }
}

/// Shared addresses.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Ring {
    pub keys: u32,
    pub values: u32,
    /// A kilobyte of ones: a product with them adds up the rows of `phi(K)`.
    pub ones: u32,
    barriers: u32,
}

#[cube]
impl Ring {
    /// Reserves the shared memory and initialises the barriers; usable after the next `sync_cube`.
    pub fn new(#[comptime] tile: StateTile) -> Ring {
        let stages = tile.stages;
        let keys =
            Shared::<[u32]>::new_aligned_slice(comptime!(stages * tile.key_bytes() / 4), 1024usize);
        let values = Shared::<[u32]>::new_aligned_slice(
            comptime!(stages * tile.value_bytes() / 4),
            1024usize,
        );
        let mut ones = Shared::<[u32]>::new_aligned_slice(256usize, 1024usize);
        let barriers = Shared::<[u64]>::new_aligned_slice(comptime!(2 * stages), 16usize);
        let ring = Ring {
            keys: generic_to_shared::<u32>(keys.as_ptr()),
            values: generic_to_shared::<u32>(values.as_ptr()),
            ones: generic_to_shared::<u32>(ones.as_ptr()),
            barriers: generic_to_shared::<u64>(barriers.as_ptr()),
        };
        if UNIT_POS == 0 {
            #[unroll]
            for stage in 0..comptime!(stages as u32) {
                barrier::init(ring.full(stage), 1);
                barrier::init(ring.empty(stage), comptime!(tile.consumers() as u32));
            }
            barrier::fence_init();
        }
        for at in range_stepped(UNIT_POS, 256, comptime!(tile.units() as u32)) {
            ones[at as usize] = comptime!(tile.ones());
        }
        tma::fence_writes();
        ring
    }

    /// Completes when a stage's tiles have arrived.
    pub fn full(&self, stage: u32) -> u32 {
        self.barriers + stage * 16
    }

    /// Completes when every consumer has used them.
    pub fn empty(&self, stage: u32) -> u32 {
        self.full(stage) + 8
    }

    /// Hands a stage back to the producer, once for the warpgroup.
    pub fn release(&self, stage: u32) {
        if UNIT_POS % 128 == 0 {
            barrier::arrive(self.empty(stage));
        }
    }
}
