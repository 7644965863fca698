//! Soft masks, run on the device and through the reference.

use cubesla::{Client, DType, SoftInputs, download, sla2_soft_backward, sla2_soft_forward, upload};
use cubesla_reference::attention::Causal;
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::{Tensor, attention, linear, relative_error, sla};

use crate::case::{Inputs, exact, wide};
use crate::sla::{SlaCase, poison, reference_phi};
use crate::sla_backward::sum;
use crate::{Rng, plain};

/// What a run returns, by name.
const NAMES: [&str; 6] = ["out", "dq", "dk", "dv", "dweights", "dlogits"];

/// An SLA2 case, with logits for each block, whose blocks have weights instead of lists.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SoftCase(pub SlaCase);

impl SoftCase {
    /// Weights between 0 and 1.
    pub fn weights(&self) -> Vec<f32> {
        let mut rng = Rng::new(self.0.attention.seed ^ 0x50F7);
        let len = self.0.attention.list_shape().iter().product();
        (0..len)
            .map(|_| 0.01 + 0.98 * rng.uniform() as f32)
            .collect()
    }

    /// Runs forward and backward on the device: `O`, `dQ`, `dK`, `dV`, and the gradients of the
    /// weights and of the logits.
    pub fn run(&self, client: &Client, inputs: &Inputs, grad_out: &[f32]) -> Vec<Vec<f32>> {
        let case = &self.0.attention;
        let ([q, k, v], _) = case.upload_inputs(client, inputs);
        let grad_out = case.upload(client, grad_out, case.out_shape());
        let weights = upload(client, &self.weights(), case.list_shape(), DType::F32);
        let logits = upload(
            client,
            &self.0.weights().logits,
            self.0.logit_shape(),
            DType::F32,
        );
        let inputs = SoftInputs {
            q: &q,
            k: &k,
            v: &v,
            weights: &weights.expect("weights"),
            alpha_logit: &logits.expect("logits"),
        };
        poison(client, case.q_shape().iter().product::<usize>() * 4);
        let (phi, options) = (self.0.phi, &case.options);
        let forward = sla2_soft_forward(client, inputs, phi, options).expect("a valid call");
        let grads = sla2_soft_backward(client, inputs, &forward.saved, &grad_out, phi, options)
            .expect("a valid call");
        let mut all: Vec<Vec<f32>> = [
            &forward.out,
            &grads.dq,
            &grads.dk,
            &grads.dv,
            &grads.dweights,
        ]
        .map(|x| download(client, x).expect("the launch to succeed"))
        .into();
        all.push(download(client, &grads.dalpha_logit).expect("the launch to succeed"));
        all
    }

    /// Runs the case and compares everything with the reference by the error rules.
    pub fn check(&self, client: &Client) {
        let case = &self.0.attention;
        let inputs = self.0.inputs();
        let grad_out = case.grad_out();
        let found = self.run(client, &inputs, &grad_out);

        let ([q, k, v], _) = case.reference_inputs(&inputs);
        let dout = exact(&grad_out, case.out_shape());
        let blocks = |values: Vec<f64>| BlockWeights {
            block_q: case.options.block_q,
            block_k: case.options.block_k,
            weights: Tensor::new(case.list_shape(), values),
        };
        let m = blocks(wide(&self.weights()));
        let rest = blocks(m.weights.data().iter().map(|m| 1.0 - m).collect());
        let (scale, phi, none) = (case.scale(), reference_phi(self.0.phi), Causal::None);
        let (alpha, block_q) = (self.0.alpha(), case.options.block_q);
        let negative = |x: &Tensor| x.map(|x| -x);

        let sparse = attention::forward(&q, &k, &v, &m, scale, none);
        let branch = linear::forward(&q, &k, &v, phi, &rest, none);
        let out = sla::combine_sla2(&sparse.out, &branch, &alpha, block_q);
        let split = sla::combine_sla2_backward(&sparse.out, &branch, &alpha, block_q, &dout);
        let s = attention::backward(&q, &k, &v, &m, scale, none, &sparse, &split.sparse);
        let l = linear::backward(&q, &k, &v, phi, &rest, none, &branch, &split.linear);
        let (exact_sparse, exact_branch) = (sparse.out.clone(), branch.clone());
        let expected = [
            out,
            sum(&s.dq, &l.dq),
            sum(&s.dk, &l.dk),
            sum(&s.dv, &l.dv),
            sum(&s.dweights, &negative(&l.dweights)),
            split.logits,
        ];

        let dtype = case.dtype;
        let sparse = plain::attention(&q, &k, &v, &m, scale, none, dtype);
        let branch = plain::linear(&q, &k, &v, phi, &rest, none, dtype);
        let out = sla::combine_sla2(&sparse, &branch, &alpha, block_q);
        let split = sla::combine_sla2_backward(&sparse, &branch, &alpha, block_q, &dout);
        let (ds, dl) = (
            plain::stored(&split.sparse, dtype),
            plain::stored(&split.linear, dtype),
        );
        let s = plain::attention_backward(&q, &k, &v, &m, scale, none, &ds, dtype);
        let l = plain::linear_backward(&q, &k, &v, phi, &rest, &dl, dtype);
        let plain = [
            out,
            sum(&s[0], &l[0]),
            sum(&s[1], &l[1]),
            sum(&s[2], &l[2]),
            sum(&s[3], &negative(&l[3])),
            split.logits,
        ];

        for (at, name) in NAMES.into_iter().enumerate() {
            let plain = match name {
                "dlogits" => plain[at].clone(),
                _ => plain::stored(&plain[at], dtype),
            };
            let mut bound = plain::gradient_bound(&plain, &expected[at], dtype);
            if name == "dlogits" {
                bound = self
                    .0
                    .logit_bound(&expected[at], [&exact_sparse, &exact_branch], &dout);
            } else if name == "dweights" {
                // Few numbers, each a sum that nearly cancels: twice the plain error is within chance.
                bound *= 2.0;
            }
            let error = relative_error(&wide(&found[at]), expected[at].data());
            assert!(
                error <= bound,
                "{name}: {error:.2e} > {bound:.2e} in {self:?}"
            );
        }
    }
}
