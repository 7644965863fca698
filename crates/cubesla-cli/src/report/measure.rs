//! Errors against full attention, by sparsity and by how blocks are chosen.

use std::fmt;

use cubesla::{
    AttentionOptions, BlockList, Blocks, Client, DType, DeviceTensor, HostBlockList, RouterOptions,
    SlaOptions, block_sparse_attention, download, route, sla_forward, sla2_forward, upload,
};
use cubesla_reference::attention::Forward;
use cubesla_reference::router::{critical_count, top_k};
use cubesla_reference::{Tensor, relative_error};
use indicatif::ProgressBar;

use crate::error::Error;
use crate::exact::{kept, to_host};
use crate::fit::{alpha_logits, projection, sigmoid};
use crate::layers::Layer;

/// Percent of the key blocks left out.
const SPARSITIES: [usize; 5] = [50, 75, 90, 95, 97];
/// Steps of progress in a layer.
pub const STEPS: usize = 1 + SPARSITIES.len() * 2;

/// Who chooses the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// The library's router, from block means.
    Heuristic,
    /// The blocks with the most softmax mass, which only full attention knows.
    Oracle,
}

impl fmt::Display for Routing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Routing::Heuristic => "router",
            Routing::Oracle => "oracle",
        })
    }
}

/// Relative errors of the device's results against full attention in f64.
pub struct Point {
    /// Who chose the blocks.
    pub routing: Routing,
    /// Percents left out, which all round to these blocks.
    pub sparsities: Vec<usize>,
    /// Critical blocks of a row, and all blocks.
    pub blocks: [usize; 2],
    /// Mean softmax mass of the critical blocks.
    pub kept: f64,
    /// Of the sparse branch alone.
    pub sparse: f64,
    /// Of SLA with a projection of zero, which is the sparse branch by definition.
    pub sla_zero: f64,
    /// Of SLA with the fitted projection.
    pub sla_fitted: f64,
    /// Of SLA2 with fitted weights.
    pub sla2_fitted: f64,
    /// Mean of the fitted weights of the sparse branch.
    pub alpha: f64,
}

/// Every sparsity with both routings.
pub fn layer(
    client: &Client,
    layer: &Layer,
    options: &AttentionOptions,
    progress: &ProgressBar,
) -> Result<Vec<Point>, Error> {
    progress.set_message(format!("{}: full attention in f64", layer.name));
    let lab = Lab {
        client,
        layer,
        options,
        inputs: layer.upload(client)?,
        full: layer.sparse(&layer.all_blocks()),
    };
    let mass = layer.block_mass();
    progress.inc(1);
    let mut points = Vec::new();
    for routing in [Routing::Heuristic, Routing::Oracle] {
        for sparsities in groups(mass.shape()[3]) {
            progress.set_message(format!("{}: {routing}, {} %", layer.name, sparsities[0]));
            let share = share(sparsities[0]);
            let critical = match routing {
                Routing::Heuristic => lab.routed(share)?,
                Routing::Oracle => oracle(&mass, share)?.upload(client),
            };
            progress.inc(sparsities.len() as u64);
            points.push(lab.point(routing, sparsities, &critical)?);
        }
    }
    Ok(points)
}

/// The share of critical blocks.
fn share(sparsity: usize) -> f64 {
    (100 - sparsity) as f64 / 100.0
}

/// The sparsities, together where they round to the same of `blocks` blocks.
fn groups(blocks: usize) -> Vec<Vec<usize>> {
    SPARSITIES
        .chunk_by(|&a, &b| critical_count(share(a), blocks) == critical_count(share(b), blocks))
        .map(<[usize]>::to_vec)
        .collect()
}

/// The blocks of each row with the most mass.
fn oracle(mass: &Tensor, share: f64) -> Result<HostBlockList, Error> {
    let blocks = mass.shape()[3];
    let count = critical_count(share, blocks);
    let rows = mass.data().chunks_exact(blocks);
    let chosen = rows.map(|row| top_k(row, count).into_iter().map(|j| j as u32).collect());
    Ok(HostBlockList::from_rows(mass.shape(), chosen.collect())?)
}

/// What the points of a layer share.
struct Lab<'a> {
    client: &'a Client,
    layer: &'a Layer,
    options: &'a AttentionOptions,
    inputs: [DeviceTensor<4>; 3],
    full: Forward,
}

impl Lab<'_> {
    fn routed(&self, share: f64) -> Result<BlockList, Error> {
        let [q, k, _] = &self.inputs;
        let router = RouterOptions {
            critical: share,
            ..RouterOptions::sla2()
        };
        Ok(route(self.client, q, k, self.options, &router)?.critical)
    }

    fn point(
        &self,
        routing: Routing,
        sparsities: Vec<usize>,
        critical: &BlockList,
    ) -> Result<Point, Error> {
        let (client, problem) = (self.client, &self.layer.problem);
        let [q, k, v] = &self.inputs;
        let error = |out: &DeviceTensor<4>| -> Result<f64, Error> {
            let out = to_host(client, out)?;
            Ok(relative_error(out.data(), self.full.out.data()))
        };
        let alone = block_sparse_attention(client, q, k, v, critical, self.options)?;
        let lse: Vec<f64> = download(client, &alone.lse)?
            .into_iter()
            .map(f64::from)
            .collect();

        let options = SlaOptions {
            attention: *self.options,
            blocks: Blocks::Given {
                critical,
                negligible: None,
            },
            save: true,
            ..SlaOptions::sla()
        };
        let dim = problem.value_dim();
        let sla = |wl: &[f64], bl: &[f64]| {
            let wl = upload(client, &narrowed(wl), [dim, dim], DType::F32)?;
            let bl = upload(client, &narrowed(bl), [dim], DType::F32)?;
            sla_forward(client, q, k, v, &wl, &bl, &options)
        };
        let zero = sla(&vec![0.0; dim * dim], &vec![0.0; dim])?;
        let branches = zero.saved.as_ref().expect("the branches were asked for");
        let sparse = to_host(client, &branches.sparse)?;
        let linear = to_host(client, &branches.linear)?;
        let (wl, bl) = projection(&self.full.out, &sparse, &linear);
        let fitted = sla(&wl, &bl)?;

        let logits = alpha_logits(&self.full.out, &sparse, &linear, problem.block_q());
        let shape = [problem.query_heads(), problem.query_blocks()];
        let alpha_logit = upload(client, &logits, shape, DType::F32)?;
        let sla2 = sla2_forward(client, q, k, v, &alpha_logit, &options)?;
        let alpha: f64 = logits.iter().map(|&logit| sigmoid(logit)).sum();
        Ok(Point {
            routing,
            sparsities,
            blocks: [critical.width(), problem.key_blocks()],
            kept: kept(&lse, self.full.lse.data()),
            sparse: error(&alone.out)?,
            sla_zero: error(&zero.out)?,
            sla_fitted: error(&fitted.out)?,
            sla2_fitted: error(&sla2.out)?,
            alpha: alpha / logits.len() as f64,
        })
    }
}

fn narrowed(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sparsities_of_the_same_blocks_are_one() {
        assert_eq!(groups(512).len(), SPARSITIES.len());
        assert_eq!(groups(32), [vec![50], vec![75], vec![90], vec![95, 97]]);
        assert_eq!(groups(1), [SPARSITIES]);
    }

    #[test]
    fn the_oracle_takes_the_heaviest_blocks_and_at_least_one() {
        let mass = Tensor::new([1, 1, 2, 4], vec![0.1, 0.4, 0.2, 0.3, 0.7, 0.1, 0.1, 0.1]);
        let half = oracle(&mass, 0.5).unwrap();
        assert_eq!([half.row(0), half.row(1)], [&[1, 3], &[0, 1]]);
        assert_eq!(oracle(&mass, 0.03).unwrap().row(0), [1]);
    }
}
