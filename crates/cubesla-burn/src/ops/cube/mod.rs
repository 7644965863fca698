//! The operations on CubeCL's runtimes: a call into the library each.

mod backward;
mod forward;
mod soft;

use burn_core::backend::TensorMetadata;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubesla::{BlockList, Blocks, Error, SlaBackwardOptions, SlaOptions, SlaResult};

use super::layout::{block_list, contiguous, view};
use super::{Combination, Lists};

type Weights = Combination<CubeBackend>;
type ListTensors = Lists<CubeBackend>;

/// What is left to go wrong at a launch depends on the device alone, and Burn's operations have no
/// way to return it.
pub(super) fn launched<T>(operation: &str, result: Result<T, Error>) -> T {
    result.unwrap_or_else(|error| panic!("{operation}: {error}"))
}

fn sla(
    q: CubeTensor,
    k: CubeTensor,
    v: CubeTensor,
    weights: Weights,
    lists: ListTensors,
    options: SlaBackwardOptions,
    save: bool,
) -> Result<SlaResult, Error> {
    let client = q.client.clone();
    let blocks = k.shape()[2].div_ceil(options.attention.block_k);
    let (critical, negligible) = library_lists(lists, blocks);
    let (q, k, v) = (view(q)?, view(k)?, view(v)?);
    let options = SlaOptions {
        attention: options.attention,
        blocks: Blocks::Given {
            critical: &critical,
            negligible: negligible.as_ref(),
        },
        phi: options.phi,
        linear: options.linear,
        precision: options.precision,
        save,
    };
    match weights {
        Combination::Sla { wl, bl } => {
            let (wl, bl) = (contiguous(wl)?, contiguous(bl)?);
            cubesla::sla_forward(&client, &q, &k, &v, &wl, &bl, &options)
        }
        Combination::Sla2 { alpha_logit } => {
            let alpha_logit = contiguous(alpha_logit)?;
            cubesla::sla2_forward(&client, &q, &k, &v, &alpha_logit, &options)
        }
    }
}

fn library_lists(lists: ListTensors, key_blocks: usize) -> (BlockList, Option<BlockList>) {
    match lists {
        Lists::Critical { indices, counts } => (block_list(indices, counts, key_blocks), None),
        Lists::Negligible {
            indices,
            counts,
            negligible_indices,
            negligible_counts,
        } => (
            block_list(indices, counts, key_blocks),
            Some(block_list(
                negligible_indices,
                negligible_counts,
                key_blocks,
            )),
        ),
    }
}
