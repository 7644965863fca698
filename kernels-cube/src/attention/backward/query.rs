//! `dQ`: each query block walks its own list, as the forward does.

use cubecl::prelude::*;

use super::{BackwardConfig, RowStatistics};
use crate::attention::forward::ForwardScalars;
use crate::block_list::{BlockListView, BlockWeightsView, KeyWalk, Walk, WalkExpand};
use crate::engine::*;
use crate::mask::TileWindow;
use crate::rows::{RowRange, RowTarget, store_rows};

/// One cube computes `tile.rows` rows of a query block's `dQ = scale sum_j dS_j K_j`.
///
/// Grid: x = tiles of query rows, y = query head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn query_gradient<E: TileEngine<F>, F: Float, G: Float, N: Size, V: Size>(
    q: &Tensor<Vector<F, N>>,    // [B, Hq, Lq, D]
    k: &Tensor<Vector<F, N>>,    // [B, Hkv, Lk, D]
    v: &Tensor<Vector<F, N>>,    // [B, Hkv, Lk, Dv]
    dout: &Tensor<Vector<F, N>>, // [B, Hq, Lq, Dv]
    statistics: &RowStatistics,
    list: &BlockListView,
    weights: &BlockWeightsView, // not read if blocks have none
    dq: &mut [Vector<G, V>],    // [B, Hq, Lq, D]
    scalars: ForwardScalars,
    #[comptime] config: BackwardConfig,
    #[define(F)] _dtype: ElemType,
    #[define(G)] _grad_dtype: ElemType,
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
        let mut do_tile = E::operand(tile.rows, config.value_dim, tile);
        let mut tiles = Streams::<E, F>::new(config.head_dim, config.value_dim, tile);
        let mut left = E::left(tile);
        let mut scores = E::scores(tile);
        let mut dp = E::scores(tile);
        let mut acc = E::accumulator(config.head_dim, tile);

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

        let rows = acc.rows();
        let first_row = head_index * q.shape(2) + first_query as usize;
        let mut lse = Array::<f32>::new(rows);
        let mut delta = Array::<f32>::new(rows);
        #[unroll]
        for r in 0..rows {
            // Rows past the end are not stored; they only need numbers.
            let at = first_row + min(scores.row(r), end_query - first_query - 1) as usize;
            // A row of nothing but blocks of weight 0 has an infinite one.
            lse[r] = max(statistics.lse[at], f32::min_value());
            delta[r] = statistics.delta[at];
        }

        let queries = RowRange::new::<F, N>(q, batch, head, first_query, end_query);
        E::begin_load::<N>(&mut q_tile, q, queries, tile);
        let grads = RowRange::new::<F, N>(dout, batch, head, first_query, end_query);
        E::begin_load::<N>(&mut do_tile, dout, grads, tile);
        tiles.start::<KeyWalk, N>(&walk, list, k, v, batch, kv_head);

        for t in 0..walk.tiles() {
            let keys = walk.tile(list, t);
            tiles.next::<KeyWalk, N>(t, &walk, list, k, v, batch, kv_head);
            E::mul_nt(&mut scores, &q_tile, &tiles.first);
            E::mul_nt(&mut dp, &do_tile, &tiles.second);

            let window = TileWindow {
                first_query,
                first_key: keys.first,
                end_key: keys.end,
                causal_shift: scalars.causal_shift,
            };
            let mut bias = 0.0f32.runtime();
            if config.weighted {
                let key_block = keys.first / comptime!(config.block_k as u32);
                bias = weights.at(head_index, query_block, key_block).ln();
            }
            // dS = P (dP - delta), P = m exp(scale S - L).
            #[unroll]
            for r in 0..scores.rows() {
                let end = window.end_seen(first_query + scores.row(r), config.causal);
                #[unroll]
                for c in 0..scores.cols() {
                    let visible = window.first_key + scores.col(c) < end;
                    let p = (scores.get(r, c) * scalars.scale + bias - lse[r]).exp();
                    let ds = p * (dp.get(r, c) - delta[r]);
                    scores.set(r, c, select(visible, ds, 0.0));
                }
            }
            E::stage(&mut left, &scores);
            E::sync_left();
            E::mul_nn(&mut acc, &left, &tiles.first);
        }

        #[unroll]
        for r in 0..acc.rows() {
            #[unroll]
            for c in 0..acc.cols() {
                acc.set(r, c, acc.get(r, c) * scalars.scale);
            }
        }
        let target = RowTarget {
            first_row,
            len: end_query - first_query,
            first_column: 0,
            end_column: comptime!(config.head_dim as u32),
        };
        store_rows::<G, V, E::Fragment>(dq, &acc, target, config.head_dim);
    }
}
