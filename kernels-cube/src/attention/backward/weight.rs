//! Gradients of the weights of blocks: for each pair of blocks a sum over its scores.

use cubecl::prelude::*;

use super::{RowStatistics, RowStatisticsLaunch};
use crate::attention::forward::{ForwardScalars, ForwardScalarsLaunch};
use crate::block_list::{BlockListView, BlockWeightsView, weights_arg};
use crate::engine::*;
use crate::limits::{expect_loop_budget, grid};
use crate::mask::TileWindow;
use crate::rows::RowRange;
use crate::{AttentionProblem, BlockList, Causal, DeviceTensor, FactorType, ProblemError};

/// What is summed over a pair of blocks, with `S = a b^T` and `dP = dO V^T`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum WeightTerm {
    /// `dm = sum P (dP - delta) / m` with `P = m exp(factor S - L)`.
    Softmax,
    /// `dm -= factor sum S (dP - delta)`: the linear branch's, whose weights are `1 - m`.
    Linear,
}

/// One pass over all pairs of blocks of a list.
pub(crate) struct WeightJob<'a> {
    /// `a [B, Hq, Lq, D]`, `b [B, Hkv, Lk, D]`, `dO [B, Hq, Lq, Dv]` and `V [B, Hkv, Lk, Dv]`.
    pub tensors: [&'a DeviceTensor<4>; 4],
    /// Not read by the linear term.
    pub lse: &'a DeviceTensor<3>,
    pub delta: &'a DeviceTensor<3>,
    pub list: &'a BlockList,
    pub weights: &'a DeviceTensor<4>,
    pub grad: &'a DeviceTensor<4>,
    pub term: WeightTerm,
    pub factor: f32,
}

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct WeightConfig {
    tile: Tile,
    head_dim: usize,
    value_dim: usize,
    block_q: usize,
    block_k: usize,
    causal: bool,
    term: WeightTerm,
}

impl WeightJob<'_> {
    /// Writes, or for the linear term changes, the gradients of all weights of the list.
    pub fn run(&self, client: &Client, problem: &AttentionProblem) -> Result<(), ProblemError> {
        let (d, dv) = (problem.head_dim(), problem.value_dim());
        let device = client.properties();
        // Two tiles of scores at once beside fragments of tf32, twice as large: ptxas spills of 32 columns.
        let max_cols = match problem.factors() {
            FactorType::Tf32 => 16,
            _ => problem.block_k(),
        };
        let needs = TileNeeds {
            owned: vec![d, dv],
            streamed: vec![d, dv],
            accumulators: vec![],
            lefts: 0,
            max_rows: problem.block_q(),
            max_cols,
            max_stages: 1,
            unit_bytes: 4,
        };
        let (engine, tile) = engine_tile(&needs, problem.factors(), device)?;
        let loads = |rows: usize| (rows * (d + dv) / 4).div_ceil(tile.units) + 4;
        let columns = problem.block_k().div_ceil(tile.cols) * (loads(tile.cols) + (d + dv) / 4);
        let rows = problem.block_q().div_ceil(tile.rows);
        let iterations = rows * (loads(tile.rows) + columns) + tile.units;
        expect_loop_budget(device, "the gradient of block weights", iterations)?;
        let config = WeightConfig {
            tile,
            head_dim: d,
            value_dim: dv,
            block_q: problem.block_q(),
            block_k: problem.block_k(),
            causal: problem.causal() != Causal::None,
            term: self.term,
        };
        match engine {
            EngineKind::Simt => self.launch::<Simt>(client, problem, config, 4),
            EngineKind::Mma => self.launch::<Mma>(client, problem, config, 8),
            EngineKind::MmaTf32 => self.launch::<MmaTf32>(client, problem, config, 4),
        }
    }

    fn launch<E: TileEngine<weight_gradient::F>>(
        &self,
        client: &Client,
        problem: &AttentionProblem,
        config: WeightConfig,
        load: usize,
    ) -> Result<(), ProblemError> {
        let [a, b, dout, v] = self.tensors;
        let aligned = self.tensors.into_iter().all(DeviceTensor::is_aligned);
        let extent = self.tensors.map(DeviceTensor::extent).into_iter().max();
        let heads = problem.batch() * problem.query_heads();
        // SAFETY: the tensors have the problem's shapes, and lists hold key blocks below N.
        unsafe {
            weight_gradient::launch_unchecked::<E>(
                client,
                grid(
                    client.properties(),
                    [
                        ("entries of a row", self.list.width()),
                        ("query blocks", problem.query_blocks()),
                        ("B * Hq", heads),
                    ],
                )?,
                CubeDim::new_1d(config.tile.units as u32),
                AddressType::from_len(extent.unwrap_or(0)),
                if aligned { load } else { 1 },
                a.tensor_arg(),
                b.tensor_arg(),
                dout.tensor_arg(),
                v.tensor_arg(),
                RowStatisticsLaunch::new(self.lse.buffer_arg(), self.delta.buffer_arg()),
                self.list.launch_arg(),
                weights_arg(Some(self.weights), self.list),
                self.grad.buffer_arg(),
                ForwardScalarsLaunch::new(self.factor, problem.causal_shift()),
                config,
                problem.dtype().elem_type(),
            );
        }
        Ok(())
    }
}

/// One cube sums over one pair of blocks.
///
/// Grid: x = entry of the row, y = query block, z = (batch, query head).
#[cube(launch_unchecked, address_type = "dynamic")]
fn weight_gradient<E: TileEngine<F>, F: Float, N: Size>(
    a: &Tensor<Vector<F, N>>,
    b: &Tensor<Vector<F, N>>,
    dout: &Tensor<Vector<F, N>>,
    v: &Tensor<Vector<F, N>>,
    statistics: &RowStatistics,
    list: &BlockListView,
    weights: &BlockWeightsView,
    grad: &mut [f32], // [B, Hq, M, N]
    scalars: ForwardScalars,
    #[comptime] config: WeightConfig,
    #[define(F)] _dtype: ElemType,
) {
    let tile = comptime!(config.tile);
    let (rows, cols) = comptime!((tile.rows as u32, tile.cols as u32));
    let index = CUBE_POS_Z as usize;
    let (batch, head) = (index / a.shape(1), index % a.shape(1));
    let kv_head = head / (a.shape(1) / b.shape(1));
    let query_len = a.shape(2);
    let query_block = CUBE_POS_Y;
    let row = list.row(CUBE_POS_Z, query_block);

    if CUBE_POS_X < row.count {
        let key_block = list.key_block(row, CUBE_POS_X);
        let first_query = query_block * comptime!(config.block_q as u32);
        let end_query = min(
            first_query + comptime!(config.block_q as u32),
            query_len as u32,
        );
        let first_key = key_block * comptime!(config.block_k as u32);
        let end_key = min(
            first_key + comptime!(config.block_k as u32),
            b.shape(2) as u32,
        );
        let weight = weights.at(index, query_block, key_block);
        let bias = weight.ln();

        let mut a_tile = E::operand(tile.rows, config.head_dim, tile);
        let mut do_tile = E::operand(tile.rows, config.value_dim, tile);
        let mut b_tile = E::operand(tile.cols, config.head_dim, tile);
        let mut v_tile = E::operand(tile.cols, config.value_dim, tile);
        let mut scores = E::scores(tile);
        let mut dp = E::scores(tile);
        let mut sum = 0.0f32;
        for i in 0..(end_query - first_query).div_ceil(rows) {
            let first = first_query + i * rows;
            let range = RowRange::new::<F, N>(a, batch, head, first, end_query);
            E::begin_load::<N>(&mut a_tile, a, range, tile);
            let range = RowRange::new::<F, N>(dout, batch, head, first, end_query);
            E::begin_load::<N>(&mut do_tile, dout, range, tile);
            E::await_loads(0usize);
            for j in 0..(end_key - first_key).div_ceil(cols) {
                let key = first_key + j * cols;
                let range = RowRange::new::<F, N>(b, batch, kv_head, key, end_key);
                E::begin_load::<N>(&mut b_tile, b, range, tile);
                let range = RowRange::new::<F, N>(v, batch, kv_head, key, end_key);
                E::begin_load::<N>(&mut v_tile, v, range, tile);
                E::await_loads(0usize);
                E::mul_nt(&mut scores, &a_tile, &b_tile);
                E::mul_nt(&mut dp, &do_tile, &v_tile);
                let window = TileWindow {
                    first_query: first,
                    first_key: key,
                    end_key,
                    causal_shift: scalars.causal_shift,
                };
                #[unroll]
                for r in 0..scores.rows() {
                    let query = first + scores.row(r);
                    let at = index * query_len + min(query, end_query - 1) as usize;
                    let delta = statistics.delta[at];
                    let mut lse = 0.0f32.runtime();
                    if comptime!(config.term == WeightTerm::Softmax) {
                        lse = max(statistics.lse[at], f32::min_value());
                    }
                    let end = select(query < end_query, window.end_seen(query, config.causal), 0);
                    #[unroll]
                    for c in 0..scores.cols() {
                        let mut p = scores.get(r, c) * scalars.scale;
                        if comptime!(config.term == WeightTerm::Softmax) {
                            p = (p + bias - lse).exp();
                        }
                        let term = p * (dp.get(r, c) - delta);
                        sum += select(key + scores.col(c) < end, term, 0.0);
                    }
                }
                // The tiles are filled again.
                sync_cube();
            }
        }

        let mut partial = Shared::<[f32]>::new_slice(tile.units);
        partial[UNIT_POS as usize] = sum;
        sync_cube();
        if UNIT_POS == 0 {
            let mut total = 0.0f32;
            for i in 0..comptime!(tile.units) {
                total += partial[i];
            }
            let at = (index * weights.query_blocks as usize + query_block as usize)
                * weights.key_blocks as usize
                + key_block as usize;
            if comptime!(config.term == WeightTerm::Softmax) {
                grad[at] = select(weight > 0.0, total / weight, 0.0);
            } else {
                grad[at] -= total;
            }
        }
    }
}
