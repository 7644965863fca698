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

mod kernel;

use cubecl::prelude::*;
use kernel::{RowConfig, key_rows, query_rows};

use super::Gradients;
use crate::engine::*;
use crate::limits::{expect_bindings, expect_loop_budget, grid, line_grid};
use crate::linear::{
    Chunks, FeatureMap, Normalised, gradient_states, state_scale, states, tile_of,
};
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
    let of_keys = states(client, k, v, phi, Chunks::Total, problem.factors())?;
    let h = transposed_states(client, &of_keys.h)?;
    let [batch, heads, len, _] = problem.out_shape();
    let delta = DeviceTensor::empty(client, [batch, heads, len], DType::F32);
    let dq = job.run_query([q, grad_out, &h], &of_keys.z, &delta)?;

    let by = Normalised {
        z: &of_keys.z,
        weights: &delta,
    };
    let of_queries = gradient_states(client, q, grad_out, phi, by, problem.factors())?;
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
            max_stages: 1,
            unit_bytes: 4,
        };
        let key = TileNeeds {
            streamed: vec![d, dv],
            accumulators: vec![d.max(dv)],
            ..query.clone()
        };
        let (query_engine, query) = tile_of(&query, &[dv], problem.factors(), device)?;
        let (key_engine, key) = tile_of(&key, &[d, dv], problem.factors(), device)?;
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
            EngineKind::MmaTf32 => self.launch_query::<MmaTf32>(tensors, z, delta, [4, 2]),
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
            EngineKind::MmaTf32 => self.launch_key::<MmaTf32>(tensors, dz, factor, [4, 2]),
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
