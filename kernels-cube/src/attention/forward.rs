//! Block-sparse attention, forward: the kernel.

use cubecl::prelude::*;

use crate::block_list::{BlockListView, BlockWeightsView, KeyWalk, Walk, WalkExpand};
use crate::engine::*;
use crate::mask::{TileWindow, add_to_all, scale_and_mask};
use crate::rows::{RowRange, RowTarget, store_rows};
use crate::softmax::OnlineSoftmax;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ForwardConfig {
    pub tile: Tile,
    pub head_dim: usize,
    pub value_dim: usize,
    pub block_q: usize,
    pub block_k: usize,
    pub causal: bool,
    /// Whether blocks have weights.
    pub weighted: bool,
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct ForwardScalars {
    pub scale: f32,
    pub causal_shift: i32,
}

/// One cube computes `tile.rows` rows of a query block. It walks the block's list, `tile.cols` keys
/// at a time, while the next tiles are on their way.
///
/// Grid: x = tiles of query rows, y = query head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn block_sparse_forward<E: TileEngine<F>, F: Float, N: Size, V: Size>(
    q: &Tensor<Vector<F, N>>,
    k: &Tensor<Vector<F, N>>,
    v: &Tensor<Vector<F, N>>,
    list: &BlockListView,
    weights: &BlockWeightsView, // not read if blocks have none
    out: &mut [Vector<F, V>],
    lse: &mut [f32],
    scalars: ForwardScalars,
    #[comptime] config: ForwardConfig,
    #[define(F)] _dtype: ElemType,
) {
    let tile = comptime!(config.tile);
    let head = CUBE_POS_Y as usize;
    let batch = CUBE_POS_Z as usize;
    let head_index = batch * q.shape(1) + head;
    let kv_head = head / (q.shape(1) / k.shape(1));

    let block_q = comptime!(config.block_q as u32);
    let tiles_per_block = comptime!(config.block_q.div_ceil(tile.rows) as u32);
    let query_block = CUBE_POS_X / tiles_per_block;
    let first_query =
        query_block * block_q + CUBE_POS_X % tiles_per_block * comptime!(tile.rows as u32);
    let end_query = min((query_block + 1) * block_q, q.shape(2) as u32);

    if first_query < end_query {
        let mut q_tile = E::operand(tile.rows, config.head_dim, tile);
        let mut tiles = Streams::<E, F>::new(config.head_dim, config.value_dim, tile);
        let mut left = E::left(tile);
        let mut scratch = E::scratch(tile);
        let mut scores = E::scores(tile);
        let mut acc = E::accumulator(config.value_dim, tile);
        let mut softmax = OnlineSoftmax::new(acc.rows());

        let mut row = list.row(head_index as u32, query_block);
        if config.causal {
            let last_query = min(first_query + comptime!(tile.rows as u32), end_query) - 1;
            let visible_keys = max(last_query as i32 + scalars.causal_shift + 1, 0) as u32;
            row.count =
                list.count_below(row, visible_keys.div_ceil(comptime!(config.block_k as u32)));
        }
        let walk = KeyWalk {
            row,
            key_len: k.shape(2) as u32,
            block_k: config.block_k,
            cols: tile.cols,
        };

        let queries = RowRange::new::<F, N>(q, batch, head, first_query, end_query);
        E::begin_load::<N>(&mut q_tile, q, queries, tile);
        tiles.start::<KeyWalk, N>(&walk, list, k, v, batch, kv_head);

        for t in 0..walk.tiles() {
            let keys = walk.tile(list, t);
            tiles.next::<KeyWalk, N>(t, &walk, list, k, v, batch, kv_head);
            E::mul_nt(&mut scores, &q_tile, &tiles.first);

            let window = TileWindow {
                first_query,
                first_key: keys.first,
                end_key: keys.end,
                causal_shift: scalars.causal_shift,
            };
            scale_and_mask::<E::Fragment>(&mut scores, window, scalars.scale, config.causal);
            if config.weighted {
                let key_block = keys.first / comptime!(config.block_k as u32);
                let weight = weights.at(head_index, query_block, key_block);
                add_to_all::<E::Fragment>(&mut scores, weight.ln());
            }
            softmax.step::<F, E>(&mut scores, &mut acc, &mut scratch, tile);
            E::stage(&mut left, &scores);
            E::sync_left();
            E::mul_nn(&mut acc, &left, &tiles.second);
        }

        softmax.finish::<F, E>(&mut acc, &mut scratch, tile);
        let out_row = head_index * q.shape(2) + first_query as usize;
        let rows = end_query - first_query;
        let target = RowTarget {
            first_row: out_row,
            len: rows,
            first_column: 0,
            end_column: comptime!(config.value_dim as u32),
        };
        store_rows::<F, V, E::Fragment>(out, &acc, target, config.value_dim);
        #[unroll]
        for r in 0..acc.rows() {
            if acc.col(0usize) == 0 && acc.row(r) < rows {
                lse[out_row + acc.row(r) as usize] = softmax.lse(r);
            }
        }
    }
}
