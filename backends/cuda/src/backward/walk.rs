//! The walk of a warpgroup over the query blocks that selected its keys.

use cubecl::prelude::*;

use super::key::{KeyConfig, KeyMemory};
use crate::forward::config::Place;
use crate::ptx::{backward, barrier, math, wgmma};

/// Where a warpgroup stands in its walk over query blocks, of which it takes 64 rows each.
#[derive(CubeType)]
pub(super) struct Walk {
    /// The queries whose scores are multiplied next.
    scores: Place,
    /// The queries that are added next, and their output gradients.
    queries: Place,
    grads: Place,
    memory: KeyMemory,
    scale: f32,
    /// Told by one unit of each warp, so that ptxas knows that a warp's addresses are one, and counts
    /// them on its uniform units.
    warpgroup: u32,
    #[cube(comptime)]
    config: KeyConfig,
}

#[cube]
impl Walk {
    pub fn new(memory: KeyMemory, scale: f32, #[comptime] config: KeyConfig) -> Walk {
        Walk {
            scores: Place::first(config.query_stages),
            queries: Place::first(config.query_stages),
            grads: Place::first(config.grad_stages),
            memory,
            scale,
            warpgroup: plane_broadcast(UNIT_POS / 128, 0u32),
            config,
        }
    }

    /// Address of the warpgroup's rows in a stage of the ring at `ring`.
    fn rows(&self, ring: u32, stage: u32) -> u32 {
        let bytes = comptime!(self.config.query_bytes() as u32);
        ring + stage * bytes + self.warpgroup * comptime!(64 * 128u32)
    }

    /// Begins `S^T = K Q^T` with the next queries.
    pub fn begin_scores(&mut self) {
        let config = comptime!(self.config);
        let stage = self.scores.stage;
        barrier::wait(self.memory.query_full(stage), self.scores.parity);
        let keys = wgmma::descriptor(self.memory.keys);
        let queries = wgmma::descriptor(self.rows(self.memory.queries, stage));
        wgmma::fence();
        backward::key_scores(keys, queries, config.rows(), config.products());
        wgmma::commit();
        self.scores.advance();
    }

    /// Adds a tile, whose scores are there, to both gradients.
    ///
    /// Scores and the gradients of probabilities take turns in the same registers: with registers of
    /// their own, both accumulators and the packed operands are more than a unit can have, and ptxas
    /// lets no product run beside anything. While weights are made, the keys' product of the tile
    /// before runs; while gradients of scores are made, the values'.
    pub fn add_tile(&mut self, others_before: bool, #[comptime] next: bool) {
        let config = comptime!(self.config);
        let products = comptime!(config.products());
        let rows = comptime!(config.rows());
        let memory = self.memory;
        let stage = self.queries.stage;
        let queries = self.rows(memory.queries, stage);
        let grads = self.rows(memory.grads, self.grads.stage);
        // Of the unit's first pair of rows.
        let own = self.warpgroup * 64 + UNIT_POS % 4 * 2;
        let log_sums = memory.statistics + (stage * comptime!(2 * rows as u32) + own) * 4;
        let deltas = log_sums + comptime!(4 * rows as u32);

        let weights = make_weights(log_sums, self.scale, config);
        wgmma::wait(0u32);
        if others_before {
            let stages = comptime!(config.query_stages as u32);
            if UNIT_POS % 128 == 0 {
                barrier::arrive(memory.query_empty((stage + stages - 1) % stages));
            }
        }
        write_words(&weights, false);
        let values = wgmma::descriptor(memory.values);
        barrier::wait(
            memory.grad_full(self.grads.stage, config),
            self.grads.parity,
        );
        wgmma::fence();
        backward::key_probability_gradients(values, wgmma::descriptor(grads), rows, products);
        wgmma::commit();
        wgmma::accumulate(
            wgmma::descriptor_transposed(grads, rows),
            false,
            0usize,
            products,
        );
        wgmma::commit();
        wgmma::wait(1u32);
        let gradients = make_score_gradients(&weights, deltas, config);
        write_words(&gradients, true);
        if next {
            self.begin_scores();
        } else {
            wgmma::fence();
        }
        backward::accumulate_key_gradient(wgmma::descriptor_transposed(queries, rows), products);
        wgmma::commit();
        if next {
            wgmma::wait(1u32);
            if UNIT_POS % 128 == 0 {
                barrier::arrive(memory.grad_empty(self.grads.stage, config));
            }
        }
        self.queries.advance();
        self.grads.advance();
    }
}

/// `P^T = exp(scale S^T - L)` of the scores, packed. Word `4 s + 2 h + k`: two neighbouring queries of
/// half `h` of step `s`, of the unit's key `k`.
#[cube]
fn make_weights(log_sums: u32, scale: f32, #[comptime] config: KeyConfig) -> Array<u32> {
    let scale_log2 = scale * std::f32::consts::LOG2_E;
    let mut bits = 0u32.runtime();
    let mut weights = Array::<u32>::new(16usize);
    #[unroll]
    for step in 0..4usize {
        let scores = wgmma::read_score_step(0usize, step);
        #[unroll]
        for half in 0..2usize {
            let pair = math::load_pair(log_sums + comptime!((16 * step + 8 * half) as u32 * 4));
            let lse0 = f32::reinterpret(pair.extract(0usize));
            let lse1 = f32::reinterpret(pair.extract(1usize));
            #[unroll]
            for key in 0..2usize {
                let e = comptime!(4 * half + 2 * key);
                let p0 = math::exp2(fma(scores.extract(e), scale_log2, -lse0));
                let p1 = math::exp2(fma(scores.extract(comptime!(e + 1)), scale_log2, -lse1));
                let pair = math::pack(p0, p1, comptime!(config.products().format()));
                bits |= pair;
                weights[comptime!(4 * step + 2 * half + key)] = pair;
            }
        }
    }
    wgmma::compute_before(bits);
    weights
}

/// `dS^T = P^T (dP^T - delta)`, packed likewise, from the rounded weights, which hold half the
/// registers.
#[cube]
fn make_score_gradients(
    weights: &Array<u32>,
    deltas: u32,
    #[comptime] config: KeyConfig,
) -> Array<u32> {
    let format = comptime!(config.products().format());
    let mut packed = Array::<u32>::new(16usize);
    #[unroll]
    for step in 0..4usize {
        let gradients = wgmma::read_score_step(0usize, step);
        #[unroll]
        for half in 0..2usize {
            let pair = math::load_pair(deltas + comptime!((16 * step + 8 * half) as u32 * 4));
            let delta0 = f32::reinterpret(pair.extract(0usize));
            let delta1 = f32::reinterpret(pair.extract(1usize));
            #[unroll]
            for key in 0..2usize {
                let e = comptime!(4 * half + 2 * key);
                let word = comptime!(4 * step + 2 * half + key);
                let p = math::unpack(weights[word], format);
                let d0 = p.extract(0usize) * (gradients.extract(e) - delta0);
                let d1 = p.extract(1usize) * (gradients.extract(comptime!(e + 1)) - delta1);
                packed[word] = math::pack(d0, d1, format);
            }
        }
    }
    packed
}

/// Makes packed words an A operand: the gradients of scores, or the weights.
#[cube]
fn write_words(packed: &Array<u32>, #[comptime] gradients: bool) {
    #[unroll]
    for step in 0..4usize {
        let mut words = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            words.insert(i, packed[comptime!(4 * step + i)]);
        }
        if gradients {
            backward::write_score_gradient_step(words, step);
        } else {
            wgmma::write_probability_step(words, 0usize, step);
        }
    }
}
