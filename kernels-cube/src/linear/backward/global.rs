//! Gradients of the linear branch over all keys, where every query block has the same state.
//!
//! ```text
//! dphi(Q_i) = (dO_i H^T - delta_i Z) / n_i    delta_i = phi(Q_i) . (dO_i H^T) / n_i
//! dphi(K_j) = V_j dH^T + dZ                   dV_j = phi(K_j) dH
//! ```
//!
//! `delta_i` is `rowsum(dO_i * O_i)`, so that the forward's output is not read, and with softmax the
//! mean of `dphi(Q_i)` that phi's gradient takes away is 0. Rows come from memory twice, once for the
//! states and once here; features are made where they lie and never written.

use cubecl::prelude::*;

use super::{Gradients, slope};
use crate::engine::*;
use crate::limits::{expect_bindings, expect_loop_budget, grid, line_grid};
use crate::linear::{
    Chunks, FeatureMap, Normalised, gradient_states, multiply_state, state_scale, states, tile_of,
};
use crate::rows::{RowRange, RowTarget, add_rows, store_rows};
use crate::{AttentionProblem, DType, DeviceTensor, ProblemError};

/// The gradients of the linear branch over all keys for `grad_out [B, Hq, Lq, Dv]`, any strides, added
/// to `others`, which are f32 or of the inputs' type; in the inputs' type.
pub(crate) fn global_gradients(
    client: &Client,
    problem: &AttentionProblem,
    [q, k, v]: [&DeviceTensor<4>; 3],
    grad_out: &DeviceTensor<4>,
    phi: FeatureMap,
    others: &Gradients,
) -> Result<Gradients, ProblemError> {
    let job = RowJob::new(client, problem, phi, others)?;
    let of_keys = states(client, k, v, phi, Chunks::Total, problem.dtype())?;
    let h = transposed_states(client, &of_keys.h)?;
    let [batch, heads, len, _] = problem.out_shape();
    let delta = DeviceTensor::empty(client, [batch, heads, len], DType::F32);
    let dq = job.run_query([q, grad_out, &h], &of_keys.z, &delta)?;

    let by = Normalised {
        z: &of_keys.z,
        weights: &delta,
    };
    let of_queries = gradient_states(client, q, grad_out, phi, by)?;
    let dh = transposed_states(client, &of_queries.h)?;
    let rows = len * heads / problem.kv_heads();
    let factor = state_scale(problem.key_len()) / state_scale(rows);
    let [dk, dv] = job.run_key([k, v, &dh, &of_queries.h], &of_queries.z, factor)?;
    Ok(Gradients { dq, dk, dv })
}

/// The transposes of `h [B, H, D, Dv]`, contiguous.
pub(super) fn transposed_states(
    client: &Client,
    h: &DeviceTensor<4>,
) -> Result<DeviceTensor<4>, ProblemError> {
    let [batch, heads, rows, columns] = h.shape();
    let out = DeviceTensor::empty(client, [batch, heads, columns, rows], h.dtype());
    let units = 256;
    // SAFETY: one unit to an element.
    unsafe {
        transpose_states_kernel::launch_unchecked(
            client,
            line_grid(
                client.properties(),
                "elements of the states",
                h.len().div_ceil(units),
            )?,
            CubeDim::new_1d(units as u32),
            h.buffer_arg(),
            out.buffer_arg(),
            rows,
            columns,
            h.dtype().elem_type(),
        );
    }
    Ok(out)
}

#[cube(launch_unchecked)]
fn transpose_states_kernel<F: Float>(
    h: &[F],
    out: &mut [F],
    rows: usize,
    columns: usize,
    #[define(F)] _dtype: ElemType,
) {
    let at = ((CUBE_POS_Y * CUBE_COUNT_X + CUBE_POS_X) * CUBE_DIM + UNIT_POS) as usize;
    if at < out.len() {
        let (state, within) = (at / (rows * columns), at % (rows * columns));
        let (column, row) = (within / rows, within % rows);
        out[at] = h[(state * rows + row) * columns + column];
    }
}

/// The kernels that go through all rows of queries, and of keys and values.
struct RowJob<'a> {
    client: &'a Client,
    problem: &'a AttentionProblem,
    others: &'a Gradients,
    engines: [EngineKind; 2],
    query: RowConfig,
    key: RowConfig,
}

/// What the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct RowConfig {
    tile: Tile,
    head_dim: usize,
    value_dim: usize,
    phi: FeatureMap,
}

impl<'a> RowJob<'a> {
    fn new(
        client: &'a Client,
        problem: &'a AttentionProblem,
        phi: FeatureMap,
        others: &'a Gradients,
    ) -> Result<Self, ProblemError> {
        let device = client.properties();
        let (d, dv) = (problem.head_dim(), problem.value_dim());
        let query = TileNeeds {
            owned: vec![d, dv],
            streamed: vec![d],
            accumulators: vec![d],
            lefts: 0,
            max_rows: 64,
            max_cols: 64,
        };
        let key = TileNeeds {
            streamed: vec![d, dv],
            accumulators: vec![d.max(dv)],
            ..query.clone()
        };
        let (query_engine, query) = tile_of(&query, &[dv], problem.dtype(), device)?;
        let (key_engine, key) = tile_of(&key, &[d, dv], problem.dtype(), device)?;
        for tile in [query, key] {
            let loads = (tile.rows.max(tile.cols) * d.max(dv) / 4).div_ceil(tile.units);
            let steps = d.div_ceil(tile.cols) + dv.div_ceil(tile.cols);
            let iterations = 2 * (loads + d) + steps * (loads + tile.cols);
            expect_loop_budget(device, "the gradient of the linear branch", iterations)?;
        }
        expect_bindings(device, "the gradient of the linear branch", 9)?;
        let config = |tile| RowConfig {
            tile,
            head_dim: d,
            value_dim: dv,
            phi,
        };
        Ok(Self {
            client,
            problem,
            others,
            engines: [query_engine, key_engine],
            query: config(query),
            key: config(key),
        })
    }

    /// `dQ`, and `delta`; `tensors` are Q, dO and the transposed states.
    fn run_query(
        &self,
        tensors: [&DeviceTensor<4>; 3],
        z: &DeviceTensor<4>,
        delta: &DeviceTensor<3>,
    ) -> Result<DeviceTensor<4>, ProblemError> {
        match self.engines[0] {
            EngineKind::Simt => self.launch_query::<Simt>(tensors, z, delta, [4, 4]),
            EngineKind::Mma => self.launch_query::<Mma>(tensors, z, delta, [8, 2]),
        }
    }

    fn launch_query<E: TileEngine<query_rows::F>>(
        &self,
        tensors: [&DeviceTensor<4>; 3],
        z: &DeviceTensor<4>,
        delta: &DeviceTensor<3>,
        [load, store]: [usize; 2],
    ) -> Result<DeviceTensor<4>, ProblemError> {
        let [q, grad, h] = tensors;
        let dq = DeviceTensor::empty(self.client, q.shape(), q.dtype());
        // SAFETY: rows past the length read as zeros and are not stored.
        unsafe {
            query_rows::launch_unchecked::<E>(
                self.client,
                self.grid(q, self.query.tile)?,
                CubeDim::new_1d(self.query.tile.units as u32),
                self.address_type(&tensors),
                if q.is_aligned() && grad.is_aligned() {
                    load
                } else {
                    1
                },
                store,
                q.tensor_arg(),
                grad.tensor_arg(),
                h.tensor_arg(),
                z.buffer_arg(),
                self.others.dq.buffer_arg(),
                dq.buffer_arg(),
                delta.buffer_arg(),
                self.query,
                self.problem.dtype().elem_type(),
                self.others.dq.dtype().elem_type(),
            );
        }
        Ok(dq)
    }

    /// `dK` and `dV`; `tensors` are K, V, the transposed gradients of states, and these themselves.
    fn run_key(
        &self,
        tensors: [&DeviceTensor<4>; 4],
        dz: &DeviceTensor<4>,
        factor: f32,
    ) -> Result<[DeviceTensor<4>; 2], ProblemError> {
        match self.engines[1] {
            EngineKind::Simt => self.launch_key::<Simt>(tensors, dz, factor, [4, 4]),
            EngineKind::Mma => self.launch_key::<Mma>(tensors, dz, factor, [8, 2]),
        }
    }

    fn launch_key<E: TileEngine<key_rows::F>>(
        &self,
        tensors: [&DeviceTensor<4>; 4],
        dz: &DeviceTensor<4>,
        factor: f32,
        [load, store]: [usize; 2],
    ) -> Result<[DeviceTensor<4>; 2], ProblemError> {
        let [k, v, dh_transposed, dh] = tensors;
        let [dk, dv] = [k, v].map(|x| DeviceTensor::empty(self.client, x.shape(), x.dtype()));
        // SAFETY: as for the queries.
        unsafe {
            key_rows::launch_unchecked::<E>(
                self.client,
                self.grid(k, self.key.tile)?,
                CubeDim::new_1d(self.key.tile.units as u32),
                self.address_type(&tensors),
                if k.is_aligned() && v.is_aligned() {
                    load
                } else {
                    1
                },
                store,
                k.tensor_arg(),
                v.tensor_arg(),
                dh_transposed.tensor_arg(),
                dh.tensor_arg(),
                dz.buffer_arg(),
                self.others.dk.buffer_arg(),
                self.others.dv.buffer_arg(),
                dk.buffer_arg(),
                dv.buffer_arg(),
                factor,
                self.key,
                self.problem.dtype().elem_type(),
                self.others.dk.dtype().elem_type(),
            );
        }
        Ok([dk, dv])
    }

    fn grid(&self, x: &DeviceTensor<4>, tile: Tile) -> Result<CubeCount, ProblemError> {
        let [batch, heads, len, _] = x.shape();
        grid(
            self.client.properties(),
            [
                ("tiles of rows", len.div_ceil(tile.rows)),
                ("H", heads),
                ("B", batch),
            ],
        )
    }

    fn address_type(&self, tensors: &[&DeviceTensor<4>]) -> AddressType {
        let Gradients { dq, dk, dv } = self.others;
        let all = tensors.iter().copied().chain([dq, dk, dv]);
        AddressType::from_len(all.map(|x| x.extent()).max().unwrap_or(0))
    }
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

/// Grid: x = tiles of query rows, y = query head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
fn query_rows<E: TileEngine<F>, F: Float, G: Float, N: Size, V: Size>(
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
    E::await_load(&mut phi);
    E::apply_feature_map(&mut phi, rows.len, config.phi, tile);
    E::await_load(&mut grads);
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
    let target = RowTarget {
        first_row,
        len: rows.len,
        first_column: 0,
        end_column: comptime!(dim as u32),
    };
    add_rows::<G, V, E::Fragment>(&mut acc, others, target, dim);
    store_rows::<F, V, E::Fragment>(dq, &acc, target, dim);
}

/// Grid: x = tiles of keys, y = key head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
fn key_rows<E: TileEngine<F>, F: Float, G: Float, N: Size, V: Size>(
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
    E::await_load(&mut phi);
    E::apply_feature_map(&mut phi, rows.len, config.phi, tile);
    E::await_load(&mut values);

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
    let target = RowTarget {
        first_row,
        len: rows.len,
        first_column: 0,
        end_column: comptime!(dim as u32),
    };
    add_rows::<G, V, E::Fragment>(&mut dk_acc, others_k, target, dim);
    store_rows::<F, V, E::Fragment>(dk, &dk_acc, target, dim);

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
    let target = RowTarget {
        first_row,
        len: rows.len,
        first_column: 0,
        end_column: comptime!(value_dim as u32),
    };
    add_rows::<G, V, E::Fragment>(&mut dv_acc, others_v, target, value_dim);
    store_rows::<F, V, E::Fragment>(dv, &dv_acc, target, value_dim);
}
