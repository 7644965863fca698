//! Sizes of tile programs, and which devices can run them.

use cubecl::features::MmaConfig;
use cubecl::ir::{DeviceProperties, ElemType, FloatKind, IntKind};

use super::operand::pitch;
use crate::FactorType;
use crate::engine::{Tile, TileNeeds};
use crate::quantize::Format;

/// Whether the device can multiply factors of this type, or why not.
pub(crate) fn mma_supported(
    factors: FactorType,
    device: &DeviceProperties,
) -> Result<(), &'static str> {
    let (k, missing) = match factors {
        FactorType::F32 => {
            return Err(
                "the tensor cores would round f32 to tf32, which F32Products::Tf32 asks for",
            );
        }
        FactorType::Tf32 => (8, "the device has no 16x8x8 product of tf32"),
        FactorType::F16 | FactorType::BF16 => {
            (16, "the device has no 16x8x16 product of this type")
        }
    };
    let elem = factors.elem_type();
    // Rows of matrices are moved as 16 bytes of 16-bit elements whatever they hold.
    let moved = match factors {
        FactorType::BF16 => elem,
        _ => ElemType::Float(FloatKind::F16),
    };
    let sums = ElemType::Float(FloatKind::F32);
    if !has_product(device, elem, sums, k) || !device.features.matmul.ldmatrix.contains(&moved) {
        return Err(missing);
    }
    if device.hardware.plane_size_min != 32 || device.hardware.plane_size_max != 32 {
        return Err("fragments are laid out for planes of 32 units");
    }
    if !device.features.copy_async {
        return Err("the device has no asynchronous copies to shared memory");
    }
    Ok(())
}

/// Whether the device can multiply codes of this 8-bit format as they are, or why not.
pub(crate) fn mma_codes_supported(
    format: Format,
    device: &DeviceProperties,
) -> Result<(), &'static str> {
    mma_supported(FactorType::F16, device)?;
    let (elem, sums, missing) = match format {
        Format::Fp8 => (
            ElemType::Float(FloatKind::E4M3),
            ElemType::Float(FloatKind::F32),
            "the device has no 16x8x32 product of FP8",
        ),
        Format::Int8 | Format::Int4 => (
            ElemType::Int(IntKind::I8),
            ElemType::Int(IntKind::I32),
            "the device has no 16x8x32 product of INT8",
        ),
    };
    if !has_product(device, elem, sums, 32) {
        return Err(missing);
    }
    Ok(())
}

/// Whether the device multiplies 16 rows by 8 columns, `k` of each.
fn has_product(device: &DeviceProperties, elem: ElemType, sums: ElemType, k: u32) -> bool {
    device.features.matmul.mma.contains(&MmaConfig {
        a_type: elem,
        b_type: elem,
        cd_type: sums,
        m: 16,
        n: 8,
        k,
    })
}

/// The tile program of this engine, or why it cannot run.
///
/// # Errors
/// The reason, in a few words.
pub fn mma_tile(
    needs: &TileNeeds,
    factors: FactorType,
    device: &DeviceProperties,
) -> Result<Tile, &'static str> {
    let tiles = mma_tiles(needs, factors, device)?;
    // Of 128 rows, half as many cubes fit a multiprocessor, each of which waits as one.
    tiles
        .into_iter()
        .find(|tile| tile.rows <= 64)
        .ok_or("no tile fits the shared memory")
}

/// All tile programs of this engine that the device can run, larger tiles first; of each size the one
/// with the most stages that are worth their memory.
///
/// # Errors
/// Why it can run none, in a few words.
pub fn mma_tiles(
    needs: &TileNeeds,
    factors: FactorType,
    device: &DeviceProperties,
) -> Result<Vec<Tile>, &'static str> {
    mma_supported(factors, device)?;
    let columns: usize = needs.accumulators.iter().sum();
    if columns > 256 {
        return Err("the accumulators do not fit the registers");
    }
    // A left side of tf32 has twice the registers for as many columns, which programs of more than one
    // product of a kind do not have to spare.
    let crowded = factors == FactorType::Tf32 && (needs.owned.len() > 1 || needs.lefts > 1);
    let most_cols = match (columns > 128, crowded) {
        (true, true) => 16,
        (true, false) | (false, true) => 32,
        (false, false) => 64,
    };
    let sizes = [128, 64, 32, 16].map(|rows| [64, 32, 16].map(|cols| (rows, cols)));
    let tiles = sizes
        .into_iter()
        .flatten()
        .filter(|(rows, cols)| {
            *rows <= needs.max_rows && *cols <= most_cols && needs.max_cols.is_multiple_of(*cols)
        })
        .filter_map(|size| staged(needs, size, factors, device.hardware.max_shared_memory_size))
        .collect();
    Ok(tiles)
}

/// A tile program of so many rows and columns in `memory` bytes, or none if it does not fit.
///
/// Two stages hide a copy behind a tile's products. A third hides what is left of it, if 16 planes
/// still fit a multiprocessor, whose memory is about what one cube may have.
fn staged(
    needs: &TileNeeds,
    (rows, cols): (usize, usize),
    factors: FactorType,
    memory: usize,
) -> Option<Tile> {
    let tile = |stages| Tile {
        rows,
        cols,
        units: rows * 2,
        stages,
    };
    let planes =
        |tile: &Tile| memory / shared_memory(needs, factors, *tile).max(1) * (tile.units / 32);
    let third = Some(tile(3)).filter(|tile| planes(tile) >= 16);
    third
        .into_iter()
        .chain([tile(2), tile(1)])
        .find(|tile| tile.stages <= needs.max_stages && planes(tile) > 0)
}

/// Bytes of shared memory of a tile program.
fn shared_memory(needs: &TileNeeds, factors: FactorType, tile: Tile) -> usize {
    let wide = 16 / factors.stored_size();
    let operands = |rows: usize, widths: &[usize]| -> usize {
        widths
            .iter()
            .map(|&width| rows * pitch(width, wide) * 16)
            .sum()
    };
    operands(tile.rows, &needs.owned)
        + tile.stages * operands(tile.cols, &needs.streamed)
        + tile.units * needs.unit_bytes
}
