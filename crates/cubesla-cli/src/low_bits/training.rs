//! Quantization-aware training of queries, keys and values.

use cubesla::{
    AttentionOptions, BlockList, Client, DeviceTensor, LowBitFormats, download, low_bit_attention,
    low_bit_attention_backward, upload,
};
use indicatif::ProgressBar;

use crate::error::Error;
use crate::layers::Layer;

const FORMATS: LowBitFormats = LowBitFormats::INT8_FP8;
/// What of a gradient a step goes, and what of the step before. Larger steps stir up more rounding
/// than they take away.
const RATE: f32 = 3e-3;
const MOMENTUM: f32 = 0.9;

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
                input.step(&download(client, grad)?);
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
    let (out, lse, grad) = (&forward.out, &forward.lse, &grad_out);
    let grads =
        low_bit_attention_backward(client, q, k, v, out, lse, grad, list, options, FORMATS)?;
    Ok((distance, [grads.dq, grads.dk, grads.dv]))
}

/// A tensor that gradient descent with momentum trains.
struct Trained {
    shape: [usize; 4],
    values: Vec<f32>,
    momentum: Vec<f32>,
}

impl Trained {
    fn new(shape: [usize; 4], values: &[f64]) -> Self {
        Self {
            shape,
            values: values.iter().map(|&x| x as f32).collect(),
            momentum: vec![0.0; values.len()],
        }
    }

    fn step(&mut self, grad: &[f32]) {
        let values = self.values.iter_mut().zip(&mut self.momentum);
        for ((value, momentum), &grad) in values.zip(grad) {
            *momentum = MOMENTUM * *momentum + grad;
            *value -= RATE * *momentum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_go_downhill() {
        let mut x = Trained::new([1, 1, 1, 2], &[3.0, -1.0]);
        for _ in 0..400 {
            let grad: Vec<f32> = x.values.iter().map(|x| 2.0 * (x - 1.0)).collect();
            x.step(&grad);
        }
        assert!(
            x.values.iter().all(|x| (x - 1.0).abs() < 1e-3),
            "{:?}",
            x.values
        );
    }
}
