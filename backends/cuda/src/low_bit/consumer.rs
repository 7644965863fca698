//! A consumer: as in [`crate::forward`], with 8-bit products.

use cubecl::prelude::*;
use cubecl_cpp::cuda::ptx::tensor_map_address;

use super::config::LowBitConfig;
use super::epilogue::store;
use super::kernel::Scales;
use super::producer::ScaledKeys;
use super::queries::take_queries;
use super::scratch::Scratch;
use super::softmax::{make_tile_weights, write_weights};
use crate::forward::config::{Memory, Place, next_note};
use crate::forward::consumer::{LookAhead, LookAheadExpand, attend_ahead, release};
use crate::forward::epilogue::end_stores;
use crate::forward::kernel::{ForwardScalars, Item};
use crate::forward::softmax::{FLOOR, RowPair, Weights};
use crate::ptx::wgmma::Descriptors;
use crate::ptx::{barrier, low_bit, value, wgmma};

/// The loop over items. The first scores of an item are multiplied while the one before it is being
/// finished and stored.
#[cube]
pub(super) fn consume<F: Float>(
    out: &TensorMap<F, Tiled>,
    scales: &Scales,
    lse: &mut [f32],
    scratch: Scratch,
    memory: Memory,
    scalars: ForwardScalars,
    #[comptime] config: LowBitConfig,
) {
    let out = tensor_map_address(out);
    let mut consumer = Consumer::new(memory, scratch, config);
    let mut index = CUBE_POS_X;
    consumer.begin(true, 0u32, memory);
    while index < scalars.items {
        let item = Item::read(memory, consumer.note);
        let mut rows = RowPair::new(item.first_query);
        rows.upper.max = consumer.upper_max;
        rows.lower.max = consumer.lower_max;
        consumer.attend(&mut rows, item.tiles, memory, scalars);
        index += scalars.stride;
        consumer.begin(index < scalars.items, next_note(consumer.note), memory);
        wgmma::wait(1u32);
        consumer.finish(&rows, memory);
        // Read again: registers are scarce between.
        let item = Item::read(memory, consumer.note);
        let note = consumer.note;
        store(
            out, lse, scales, scratch, note, memory, item, &rows, scalars, config,
        );
        consumer.note = next_note(note);
        if comptime!(!config.fp8) {
            consumer.upper_max = rows.upper.max;
            consumer.lower_max = rows.lower.max;
        }
    }
    wgmma::wait(0u32);
    end_stores();
}

/// Where a warpgroup stands in what the producer loads.
#[derive(CubeType)]
struct Consumer {
    /// Of the tile whose scores were begun last.
    begun: Place,
    /// The stage of the tile before it.
    before: u32,
    /// The stage of the tile whose values are multiplied, or will be next.
    values: u32,
    /// On the item being computed.
    note: u32,
    /// The keys whose scores were begun last.
    tile: ScaledKeys,
    /// The maxima in use at the end of the item before.
    upper_max: f32,
    lower_max: f32,
    key_tiles: Descriptors,
    value_tiles: Descriptors,
    /// Of the queries whose scores were begun last, for base-2 scores.
    query_scale: f32,
    scratch: Scratch,
    #[cube(comptime)]
    config: LowBitConfig,
}

#[cube]
impl Consumer {
    fn new(memory: Memory, scratch: Scratch, #[comptime] config: LowBitConfig) -> Consumer {
        let tile = comptime!(config.forward.tile);
        let keys = comptime!(tile.keys);
        let values = comptime!(if config.fp8 {
            low_bit::description_of_values(keys)
        } else {
            wgmma::description_transposed(keys)
        });
        Consumer {
            begun: Place::before_first(tile.stages),
            before: 0,
            values: 0,
            note: 0,
            tile: ScaledKeys::none(),
            upper_max: FLOOR,
            lower_max: FLOOR,
            key_tiles: Descriptors::new(memory.keys, wgmma::DESCRIPTION, tile.key_bytes()),
            value_tiles: Descriptors::new(memory.values, values, config.value_bytes()),
            query_scale: 0.0,
            scratch,
            config,
        }
    }

    /// Takes the next item, which `note` is on: its queries, and the scores of its first tile, which are in
    /// flight then; as in [`crate::forward`], also if there are no `more`.
    fn begin(&mut self, more: bool, note: u32, memory: Memory) {
        let config = comptime!(self.config);
        if more {
            // There is an even number of notes, so that they tell the phase.
            barrier::wait(memory.query_full(0u32), note % 2);
            barrier::wait(memory.measured(), note % 2);
        }
        let scale = take_queries(memory, self.scratch, note, config);
        self.query_scale = scale * std::f32::consts::LOG2_E;
        sync_plane();
        if more && UNIT_POS % 32 == 0 {
            barrier::arrive(memory.query_empty(0u32));
        }
        self.begin_scores(more, memory, 0usize);
    }

    /// Brings `O`, not yet divided by the rows' sums, into the accumulator, but for the product with
    /// the last values, which is in flight then.
    fn attend(&mut self, rows: &mut RowPair, tiles: u32, memory: Memory, scalars: ForwardScalars) {
        wgmma::wait(0u32);
        self.release_keys(memory);
        if comptime!(self.config.ahead()) {
            attend_ahead::<Consumer>(self, rows, tiles, memory, scalars);
        } else {
            self.attend_plainly(rows, tiles, memory, scalars);
        }
    }

    /// `S_t = Q K_t^T` and the product of the tile before with its values are in flight together, and
    /// the softmax of the one runs beside the other.
    fn attend_plainly(
        &mut self,
        rows: &mut RowPair,
        tiles: u32,
        memory: Memory,
        scalars: ForwardScalars,
    ) {
        let config = comptime!(self.config);
        let products = comptime!(config.products());
        if config.fp8 {
            low_bit::clear_accumulator(products);
        }
        let mut weights = Weights::new(config.weight_words());
        self.make_weights(&mut weights, rows, scalars);
        write_weights(&weights.packed, 0usize, config);
        // Corrections that belong to the product in registers `par`: zeros to begin with.
        let mut upper = f32::new(0.0);
        let mut lower = f32::new(0.0);
        if config.fp8 {
            low_bit::clear_product(products);
        }

        for t in 1..tiles {
            self.begin_scores(true, memory, 0usize);
            if config.fp8 {
                // Beside the product that was begun.
                low_bit::promote(upper, lower, products);
                upper = value::<f32>(rows.upper.correction);
                lower = value::<f32>(rows.lower.correction);
            }
            self.begin_values(t == 1, 0usize);
            wgmma::wait(1u32);
            self.release_keys(memory);
            self.make_weights(&mut weights, rows, scalars);
            wgmma::wait(0u32);
            self.release_values(memory, false);
            if comptime!(!config.fp8) {
                rescale(&*rows, config);
            }
            write_weights(&weights.packed, 0usize, config);
        }

        if config.fp8 {
            low_bit::promote(upper, lower, products);
        }
        self.begin_values(tiles == 1, 0usize);
    }

    /// Makes the weights of the scores begun last.
    fn make_weights(&self, weights: &mut Weights, rows: &mut RowPair, scalars: ForwardScalars) {
        make_tile_weights(weights, rows, &self.tile, scalars, 0usize, self.config);
    }

    /// Takes an item's last product, which is done, into the accumulator.
    fn finish(&mut self, rows: &RowPair, memory: Memory) {
        let config = comptime!(self.config);
        self.release_values(memory, false);
        if config.fp8 {
            let (upper, lower) = (rows.upper.correction, rows.lower.correction);
            low_bit::promote(upper, lower, config.products());
        }
    }

    /// Begins `S = Q K^T` with the next keys, into the registers of `buffer`; with old ones if there are
    /// no `more`.
    fn begin_scores(&mut self, more: bool, memory: Memory, #[comptime] buffer: usize) {
        let config = comptime!(self.config);
        low_bit::bias_scores(self.scratch.bias(), buffer, config.products());
        self.before = self.begun.stage;
        self.begun.advance();
        let stage = self.begun.stage;
        if more {
            barrier::wait(memory.key_full(stage), self.begun.parity);
        }
        self.tile.read(memory, stage, self.query_scale);
        wgmma::fence();
        low_bit::scores(self.key_tiles.at(stage), buffer, config.products());
        wgmma::commit();
    }

    /// Begins `P V`, or `O += P V` in 16 bits, with the weights in `buffer` and the next values; `O = P V`
    /// with `anew`. FP8 weights have one buffer.
    fn begin_values(&self, anew: bool, #[comptime] buffer: usize) {
        let config = comptime!(self.config);
        let values = self.value_tiles.at(self.values);
        wgmma::fence();
        if comptime!(config.fp8) {
            low_bit::multiply_values(values, config.products());
        } else {
            low_bit::accumulate(values, anew, buffer, config.products());
        }
        wgmma::commit();
    }

    /// Hands the keys' stage back to the producer.
    fn release_keys(&self, memory: Memory) {
        release(memory.key_empty(self.begun.stage));
    }

    /// Hands the values' stage back to the producer. Next come the values of the tile whose scores were
    /// begun last, or `before` it.
    fn release_values(&mut self, memory: Memory, #[comptime] before: bool) {
        release(memory.value_empty(self.values));
        self.values = if comptime!(before) {
            self.before
        } else {
            self.begun.stage
        };
    }
}

#[cube]
impl LookAhead for Consumer {
    fn add_tile(
        &mut self,
        rows: &mut RowPair,
        t: u32,
        memory: Memory,
        scalars: ForwardScalars,
        #[comptime] buffer: usize,
        #[comptime] next: bool,
    ) {
        let config = comptime!(self.config);
        let tile = self.tile.copy();
        if next {
            self.begin_scores(true, memory, comptime!(1 - buffer));
        }
        let mut weights = Weights::new(config.weight_words());
        make_tile_weights(&mut weights, rows, &tile, scalars, buffer, config);
        write_weights(&weights.packed, buffer, config);
        wgmma::wait(comptime!(u32::from(next)));
        if t > 0 {
            self.release_values(memory, next);
            rescale(&*rows, config);
        }
        self.begin_values(t == 0, buffer);
        if next {
            wgmma::wait(1u32);
            self.release_keys(memory);
        }
    }
}

/// Brings the accumulator to the rows' maxima, if the last tile raised any.
#[cube]
fn rescale(rows: &RowPair, #[comptime] config: LowBitConfig) {
    if rows.raised {
        low_bit::scale_accumulator(
            rows.upper.correction,
            rows.lower.correction,
            config.products(),
        );
    }
}
