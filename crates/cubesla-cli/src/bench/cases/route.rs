//! The router: pooling, scores, top-k and block lists.

use cubesla::{AttentionOptions, Client, HostBlockList, RouterOptions, route};
use cubesla_reference::router::{mean_pool, scores, smooth, top_k};

use super::{Case, Check, Cost, Qkv, Scale, Work};
use crate::error::Error;

/// The share of critical blocks.
const CRITICAL: f64 = 0.05;

pub fn cases(scale: Scale, dtype: Option<cubesla::DType>) -> Vec<Case> {
    let (sizes, _) = scale.sizes(dtype);
    sizes
        .into_iter()
        .map(|size| Case {
            name: format!("route/95/{size}"),
            prepare: Box::new(move |client| {
                Ok(Box::new(Route {
                    client: client.clone(),
                    inputs: Qkv::new(client, size)?,
                    options: AttentionOptions::default(),
                }))
            }),
        })
        .collect()
}

struct Route {
    client: Client,
    inputs: Qkv,
    options: AttentionOptions,
}

impl Route {
    fn route(&self, number: usize) -> Result<cubesla::Routing, Error> {
        let [q, k, _] = self.inputs.copy(number);
        let router = RouterOptions {
            critical: CRITICAL,
            ..RouterOptions::sla2()
        };
        Ok(route(&self.client, q, k, &self.options, &router)?)
    }

    fn blocks(&self) -> [usize; 2] {
        let len = self.inputs.size.len;
        [self.options.block_q, self.options.block_k].map(|block| len.div_ceil(block))
    }
}

impl Work for Route {
    fn call(&self, number: usize) -> Result<(), Error> {
        self.route(number).map(drop)
    }

    /// The error is the largest score, relative to the row's largest, by which a block that was left
    /// out exceeds one that was taken.
    fn check(&self) -> Result<Check, Error> {
        let list = HostBlockList::download(&self.client, &self.route(0)?.critical)?;
        let [query_blocks, key_blocks] = self.blocks();
        let count = cubesla_reference::router::critical_count(CRITICAL, key_blocks);
        let [q, k, _] = &self.inputs.host;
        let size = self.inputs.size;
        let scale = 1.0 / (size.dim as f64).sqrt();
        let mut error: f64 = 0.0;
        for [b, h, i] in self.inputs.sample() {
            let block = i / self.options.block_q;
            let means = mean_pool(&q.head([b, h]), self.options.block_q);
            let keys = mean_pool(&smooth(&k.head([b, h])), self.options.block_k);
            let all = scores(&means, &keys, scale);
            let row = all.row(0, 0, block);
            let found = list.row((b * size.heads + h) * query_blocks + block);
            if found.len() != count {
                return Ok(wrong());
            }
            error = error.max(regret(row, found));
        }
        Ok(Check { error, bound: 1e-5 })
    }

    fn cost(&self) -> Cost {
        let size = self.inputs.size;
        let [query_blocks, key_blocks] = self.blocks();
        let rows = size.batch * size.heads * query_blocks;
        let count = cubesla_reference::router::critical_count(CRITICAL, key_blocks);
        Cost {
            flops: (2 * rows * key_blocks * size.dim) as f64,
            low_bit_flops: 0.0,
            dense_flops: None,
            bytes: (2 * size.tensor_bytes() + 4 * rows * (count + 1)) as f64,
            dtype: size.dtype,
        }
    }
}

fn wrong() -> Check {
    Check {
        error: f64::INFINITY,
        bound: 0.0,
    }
}

/// By how much the best block left out exceeds the worst taken, relative to the largest score: 0 for
/// an exact top-k, and what rounding makes of near-ties otherwise.
fn regret(row: &[f64], found: &[u32]) -> f64 {
    let best = top_k(row, found.len());
    let missed = best.iter().filter(|&&j| !found.contains(&(j as u32)));
    let largest = row.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
    let worst = found
        .iter()
        .map(|&j| row[j as usize])
        .fold(f64::INFINITY, f64::min);
    missed
        .map(|&j| (row[j] - worst) / largest)
        .fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_missed_counts() {
        let row = [4.0, 1.0, 3.0, -8.0];
        assert_eq!(regret(&row, &[0, 2]), 0.0);
        assert_eq!(regret(&row, &[0, 1]), 2.0 / 8.0);
        assert_eq!(regret(&row, &[1, 3]), 12.0 / 8.0);
    }
}
