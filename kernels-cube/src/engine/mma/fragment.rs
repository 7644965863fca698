//! Fragments as tensor cores hold them.

use cubecl::prelude::*;

use super::Pair;
use crate::engine::{Fragment, FragmentExpand};

/// A fragment as one array of two pairs for each 8 columns.
#[derive(CubeType)]
pub struct MmaFragment {
    pub(super) tiles: Sequence<Array<Pair<f32>>>,
    first_row: u32,
    #[cube(comptime)]
    pub(super) count: usize,
}

#[cube]
impl MmaFragment {
    pub(super) fn zeros(#[comptime] cols: usize) -> Self {
        let count = comptime!(cols / 8);
        let mut tiles = Sequence::<Array<Pair<f32>>>::new();
        #[unroll]
        for _ in 0..count {
            let mut tile = Array::<Pair<f32>>::new(2usize);
            tile[0] = Vector::new(0.0f32);
            tile[1] = Vector::new(0.0f32);
            tiles.push(tile);
        }
        MmaFragment {
            tiles,
            first_row: UNIT_POS / 32 * 16 + UNIT_POS_PLANE / 4,
            count,
        }
    }
}

#[cube]
impl Fragment for MmaFragment {
    fn rows(&self) -> comptime_type!(usize) {
        2usize
    }

    fn cols(&self) -> comptime_type!(usize) {
        comptime!(2 * self.count)
    }

    fn run(&self) -> comptime_type!(usize) {
        2usize
    }

    fn get(&self, #[comptime] r: usize, #[comptime] c: usize) -> f32 {
        self.tiles[comptime!(c / 2)][r].extract(comptime!(c % 2))
    }

    fn set(&mut self, #[comptime] r: usize, #[comptime] c: usize, value: f32) {
        let tile = self.tiles.index_mut(comptime!(c / 2));
        let mut pair = tile[r];
        pair.insert(comptime!(c % 2), value);
        tile[r] = pair;
    }

    fn row(&self, #[comptime] r: usize) -> u32 {
        self.first_row + comptime!(8 * r as u32)
    }

    fn col(&self, #[comptime] c: usize) -> u32 {
        UNIT_POS_PLANE % 4 * 2 + comptime!((c / 2 * 8 + c % 2) as u32)
    }
}
