//! The linear branch and the SLA operations, run on the device and through the reference.

use cubesla::{
    BlockList, Blocks, Client, DType, DeviceTensor, Error, FeatureMap, HostBlockList, LinearMode,
    Precision, SlaOptions, SlaResult, download, sla_forward, sla2_forward, upload,
};
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::{Tensor, attention, linear, relative_error, sla};

use crate::case::{Inputs, causal, wide};
use crate::{AttentionCase, Rng, plain};

/// The reference's name of a feature map.
pub fn reference_phi(phi: FeatureMap) -> linear::FeatureMap {
    match phi {
        FeatureMap::Softmax => linear::FeatureMap::Softmax,
        FeatureMap::EluPlusOne => linear::FeatureMap::EluPlusOne,
        FeatureMap::Relu => linear::FeatureMap::Relu,
        FeatureMap::Identity => linear::FeatureMap::Identity,
    }
}

/// How the branches of a case are combined.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Combine {
    /// SLA, with a random projection and bias.
    Sla,
    /// SLA2, with logits `[1, 1]`.
    OneLogit,
    /// SLA2, with logits `[Hq, 1]`.
    LogitPerHead,
    /// SLA2, with logits `[Hq, M]`.
    LogitPerBlock,
}

/// An attention case with a linear branch beside it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlaCase {
    /// Shapes, inputs and critical blocks.
    pub attention: AttentionCase,
    /// Probability of each other block to be negligible; without it there is no such list.
    pub negligible: Option<f64>,
    /// phi.
    pub phi: FeatureMap,
    /// Keys of the linear branch.
    pub linear: LinearMode,
    /// The combination.
    pub combine: Combine,
    /// Arithmetic of the sparse branch.
    pub precision: Precision,
}

impl Default for SlaCase {
    fn default() -> Self {
        Self {
            attention: AttentionCase::default(),
            negligible: None,
            phi: FeatureMap::Softmax,
            linear: LinearMode::Complement,
            combine: Combine::LogitPerBlock,
            precision: Precision::Full,
        }
    }
}

/// Weights of the combination.
#[derive(Clone, Debug)]
pub struct Weights {
    /// `[Dv, Dv]`.
    pub wl: Vec<f32>,
    /// `[Dv]`.
    pub bl: Vec<f32>,
    /// Logits, of the case's shape.
    pub logits: Vec<f32>,
}

/// What the device returned.
#[derive(Clone, Debug, PartialEq)]
pub struct SlaOutputs {
    /// `O`.
    pub out: Vec<f32>,
    /// `O^s`, `O^l` and the log-sum-exp, if saved.
    pub saved: Option<[Vec<f32>; 3]>,
}

impl SlaCase {
    /// The case with other elements.
    pub fn with_dtype(mut self, dtype: DType) -> Self {
        self.attention.dtype = dtype;
        self
    }

    /// Inputs. Features of the identity are kept positive, so that denominators are far from 0.
    pub fn inputs(&self) -> Inputs {
        let mut inputs = self.attention.inputs();
        if self.phi == FeatureMap::Identity {
            inputs
                .q
                .iter_mut()
                .chain(&mut inputs.k)
                .for_each(|x| *x = x.abs());
        }
        inputs
    }

    /// Negligible blocks.
    pub fn negligible_list(&self, inputs: &Inputs) -> Option<HostBlockList> {
        let probability = self.negligible?;
        let mut rng = Rng::new(self.attention.seed ^ 0x4E6);
        let mask: Vec<bool> = inputs
            .list
            .to_mask()
            .into_iter()
            .map(|critical| !critical && rng.uniform() < probability)
            .collect();
        Some(HostBlockList::from_mask(inputs.list.shape(), &mask).expect("a valid mask"))
    }

    /// Shape of the logits.
    pub fn logit_shape(&self) -> [usize; 2] {
        let [_, heads, blocks, _] = self.attention.list_shape();
        match self.combine {
            Combine::Sla | Combine::OneLogit => [1, 1],
            Combine::LogitPerHead => [heads, 1],
            Combine::LogitPerBlock => [heads, blocks],
        }
    }

    /// Random weights.
    pub fn weights(&self) -> Weights {
        let mut rng = Rng::new(self.attention.seed ^ 0x5EED);
        let dv = self.attention.value_dim;
        let mut normals = |n| rng.normals(n, DType::F32);
        let wl = normals(dv * dv).into_iter().map(|x| x / (dv as f32).sqrt());
        Weights {
            wl: wl.collect(),
            bl: normals(dv),
            logits: normals(self.logit_shape().iter().product()),
        }
    }

    /// Runs the operation on the device.
    pub fn run(&self, client: &Client, inputs: &Inputs, save: bool) -> SlaOutputs {
        let (tensors, critical) = self.attention.upload_inputs(client, inputs);
        let negligible = self.negligible_list(inputs).map(|list| list.upload(client));
        poison(
            client,
            self.attention.q_shape().iter().product::<usize>() * 4,
        );
        let result = self.call(client, &tensors, &critical, negligible.as_ref(), save);
        let result = result.expect("a valid call");
        SlaOutputs {
            out: download(client, &result.out).expect("the launch to succeed"),
            saved: result.saved.map(|saved| {
                [
                    download(client, &saved.sparse).expect("the launch to succeed"),
                    download(client, &saved.linear).expect("the launch to succeed"),
                    download(client, &saved.lse).expect("the launch to succeed"),
                ]
            }),
        }
    }

    /// Calls the operation with `[q, k, v]` and lists.
    pub fn call(
        &self,
        client: &Client,
        [q, k, v]: &[DeviceTensor<4>; 3],
        critical: &BlockList,
        negligible: Option<&BlockList>,
        save: bool,
    ) -> Result<SlaResult, Error> {
        let weights = self.weights();
        let options = SlaOptions {
            attention: self.attention.options,
            blocks: Blocks::Given {
                critical,
                negligible,
            },
            phi: self.phi,
            linear: self.linear,
            precision: self.precision,
            save,
        };
        let dv = self.attention.value_dim;
        if self.combine == Combine::Sla {
            let wl = upload(client, &weights.wl, [dv, dv], DType::F32).expect("a matrix");
            let bl = upload(client, &weights.bl, [dv], DType::F32).expect("a vector");
            sla_forward(client, q, k, v, &wl, &bl, &options)
        } else {
            let logits = upload(client, &weights.logits, self.logit_shape(), DType::F32);
            sla2_forward(client, q, k, v, &logits.expect("logits"), &options)
        }
    }

    /// Weights of the blocks that the linear branch sums over.
    pub fn linear_weights(&self, inputs: &Inputs) -> BlockWeights {
        let taken = match self.linear {
            LinearMode::Global => vec![1.0; inputs.list.shape().iter().product()],
            LinearMode::Complement => {
                let critical = inputs.list.to_mask();
                let negligible = self
                    .negligible_list(inputs)
                    .map_or(vec![false; critical.len()], |list| list.to_mask());
                let pairs = critical.into_iter().zip(negligible);
                pairs.map(|(c, n)| f64::from(!c && !n)).collect()
            }
        };
        BlockWeights {
            block_q: self.attention.options.block_q,
            block_k: self.attention.options.block_k,
            weights: Tensor::new(inputs.list.shape(), taken),
        }
    }

    /// Runs the case and compares it with the reference by the error rules, with and without the
    /// saved branches.
    pub fn check(&self, client: &Client) {
        let inputs = self.inputs();
        let saved = self.run(client, &inputs, true);
        let unsaved = self.run(client, &inputs, false);
        assert!(unsaved.saved.is_none());
        assert_eq!(
            saved.out, unsaved.out,
            "saving changes the result of {self:?}"
        );
        self.check_outputs(&inputs, &saved);
    }

    /// Compares `outputs` with the reference by the error rules.
    pub fn check_outputs(&self, inputs: &Inputs, outputs: &SlaOutputs) {
        let case = &self.attention;
        let ([q, k, v], critical) = case.reference_inputs(inputs);
        let marginal = self.linear_weights(inputs);
        let (phi, none) = (reference_phi(self.phi), attention::Causal::None);
        let sparse = attention::forward(&q, &k, &v, &critical, case.scale(), none);
        let branch = linear::forward(&q, &k, &v, phi, &marginal, causal(case.options.causal));
        let out = self.combined(&sparse.out, &branch);

        let dtype = case.factors();
        let plain_sparse = plain::attention(&q, &k, &v, &critical, case.scale(), none, dtype);
        let plain_linear = plain::linear(&q, &k, &v, phi, &marginal, none, dtype);
        let plain_out = plain::stored(&self.combined(&plain_sparse, &plain_linear), dtype);

        let near = |what: &str, found: &[f32], exact: &Tensor, plain: &Tensor| {
            let bound = plain::bound(plain, exact, dtype);
            let error = relative_error(&wide(found), exact.data());
            assert!(
                error <= bound,
                "{what}: {error:.2e} > {bound:.2e} in {self:?}"
            );
        };
        near("out", &outputs.out, &out, &plain_out);
        if let Some([saved_sparse, saved_linear, lse]) = &outputs.saved {
            near("sparse", saved_sparse, &sparse.out, &plain_sparse);
            near("linear", saved_linear, &branch, &plain_linear);
            let bound = case.lse_bound(inputs, &critical, &sparse.lse);
            let error = relative_error(&wide(lse), sparse.lse.data());
            assert!(error <= bound, "lse: {error:.2e} > {bound:.2e} in {self:?}");
        }
    }

    /// The weight of the sparse branch for each head and query block, `[1, Hq, M, 1]`.
    pub fn alpha(&self) -> Tensor {
        let weights = self.weights();
        let [_, heads, blocks, _] = self.attention.list_shape();
        let [_, columns] = self.logit_shape();
        Tensor::from_fn([1, heads, blocks, 1], |[_, h, i, _]| {
            let at = match self.combine {
                Combine::Sla | Combine::OneLogit => 0,
                Combine::LogitPerHead => h,
                Combine::LogitPerBlock => h * columns + i,
            };
            1.0 / (1.0 + (-f64::from(weights.logits[at])).exp())
        })
    }

    /// The branches combined as the reference does.
    pub fn combined(&self, sparse: &Tensor, branch: &Tensor) -> Tensor {
        let weights = self.weights();
        let dv = self.attention.value_dim;
        if self.combine == Combine::Sla {
            let wl = Tensor::new([1, 1, dv, dv], wide(&weights.wl));
            let bl = Tensor::new([1, 1, 1, dv], wide(&weights.bl));
            return sla::combine_sla(sparse, branch, &wl, &bl);
        }
        let alpha = self.alpha();
        sla::combine_sla2(sparse, branch, &alpha, self.attention.options.block_q)
    }
}

/// Leaves NaN in memory that the next outputs of up to `bytes` are likely to take, for operations
/// that allocate their own.
pub fn poison(client: &Client, bytes: usize) {
    let mut size = bytes;
    while size > 256 {
        let values = vec![f32::NAN; size / 4];
        let buffers: Vec<_> = (0..6)
            .map(|_| client.create_from_slice(bytemuck::cast_slice(&values)))
            .collect();
        drop(buffers);
        size /= 4;
    }
}
