//! Sizes of the portable engine's tile programs, and the factors that it multiplies.

use cubecl::ir::HardwareProperties;

use super::LANES;
use crate::FactorType;
use crate::engine::{Tile, TileNeeds};

/// Vectors from one row of a shared tile to the next: whole groups of the accumulator's columns, and
/// one of padding.
pub(super) fn pitch(width: usize) -> usize {
    (width / 4).next_multiple_of(LANES) + 1
}

/// Rows that each unit of a tile program holds.
pub(super) fn rows_per_unit(tile: Tile) -> usize {
    tile.rows * LANES / tile.units
}

/// Whether this engine makes products of these factors, or why not.
pub(crate) fn simt_supported(factors: FactorType) -> Result<(), &'static str> {
    match factors {
        FactorType::Tf32 => Err("it multiplies f32 as it is, and tf32 was asked for"),
        FactorType::F32 | FactorType::F16 | FactorType::BF16 => Ok(()),
    }
}

/// Tiles in the order they are tried: (rows, columns).
///
/// Larger tiles read each streamed row fewer times; the small ones exist for devices with 32 KiB of
/// shared memory and wide heads.
const CANDIDATES: [(usize, usize); 6] = [(64, 32), (32, 32), (32, 16), (16, 16), (16, 8), (8, 8)];

/// Columns of accumulators per unit from which four rows would spill.
const WIDE_ACCUMULATOR: usize = 4;

/// The largest tile program that fits the device.
pub fn simt_tile(needs: &TileNeeds, hardware: &HardwareProperties) -> Option<Tile> {
    simt_tiles(needs, hardware).next()
}

/// All tile programs of this engine that fit the device, larger tiles first.
pub fn simt_tiles(needs: &TileNeeds, hardware: &HardwareProperties) -> impl Iterator<Item = Tile> {
    let columns: usize = needs
        .accumulators
        .iter()
        .map(|width| width.div_ceil(4 * LANES) * 4)
        .sum();
    CANDIDATES
        .into_iter()
        .map(move |(rows, cols)| {
            let rows_per_unit = if columns <= WIDE_ACCUMULATOR {
                4usize
            } else {
                2
            }
            // Two planes of 32 at least, to hide some latency.
            .min(rows * LANES / 64);
            Tile {
                rows,
                cols,
                units: rows * LANES / rows_per_unit,
                stages: 1,
            }
        })
        .filter(move |tile| tile.rows <= needs.max_rows && tile.cols <= needs.max_cols)
        .filter(move |tile| simt_fits(needs, *tile, hardware))
}

/// Whether a cube of the device has the units and the shared memory of a tile program.
pub(crate) fn simt_fits(needs: &TileNeeds, tile: Tile, hardware: &HardwareProperties) -> bool {
    tile.units <= hardware.max_units_per_cube as usize
        && simt_shared_memory(needs, tile) <= hardware.max_shared_memory_size
}

/// Bytes of shared memory of a tile program.
pub(crate) fn simt_shared_memory(needs: &TileNeeds, tile: Tile) -> usize {
    let operands = |rows: usize, widths: &[usize]| -> usize {
        widths.iter().map(|&width| rows * pitch(width) * 16).sum()
    };
    operands(tile.rows, &needs.owned)
        + tile.stages * operands(tile.cols, &needs.streamed)
        + needs.lefts * tile.rows * (tile.cols + 1) * 4
        + tile.rows * LANES * 4
        // Feature maps reduce over a row's units.
        + tile.units * 4
}
