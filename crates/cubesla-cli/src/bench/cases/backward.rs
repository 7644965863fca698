//! The gradient of block-sparse attention, in full precision and in low bits, the block list and the
//! forward's results given.

use cubesla::{
    AttentionGradients, AttentionOptions, AttentionOutput, AttentionProblem, BlockList, Client,
    DType, DeviceTensor, HostBlockList, LowBitFormats, block_sparse_attention,
    block_sparse_attention_backward, low_bit_attention, low_bit_attention_backward,
};
use cubesla_reference::attention::{Causal, Forward, Gradients, backward};
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::{Tensor, relative_error};

use super::{Case, Check, Cost, Qkv, Scale, Size, Work, bound, sparse};
use crate::bench::host::HostTensor;
use crate::error::Error;

pub fn cases(scale: Scale, dtype: Option<DType>) -> Vec<Case> {
    let case = |name, (size, sparsity), formats| Case {
        name: format!("{name}/{}/{size}", sparse::label(sparsity)),
        prepare: Box::new(move |client| {
            Ok(Box::new(Backward::new(client, size, sparsity, formats)?))
        }),
    };
    let variants = sparse::variants(scale, dtype).into_iter();
    let both = |variant| {
        [
            case("sparse_backward", variant, None),
            case(
                "low_bit_backward/int8-fp8",
                variant,
                Some(LowBitFormats::INT8_FP8),
            ),
        ]
    };
    variants.flat_map(both).collect()
}

struct Backward {
    client: Client,
    inputs: Qkv,
    options: AttentionOptions,
    problem: AttentionProblem,
    list: HostBlockList,
    on_device: BlockList,
    forward: AttentionOutput,
    /// dO, on the host and on the device.
    grad: (HostTensor, DeviceTensor<4>),
    /// Of a forward in low bits.
    formats: Option<LowBitFormats>,
}

impl Backward {
    fn new(
        client: &Client,
        size: Size,
        sparsity: usize,
        formats: Option<LowBitFormats>,
    ) -> Result<Self, Error> {
        let options = AttentionOptions::default();
        let problem = sparse::problem(size, &options)?;
        let list = sparse::random_list(&problem, sparsity)?;
        let on_device = list.upload(client);
        let inputs = Qkv::new(client, size)?;
        let [q, k, v] = inputs.copy(0);
        let forward = match formats {
            None => block_sparse_attention(client, q, k, v, &on_device, &options)?,
            Some(low) => low_bit_attention(client, q, k, v, &on_device, &options, low)?,
        };
        let grad = HostTensor::normal(size.shape(), size.dtype, 8);
        let grad_on_device = grad.upload(client)?;
        Ok(Self {
            client: client.clone(),
            inputs,
            options,
            problem,
            list,
            on_device,
            forward,
            grad: (grad, grad_on_device),
            formats,
        })
    }

    /// Every copy of the inputs has the same values, so one forward serves them all.
    fn gradients(&self, number: usize) -> Result<AttentionGradients, Error> {
        let [q, k, v] = self.inputs.copy(number);
        let AttentionOutput { out, lse } = &self.forward;
        let (list, options) = (&self.on_device, &self.options);
        let (client, grad) = (&self.client, &self.grad.1);
        Ok(match self.formats {
            None => {
                block_sparse_attention_backward(client, q, k, v, out, lse, grad, list, options)?
            }
            Some(low) => {
                low_bit_attention_backward(client, q, k, v, out, lse, grad, list, options, low)?
            }
        })
    }

    /// `dQ` of row `i` from all keys it sees.
    fn query(&self, at: [usize; 3], forward: &Results) -> Tensor {
        let [b, h, i] = at;
        let [q, k, v] = &self.inputs.host;
        let weights = sparse::weights(&self.problem, &self.list, at);
        let inputs = [q.row(at), k.head([b, h]), v.head([b, h])];
        self.exact(inputs, &weights, forward, [b, h], &[i]).dq
    }

    /// `dK` and `dV` of row `j` from all queries that see it.
    fn key(&self, [b, h, j]: [usize; 3], forward: &Results) -> [Tensor; 2] {
        let problem = &self.problem;
        let block = (j / problem.block_k()) as u32;
        let first = (b * problem.query_heads() + h) * problem.query_blocks();
        let sees = |i: &usize| {
            let row = self.list.row(first + i / problem.block_q());
            row.binary_search(&block).is_ok()
        };
        let rows: Vec<usize> = (0..problem.query_len()).filter(sees).collect();
        let [q, k, v] = &self.inputs.host;
        let weights = BlockWeights::dense([1, 1, rows.len(), 1], 1, 1);
        let inputs = [
            gathered(q, [b, h], &rows),
            k.row([b, h, j]),
            v.row([b, h, j]),
        ];
        let gradients = self.exact(inputs, &weights, forward, [b, h], &rows);
        [gradients.dk, gradients.dv]
    }

    /// Gradients for some queries, whose forward and incoming gradient are looked up.
    fn exact(
        &self,
        [q, k, v]: [Tensor; 3],
        weights: &BlockWeights,
        results: &Results,
        head: [usize; 2],
        rows: &[usize],
    ) -> Gradients {
        let forward = Forward {
            out: gathered(&results.out, head, rows),
            lse: gathered(&results.lse, head, rows),
        };
        let grad = gathered(&self.grad.0, head, rows);
        let scale = self.problem.scale().into();
        backward(&q, &k, &v, weights, scale, Causal::None, &forward, &grad)
    }
}

/// The forward's results on the host: inputs of the backward.
struct Results {
    out: HostTensor,
    /// `[B, Hq, Lq, 1]`.
    lse: HostTensor,
}

/// The larger error; a maximum of `f64` drops a NaN.
pub fn worse(one: f64, other: f64) -> f64 {
    if other > one || other.is_nan() {
        other
    } else {
        one
    }
}

/// The forward's log-sum-exp, `[B, Hq, Lq, 1]`.
pub fn download_lse(client: &Client, lse: &DeviceTensor<3>) -> Result<HostTensor, Error> {
    let [batch, heads, len] = lse.shape();
    let column = DeviceTensor::new(
        lse.handle().clone(),
        [batch, heads, len, 1],
        [heads * len, len, 1, 1],
        lse.dtype(),
    );
    HostTensor::download(client, &column.map_err(cubesla::Error::from)?)
}

/// Rows of a head, `[1, 1, rows, D]`.
pub fn gathered(x: &HostTensor, [b, h]: [usize; 2], rows: &[usize]) -> Tensor {
    let rows: Vec<Tensor> = rows.iter().map(|&i| x.row([b, h, i])).collect();
    let dim = rows.first().map_or(0, |row| row.data().len());
    let data = rows.iter().flat_map(|row| row.data()).copied().collect();
    Tensor::new([1, 1, rows.len(), dim], data)
}

impl Work for Backward {
    fn call(&self, number: usize) -> Result<(), Error> {
        self.gradients(number).map(drop)
    }

    /// The largest of the errors of dQ, dK and dV; in low bits of those to the gradients of the exact
    /// forward.
    fn check(&self) -> Result<Check, Error> {
        let client = &self.client;
        let gradients = self.gradients(0)?;
        let forward = if self.formats.is_some() {
            let [q, k, v] = self.inputs.copy(0);
            &block_sparse_attention(client, q, k, v, &self.on_device, &self.options)?
        } else {
            &self.forward
        };
        let results = Results {
            out: HostTensor::download(client, &forward.out)?,
            lse: download_lse(client, &forward.lse)?,
        };
        let [dq, dk, dv] = [&gradients.dq, &gradients.dk, &gradients.dv]
            .map(|gradient| HostTensor::download(client, gradient));
        let found = [dq?, dk?, dv?];
        let mut pairs = [(); 3].map(|()| (Vec::new(), Vec::new()));
        for at in self.inputs.sample() {
            let [dk, dv] = self.key(at, &results);
            let exact = [self.query(at, &results), dk, dv];
            for ((pair, found), exact) in pairs.iter_mut().zip(&found).zip(&exact) {
                pair.0.extend_from_slice(found.row(at).data());
                pair.1.extend_from_slice(exact.data());
            }
        }
        let errors = pairs.map(|(found, exact)| relative_error(&found, &exact));
        Ok(Check {
            error: errors.into_iter().fold(0.0, worse),
            bound: match self.formats {
                // Two factors are rounded where the forward has one.
                None => 2.0 * bound(self.inputs.size.dtype),
                Some(_) => 0.06,
            },
        })
    }

    fn cost(&self) -> Cost {
        let size = self.inputs.size;
        // Five products, where the forward has two.
        let products = 5.0 / 2.0;
        let pairs = sparse::pairs(&self.problem, self.list.rows());
        Cost {
            flops: products * pairs * (4 * size.dim) as f64,
            low_bit_flops: 0.0,
            dense_flops: Some(products * size.dense_flops()),
            bytes: (8 * size.tensor_bytes() + 4 * size.batch * size.heads * size.len) as f64
                + sparse::list_bytes(&self.list),
            dtype: size.dtype,
        }
    }
}
