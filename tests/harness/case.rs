//! An attention problem with inputs, run on the device and through the reference.

use cubesla::{
    AttentionOptions, AttentionProblem, BlockList, Causal, Client, DType, DeviceTensor,
    F32Products, HostBlockList, download, plan::ForwardPlan, upload,
};
use cubesla_kernels::FactorType;
use cubesla_kernels::attention::{ForwardInputs, ForwardOutputs};
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::{Tensor, attention, relative_error};

use crate::{Rng, plain};

/// Elements past the end of an output that must stay as they were.
const GUARD: usize = 64;

/// Which blocks a case selects.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lists {
    /// All blocks.
    Dense,
    /// The same number in every row.
    TopK(usize),
    /// Each block with a probability; rows vary in length and some are empty.
    Random(f64),
    /// None at all.
    Empty,
}

/// Sizes and choices of a case; [`Default`] is a small irregular one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionCase {
    /// B.
    pub batch: usize,
    /// Hq.
    pub query_heads: usize,
    /// Hkv.
    pub kv_heads: usize,
    /// Lq.
    pub query_len: usize,
    /// Lk.
    pub key_len: usize,
    /// D.
    pub head_dim: usize,
    /// Dv.
    pub value_dim: usize,
    /// Element type.
    pub dtype: DType,
    /// Options of the operation.
    pub options: AttentionOptions,
    /// Selected blocks.
    pub lists: Lists,
    /// Whether inputs are `[B, L, H, D]` seen as `[B, H, L, D]`.
    pub strided: bool,
    /// Standard deviation of q and k.
    pub spread: f32,
    /// Seed of the inputs and lists.
    pub seed: u64,
}

impl Default for AttentionCase {
    fn default() -> Self {
        Self {
            batch: 1,
            query_heads: 2,
            kv_heads: 1,
            query_len: 77,
            key_len: 101,
            head_dim: 32,
            value_dim: 32,
            dtype: DType::F32,
            options: AttentionOptions {
                block_q: 32,
                block_k: 32,
                ..AttentionOptions::default()
            },
            lists: Lists::Random(0.5),
            strided: false,
            spread: 1.0,
            seed: 1,
        }
    }
}

/// Inputs of a case, on the host as the device holds them.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// `[B, Hq, Lq, D]`.
    pub q: Vec<f32>,
    /// `[B, Hkv, Lk, D]`.
    pub k: Vec<f32>,
    /// `[B, Hkv, Lk, Dv]`.
    pub v: Vec<f32>,
    /// The selected blocks.
    pub list: HostBlockList,
}

/// Results of a run on the device.
#[derive(Clone, Debug, PartialEq)]
pub struct Outputs {
    /// `[B, Hq, Lq, Dv]`.
    pub out: Vec<f32>,
    /// `[B, Hq, Lq]`.
    pub lse: Vec<f32>,
}

impl AttentionCase {
    /// Shape of `q`.
    pub fn q_shape(&self) -> [usize; 4] {
        [self.batch, self.query_heads, self.query_len, self.head_dim]
    }

    /// Shape of `k`.
    pub fn k_shape(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.key_len, self.head_dim]
    }

    /// Shape of `v`.
    pub fn v_shape(&self) -> [usize; 4] {
        [self.batch, self.kv_heads, self.key_len, self.value_dim]
    }

    /// What the factors of its products are.
    pub fn factors(&self) -> FactorType {
        match self.options.products {
            F32Products::F32 => self.dtype.into(),
            F32Products::Tf32 => FactorType::Tf32,
        }
    }

    /// `[B, Hq, M, N]`.
    pub fn list_shape(&self) -> [usize; 4] {
        [
            self.batch,
            self.query_heads,
            self.query_len.div_ceil(self.options.block_q),
            self.key_len.div_ceil(self.options.block_k),
        ]
    }

    /// Random inputs.
    pub fn inputs(&self) -> Inputs {
        let mut rng = Rng::new(self.seed);
        let mut tensor = |shape: [usize; 4], spread: f32| {
            let values = rng.normals(shape.iter().product(), DType::F32);
            let values = values
                .into_iter()
                .map(|x| crate::rounded(x * spread, self.dtype));
            values.collect::<Vec<f32>>()
        };
        Inputs {
            q: tensor(self.q_shape(), self.spread),
            k: tensor(self.k_shape(), self.spread),
            v: tensor(self.v_shape(), 1.0),
            list: self.list(),
        }
    }

    /// The selected blocks.
    pub fn list(&self) -> HostBlockList {
        let shape = self.list_shape();
        let [_, _, _, key_blocks] = shape;
        let rows = shape[..3].iter().product();
        let mut rng = Rng::new(self.seed ^ 0xB10C);
        let mut row = || -> Vec<u32> {
            let all = 0..key_blocks as u32;
            match self.lists {
                Lists::Dense => all.collect(),
                Lists::Empty => Vec::new(),
                Lists::Random(p) => all.filter(|_| rng.uniform() < p).collect(),
                Lists::TopK(k) => {
                    let mut left: Vec<u32> = all.collect();
                    let mut chosen: Vec<u32> = (0..k.min(key_blocks))
                        .map(|_| left.swap_remove(rng.below(left.len())))
                        .collect();
                    chosen.sort_unstable();
                    chosen
                }
            }
        };
        HostBlockList::from_rows(shape, (0..rows).map(|_| row()).collect()).expect("a valid list")
    }

    /// A tensor of this case on the device, strided if the case asks for it.
    pub fn upload(&self, client: &Client, data: &[f32], shape: [usize; 4]) -> DeviceTensor<4> {
        if !self.strided {
            return upload(client, data, shape, self.dtype).expect("data of that shape");
        }
        let [b, h, l, d] = shape;
        let mut moved = vec![0.0; data.len()];
        for (at, &x) in data.iter().enumerate() {
            let (bh, rest) = (at / (l * d), at % (l * d));
            let (row, column) = (rest / d, rest % d);
            moved[((bh / h * l + row) * h + bh % h) * d + column] = x;
        }
        upload(client, &moved, [b, l, h, d], self.dtype)
            .expect("data of that shape")
            .permute([0, 2, 1, 3])
    }

    /// The device's inputs.
    pub fn upload_inputs(
        &self,
        client: &Client,
        inputs: &Inputs,
    ) -> ([DeviceTensor<4>; 3], BlockList) {
        let tensors = [
            self.upload(client, &inputs.q, self.q_shape()),
            self.upload(client, &inputs.k, self.k_shape()),
            self.upload(client, &inputs.v, self.v_shape()),
        ];
        (tensors, inputs.list.upload(client))
    }

    /// Runs the forward as planned by default, into poisoned, guarded outputs.
    pub fn run(&self, client: &Client, inputs: &Inputs) -> Outputs {
        self.run_all(client, inputs).swap_remove(0).1
    }

    /// Runs the forward with every engine that can, each into poisoned, guarded outputs.
    pub fn run_all(&self, client: &Client, inputs: &Inputs) -> Vec<(ForwardPlan, Outputs)> {
        let all = |problem: &AttentionProblem, _: ForwardInputs<'_>| {
            ForwardPlan::all(problem, client.properties()).expect("a plan")
        };
        self.run_plans(client, inputs, all)
    }

    /// Runs the plans that `plans` makes for the uploaded inputs.
    pub fn run_plans(
        &self,
        client: &Client,
        inputs: &Inputs,
        plans: impl FnOnce(&AttentionProblem, ForwardInputs<'_>) -> Vec<ForwardPlan>,
    ) -> Vec<(ForwardPlan, Outputs)> {
        let ([q, k, v], list) = self.upload_inputs(client, inputs);
        let problem = AttentionProblem::new(&q, &k, &v, &self.options).expect("a valid problem");
        let inputs = ForwardInputs {
            q: &q,
            k: &k,
            v: &v,
            list: &list,
        };
        let plans = plans(&problem, inputs);
        let run = |plan: ForwardPlan| {
            let out = Poisoned::new(client, problem.out_shape(), self.dtype);
            let lse = Poisoned::new(client, problem.lse_shape(), DType::F32);
            let outputs = ForwardOutputs {
                out: &out.tensor,
                lse: &lse.tensor,
            };
            plan.launch(client, &problem, inputs, outputs)
                .expect("a valid launch");
            let outputs = Outputs {
                out: out.read(client),
                lse: lse.read(client),
            };
            (plan, outputs)
        };
        plans.into_iter().map(run).collect()
    }

    /// The reference's inputs.
    pub fn reference_inputs(&self, inputs: &Inputs) -> ([Tensor; 3], BlockWeights) {
        let mask = inputs.list.to_mask();
        let weights = BlockWeights {
            block_q: self.options.block_q,
            block_k: self.options.block_k,
            weights: Tensor::new(self.list_shape(), mask.into_iter().map(f64::from).collect()),
        };
        let tensors = [
            exact(&inputs.q, self.q_shape()),
            exact(&inputs.k, self.k_shape()),
            exact(&inputs.v, self.v_shape()),
        ];
        (tensors, weights)
    }

    /// Factor on the scores.
    pub fn scale(&self) -> f64 {
        let default = 1.0 / (self.head_dim as f64).sqrt();
        self.options.scale.map_or(default, f64::from)
    }

    /// Runs the case with every engine and compares each with the reference by the error rules.
    pub fn check(&self, client: &Client) {
        let inputs = self.inputs();
        self.check_all(&inputs, self.run_all(client, &inputs));
    }

    /// Compares what plans gave with the reference.
    pub fn check_all(&self, inputs: &Inputs, outputs: Vec<(ForwardPlan, Outputs)>) {
        for (plan, outputs) in outputs {
            self.check_outputs(inputs, &outputs, &plan.to_string());
        }
    }

    /// Compares `outputs` with the reference by the error rules.
    pub fn check_outputs(&self, inputs: &Inputs, outputs: &Outputs, plan: &str) {
        let ([q, k, v], weights) = self.reference_inputs(inputs);
        let causal = causal(self.options.causal);
        let expected = attention::forward(&q, &k, &v, &weights, self.scale(), causal);
        let factors = self.factors();
        let plain = plain::attention(&q, &k, &v, &weights, self.scale(), causal, factors);
        let bound = plain::bound(&plain, &expected.out, factors);
        let error = relative_error(&wide(&outputs.out), expected.out.data());
        assert!(
            error <= bound,
            "out: {error:.2e} > {bound:.2e} by {plan} in {self:?}"
        );
        let bound = self.lse_bound(inputs, &weights, &expected.lse);
        let error = relative_error(&wide(&outputs.lse), expected.lse.data());
        assert!(
            error <= bound,
            "lse: {error:.2e} > {bound:.2e} by {plan} in {self:?}"
        );
    }

    /// The relative error that a log-sum-exp may have: 1e-5, as it is f32 whatever the inputs are, and
    /// by tf32 twice what rounding the factors of scores does to it besides.
    pub fn lse_bound(&self, inputs: &Inputs, weights: &BlockWeights, exact: &Tensor) -> f64 {
        if self.factors() != FactorType::Tf32 {
            return 1e-5;
        }
        let (tensors, _) = self.reference_inputs(inputs);
        let [q, k, v] = tensors.map(|x| plain::stored(&x, FactorType::Tf32));
        let causal = causal(self.options.causal);
        let rounded = attention::forward(&q, &k, &v, weights, self.scale(), causal);
        1e-5 + 2.0 * relative_error(rounded.lse.data(), exact.data())
    }
}

/// Options with blocks of that size.
pub fn blocks(block_q: usize, block_k: usize) -> AttentionOptions {
    AttentionOptions {
        block_q,
        block_k,
        ..AttentionOptions::default()
    }
}

/// Causal masks of both alignments, with fewer and with more queries than keys, that cut inside blocks.
pub fn causal_cases() -> Vec<AttentionCase> {
    let mut cases = Vec::new();
    for causal in [Causal::TopLeft, Causal::BottomRight] {
        for (query_len, key_len) in [(90, 90), (50, 110), (110, 50)] {
            cases.push(AttentionCase {
                query_len,
                key_len,
                lists: Lists::Dense,
                options: AttentionOptions {
                    causal,
                    ..blocks(32, 48)
                },
                ..AttentionCase::default()
            });
        }
    }
    cases
}

/// The reference's name of a causal mask.
pub fn causal(causal: Causal) -> attention::Causal {
    match causal {
        Causal::None => attention::Causal::None,
        Causal::TopLeft => attention::Causal::TopLeft,
        Causal::BottomRight => attention::Causal::BottomRight,
    }
}

/// Values in f64.
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// Values as a tensor of the reference.
pub fn exact(values: &[f32], shape: [usize; 4]) -> Tensor {
    Tensor::new(shape, wide(values))
}

/// A tensor full of NaN, with more NaN behind it.
#[derive(Debug)]
pub struct Poisoned<const R: usize> {
    /// The tensor, without its guard.
    pub tensor: DeviceTensor<R>,
    whole: DeviceTensor<1>,
}

impl<const R: usize> Poisoned<R> {
    /// A poisoned tensor.
    pub fn new(client: &Client, shape: [usize; R], dtype: DType) -> Self {
        let len = shape.iter().product::<usize>() + GUARD;
        let whole = upload(client, &vec![f32::NAN; len], [len], dtype).expect("that length");
        let mut strides = [1; R];
        for axis in (1..R).rev() {
            strides[axis - 1] = strides[axis] * shape[axis];
        }
        let tensor = DeviceTensor::new(whole.handle().clone(), shape, strides, dtype)
            .expect("it fits in front of its guard");
        Self { tensor, whole }
    }

    /// The tensor's values.
    ///
    /// # Panics
    /// If something was written past its end.
    pub fn read(&self, client: &Client) -> Vec<f32> {
        let mut values = download(client, &self.whole).expect("the launch to succeed");
        let guard = values.split_off(self.tensor.len());
        assert!(
            guard.iter().all(|x| x.is_nan()),
            "a kernel wrote past the end"
        );
        values
    }
}
