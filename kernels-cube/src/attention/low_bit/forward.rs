//! The kernel.

use cubecl::prelude::*;

use crate::block_list::{BlockListView, KeyWalk, Walk, WalkExpand};
use crate::engine::*;
use crate::mask::{TileWindow, scale_and_mask};
use crate::quantize::{Format, round_e4m3};
use crate::rows::{RowRange, RowTarget, store_rows};
use crate::softmax::OnlineSoftmax;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct LowBitConfig {
    pub tile: Tile,
    pub head_dim: usize,
    pub value_dim: usize,
    pub block_q: usize,
    pub block_k: usize,
    pub causal: bool,
    /// Of queries and keys.
    pub scores: Format,
    /// Whether values are FP8.
    pub fp8: bool,
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(super) struct LowBitScalars {
    pub scale: f32,
    pub causal_shift: i32,
    /// M.
    pub query_blocks: u32,
    /// N.
    pub key_blocks: u32,
}

/// As the kernel of [`crate::attention`]'s forward, with low-bit products of queries and keys.
///
/// Grid: x = tiles of query rows, y = query head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn low_bit_forward<E: CodeEngine<F>, F: Float, N: Size, V: Size, W: Size>(
    q: &Tensor<Vector<F, N>>,
    q_words: &[Vector<u32, W>],
    q_scales: &[f32],
    k_words: &[Vector<u32, W>],
    k_scales: &[f32],
    k_mean: &[f32],
    v: &Tensor<Vector<F, N>>,
    v_words: &[Vector<u32, W>],
    v_scales: &[f32],
    list: &BlockListView,
    out: &mut [Vector<F, V>],
    lse: &mut [f32],
    scalars: LowBitScalars,
    #[comptime] config: LowBitConfig,
    #[define(F)] _dtype: ElemType,
) {
    let tile = comptime!(config.tile);
    let (head, batch) = (CUBE_POS_Y as usize, CUBE_POS_Z as usize);
    let head_index = batch * q.shape(1) + head;
    let kv_head = head / (q.shape(1) / v.shape(1));
    let kv_index = batch * v.shape(1) + kv_head;
    let key_len = v.shape(2) as u32;

    let block_q = comptime!(config.block_q as u32);
    let tiles_per_block = comptime!(config.block_q.div_ceil(tile.rows) as u32);
    let query_block = CUBE_POS_X / tiles_per_block;
    let first_query =
        query_block * block_q + CUBE_POS_X % tiles_per_block * comptime!(tile.rows as u32);
    let end_query = min((query_block + 1) * block_q, q.shape(2) as u32);

    if first_query < end_query {
        let mut q_tile = E::codes(tile.rows, config.head_dim, config.scores, tile);
        let mut k_tile = E::codes(tile.cols, config.head_dim, config.scores, tile);
        let mut v_tile = E::operand(tile.cols, config.value_dim, tile);
        let mut weights = E::left(tile);
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
            key_len,
            block_k: config.block_k,
            cols: tile.cols,
        };
        let first_row = head_index * q.shape(2) + first_query as usize;
        let rows = end_query - first_query;
        E::begin_codes::<W>(&mut q_tile, q_words, first_row, rows, tile);
        let q_scale = q_scales[head_index * scalars.query_blocks as usize + query_block as usize];

        let tiles = walk.tiles();
        let first_key_row = kv_index * key_len as usize;
        if tiles > 0 {
            let keys = walk.tile(list, 0);
            let row = first_key_row + keys.first as usize;
            E::begin_codes::<W>(&mut k_tile, k_words, row, keys.rows(), tile);
        }
        for t in 0..tiles {
            let keys = walk.tile(list, t);
            // The last tile of values may still be being read.
            sync_cube();
            if config.fp8 {
                let row = first_key_row + keys.first as usize;
                E::load_numbers::<W>(&mut v_tile, v_words, row, keys.rows(), tile);
                E::await_loads(0usize);
            } else {
                let range = RowRange::new::<F, N>(v, batch, kv_head, keys.first, keys.end);
                E::begin_load::<N>(&mut v_tile, v, range, tile);
                // Values may still be on their way.
                E::await_loads(1usize);
            }

            E::mul_codes(&mut scores, &q_tile, &k_tile);
            let key_block = keys.first / comptime!(config.block_k as u32);
            let at = kv_index * scalars.key_blocks as usize + key_block as usize;
            let window = TileWindow {
                first_query,
                first_key: keys.first,
                end_key: keys.end,
                causal_shift: scalars.causal_shift,
            };
            let scale = scalars.scale * q_scale * k_scales[at];
            scale_and_mask::<E::Fragment>(&mut scores, window, scale, config.causal);
            softmax.step::<F, E>(&mut scores, &mut acc, &mut scratch, tile);
            if config.fp8 {
                #[unroll]
                for r in 0..scores.rows() {
                    #[unroll]
                    for c in 0..scores.cols() {
                        scores.set(r, c, round_e4m3(scores.get(r, c) * 448.0));
                    }
                }
            }
            E::stage(&mut weights, &scores);
            E::await_loads(0usize);
            if t + 1 < tiles {
                // No unit reads keys any more: the next come beside the product with the values.
                let keys = walk.tile(list, t + 1);
                let row = first_key_row + keys.first as usize;
                E::begin_codes::<W>(&mut k_tile, k_words, row, keys.rows(), tile);
            }
            E::mul_nn(&mut acc, &weights, &v_tile);
        }

        softmax.finish::<F, E>(&mut acc, &mut scratch, tile);
        if config.fp8 {
            #[unroll]
            for c in 0..acc.cols() {
                // Columns past the width are not stored.
                let column = min(acc.col(c), comptime!(config.value_dim as u32 - 1)) as usize;
                let factor = v_scales[kv_index * comptime!(config.value_dim) + column] / 448.0;
                #[unroll]
                for r in 0..acc.rows() {
                    acc.set(r, c, acc.get(r, c) * factor);
                }
            }
        }
        let target = RowTarget {
            first_row,
            len: rows,
            first_column: 0,
            end_column: comptime!(config.value_dim as u32),
        };
        store_rows::<F, V, E::Fragment>(out, &acc, target, config.value_dim);
        #[unroll]
        for r in 0..acc.rows() {
            if acc.col(0usize) == 0 && acc.row(r) < rows {
                // What smoothing took from every score of the row.
                let query = first_query as usize + acc.row(r) as usize;
                let start = batch * q.stride(0) + head * q.stride(1) + query * q.stride(2);
                let mut shift = 0.0f32.runtime();
                let size = q.vector_size();
                for i in 0..comptime!(config.head_dim / size) {
                    let x = q[(start + i * size * q.stride(3)) / size];
                    #[unroll]
                    for e in 0..size {
                        let mean = k_mean[kv_index * config.head_dim + i * size + e];
                        shift = fma(f32::cast_from(x.extract(e)), mean, shift);
                    }
                }
                let value = softmax.lse(r) + scalars.scale * shift;
                lse[first_row + acc.row(r) as usize] = value;
            }
        }
    }
}
