//! Gradients of the linear branch of a tile of rows, from a state that all of them share.

use cubecl::prelude::*;

use super::super::slope;
use crate::engine::*;
use crate::linear::{FeatureMap, multiply_state};
use crate::rows::{RowRange, RowTarget, add_rows, store_rows};

/// What the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct RowConfig {
    pub tile: Tile,
    pub head_dim: usize,
    pub value_dim: usize,
    pub phi: FeatureMap,
}

/// Adds each row's products of `p` and `a` to the unit's part of the row's sum.
#[cube]
fn add_products<F: Float, E: TileEngine<F>>(
    sums: &mut Array<f32>,
    p: &E::Fragment,
    a: &E::Operand,
) {
    let cols = p.cols();
    #[unroll]
    for step in 0..comptime!(cols.div_ceil(4)) {
        let elements = E::elements(a, p, step);
        #[unroll]
        for r in 0..p.rows() {
            #[unroll]
            for i in 0..4usize {
                let c = comptime!(4 * step + i);
                if comptime!(c < cols) {
                    sums[r] = fma(p.get(r, c), elements[comptime!(4 * r + i)], sums[r]);
                }
            }
        }
    }
}

/// `p = (p - means) phi'`, row by row, where `a` holds the values of phi.
#[cube]
fn multiply_slopes<F: Float, E: TileEngine<F>>(
    p: &mut E::Fragment,
    a: &E::Operand,
    means: &Array<f32>,
    #[comptime] phi: FeatureMap,
) {
    let cols = p.cols();
    #[unroll]
    for step in 0..comptime!(cols.div_ceil(4)) {
        let elements = E::elements(a, &*p, step);
        #[unroll]
        for r in 0..p.rows() {
            #[unroll]
            for i in 0..4usize {
                let c = comptime!(4 * step + i);
                if comptime!(c < cols) {
                    let y = elements[comptime!(4 * r + i)];
                    p.set(r, c, (p.get(r, c) - means[r]) * slope(y, phi));
                }
            }
        }
    }
}

/// A row's numbers, all 0.
#[cube]
fn zeros(#[comptime] rows: usize) -> Array<f32> {
    let mut numbers = Array::<f32>::new(rows);
    #[unroll]
    for r in 0..rows {
        numbers[r] = 0.0;
    }
    numbers
}

/// Stores the first `len` rows of `acc`, `width` wide, added to those of `others`, from `first_row` on.
#[cube]
fn store_sum<F: Float, G: Float, V: Size, E: TileEngine<F>>(
    to: &mut [Vector<F, V>],
    others: &[Vector<G, V>],
    acc: &mut E::Fragment,
    first_row: usize,
    len: u32,
    #[comptime] width: usize,
) {
    let target = RowTarget {
        first_row,
        len,
        first_column: 0,
        end_column: comptime!(width as u32),
    };
    add_rows::<G, V, E::Fragment>(acc, others, target, width);
    store_rows::<F, V, E::Fragment>(to, &*acc, target, width);
}

/// Grid: x = tiles of query rows, y = query head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn query_rows<E: TileEngine<F>, F: Float, G: Float, N: Size, V: Size>(
    q: &Tensor<Vector<F, N>>,    // [B, Hq, Lq, D]
    dout: &Tensor<Vector<F, N>>, // [B, Hq, Lq, Dv]
    h: &Tensor<Vector<F, N>>,    // [B, Hkv, Dv, D]
    z: &[f32],                   // [B, Hkv, D]
    others: &[Vector<G, V>],     // [B, Hq, Lq, D]
    dq: &mut [Vector<F, V>],     // [B, Hq, Lq, D]
    delta: &mut [f32],           // [B, Hq, Lq]
    #[comptime] config: RowConfig,
    #[define(F)] _dtype: ElemType,
    #[define(G)] _others_dtype: ElemType,
) {
    let tile = comptime!(config.tile);
    let dim = comptime!(config.head_dim);
    let (batch, head) = (CUBE_POS_Z as usize, CUBE_POS_Y as usize);
    let kv_head = head / (q.shape(1) / h.shape(1));
    let first = CUBE_POS_X * comptime!(tile.rows as u32);
    let rows = RowRange::new::<F, N>(q, batch, head, first, q.shape(2) as u32);

    let mut phi = E::operand(tile.rows, config.head_dim, tile);
    let mut grads = E::operand(tile.rows, config.value_dim, tile);
    let mut right = E::operand(tile.cols, config.head_dim, tile);
    let mut acc = E::accumulator(config.head_dim, tile);
    let mut scratch = E::scratch(tile);
    E::begin_load::<N>(&mut phi, q, rows, tile);
    let grad_rows = RowRange::new::<F, N>(dout, batch, head, first, q.shape(2) as u32);
    E::begin_load::<N>(&mut grads, dout, grad_rows, tile);
    E::await_loads(1usize);
    E::apply_feature_map(&mut phi, rows.len, config.phi, tile);
    E::await_loads(0usize);
    multiply_state::<E, F, N>(
        &mut acc,
        &grads,
        &mut right,
        h,
        batch,
        kv_head,
        tile,
        config.value_dim,
    );

    let state = (batch * h.shape(1) + kv_head) * dim;
    let z = &z[state..state + dim];
    let mut inverse = zeros(acc.rows());
    E::row_dot(&mut inverse, &phi, z, tile);
    E::row_sum(&mut inverse, &mut scratch, tile);
    let mut deltas = zeros(acc.rows());
    add_products::<F, E>(&mut deltas, &acc, &phi);
    E::row_sum(&mut deltas, &mut scratch, tile);
    let first_row = (batch * q.shape(1) + head) * q.shape(2) + first as usize;
    #[unroll]
    for r in 0..acc.rows() {
        inverse[r] = select(inverse[r] == 0.0, 0.0, 1.0 / inverse[r]);
        deltas[r] *= inverse[r];
        if acc.row(r) < rows.len && acc.col(0usize) == 0 {
            delta[first_row + acc.row(r) as usize] = deltas[r];
        }
    }
    #[unroll]
    for c in 0..acc.cols() {
        let column = acc.col(c) as usize;
        let mut shared = f32::new(0.0);
        if column < dim {
            shared = z[column];
        }
        #[unroll]
        for r in 0..acc.rows() {
            let grad = (acc.get(r, c) - deltas[r] * shared) * inverse[r];
            acc.set(r, c, grad);
        }
    }
    // The mean that softmax would take away is 0.
    let means = zeros(acc.rows());
    multiply_slopes::<F, E>(&mut acc, &phi, &means, config.phi);
    store_sum::<F, G, V, E>(dq, others, &mut acc, first_row, rows.len, dim);
}

/// Grid: x = tiles of keys, y = key head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn key_rows<E: TileEngine<F>, F: Float, G: Float, N: Size, V: Size>(
    k: &Tensor<Vector<F, N>>,             // [B, Hkv, Lk, D]
    v: &Tensor<Vector<F, N>>,             // [B, Hkv, Lk, Dv]
    dh_transposed: &Tensor<Vector<F, N>>, // [B, Hkv, Dv, D]
    dh: &Tensor<Vector<F, N>>,            // [B, Hkv, D, Dv]
    dz: &[f32],                           // -dZ [B, Hkv, D]
    others_k: &[Vector<G, V>],            // [B, Hkv, Lk, D]
    others_v: &[Vector<G, V>],            // [B, Hkv, Lk, Dv]
    dk: &mut [Vector<F, V>],              // [B, Hkv, Lk, D]
    dv: &mut [Vector<F, V>],              // [B, Hkv, Lk, Dv]
    factor: f32,
    #[comptime] config: RowConfig,
    #[define(F)] _dtype: ElemType,
    #[define(G)] _others_dtype: ElemType,
) {
    let tile = comptime!(config.tile);
    let dim = comptime!(config.head_dim);
    let value_dim = comptime!(config.value_dim);
    let (batch, head) = (CUBE_POS_Z as usize, CUBE_POS_Y as usize);
    let first = CUBE_POS_X * comptime!(tile.rows as u32);
    let rows = RowRange::new::<F, N>(k, batch, head, first, k.shape(2) as u32);

    let mut phi = E::operand(tile.rows, config.head_dim, tile);
    let mut values = E::operand(tile.rows, config.value_dim, tile);
    let mut right = E::operand(tile.cols, config.head_dim, tile);
    let mut right_values = E::operand(tile.cols, config.value_dim, tile);
    let mut scratch = E::scratch(tile);
    E::begin_load::<N>(&mut phi, k, rows, tile);
    let value_rows = RowRange::new::<F, N>(v, batch, head, first, k.shape(2) as u32);
    E::begin_load::<N>(&mut values, v, value_rows, tile);
    E::await_loads(1usize);
    E::apply_feature_map(&mut phi, rows.len, config.phi, tile);
    E::await_loads(0usize);

    let first_row = (batch * k.shape(1) + head) * k.shape(2) + first as usize;
    let mut dk_acc = E::accumulator(config.head_dim, tile);
    multiply_state::<E, F, N>(
        &mut dk_acc,
        &values,
        &mut right,
        dh_transposed,
        batch,
        head,
        tile,
        config.value_dim,
    );
    let state = (batch * k.shape(1) + head) * dim;
    #[unroll]
    for c in 0..dk_acc.cols() {
        let column = dk_acc.col(c) as usize;
        let mut shared = f32::new(0.0);
        if column < dim {
            shared = dz[state + column];
        }
        #[unroll]
        for r in 0..dk_acc.rows() {
            dk_acc.set(r, c, (dk_acc.get(r, c) - shared) * factor);
        }
    }
    let mut means = zeros(dk_acc.rows());
    if comptime!(config.phi == FeatureMap::Softmax) {
        add_products::<F, E>(&mut means, &dk_acc, &phi);
        E::row_sum(&mut means, &mut scratch, tile);
    }
    multiply_slopes::<F, E>(&mut dk_acc, &phi, &means, config.phi);
    store_sum::<F, G, V, E>(dk, others_k, &mut dk_acc, first_row, rows.len, dim);

    let mut dv_acc = E::accumulator(config.value_dim, tile);
    multiply_state::<E, F, N>(
        &mut dv_acc,
        &phi,
        &mut right_values,
        dh,
        batch,
        head,
        tile,
        config.head_dim,
    );
    #[unroll]
    for r in 0..dv_acc.rows() {
        #[unroll]
        for c in 0..dv_acc.cols() {
            dv_acc.set(r, c, dv_acc.get(r, c) * factor);
        }
    }
    store_sum::<F, G, V, E>(dv, others_v, &mut dv_acc, first_row, rows.len, value_dim);
}
