//! A layer in f64, and its tensors on the device.

use cubesla::{Client, DType, DeviceTensor, HostBlockList, download, upload};
use cubesla_reference::Tensor;
use cubesla_reference::attention::{Causal, Forward, forward};
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::linear::{self, FeatureMap};
use cubesla_reference::router::mean_pool;

use crate::layers::Layer;

impl Layer {
    /// Softmax attention over the blocks of a list.
    pub fn sparse(&self, list: &HostBlockList) -> Forward {
        let weights = self.weights(list, true);
        let scale = self.problem.scale().into();
        forward(&self.q, &self.k, &self.v, &weights, scale, Causal::None)
    }

    /// Linear attention over the blocks that are not in a list.
    pub fn linear(&self, list: &HostBlockList) -> Tensor {
        let weights = self.weights(list, false);
        let phi = FeatureMap::Softmax;
        linear::forward(&self.q, &self.k, &self.v, phi, &weights, Causal::None)
    }

    /// Weights of 1 for the blocks in a list, or for the others.
    pub fn weights(&self, list: &HostBlockList, listed: bool) -> BlockWeights {
        let mask = list.to_mask();
        let weights = mask.into_iter().map(|is| f64::from(is == listed)).collect();
        BlockWeights {
            block_q: self.problem.block_q(),
            block_k: self.problem.block_k(),
            weights: Tensor::new(list.shape(), weights),
        }
    }

    /// Every block.
    pub fn all_blocks(&self) -> HostBlockList {
        let p = &self.problem;
        HostBlockList::dense([p.batch(), p.query_heads(), p.query_blocks(), p.key_blocks()])
    }

    /// The share of the softmax that each block of keys gets from a block of queries,
    /// `[B, Hq, M, N]`.
    pub fn block_mass(&self) -> Tensor {
        let p = &self.problem;
        let shape = [p.batch(), p.kv_heads(), p.key_len(), p.key_blocks()];
        // Where values name the block of their key, attention's output is what each block gets.
        let block_of = Tensor::from_fn(shape, |[_, _, j, block]| {
            f64::from(j / p.block_k() == block)
        });
        let dense = self.weights(&self.all_blocks(), true);
        let scale = p.scale().into();
        let received = forward(&self.q, &self.k, &block_of, &dense, scale, Causal::None).out;
        mean_pool(&received, p.block_q())
    }

    /// Q, K and V on the device.
    pub fn upload(&self, client: &Client) -> Result<[DeviceTensor<4>; 3], cubesla::Error> {
        let [q, k, v] =
            [&self.q, &self.k, &self.v].map(|x| to_device(client, x, self.problem.dtype()));
        Ok([q?, k?, v?])
    }
}

fn to_device(client: &Client, x: &Tensor, dtype: DType) -> Result<DeviceTensor<4>, cubesla::Error> {
    let values: Vec<f32> = x.data().iter().map(|&x| x as f32).collect();
    upload(client, &values, x.shape(), dtype)
}

/// A result of the device.
pub fn to_host(client: &Client, x: &DeviceTensor<4>) -> Result<Tensor, cubesla::Error> {
    let values = download(client, x)?;
    Ok(Tensor::new(
        x.shape(),
        values.into_iter().map(f64::from).collect(),
    ))
}

/// The mean over rows of `exp(L_sparse - L_full)`: the softmax mass of the chosen blocks.
pub fn kept(sparse: &[f64], full: &[f64]) -> f64 {
    let shares = sparse
        .iter()
        .zip(full)
        .map(|(sparse, full)| (sparse - full).exp());
    shares.sum::<f64>() / sparse.len() as f64
}

/// `f` of each head of two tensors.
pub fn by_head(
    a: &Tensor,
    b: &Tensor,
    heads: usize,
    f: impl Fn(&[f64], &[f64]) -> f64,
) -> Vec<f64> {
    let len = a.data().len() / heads;
    let (a, b) = (a.data().chunks_exact(len), b.data().chunks_exact(len));
    a.zip(b).map(|(a, b)| f(a, b)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::SHIPPED;
    use crate::layers;

    #[test]
    fn the_mass_of_a_row_is_one() {
        let options = cubesla::AttentionOptions {
            block_q: 128,
            block_k: 64,
            ..Default::default()
        };
        let layer = &layers::parse(SHIPPED, DType::F32, &options).unwrap()[0];
        let mass = layer.block_mass();
        assert_eq!(mass.shape(), [1, 12, 4, 8]);
        for row in mass.data().chunks_exact(8) {
            assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        }
    }
}
