//! `dK` and `dV`: each key block walks the query blocks that selected it.

use cubecl::prelude::*;

use super::{BackwardConfig, RowStatistics};
use crate::attention::forward::ForwardScalars;
use crate::block_list::{BlockWeightsView, InverseListView, QueryWalk, Walk, WalkExpand};
use crate::engine::*;
use crate::mask::TileWindow;
use crate::rows::{RowRange, RowTarget, store_rows};

/// One cube computes `tile.rows` rows of a key block's `dV = sum_i P_i^T dO_i` and
/// `dK = scale sum_i dS_i^T Q_i`, over the query blocks of every head that reads the key head.
///
/// Grid: x = tiles of keys, y = key head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn key_gradients<E: TileEngine<F>, F: Float, G: Float, N: Size, V: Size>(
    q: &Tensor<Vector<F, N>>,    // [B, Hq, Lq, D]
    k: &Tensor<Vector<F, N>>,    // [B, Hkv, Lk, D]
    v: &Tensor<Vector<F, N>>,    // [B, Hkv, Lk, Dv]
    dout: &Tensor<Vector<F, N>>, // [B, Hq, Lq, Dv]
    statistics: &RowStatistics,
    inverse: &InverseListView,
    weights: &BlockWeightsView, // not read if blocks have none
    dk: &mut [Vector<G, V>],    // [B, Hkv, Lk, D]
    dv: &mut [Vector<G, V>],    // [B, Hkv, Lk, Dv]
    scalars: ForwardScalars,
    #[comptime] config: BackwardConfig,
    #[define(F)] _dtype: ElemType,
    #[define(G)] _grad_dtype: ElemType,
) {
    let tile = comptime!(config.tile);
    let kv_head = CUBE_POS_Y as usize;
    let batch = CUBE_POS_Z as usize;
    let group = q.shape(1) / k.shape(1);
    let query_len = q.shape(2) as u32;

    let block_k = comptime!(config.block_k as u32);
    let tiles_per_block = comptime!(config.block_k.div_ceil(tile.rows) as u32);
    let key_block = CUBE_POS_X / tiles_per_block;
    let first_key =
        key_block * block_k + CUBE_POS_X % tiles_per_block * comptime!(tile.rows as u32);
    let end_key = min((key_block + 1) * block_k, k.shape(2) as u32);

    if first_key < end_key {
        let mut k_tile = E::operand(tile.rows, config.head_dim, tile);
        let mut v_tile = E::operand(tile.rows, config.value_dim, tile);
        let mut tiles = Streams::<E, F>::new(config.head_dim, config.value_dim, tile);
        let mut p_left = E::left(tile);
        let mut ds_left = E::left(tile);
        let mut scores = E::scores(tile);
        let mut ds = E::scores(tile);
        let mut dk_acc = E::accumulator(config.head_dim, tile);
        let mut dv_acc = E::accumulator(config.value_dim, tile);

        let keys = RowRange::new::<F, N>(k, batch, kv_head, first_key, end_key);
        E::begin_load::<N>(&mut k_tile, k, keys, tile);
        let values = RowRange::new::<F, N>(v, batch, kv_head, first_key, end_key);
        E::begin_load::<N>(&mut v_tile, v, values, tile);

        for member in 0..group {
            let head = kv_head * group + member;
            let head_index = batch * q.shape(1) + head;
            let mut row = inverse.row(head_index as u32, key_block);
            if config.causal {
                let first_seen = max(first_key as i32 - scalars.causal_shift, 0) as u32;
                let unseen =
                    inverse.count_below(row, first_seen / comptime!(config.block_q as u32));
                row.start += unseen as usize;
                row.count -= unseen;
            }
            let walk = QueryWalk {
                row,
                query_len,
                block_q: config.block_q,
                cols: tile.cols,
            };
            tiles.start::<QueryWalk, N>(&walk, inverse, q, dout, batch, head);
            for t in 0..walk.tiles() {
                let queries = walk.tile(inverse, t);
                tiles.next::<QueryWalk, N>(t, &walk, inverse, q, dout, batch, head);
                E::mul_nt(&mut scores, &k_tile, &tiles.first);
                let window = TileWindow {
                    first_query: queries.first,
                    first_key,
                    end_key,
                    causal_shift: scalars.causal_shift,
                };
                let mut bias = 0.0f32.runtime();
                if config.weighted {
                    let query_block = queries.first / comptime!(config.block_q as u32);
                    bias = weights.at(head_index, query_block, key_block).ln();
                }
                // P^T = m exp(scale S^T - L), a query to a column.
                let first_row = head_index * query_len as usize;
                #[unroll]
                for c in 0..scores.cols() {
                    let query = queries.first + scores.col(c);
                    let at = first_row + min(query, queries.end - 1) as usize;
                    // A row of nothing but blocks of weight 0 has an infinite one.
                    let shift = bias - max(statistics.lse[at], f32::min_value());
                    let end = select(
                        query < queries.end,
                        window.end_seen(query, config.causal),
                        0,
                    );
                    #[unroll]
                    for r in 0..scores.rows() {
                        let visible = first_key + scores.row(r) < end;
                        let p = (scores.get(r, c) * scalars.scale + shift).exp();
                        scores.set(r, c, select(visible, p, 0.0));
                    }
                }
                E::stage(&mut p_left, &scores);

                E::mul_nt(&mut ds, &v_tile, &tiles.second);
                // dS^T = P^T (dP^T - delta).
                #[unroll]
                for c in 0..ds.cols() {
                    let query = queries.first + ds.col(c);
                    let delta = statistics.delta[first_row + min(query, queries.end - 1) as usize];
                    #[unroll]
                    for r in 0..ds.rows() {
                        let p = scores.get(r, c);
                        // What a query does not see may be NaN.
                        let product = p * (ds.get(r, c) - delta);
                        ds.set(r, c, select(p == 0.0, 0.0, product));
                    }
                }
                E::stage(&mut ds_left, &ds);
                E::sync_left();
                E::mul_nn(&mut dv_acc, &p_left, &tiles.second);
                E::mul_nn(&mut dk_acc, &ds_left, &tiles.first);
            }
        }

        #[unroll]
        for r in 0..dk_acc.rows() {
            #[unroll]
            for c in 0..dk_acc.cols() {
                dk_acc.set(r, c, dk_acc.get(r, c) * scalars.scale);
            }
        }
        let first_row = (batch * k.shape(1) + kv_head) * k.shape(2) + first_key as usize;
        let target = RowTarget {
            first_row,
            len: end_key - first_key,
            first_column: 0,
            end_column: comptime!(config.head_dim as u32),
        };
        store_rows::<G, V, E::Fragment>(dk, &dk_acc, target, config.head_dim);
        let target = RowTarget {
            first_row,
            len: end_key - first_key,
            first_column: 0,
            end_column: comptime!(config.value_dim as u32),
        };
        store_rows::<G, V, E::Fragment>(dv, &dv_acc, target, config.value_dim);
    }
}
