//! Attention whose blocks have weights, and its gradient: what SLA2's first stage adds.

use cubesla::{
    AttentionOptions, AttentionOutput, AttentionProblem, Client, DType, DeviceTensor,
    SoftAttentionGradients, soft_attention, soft_attention_backward, upload,
};
use cubesla_reference::attention::{Causal, Forward, backward, forward};
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::{Tensor, relative_error};

use super::backward::{download_lse, gathered, worse};
use super::{Case, Check, Cost, Qkv, Scale, Size, Work, bound, sparse};
use crate::bench::host::{HostTensor, Random};
use crate::error::Error;

pub fn cases(scale: Scale, dtype: Option<DType>) -> Vec<Case> {
    let (sizes, full) = scale.sizes(dtype);
    let of = |size: Size| {
        ["soft_forward", "soft_backward"].map(|operation| Case {
            name: format!("{operation}/all/{size}"),
            prepare: Box::new(move |client| {
                let soft = Soft::new(client, size)?;
                Ok(match operation {
                    "soft_forward" => Box::new(SoftForward(soft)) as Box<dyn Work>,
                    _ => Box::new(SoftBackward::new(soft)?),
                })
            }),
        })
    };
    sizes.into_iter().take(full).flat_map(of).collect()
}

/// Inputs, with a weight in (0, 1) for every block.
struct Soft {
    client: Client,
    inputs: Qkv,
    options: AttentionOptions,
    problem: AttentionProblem,
    /// `[B, H, M, N]`.
    weights: Vec<f32>,
    on_device: DeviceTensor<4>,
}

impl Soft {
    fn new(client: &Client, size: Size) -> Result<Self, Error> {
        let options = AttentionOptions::default();
        let problem = sparse::problem(size, &options)?;
        let blocks = [problem.query_blocks(), problem.key_blocks()];
        let shape = [size.batch, size.heads, blocks[0], blocks[1]];
        let mut random = Random::new(19);
        let uniform = |_| (random.below(1 << 20) as f32 + 0.5) / (1 << 20) as f32;
        let weights: Vec<f32> = (0..shape.iter().product()).map(uniform).collect();
        Ok(Self {
            client: client.clone(),
            inputs: Qkv::new(client, size)?,
            options,
            problem,
            on_device: upload(client, &weights, shape, DType::F32)?,
            weights,
        })
    }

    fn forward(&self, number: usize) -> Result<AttentionOutput, Error> {
        let [q, k, v] = self.inputs.copy(number);
        let (weights, options) = (&self.on_device, &self.options);
        Ok(soft_attention(&self.client, q, k, v, weights, options)?)
    }

    /// The weight of query `i` and key `j`.
    fn weight(&self, [b, h, i]: [usize; 3], j: usize) -> f64 {
        let problem = &self.problem;
        let row = (b * problem.query_heads() + h) * problem.query_blocks() + i / problem.block_q();
        self.weights[row * problem.key_blocks() + j / problem.block_k()].into()
    }

    /// Weights of `rows` of a head against the keys `keys`.
    fn weights(&self, [b, h]: [usize; 2], rows: &[usize], keys: &[usize]) -> BlockWeights {
        let shape = [1, 1, rows.len(), keys.len()];
        BlockWeights::from_fn(shape, 1, 1, |[_, _, i, j]| {
            self.weight([b, h, rows[i]], keys[j])
        })
    }

    fn cost(&self, products: f64, tensors: usize) -> Cost {
        let size = self.inputs.size;
        Cost {
            flops: products / 2.0 * size.dense_flops(),
            low_bit_flops: 0.0,
            dense_flops: None,
            bytes: (tensors * size.tensor_bytes()
                + 4 * size.batch * size.heads * size.len
                + 4 * self.weights.len()) as f64,
            dtype: size.dtype,
        }
    }
}

struct SoftForward(Soft);

impl Work for SoftForward {
    fn call(&self, number: usize) -> Result<(), Error> {
        self.0.forward(number).map(drop)
    }

    fn check(&self) -> Result<Check, Error> {
        let soft = &self.0;
        let out = HostTensor::download(&soft.client, &soft.forward(0)?.out)?;
        let keys: Vec<usize> = (0..soft.problem.key_len()).collect();
        let [q, k, v] = &soft.inputs.host;
        let scale = soft.problem.scale().into();
        let (mut found, mut exact) = (Vec::new(), Vec::new());
        for at in soft.inputs.sample() {
            let head = [at[0], at[1]];
            let weights = soft.weights(head, &[at[2]], &keys);
            let (q, k, v) = (q.row(at), k.head(head), v.head(head));
            let row = forward(&q, &k, &v, &weights, scale, Causal::None).out;
            found.extend_from_slice(out.row(at).data());
            exact.extend_from_slice(row.data());
        }
        Ok(Check {
            error: relative_error(&found, &exact),
            bound: bound(soft.inputs.size.dtype),
        })
    }

    fn cost(&self) -> Cost {
        self.0.cost(2.0, 4)
    }
}

struct SoftBackward {
    soft: Soft,
    forward: AttentionOutput,
    /// dO, on the host and on the device.
    grad: (HostTensor, DeviceTensor<4>),
}

impl SoftBackward {
    fn new(soft: Soft) -> Result<Self, Error> {
        let size = soft.inputs.size;
        let grad = HostTensor::normal(size.shape(), size.dtype, 8);
        let on_device = grad.upload(&soft.client)?;
        Ok(Self {
            forward: soft.forward(0)?,
            grad: (grad, on_device),
            soft,
        })
    }

    /// Every copy of the inputs has the same values, so one forward serves them all.
    fn gradients(&self, number: usize) -> Result<SoftAttentionGradients, Error> {
        let soft = &self.soft;
        let [q, k, v] = soft.inputs.copy(number);
        Ok(soft_attention_backward(
            &soft.client,
            q,
            k,
            v,
            &soft.on_device,
            &self.forward,
            &self.grad.1,
            &soft.options,
        )?)
    }
}

impl Work for SoftBackward {
    fn call(&self, number: usize) -> Result<(), Error> {
        self.gradients(number).map(drop)
    }

    /// The largest of the errors of dQ, dK, dV and dm.
    fn check(&self) -> Result<Check, Error> {
        let soft = &self.soft;
        let (client, problem) = (&soft.client, &soft.problem);
        let gradients = self.gradients(0)?;
        let results = [
            HostTensor::download(client, &self.forward.out)?,
            download_lse(client, &self.forward.lse)?,
        ];
        let [dq, dk, dv, dm] = [
            &gradients.dq,
            &gradients.dk,
            &gradients.dv,
            &gradients.dweights,
        ]
        .map(|gradient| HostTensor::download(client, gradient));
        let found = [dq?, dk?, dv?, dm?];
        let [q, k, v] = &soft.inputs.host;
        // Gradients of some queries and keys, all that others have to do with them given.
        let exact = |head, rows: &[usize], keys: &[usize]| {
            let [out, lse] = results.each_ref().map(|x| gathered(x, head, rows));
            let (q, grad) = (gathered(q, head, rows), gathered(&self.grad.0, head, rows));
            let (k, v) = (gathered(k, head, keys), gathered(v, head, keys));
            let (weights, scale) = (soft.weights(head, rows, keys), problem.scale().into());
            let forward = Forward { out, lse };
            backward(&q, &k, &v, &weights, scale, Causal::None, &forward, &grad)
        };
        let block = |at: usize, size: usize, len: usize| -> Vec<usize> {
            (at / size * size..len.min((at / size + 1) * size)).collect()
        };
        let all_rows: Vec<usize> = (0..problem.query_len()).collect();
        let all_keys: Vec<usize> = (0..problem.key_len()).collect();
        let mut pairs = [(); 4].map(|()| (Vec::new(), Vec::new()));
        for at in soft.inputs.sample() {
            let (head, i) = ([at[0], at[1]], at[2]);
            let by_key = exact(head, &all_rows, &[i]);
            let rows = block(i, problem.block_q(), problem.query_len());
            let keys = block(i, problem.block_k(), problem.key_len());
            let of_block: f64 = exact(head, &rows, &keys).dweights.data().iter().sum();
            let wanted = [
                exact(head, &[i], &all_keys).dq,
                by_key.dk,
                by_key.dv,
                Tensor::full([1, 1, 1, 1], of_block),
            ];
            for ((pair, found), wanted) in pairs.iter_mut().zip(&found).take(3).zip(&wanted) {
                pair.0.extend_from_slice(found.row(at).data());
                pair.1.extend_from_slice(wanted.data());
            }
            let row = found[3].row([at[0], at[1], i / problem.block_q()]);
            pairs[3].0.push(row.data()[i / problem.block_k()]);
            pairs[3].1.extend_from_slice(wanted[3].data());
        }
        let errors = pairs.map(|(found, exact)| relative_error(&found, &exact));
        Ok(Check {
            error: errors.into_iter().fold(0.0, worse),
            // Two factors are rounded where the forward has one.
            bound: 2.0 * bound(soft.inputs.size.dtype),
        })
    }

    fn cost(&self) -> Cost {
        self.soft.cost(5.0, 8)
    }
}
