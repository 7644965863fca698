//! The output of linear attention: `O = phi(Q) H / (phi(Q) . Z)`.

use cubecl::prelude::*;

use super::FeatureMap;
use crate::engine::*;
use crate::rows::{RowRange, RowTarget, store_rows};

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct OutputConfig {
    pub tile: Tile,
    pub head_dim: usize,
    pub value_dim: usize,
    pub phi: FeatureMap,
    /// Keys of a chunk if queries see only the keys before them.
    pub causal_chunk: Option<usize>,
}

/// One cube computes `tile.rows` rows. If causal, `h` and `z` are the states of all chunks before
/// the rows' own, whose keys are taken one tile at a time.
///
/// Grid: x = tiles of rows, y = query head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn linear_output<E: TileEngine<F>, F: Float, N: Size, V: Size>(
    q: &Tensor<Vector<F, N>>, // [B, Hq, Lq, D]
    k: &Tensor<Vector<F, N>>, // [B, Hkv, Lk, D]
    v: &Tensor<Vector<F, N>>, // [B, Hkv, Lk, Dv]
    h: &Tensor<Vector<F, N>>, // [chunks * B, Hkv, D, Dv]
    z: &[f32],                // [chunks * B, Hkv, D]
    out: &mut [Vector<F, V>], // [B, Hq, Lq, Dv]
    state_scale: f32,
    #[comptime] config: OutputConfig,
    #[define(F)] _dtype: ElemType,
) {
    let tile = comptime!(config.tile);
    let head = CUBE_POS_Y as usize;
    let batch = CUBE_POS_Z as usize;
    let kv_head = head / (q.shape(1) / h.shape(1));
    let first = CUBE_POS_X * comptime!(tile.rows as u32);
    let rows = RowRange::new::<F, N>(q, batch, head, first, q.shape(2) as u32);

    let mut queries = E::operand(tile.rows, config.head_dim, tile);
    let mut right = E::operand(tile.cols, config.value_dim, tile);
    let mut acc = E::accumulator(config.value_dim, tile);
    let mut scratch = E::scratch(tile);
    let mut sums = Array::<f32>::new(acc.rows());
    #[unroll]
    for r in 0..acc.rows() {
        sums[r] = 0.0;
    }
    E::begin_load::<N>(&mut queries, q, rows, tile);
    E::await_loads(0usize);
    E::apply_feature_map(&mut queries, comptime!(tile.rows as u32), config.phi, tile);

    let mut state_batch = batch;
    if comptime!(config.causal_chunk.is_some()) {
        let chunk = first / comptime!(config.causal_chunk.unwrap() as u32);
        state_batch = chunk as usize * q.shape(0) + batch;
    }
    multiply_state::<E, F, N>(
        &mut acc,
        &queries,
        &mut right,
        h,
        state_batch,
        kv_head,
        tile,
        config.head_dim,
    );
    let state = (state_batch * h.shape(1) + kv_head) * config.head_dim;
    E::row_dot(
        &mut sums,
        &queries,
        &z[state..state + config.head_dim],
        tile,
    );

    if comptime!(config.causal_chunk.is_some()) {
        let chunk = comptime!(config.causal_chunk.unwrap() as u32);
        let mut keys = E::operand(tile.cols, config.head_dim, tile);
        let mut scores = E::scores(tile);
        let mut weights = E::left(tile);
        let end = min(first + comptime!(tile.rows as u32), q.shape(2) as u32);
        let mut at = first / chunk * chunk;
        while at < end {
            let key_rows = RowRange::new::<F, N>(k, batch, kv_head, at, end);
            E::begin_load::<N>(&mut keys, k, key_rows, tile);
            let value_rows = RowRange::new::<F, N>(v, batch, kv_head, at, end);
            E::begin_load::<N>(&mut right, v, value_rows, tile);
            E::await_loads(1usize);
            E::apply_feature_map(&mut keys, key_rows.len, config.phi, tile);
            E::mul_nt(&mut scores, &queries, &keys);
            #[unroll]
            for r in 0..scores.rows() {
                #[unroll]
                for c in 0..scores.cols() {
                    let seen = at + scores.col(c) <= first + scores.row(r);
                    let weight = select(seen, scores.get(r, c) * state_scale, 0.0);
                    sums[r] += weight;
                    scores.set(r, c, weight);
                }
            }
            E::stage(&mut weights, &scores);
            E::await_loads(0usize);
            E::mul_nn(&mut acc, &weights, &right);
            sync_cube();
            at += comptime!(tile.cols as u32);
        }
    }

    E::row_sum(&mut sums, &mut scratch, tile);
    divide_rows::<E::Fragment>(&mut acc, &sums);
    let target = RowTarget {
        first_row: (batch * q.shape(1) + head) * q.shape(2) + first as usize,
        len: rows.len,
        first_column: 0,
        end_column: comptime!(config.value_dim as u32),
    };
    store_rows::<F, V, E::Fragment>(out, &acc, target, config.value_dim);
}

/// `acc += phi(Q) H`, the state's `dim` rows read a tile at a time.
#[cube]
pub(crate) fn multiply_state<E: TileEngine<F>, F: Float, N: Size>(
    acc: &mut E::Fragment,
    queries: &E::Operand,
    right: &mut E::Operand,
    h: &Tensor<Vector<F, N>>,
    batch: usize,
    head: usize,
    #[comptime] tile: Tile,
    #[comptime] dim: usize,
) {
    let dim = comptime!(dim as u32);
    let cols = comptime!(tile.cols as u32);
    for step in 0..dim.div_ceil(cols) {
        let rows = RowRange::new::<F, N>(h, batch, head, step * cols, dim);
        E::begin_load::<N>(right, h, rows, tile);
        E::await_loads(0usize);
        E::mul_on(acc, queries, step * cols, &*right);
        sync_cube();
    }
}

/// Divides each row by its sum; a row whose sum is 0 becomes 0.
#[cube]
pub(crate) fn divide_rows<Fr: Fragment>(acc: &mut Fr, sums: &Array<f32>) {
    #[unroll]
    for r in 0..acc.rows() {
        let inverse = select(sums[r] == 0.0, 0.0, 1.0 / sums[r]);
        #[unroll]
        for c in 0..acc.cols() {
            acc.set(r, c, acc.get(r, c) * inverse);
        }
    }
}
