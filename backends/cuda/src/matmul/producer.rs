//! The producer: one unit that keeps the ring of steps full.

use cubecl::prelude::*;

use super::config::{MatmulTile, Memory, ROWS};
use super::kernel::{Item, MatmulScalars, first_item, item_stride, rank};
use crate::forward::config::Place;
use crate::ptx::tma::L2;
use crate::ptx::{barrier, tma};

/// Loads the tiles of each step as soon as there is room, so that it runs ahead into the next item.
///
/// In a cluster each producer loads its own rows of X, and half of the rows of W for both cubes. A
/// stage is therefore written to only when the consumers of both have handed it back.
#[cube]
pub(crate) fn produce(
    x: u64,
    w: u64,
    memory: Memory,
    scalars: MatmulScalars,
    #[comptime] tile: MatmulTile,
) {
    let x_bytes = comptime!(tile.x_bytes() as u32);
    let w_bytes = comptime!(tile.w_bytes() as u32);
    let rows = comptime!(ROWS as u32);
    let mut place = Place::first(comptime!(tile.stages()));
    let mut index = first_item(tile);
    while index < scalars.row_tiles * scalars.column_tiles {
        let item = Item::new(index, scalars, tile);
        // A step is 32 words of four elements.
        for word in range_stepped(0u32, scalars.steps * 32, 32u32) {
            barrier::wait(memory.empty(place.stage), place.parity ^ 1);
            let full = memory.full(place.stage);
            barrier::arrive_expect(full, x_bytes + w_bytes);
            let to = memory.x + place.stage * x_bytes;
            tma::load(to, x, full, word, item.row, 0u32, 0u32, L2::Normal);
            let to = memory.w + place.stage * w_bytes;
            if comptime!(tile.cluster > 1) {
                let half = rank(tile);
                let to = to + half * comptime!(tile.box_bytes() as u32);
                let row = item.column + half * rows;
                tma::load_to_both(to, w, full, word, row, 0u32, 0u32);
            } else {
                tma::load(to, w, full, word, item.column, 0u32, 0u32, L2::Normal);
                let to = to + comptime!(tile.box_bytes() as u32);
                tma::load(
                    to,
                    w,
                    full,
                    word,
                    item.column + rows,
                    0u32,
                    0u32,
                    L2::Normal,
                );
            }
            place.advance();
        }
        index += item_stride(tile);
    }
}
