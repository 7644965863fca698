//! What listed blocks add to the gradients of the linear branch, or take from them.
//!
//! ```text
//! dphi(Q_i) += factor sum_j (dO_i V_j^T) phi(K_j)          over the list of i
//! dphi(K_j) += factor sum_i (V_j dO_i^T) (phi(Q_i) / n_i)  over the inverse list of j
//! dV_j      += factor sum_i (phi(K_j) (phi(Q_i) / n_i)^T) dO_i
//! ```

use cubecl::prelude::*;

use crate::block_list::{
    BlockListView, BlockWeightsView, InverseListView, KeyWalk, QueryWalk, Walk, WalkExpand,
};
use crate::engine::*;
use crate::rows::{RowRange, RowTarget, add_rows, store_rows};

/// What the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct WalkConfig {
    pub tile: Tile,
    pub head_dim: usize,
    pub value_dim: usize,
    pub block_q: usize,
    pub block_k: usize,
    /// Whether the gradients hold something already.
    pub accumulate: bool,
    /// Whether blocks have weights `m`, of which the branch has the rest, `1 - m`.
    pub weighted: bool,
}

/// Stages `factor p`.
#[cube]
fn stage_scaled<F: Float, E: TileEngine<F>>(left: &mut E::Left, p: &mut E::Fragment, factor: f32) {
    #[unroll]
    for r in 0..p.rows() {
        #[unroll]
        for c in 0..p.cols() {
            p.set(r, c, p.get(r, c) * factor);
        }
    }
    E::stage(left, &*p);
}

/// Grid: x = tiles of query rows, y = query head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn query_walk<E: TileEngine<F>, F: Float, N: Size, V: Size>(
    dout: &Tensor<Vector<F, N>>,  // [B, Hq, Lq, Dv]
    phi_k: &Tensor<Vector<F, N>>, // [B, Hkv, Lk, D]
    v: &Tensor<Vector<F, N>>,     // [B, Hkv, Lk, Dv]
    list: &BlockListView,
    weights: &BlockWeightsView,  // not read if blocks have none
    dphi: &mut [Vector<f32, V>], // [B, Hq, Lq, D]
    factor: f32,
    #[comptime] config: WalkConfig,
    #[define(F)] _dtype: ElemType,
) {
    let tile = comptime!(config.tile);
    let head = CUBE_POS_Y as usize;
    let batch = CUBE_POS_Z as usize;
    let head_index = batch * dout.shape(1) + head;
    let kv_head = head / (dout.shape(1) / v.shape(1));
    let block_q = comptime!(config.block_q as u32);
    let tiles_per_block = comptime!(config.block_q.div_ceil(tile.rows) as u32);
    let query_block = CUBE_POS_X / tiles_per_block;
    let first = query_block * block_q + CUBE_POS_X % tiles_per_block * comptime!(tile.rows as u32);
    let end = min((query_block + 1) * block_q, dout.shape(2) as u32);

    if first < end {
        let mut do_tile = E::operand(tile.rows, config.value_dim, tile);
        let mut tiles = Streams::<E, F>::new(config.value_dim, config.head_dim, tile);
        let mut left = E::left(tile);
        let mut scores = E::scores(tile);
        let mut acc = E::accumulator(config.head_dim, tile);
        let walk = KeyWalk {
            row: list.row(head_index as u32, query_block),
            key_len: v.shape(2) as u32,
            block_k: config.block_k,
            cols: tile.cols,
        };
        let grads = RowRange::new::<F, N>(dout, batch, head, first, end);
        E::begin_load::<N>(&mut do_tile, dout, grads, tile);
        tiles.start::<KeyWalk, N>(&walk, list, v, phi_k, batch, kv_head);
        for t in 0..walk.tiles() {
            tiles.next::<KeyWalk, N>(t, &walk, list, v, phi_k, batch, kv_head);
            E::mul_nt(&mut scores, &do_tile, &tiles.first);
            let mut scaled = factor;
            if config.weighted {
                let keys = walk.tile(list, t);
                let key_block = keys.first / comptime!(config.block_k as u32);
                scaled *= 1.0 - weights.at(head_index, query_block, key_block);
            }
            stage_scaled::<F, E>(&mut left, &mut scores, scaled);
            E::sync_left();
            E::mul_nn(&mut acc, &left, &tiles.second);
        }
        let target = RowTarget {
            first_row: head_index * dout.shape(2) + first as usize,
            len: end - first,
            first_column: 0,
            end_column: comptime!(config.head_dim as u32),
        };
        if config.accumulate {
            add_rows::<f32, V, E::Fragment>(&mut acc, &*dphi, target, config.head_dim);
        }
        store_rows::<f32, V, E::Fragment>(dphi, &acc, target, config.head_dim);
    }
}

/// Grid: x = tiles of keys, y = key head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn key_walk<E: TileEngine<F>, F: Float, N: Size, V: Size>(
    dout: &Tensor<Vector<F, N>>,  // [B, Hq, Lq, Dv]
    qn: &Tensor<Vector<F, N>>,    // phi(Q) / n [B, Hq, Lq, D]
    phi_k: &Tensor<Vector<F, N>>, // [B, Hkv, Lk, D]
    v: &Tensor<Vector<F, N>>,     // [B, Hkv, Lk, Dv]
    inverse: &InverseListView,
    weights: &BlockWeightsView,  // not read if blocks have none
    dphi: &mut [Vector<f32, V>], // [B, Hkv, Lk, D]
    dv: &mut [Vector<f32, V>],   // [B, Hkv, Lk, Dv]
    factor: f32,
    #[comptime] config: WalkConfig,
    #[define(F)] _dtype: ElemType,
) {
    let tile = comptime!(config.tile);
    let kv_head = CUBE_POS_Y as usize;
    let batch = CUBE_POS_Z as usize;
    let group = qn.shape(1) / v.shape(1);
    let block_k = comptime!(config.block_k as u32);
    let tiles_per_block = comptime!(config.block_k.div_ceil(tile.rows) as u32);
    let key_block = CUBE_POS_X / tiles_per_block;
    let first = key_block * block_k + CUBE_POS_X % tiles_per_block * comptime!(tile.rows as u32);
    let end = min((key_block + 1) * block_k, v.shape(2) as u32);

    if first < end {
        let mut k_tile = E::operand(tile.rows, config.head_dim, tile);
        let mut v_tile = E::operand(tile.rows, config.value_dim, tile);
        let mut tiles = Streams::<E, F>::new(config.head_dim, config.value_dim, tile);
        let mut p_left = E::left(tile);
        let mut du_left = E::left(tile);
        let mut scores = E::scores(tile);
        let mut dk_acc = E::accumulator(config.head_dim, tile);
        let mut dv_acc = E::accumulator(config.value_dim, tile);
        let keys = RowRange::new::<F, N>(phi_k, batch, kv_head, first, end);
        E::begin_load::<N>(&mut k_tile, phi_k, keys, tile);
        let values = RowRange::new::<F, N>(v, batch, kv_head, first, end);
        E::begin_load::<N>(&mut v_tile, v, values, tile);
        for member in 0..group {
            let head = kv_head * group + member;
            let head_index = batch * qn.shape(1) + head;
            let walk = QueryWalk {
                row: inverse.row(head_index as u32, key_block),
                query_len: qn.shape(2) as u32,
                block_q: config.block_q,
                cols: tile.cols,
            };
            tiles.start::<QueryWalk, N>(&walk, inverse, qn, dout, batch, head);
            for t in 0..walk.tiles() {
                tiles.next::<QueryWalk, N>(t, &walk, inverse, qn, dout, batch, head);
                let mut scaled = factor;
                if config.weighted {
                    let queries = walk.tile(inverse, t);
                    let query_block = queries.first / comptime!(config.block_q as u32);
                    scaled *= 1.0 - weights.at(head_index, query_block, key_block);
                }
                E::mul_nt(&mut scores, &k_tile, &tiles.first);
                stage_scaled::<F, E>(&mut p_left, &mut scores, scaled);
                E::mul_nt(&mut scores, &v_tile, &tiles.second);
                stage_scaled::<F, E>(&mut du_left, &mut scores, scaled);
                E::sync_left();
                E::mul_nn(&mut dv_acc, &p_left, &tiles.second);
                E::mul_nn(&mut dk_acc, &du_left, &tiles.first);
            }
        }
        let first_row = (batch * v.shape(1) + kv_head) * v.shape(2) + first as usize;
        let target = RowTarget {
            first_row,
            len: end - first,
            first_column: 0,
            end_column: comptime!(config.head_dim as u32),
        };
        if config.accumulate {
            add_rows::<f32, V, E::Fragment>(&mut dk_acc, &*dphi, target, config.head_dim);
        }
        store_rows::<f32, V, E::Fragment>(dphi, &dk_acc, target, config.head_dim);
        let target = RowTarget {
            first_row,
            len: end - first,
            first_column: 0,
            end_column: comptime!(config.value_dim as u32),
        };
        if config.accumulate {
            add_rows::<f32, V, E::Fragment>(&mut dv_acc, &*dv, target, config.value_dim);
        }
        store_rows::<f32, V, E::Fragment>(dv, &dv_acc, target, config.value_dim);
    }
}
