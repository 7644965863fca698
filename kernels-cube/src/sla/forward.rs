//! Both branches and their combination in one kernel, which writes nothing but the result; or the
//! linear branch and the combination, where the sparse branch was computed in low bits before.

use cubecl::prelude::*;

use crate::block_list::{BlockListView, BlockRow, KeyWalk, Walk, WalkExpand};
use crate::engine::*;
use crate::linear::{FeatureMap, divide_rows, multiply_state};
use crate::mask::{TileWindow, scale_and_mask};
use crate::rows::{RowRange, RowTarget, add_rows, store_rows};
use crate::softmax::OnlineSoftmax;

/// How the linear branch comes by its sums over keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LinearForm {
    /// All keys: the states as they are.
    Global,
    /// Marginal blocks as the states less what the critical and the negligible blocks add to them.
    Subtract,
    /// Marginal blocks one by one, where they are the fewer.
    Add,
}

/// How the branches are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Combine {
    /// `O^s + O^l Wl^T + bl`.
    Sla,
    /// `a O^s + (1 - a) O^l`.
    Sla2,
}

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SlaConfig {
    pub tile: Tile,
    pub head_dim: usize,
    pub value_dim: usize,
    pub block_q: usize,
    pub block_k: usize,
    pub phi: FeatureMap,
    pub form: LinearForm,
    /// Whether there is a second list: negligible blocks to subtract, or marginal ones to add.
    pub second: bool,
    pub combine: Combine,
    /// Whether the sparse branch is read, not computed.
    pub given: bool,
    /// Whether the branches and the log-sum-exp are written too.
    pub save: bool,
}

/// Scalar arguments.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct SlaScalars {
    pub scale: f32,
    /// What the states were multiplied by.
    pub state_scale: f32,
    /// Distances between the logits of neighbouring heads and query blocks; 0 if they share one.
    pub logit_head: u32,
    pub logit_block: u32,
}

/// `O`, and what is saved of the branches.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct SlaOutputs<F: Float, V: Size> {
    pub out: Box<[Vector<F, V>]>,
    /// An input where the sparse branch is given: devices have few bindings to spare.
    pub sparse: Box<[Vector<F, V>]>,
    pub linear: Box<[Vector<F, V>]>,
    pub lse: Box<[f32]>,
}

/// One cube computes `tile.rows` rows of a query block.
///
/// Grid: x = tiles of query rows, y = query head, z = batch.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn sla_forward_kernel<E: TileEngine<F>, F: Float, N: Size, V: Size>(
    q: &Tensor<Vector<F, N>>,     // [B, Hq, Lq, D]
    k: &Tensor<Vector<F, N>>,     // [B, Hkv, Lk, D]
    v: &Tensor<Vector<F, N>>,     // [B, Hkv, Lk, Dv]
    phi_k: &Tensor<Vector<F, N>>, // phi(K) [B, Hkv, Lk, D]; not read by the global form
    h: &Tensor<Vector<F, N>>,     // [B, Hkv, D, Dv]
    z: &[f32],                    // [B, Hkv, D]
    critical: &BlockListView,
    second: &BlockListView,
    wl: &Tensor<Vector<F, N>>, // Wl^T [1, 1, Dv, Dv]; not read by SLA2
    weights: &[f32],           // bl [Dv] of SLA, logits of SLA2
    outputs: &mut SlaOutputs<F, V>,
    scalars: SlaScalars,
    #[comptime] config: SlaConfig,
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
        let queries = RowRange::new::<F, N>(q, batch, head, first_query, end_query);
        let place = Place {
            batch,
            kv_head,
            first_query,
        };
        let critical_row = critical.row(head_index as u32, query_block);
        let mut branches = Branches::<E, F>::new(config);
        branches.load_queries::<N>(q, queries);
        let target = RowTarget {
            first_row: head_index * q.shape(2) + first_query as usize,
            len: end_query - first_query,
            first_column: 0,
            end_column: comptime!(config.value_dim as u32),
        };
        let width = config.value_dim;
        if config.given {
            add_rows::<F, V, E::Fragment>(&mut branches.sparse, &outputs.sparse, target, width);
            if comptime!(config.form == LinearForm::Subtract) {
                branches.walk_linear::<N>(v, phi_k, critical, critical_row, place, scalars);
            }
        } else {
            branches.attend::<N>(k, v, phi_k, critical, critical_row, place, scalars);
        }
        let mut listed = critical_row.count;
        if config.second {
            let second_row = second.row(head_index as u32, query_block);
            branches.walk_linear::<N>(v, phi_k, second, second_row, place, scalars);
            listed += second_row.count;
        }
        // Without a marginal block the subtraction leaves rounding errors, not zeros.
        let key_blocks = (k.shape(2) as u32).div_ceil(comptime!(config.block_k as u32));
        let marginal = listed < key_blocks || comptime!(config.form != LinearForm::Subtract);
        branches.finish::<N>(h, z, place, marginal);

        if config.save {
            store_rows::<F, V, E::Fragment>(&mut outputs.linear, &branches.linear, target, width);
        }
        if comptime!(config.save && !config.given) {
            store_rows::<F, V, E::Fragment>(&mut outputs.sparse, &branches.sparse, target, width);
            #[unroll]
            for r in 0..branches.sparse.rows() {
                let row = branches.sparse.row(r);
                if branches.sparse.col(0usize) == 0 && row < target.len {
                    outputs.lse[target.first_row + row as usize] = branches.softmax.lse(r);
                }
            }
        }
        if comptime!(config.combine == Combine::Sla2) {
            let at = head as u32 * scalars.logit_head + query_block * scalars.logit_block;
            branches.mix(1.0 / (1.0 + (-weights[at as usize]).exp()));
        } else {
            branches.project::<N>(wl, weights);
        }
        store_rows::<F, V, E::Fragment>(&mut outputs.out, &branches.sparse, target, width);
    }
}

/// The keys of a cube: a (batch, key head), and the queries that they are masked against.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Place {
    batch: usize,
    kv_head: usize,
    first_query: u32,
}

/// What a cube holds of its rows.
#[derive(CubeType)]
struct Branches<E: TileEngine<F>, F: Float> {
    /// `Q`, and in the global form later `phi(Q)`.
    queries: E::Operand,
    /// `phi(Q)` beside it, where both are needed at once.
    phi_queries: E::Operand,
    keys: E::Operand,
    phi_keys: E::Operand,
    /// Tiles of values, and of everything else of their width.
    values: E::Operand,
    scores: E::Fragment,
    weights: E::Left,
    phi_weights: E::Left,
    scratch: E::Scratch,
    softmax: OnlineSoftmax,
    /// `O^s`, and in the end `O`.
    sparse: E::Fragment,
    /// `O^l`, unnormalised until `finish`.
    linear: E::Fragment,
    /// The unit's part of the linear branch's denominators.
    sums: Array<f32>,
    #[cube(comptime)]
    config: SlaConfig,
}

#[cube]
impl<E: TileEngine<F>, F: Float> Branches<E, F> {
    fn new(#[comptime] config: SlaConfig) -> Self {
        let tile = comptime!(config.tile);
        // The global form never holds phi(Q) beside Q, nor tiles of phi(K); a given sparse branch
        // needs no keys, and Q in the global form only.
        let spare = comptime!(usize::from(config.form != LinearForm::Global));
        let attend = comptime!(usize::from(!config.given));
        let query_rows = comptime!(attend.max(1 - spare) * tile.rows);
        let sparse = E::accumulator(config.value_dim, tile);
        let mut sums = Array::<f32>::new(sparse.rows());
        #[unroll]
        for r in 0..sparse.rows() {
            sums[r] = 0.0;
        }
        Branches::<E, F> {
            queries: E::operand(query_rows, config.head_dim, tile),
            phi_queries: E::operand(comptime!(spare * tile.rows), config.head_dim, tile),
            keys: E::operand(comptime!(attend * tile.cols), config.head_dim, tile),
            phi_keys: E::operand(comptime!(spare * tile.cols), config.head_dim, tile),
            values: E::operand(tile.cols, config.value_dim, tile),
            scores: E::scores(tile),
            weights: E::left(tile),
            phi_weights: E::left(tile),
            scratch: E::scratch(tile),
            softmax: OnlineSoftmax::new(sums.len()),
            sparse,
            linear: E::accumulator(config.value_dim, tile),
            sums,
            config,
        }
    }

    fn load_queries<N: Size>(&mut self, q: &Tensor<Vector<F, N>>, rows: RowRange) {
        let tile = comptime!(self.config.tile);
        let needed = comptime!(!self.config.given || self.config.form == LinearForm::Global);
        if needed {
            E::begin_load::<N>(&mut self.queries, q, rows, tile);
        }
        if comptime!(self.config.form != LinearForm::Global) {
            E::begin_load::<N>(&mut self.phi_queries, q, rows, tile);
        }
        E::await_loads(0usize);
        if comptime!(self.config.form != LinearForm::Global) {
            E::apply_feature_map(&mut self.phi_queries, rows.len, self.config.phi, tile);
        }
    }

    /// The walk over the keys of `row`.
    fn walk(&self, row: BlockRow, key_len: u32) -> KeyWalk {
        KeyWalk {
            row,
            key_len,
            block_k: comptime!(self.config.block_k),
            cols: comptime!(self.config.tile.cols),
        }
    }

    /// The sparse branch over the critical blocks; in the subtracting form the linear branch gives
    /// up the same blocks on the way.
    fn attend<N: Size>(
        &mut self,
        k: &Tensor<Vector<F, N>>,
        v: &Tensor<Vector<F, N>>,
        phi_k: &Tensor<Vector<F, N>>,
        list: &BlockListView,
        row: BlockRow,
        place: Place,
        scalars: SlaScalars,
    ) {
        let tile = comptime!(self.config.tile);
        let subtract = comptime!(self.config.form == LinearForm::Subtract);
        let walk = self.walk(row, k.shape(2) as u32);
        let tiles = walk.tiles();
        for t in 0..tiles {
            let keys = walk.tile(list, t);
            let (batch, head) = (place.batch, place.kv_head);
            let rows = RowRange::new::<F, N>(k, batch, head, keys.first, keys.end);
            E::begin_load::<N>(&mut self.keys, k, rows, tile);
            let rows = RowRange::new::<F, N>(v, batch, head, keys.first, keys.end);
            E::begin_load::<N>(&mut self.values, v, rows, tile);
            if subtract {
                let rows = RowRange::new::<F, N>(phi_k, batch, head, keys.first, keys.end);
                E::begin_load::<N>(&mut self.phi_keys, phi_k, rows, tile);
            }
            E::await_loads(comptime!(1 + usize::from(subtract)));
            E::mul_nt(&mut self.scores, &self.queries, &self.keys);
            let window = TileWindow {
                first_query: place.first_query,
                first_key: keys.first,
                end_key: keys.end,
                causal_shift: 0,
            };
            scale_and_mask::<E::Fragment>(&mut self.scores, window, scalars.scale, false);
            self.softmax
                .step::<F, E>(&mut self.scores, &mut self.sparse, &mut self.scratch, tile);
            E::stage(&mut self.weights, &self.scores);
            if subtract {
                self.weigh(-scalars.state_scale, 0usize);
            }
            E::await_loads(0usize);
            E::mul_nn(&mut self.sparse, &self.weights, &self.values);
            if subtract {
                E::mul_nn(&mut self.linear, &self.phi_weights, &self.values);
            }
            // The tiles are filled again.
            sync_cube();
        }
    }

    /// The linear branch over the blocks of a list, added or, in the subtracting form, taken away.
    fn walk_linear<N: Size>(
        &mut self,
        v: &Tensor<Vector<F, N>>,
        phi_k: &Tensor<Vector<F, N>>,
        list: &BlockListView,
        row: BlockRow,
        place: Place,
        scalars: SlaScalars,
    ) {
        let tile = comptime!(self.config.tile);
        let subtract = comptime!(self.config.form == LinearForm::Subtract);
        let factor = if subtract {
            -scalars.state_scale
        } else {
            scalars.state_scale
        };
        let walk = self.walk(row, v.shape(2) as u32);
        let tiles = walk.tiles();
        for t in 0..tiles {
            let keys = walk.tile(list, t);
            let (batch, head) = (place.batch, place.kv_head);
            let rows = RowRange::new::<F, N>(phi_k, batch, head, keys.first, keys.end);
            E::begin_load::<N>(&mut self.phi_keys, phi_k, rows, tile);
            let rows = RowRange::new::<F, N>(v, batch, head, keys.first, keys.end);
            E::begin_load::<N>(&mut self.values, v, rows, tile);
            self.weigh(factor, 1usize);
            E::await_loads(0usize);
            E::mul_nn(&mut self.linear, &self.phi_weights, &self.values);
            sync_cube();
        }
    }

    /// Stages `factor phi(Q) phi(K)^T` of the tile of keys on its way, and adds up its rows. Keys
    /// that do not exist are zero rows of `phi(K)`.
    fn weigh(&mut self, factor: f32, #[comptime] newer: usize) {
        E::await_loads(newer);
        E::mul_nt(&mut self.scores, &self.phi_queries, &self.phi_keys);
        #[unroll]
        for r in 0..self.scores.rows() {
            #[unroll]
            for c in 0..self.scores.cols() {
                let weight = self.scores.get(r, c) * factor;
                self.sums[r] += weight;
                self.scores.set(r, c, weight);
            }
        }
        E::stage(&mut self.phi_weights, &self.scores);
    }

    /// Brings both branches to their final form.
    fn finish<N: Size>(
        &mut self,
        h: &Tensor<Vector<F, N>>,
        z: &[f32],
        place: Place,
        marginal: bool,
    ) {
        let tile = comptime!(self.config.tile);
        if !self.config.given {
            self.softmax
                .finish::<F, E>(&mut self.sparse, &mut self.scratch, tile);
        }
        let dim = comptime!(self.config.head_dim);
        let state = (place.batch * h.shape(1) + place.kv_head) * dim;
        let z = &z[state..state + dim];
        let (batch, head) = (place.batch, place.kv_head);
        if comptime!(self.config.form == LinearForm::Global) {
            E::apply_feature_map(
                &mut self.queries,
                comptime!(tile.rows as u32),
                self.config.phi,
                tile,
            );
            multiply_state::<E, F, N>(
                &mut self.linear,
                &self.queries,
                &mut self.values,
                h,
                batch,
                head,
                tile,
                dim,
            );
            E::row_dot(&mut self.sums, &self.queries, z, tile);
        }
        if comptime!(self.config.form == LinearForm::Subtract) {
            multiply_state::<E, F, N>(
                &mut self.linear,
                &self.phi_queries,
                &mut self.values,
                h,
                batch,
                head,
                tile,
                dim,
            );
            E::row_dot(&mut self.sums, &self.phi_queries, z, tile);
        }
        E::row_sum(&mut self.sums, &mut self.scratch, tile);
        #[unroll]
        for r in 0..self.sums.len() {
            self.sums[r] = select(marginal, self.sums[r], 0.0);
        }
        divide_rows::<E::Fragment>(&mut self.linear, &self.sums);
    }

    /// `O = a O^s + (1 - a) O^l`.
    fn mix(&mut self, a: f32) {
        #[unroll]
        for r in 0..self.sparse.rows() {
            #[unroll]
            for c in 0..self.sparse.cols() {
                let mixed = a * self.sparse.get(r, c) + (1.0 - a) * self.linear.get(r, c);
                self.sparse.set(r, c, mixed);
            }
        }
    }

    /// `O = O^s + O^l Wl^T + bl`.
    fn project<N: Size>(&mut self, wl: &Tensor<Vector<F, N>>, bl: &[f32]) {
        let tile = comptime!(self.config.tile);
        let dim = comptime!(self.config.value_dim as u32);
        let cols = comptime!(tile.cols as u32);
        let mut linear = E::operand(tile.rows, self.config.value_dim, tile);
        E::put(&mut linear, &self.linear);
        for step in 0..dim.div_ceil(cols) {
            let rows = RowRange::new::<F, N>(wl, 0, 0, step * cols, dim);
            E::begin_load::<N>(&mut self.values, wl, rows, tile);
            E::await_loads(0usize);
            E::mul_on(&mut self.sparse, &linear, step * cols, &self.values);
            sync_cube();
        }
        #[unroll]
        for c in 0..self.sparse.cols() {
            let column = self.sparse.col(c);
            if column < dim {
                let bias = bl[column as usize];
                #[unroll]
                for r in 0..self.sparse.rows() {
                    self.sparse.set(r, c, self.sparse.get(r, c) + bias);
                }
            }
        }
    }
}
