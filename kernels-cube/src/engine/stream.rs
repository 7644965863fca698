//! Rows that stream past a tile program, in a ring of stages.

use cubecl::prelude::*;

use super::{Tile, TileEngine};
use crate::block_list::{Walk, WalkExpand};
use crate::rows::RowRange;

/// Two operands whose rows a [`Walk`] streams past a tile program.
///
/// There are `tile.stages` tiles of each. While one is multiplied, the others are on their way:
/// [`start`](Self::start) begins to load all but one of them, and [`next`](Self::next), once a tile
/// has arrived, the one that takes the place of the tile before it.
#[derive(CubeType)]
pub struct Streams<E: TileEngine<F>, F: Float> {
    /// The current tile of the first operand.
    pub first: E::Operand,
    /// The current tile of the second.
    pub second: E::Operand,
    #[cube(comptime)]
    tile: Tile,
}

#[cube]
impl<E: TileEngine<F>, F: Float> Streams<E, F> {
    /// Streams of rows of these widths.
    pub fn new(
        #[comptime] first_width: usize,
        #[comptime] second_width: usize,
        #[comptime] tile: Tile,
    ) -> Self {
        Streams::<E, F> {
            first: E::ring(first_width, tile),
            second: E::ring(second_width, tile),
            tile,
        }
    }

    /// Begins a walk over the rows of one head of both tensors. Every unit of the cube must call it.
    pub fn start<W: Walk, N: Size>(
        &mut self,
        walk: &W,
        list: &W::List,
        first: &Tensor<Vector<F, N>>,
        second: &Tensor<Vector<F, N>>,
        batch: usize,
        head: usize,
    ) {
        if comptime!(self.tile.stages > 1) {
            // The last tile of a walk before this one may still be being read.
            sync_cube();
        }
        #[unroll]
        for t in 0..comptime!(self.tile.stages as u32 - 1) {
            self.begin::<W, N>(t, walk, list, first, second, batch, head);
        }
    }

    /// Waits for tile `t`, which may then be read until the next call. Every unit of the cube must
    /// call it, with the arguments of [`start`](Self::start), for each tile in turn.
    pub fn next<W: Walk, N: Size>(
        &mut self,
        t: u32,
        walk: &W,
        list: &W::List,
        first: &Tensor<Vector<F, N>>,
        second: &Tensor<Vector<F, N>>,
        batch: usize,
        head: usize,
    ) {
        let stages = comptime!(self.tile.stages as u32);
        if comptime!(stages == 1) {
            sync_cube();
            self.begin::<W, N>(t, walk, list, first, second, batch, head);
            E::await_loads(0usize);
        } else {
            // Two loads to each tile that was begun after this one.
            let newer = comptime!(2 * (self.tile.stages - 2));
            if comptime!(newer == 0) {
                E::await_loads(0usize);
            } else {
                if t + comptime!(stages - 1) <= walk.tiles() {
                    E::await_loads(newer);
                } else {
                    E::await_loads(0usize);
                }
            }
            let next = t + comptime!(stages - 1);
            self.begin::<W, N>(next, walk, list, first, second, batch, head);
            self.turn(t);
        }
    }

    /// Begins to load tile `t`, if there is one.
    fn begin<W: Walk, N: Size>(
        &mut self,
        t: u32,
        walk: &W,
        list: &W::List,
        first: &Tensor<Vector<F, N>>,
        second: &Tensor<Vector<F, N>>,
        batch: usize,
        head: usize,
    ) {
        let tile = comptime!(self.tile);
        if t < walk.tiles() {
            self.turn(t);
            let span = walk.tile(list, t);
            let rows = RowRange::new::<F, N>(first, batch, head, span.first, span.end);
            E::begin_load::<N>(&mut self.first, first, rows, tile);
            let rows = RowRange::new::<F, N>(second, batch, head, span.first, span.end);
            E::begin_load::<N>(&mut self.second, second, rows, tile);
        }
    }

    fn turn(&mut self, t: u32) {
        if comptime!(self.tile.stages > 1) {
            let stage = t % comptime!(self.tile.stages as u32);
            E::turn(&mut self.first, stage);
            E::turn(&mut self.second, stage);
        }
    }
}
