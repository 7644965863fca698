//! Quantization-aware training of queries, keys and values.

use cubesla::{
    AttentionOptions, BlockList, Client, DeviceTensor, LowBitFormats, LowBitScores, LowBitValues,
    block_sparse_attention_backward, download, low_bit_attention, upload,
};
use indicatif::ProgressBar;

use crate::error::Error;
use crate::layers::Layer;

const FORMATS: LowBitFormats = LowBitFormats {
    scores: LowBitScores::Int8,
    values: LowBitValues::Fp8,
};
/// Of the inputs' root mean square, how far a step of Adam goes.
const RATE: f32 = 2e-3;
/// Decay of Adam's moments.
const DECAY: [f32; 2] = [0.9, 0.99];

/// The distance of low-bit attention to exact attention of the inputs as they came, before each step and
/// after the last: `|O - exact| / |exact|`. Trained are queries, keys and values, in f32 on the host,
/// with gradients of the inputs' type at the low-bit forward's output, straight through the rounding.
///
/// Training in full precision would change nothing: there the distance is 0 from the start.
pub fn curve(
    client: &Client,
    layer: &Layer,
    options: &AttentionOptions,
    steps: usize,
    progress: &ProgressBar,
) -> Result<Vec<f64>, Error> {
    let all = layer.all_blocks();
    let exact: Vec<f32> = layer
        .sparse(&all)
        .out
        .data()
        .iter()
        .map(|&x| x as f32)
        .collect();
    let list = all.upload(client);
    let mut inputs = [&layer.q, &layer.k, &layer.v].map(|x| Trained::new(x.shape(), x.data()));
    let mut distances = Vec::with_capacity(steps + 1);
    for step in 0..=steps {
        progress.set_message(format!("{}: training, step {step}", layer.name));
        let [q, k, v] = [0, 1, 2].map(|i: usize| {
            let input = &inputs[i];
            upload(client, &input.values, input.shape, layer.problem.dtype())
        });
        let tensors = [q?, k?, v?];
        let (distance, grads) = gradients(client, &tensors, &list, options, &exact)?;
        distances.push(distance);
        progress.inc(1);
        if step < steps {
            for (input, grad) in inputs.iter_mut().zip(&grads) {
                input.step(&download(client, grad)?, step + 1);
            }
        }
    }
    Ok(distances)
}

/// The distance, and the gradients of half its square.
fn gradients(
    client: &Client,
    [q, k, v]: &[DeviceTensor<4>; 3],
    list: &BlockList,
    options: &AttentionOptions,
    exact: &[f32],
) -> Result<(f64, [DeviceTensor<4>; 3]), Error> {
    let forward = low_bit_attention(client, q, k, v, list, options, FORMATS)?;
    let out = download(client, &forward.out)?;
    let difference: Vec<f32> = out.iter().zip(exact).map(|(x, y)| x - y).collect();
    let length = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let distance = length(&difference) / length(exact);
    let shape = forward.out.shape();
    let grad_out = upload(client, &difference, shape, forward.out.dtype())?;
    let grads = block_sparse_attention_backward(
        client,
        q,
        k,
        v,
        &forward.out,
        &forward.lse,
        &grad_out,
        list,
        options,
    )?;
    Ok((distance, [grads.dq, grads.dk, grads.dv]))
}

/// A tensor that Adam trains.
struct Trained {
    shape: [usize; 4],
    values: Vec<f32>,
    rate: f32,
    moments: [Vec<f32>; 2],
}

impl Trained {
    fn new(shape: [usize; 4], values: &[f64]) -> Self {
        let values: Vec<f32> = values.iter().map(|&x| x as f32).collect();
        let squares: f32 = values.iter().map(|x| x * x).sum();
        Self {
            shape,
            rate: RATE * (squares / values.len() as f32).sqrt(),
            moments: [vec![0.0; values.len()], vec![0.0; values.len()]],
            values,
        }
    }

    /// Step number `step`, from 1 on.
    fn step(&mut self, grad: &[f32], step: usize) {
        let [first, second] = &mut self.moments;
        let corrections = DECAY.map(|decay| 1.0 - decay.powi(step as i32));
        for (at, &g) in grad.iter().enumerate() {
            first[at] = DECAY[0] * first[at] + (1.0 - DECAY[0]) * g;
            second[at] = DECAY[1] * second[at] + (1.0 - DECAY[1]) * g * g;
            let size = (second[at] / corrections[1]).sqrt();
            // Elements without a gradient stay where they are.
            if size > 0.0 {
                self.values[at] -= self.rate * first[at] / corrections[0] / size;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adam_walks_downhill() {
        let mut x = Trained::new([1, 1, 1, 2], &[3.0, -1.0]);
        for step in 1..=4000 {
            let grad: Vec<f32> = x.values.iter().map(|x| 2.0 * (x - 1.0)).collect();
            x.step(&grad, step);
        }
        assert!(
            x.values.iter().all(|x| (x - 1.0).abs() < 0.05),
            "{:?}",
            x.values
        );
    }
}
