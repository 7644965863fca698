//! What the product is compiled for, and where things lie in its shared memory.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::generic_to_shared;
use cubesla_kernels::DType;

use crate::ptx::matmul::{DEPTH, Sums};
use crate::ptx::{barrier, cluster};

/// Warpgroups that compute, 64 rows of the result each.
const CONSUMERS: usize = 2;
/// Columns of a cube's tile of the result.
pub(crate) const COLUMNS: usize = 256;
/// Rows of a cube's tile of the result, and of a box of either operand.
pub(crate) const ROWS: usize = 64 * CONSUMERS;
/// Steps in flight.
const STAGES: usize = 4;

/// Sizes and arithmetic of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MatmulTile {
    /// FP8 e4m3 rather than INT8.
    pub fp8: bool,
    /// Whether scales change along K: those of X are then applied to each step.
    pub steps: bool,
    /// Whether those of W are as well, being the same in 128 columns.
    pub w_steps: bool,
    /// Whether there is a bias.
    pub bias: bool,
    /// Cubes, one below the other, that share their loads of W: 1 or 2.
    pub cluster: usize,
    /// Type of the result.
    pub dtype: DType,
}

impl MatmulTile {
    pub(crate) fn sums(&self) -> Sums {
        Sums {
            fp8: self.fp8,
            scaled_steps: self.steps,
        }
    }

    /// Whether sums of 256 products are added to the totals rather than of 128: twice the error of
    /// FP8's, a sixth of what rounding to bf16 costs.
    pub(crate) fn pairs(&self) -> bool {
        self.fp8 && !self.steps && self.dtype == DType::BF16
    }

    /// Rows of the result of a cluster.
    pub(crate) fn cluster_rows(&self) -> usize {
        self.cluster * ROWS
    }

    /// Units of a cube: the consumers and a warpgroup whose first unit is the producer.
    pub(crate) fn units(&self) -> usize {
        128 * (CONSUMERS + 1)
    }

    /// First unit of the producer's warpgroup.
    pub(crate) fn producer(&self) -> usize {
        128 * CONSUMERS
    }

    pub(crate) fn stages(&self) -> usize {
        STAGES
    }

    /// Bytes of a box of 128 rows.
    pub(crate) fn box_bytes(&self) -> usize {
        ROWS * DEPTH
    }

    pub(crate) fn x_bytes(&self) -> usize {
        self.box_bytes()
    }

    pub(crate) fn w_bytes(&self) -> usize {
        COLUMNS * DEPTH
    }

    /// Columns of a box of the result, 128 bytes.
    pub(crate) fn out_columns(&self) -> usize {
        128 / self.dtype.size()
    }

    /// Bytes of a box of 64 rows of the result.
    pub(crate) fn out_bytes(&self) -> usize {
        64 * 128
    }

    /// Registers that a unit of the producer's warpgroup keeps and that a consumer unit takes. These
    /// are all of a multiprocessor, if the kernel has the 168 of an even share:
    /// `cargo xtask cuda` checks it.
    pub(crate) fn registers(&self) -> (u32, u32) {
        (40, 232)
    }
}

/// Shared addresses.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Memory {
    pub x: u32,
    pub w: u32,
    /// Two boxes of the result for each consumer.
    pub out: u32,
    barriers: u32,
    /// The barriers of the cube of the cluster that this unit releases stages to.
    released: u32,
}

#[cube]
impl Memory {
    /// Reserves the shared memory of a cube and initialises the barriers, which are usable after the
    /// next barrier of the cube or cluster.
    pub fn new(#[comptime] tile: MatmulTile) -> Memory {
        let stages = comptime!(tile.stages());
        let x =
            Shared::<[u32]>::new_aligned_slice(comptime!(stages * tile.x_bytes() / 4), 1024usize);
        let w =
            Shared::<[u32]>::new_aligned_slice(comptime!(stages * tile.w_bytes() / 4), 1024usize);
        let out = Shared::<[u32]>::new_aligned_slice(
            comptime!(CONSUMERS * 2 * tile.out_bytes() / 4),
            1024usize,
        );
        let barriers = Shared::<[u64]>::new_aligned_slice(comptime!(2 * stages), 16usize);
        let barriers = generic_to_shared::<u64>(barriers.as_ptr());
        let released = if comptime!(tile.cluster == 1) {
            barriers
        } else {
            cluster::address_in(barriers, UNIT_POS % comptime!(tile.cluster as u32))
        };
        let memory = Memory {
            x: generic_to_shared::<u32>(x.as_ptr()),
            w: generic_to_shared::<u32>(w.as_ptr()),
            out: generic_to_shared::<u32>(out.as_ptr()),
            barriers,
            released,
        };
        if UNIT_POS == 0 {
            #[unroll]
            for stage in 0..comptime!(stages as u32) {
                barrier::init(memory.full(stage), 1);
                barrier::init(
                    memory.empty(stage),
                    comptime!((CONSUMERS * tile.cluster) as u32),
                );
            }
            barrier::fence_init();
        }
        memory
    }

    /// Completes when a stage's tiles have arrived.
    pub fn full(&self, stage: u32) -> u32 {
        self.barriers + stage * 16
    }

    /// Completes when every consumer of the cluster has used them.
    pub fn empty(&self, stage: u32) -> u32 {
        self.full(stage) + 8
    }

    /// Hands a stage back to the producers that fill it: a unit of the warpgroup for each.
    pub fn release(&self, stage: u32, #[comptime] tile: MatmulTile) {
        if UNIT_POS % 128 < comptime!(tile.cluster as u32) {
            let empty = self.released + stage * 16 + 8;
            if comptime!(tile.cluster == 1) {
                barrier::arrive(empty);
            } else {
                cluster::arrive(empty);
            }
        }
    }
}
