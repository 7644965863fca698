//! The linear branch of an item's rows, and the combination of the branches.

use cubecl::prelude::*;

use super::kernel::{LinearMemory, SlaConfig, SlaScalars};
use crate::forward::config::Memory;
use crate::forward::epilogue::{
    begin_staging, inverse, stage_accumulator, stage_group, store_lse, store_staged,
};
use crate::forward::kernel::Item;
use crate::forward::softmax::{RowPair, quad_sum};
use crate::linear::branch::{keep_pass, round_group};
use crate::ptx::linear::{pass_columns, passes};
use crate::ptx::{barrier, linear, wgmma};

/// Maps of the outputs, and the phase of the states' barriers.
#[derive(CubeType)]
pub(crate) struct Epilogue {
    pub out: u64,
    pub sparse: u64,
    pub linear: u64,
    pub parity: u32,
    #[cube(comptime)]
    pub config: SlaConfig,
}

/// Turns the accumulator into `O` and stores it, and the branches before it if they are saved.
#[cube]
pub(crate) fn finish(
    epilogue: &mut Epilogue,
    denominators: Vector<f32, Const<2>>, // of the linear branch
    weights: &[f32],
    lse: &mut [f32],
    memory: Memory,
    extra: LinearMemory,
    item: Item,
    rows: &RowPair,
    scalars: SlaScalars,
) {
    let config = comptime!(epilogue.config);
    let forward = comptime!(config.forward);
    let tile = comptime!(forward.tile);
    let products = comptime!(tile.products());
    let upper_sum = quad_sum(rows.upper.sum);
    let lower_sum = quad_sum(rows.lower.sum);
    let mut upper = inverse(upper_sum);
    let mut lower = inverse(lower_sum);
    if config.given {
        // It was divided before.
        upper = f32::new(1.0);
        lower = f32::new(1.0);
    }
    if comptime!(config.save && !config.given) {
        let staging = begin_staging(memory, forward);
        stage_accumulator(staging, upper, lower, forward);
        store_staged(epilogue.sparse, staging, item, forward);
        store_lse(lse, item, rows, upper_sum, lower_sum, scalars.forward);
    }

    let linear_upper = inverse(denominators.extract(0usize));
    let linear_lower = inverse(denominators.extract(1usize));
    let mut rest = f32::new(0.0);
    if comptime!(!config.projects) {
        let block = item.first_query / comptime!(tile.rows() as u32);
        let logit =
            weights[(item.head * scalars.logit_head + block * scalars.logit_block) as usize];
        let a = 1.0 / (1.0 + (-logit).exp());
        upper *= a;
        lower *= a;
        rest = 1.0 - a;
    }
    wgmma::scale_accumulator(upper, lower, products);

    let mut staging = 0u32.runtime();
    if config.save {
        staging = begin_staging(memory, forward);
    }
    barrier::wait(extra.state_full(), epilogue.parity);
    epilogue.parity ^= 1;
    let state = wgmma::descriptor_transposed(extra.states, products.head_dim);
    #[unroll]
    for pass in 0..comptime!(passes(products)) {
        wgmma::fence();
        linear::state_columns(state, pass, products);
        wgmma::commit();
        wgmma::wait(0u32);
        if config.projects {
            keep_pass(linear_upper, linear_lower, pass, products);
        } else {
            linear::add_pass(rest * linear_upper, rest * linear_lower, pass, products);
        }
        if config.save {
            let unit = wgmma::here(UNIT_POS);
            #[unroll]
            for group in 0..comptime!(pass_columns(products) / 16) {
                let words = round_group(linear_upper, linear_lower, group, products);
                let at = comptime!(pass * pass_columns(products) / 16 + group);
                stage_group(staging, unit, words, at);
            }
        }
    }
    if UNIT_POS % 128 == 0 {
        barrier::arrive(extra.state_empty());
    }

    if config.save {
        store_staged(epilogue.linear, staging, item, forward);
    }
    if config.projects {
        barrier::wait(extra.weights_full(), 0);
        add_bias(weights, config);
        wgmma::fence();
        let wl = wgmma::descriptor_transposed(extra.weights, products.value_dim);
        linear::project(wl, products);
        wgmma::commit();
        wgmma::wait(0u32);
    }
    let staging = begin_staging(memory, forward);
    stage_accumulator(staging, 1.0f32, 1.0f32, forward);
    store_staged(epilogue.out, staging, item, forward);
}

/// Adds the projection's bias to the accumulator.
#[cube]
fn add_bias(bl: &[f32], #[comptime] config: SlaConfig) {
    let products = comptime!(config.forward.tile.products());
    let dim = comptime!(config.forward.tile.value_dim);
    let first = UNIT_POS as usize % 4 * 2;
    #[unroll]
    for group in 0..comptime!(products.value_dim / 16) {
        let mut bias = Vector::<f32, Const<4>>::new(0.0);
        #[unroll]
        for i in 0..4usize {
            let column = comptime!(16 * group + i / 2 * 8);
            if comptime!(column < dim) {
                bias.insert(i, bl[first + comptime!(column + i % 2)]);
            }
        }
        linear::add_columns(bias, group);
    }
}
