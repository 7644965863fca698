//! Soft masks, run on the device and through the reference.

use cubesla::plan::{BackwardPlan, ForwardPlan, SlaBackwardPlan};
use cubesla::{
    AttentionProblem, Client, DType, SoftInputs, download, sla2_soft_backward, sla2_soft_forward,
    upload,
};
use cubesla_kernels::attention::{BackwardInputs, BackwardOutputs, ForwardInputs, ForwardOutputs};
use cubesla_kernels::sla::{self as operations, CombinationGradients};
use cubesla_reference::attention::Causal;
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::{Tensor, attention, linear, relative_error, sla};

use crate::case::{Inputs, Poisoned, causal, exact, wide};
use crate::sla::{SlaCase, poison, reference_phi};
use crate::sla_backward::sum;
use crate::{AttentionCase, Rng, plain};

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
        self.run_by(client, inputs, grad_out, None)
    }

    /// The same with every engine that can: the library's choice first, then slower ones' plans.
    pub fn run_all(
        &self,
        client: &Client,
        inputs: &Inputs,
        grad_out: &[f32],
    ) -> Vec<(String, Vec<Vec<f32>>)> {
        let case = &self.0.attention;
        let ([q, k, v], _) = case.upload_inputs(client, inputs);
        let problem = AttentionProblem::new(&q, &k, &v, &case.options).expect("a valid problem");
        let forward = ForwardPlan::all(&problem, client.properties()).expect("a plan");
        let backward = SlaBackwardPlan::all(&problem, client.properties()).expect("a plan");
        let run = |at: usize| {
            let plans = (
                &forward[at.min(forward.len() - 1)],
                &backward[at.min(backward.len() - 1)],
            );
            let by = (at > 0).then_some(plans);
            let found = self.run_by(client, inputs, grad_out, by);
            (format!("{}; backward {}", plans.0, plans.1), found)
        };
        (0..forward.len().max(backward.len())).map(run).collect()
    }

    fn run_by(
        &self,
        client: &Client,
        inputs: &Inputs,
        grad_out: &[f32],
        plans: Option<(&ForwardPlan, &SlaBackwardPlan)>,
    ) -> Vec<Vec<f32>> {
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
        let (out, [dq, dk, dv, dweights], dlogit) = if let Some((forward, backward)) = plans {
            let problem = AttentionProblem::new(&q, &k, &v, options).expect("a valid problem");
            let (out, saved) = forward
                .launch_soft(client, &problem, inputs, phi)
                .expect("a valid launch");
            let (grads, dweights) = backward
                .launch_soft(client, &problem, inputs, phi, &saved, &grad_out)
                .expect("a valid launch");
            let CombinationGradients::Sla2 { alpha_logit } = grads.weights else {
                unreachable!("soft masks are SLA2's");
            };
            let grads = grads.inputs;
            (out, [grads.dq, grads.dk, grads.dv, dweights], alpha_logit)
        } else {
            let forward = sla2_soft_forward(client, inputs, phi, options).expect("a valid call");
            let grads = sla2_soft_backward(client, inputs, &forward.saved, &grad_out, phi, options)
                .expect("a valid call");
            let of_inputs = [grads.dq, grads.dk, grads.dv, grads.dweights];
            (forward.out, of_inputs, grads.dalpha_logit)
        };
        let mut all: Vec<Vec<f32>> = [out, dq, dk, dv, dweights]
            .map(|x| download(client, &x).expect("the launch to succeed"))
            .into();
        all.push(download(client, &dlogit).expect("the launch to succeed"));
        all
    }

    /// Runs the case with every engine and compares everything with the reference by the error rules.
    pub fn check(&self, client: &Client) {
        let case = &self.0.attention;
        let inputs = self.0.inputs();
        let grad_out = case.grad_out();

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

        let dtype = case.factors();
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

        let mut bounds = Vec::new();
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
            bounds.push(bound);
        }
        for (by, found) in self.run_all(client, &inputs, &grad_out) {
            for (at, name) in NAMES.into_iter().enumerate() {
                let error = relative_error(&wide(&found[at]), expected[at].data());
                let bound = bounds[at];
                assert!(
                    error <= bound,
                    "{name}: {error:.2e} > {bound:.2e} by {by} in {self:?}"
                );
            }
        }
    }
}

/// What soft attention returns.
#[derive(Clone, Debug, PartialEq)]
pub struct SoftAttention {
    /// `O`.
    pub out: Vec<f32>,
    /// `L`.
    pub lse: Vec<f32>,
    /// `dQ`, `dK`, `dV` and `dm`.
    pub grads: [Vec<f32>; 4],
}

impl AttentionCase {
    /// Runs soft attention with `weights` and its backward, with every engine that can, into poisoned,
    /// guarded outputs. Engines whose forwards and backwards are of one place in the plans' order are
    /// run together.
    pub fn run_soft(
        &self,
        client: &Client,
        inputs: &Inputs,
        weights: &[f32],
        grad_out: &[f32],
    ) -> Vec<(String, SoftAttention)> {
        let ([q, k, v], _) = self.upload_inputs(client, inputs);
        let grad_out = self.upload(client, grad_out, self.out_shape());
        let weights = upload(client, weights, self.list_shape(), DType::F32).expect("weights");
        let problem = AttentionProblem::new(&q, &k, &v, &self.options).expect("a valid problem");
        let forwards = ForwardPlan::all(&problem, client.properties()).expect("a plan");
        let backwards = BackwardPlan::all(&problem, client.properties()).expect("a plan");
        let run = |at: usize| {
            let forward = &forwards[at.min(forwards.len() - 1)];
            let backward = &backwards[at.min(backwards.len() - 1)];
            let launch = |inputs: ForwardInputs<'_>, outputs: ForwardOutputs<'_>| {
                forward.launch_weighted(client, &problem, inputs, Some(&weights), outputs)
            };
            let tensors = [&q, &k, &v];
            poison(client, problem.out_shape().iter().product::<usize>() * 4);
            let (out, lse) =
                operations::soft_attention(client, &problem, tensors, &weights, launch)
                    .expect("a valid launch");
            let [dq, dk, dv] = tensors.map(|x| Poisoned::new(client, x.shape(), self.dtype));
            let launch = |inputs: BackwardInputs<'_>, grad: &_| {
                let outputs = BackwardOutputs {
                    dq: &dq.tensor,
                    dk: &dk.tensor,
                    dv: &dv.tensor,
                };
                let weights = Some([&weights, grad]);
                backward.launch_weighted(client, &problem, inputs, weights, outputs)
            };
            let ((), dweights) = operations::soft_attention_backward(
                client,
                &problem,
                tensors,
                &weights,
                [&out, &grad_out],
                &lse,
                launch,
            )
            .expect("a valid launch");
            let [dq, dk, dv] = [dq, dk, dv].map(|x| x.read(client));
            let found = SoftAttention {
                out: download(client, &out).expect("the launch to succeed"),
                lse: download(client, &lse).expect("the launch to succeed"),
                grads: [
                    dq,
                    dk,
                    dv,
                    download(client, &dweights).expect("the launch to succeed"),
                ],
            };
            (format!("{forward}; backward {backward}"), found)
        };
        (0..forwards.len().max(backwards.len())).map(run).collect()
    }

    /// Runs soft attention with every engine and compares everything with the reference by the error
    /// rules.
    pub fn check_soft(&self, client: &Client, values: &[f32]) {
        let (inputs, grad_out, dtype) = (self.inputs(), self.grad_out(), self.factors());
        let ([q, k, v], list) = self.reference_inputs(&inputs);
        let m = BlockWeights {
            weights: exact(values, self.list_shape()),
            ..list
        };
        let (scale, mask) = (self.scale(), causal(self.options.causal));
        let dout = exact(&grad_out, self.out_shape());
        let forward = attention::forward(&q, &k, &v, &m, scale, mask);
        let grads = attention::backward(&q, &k, &v, &m, scale, mask, &forward, &dout);
        let expected = [grads.dq, grads.dk, grads.dv, grads.dweights];
        let plain = plain::attention(&q, &k, &v, &m, scale, mask, dtype);
        let out_bound = plain::bound(&plain, &forward.out, dtype);
        let lse_bound = self.lse_bound(&inputs, &m, &forward.lse);
        let plain = plain::attention_backward(&q, &k, &v, &m, scale, mask, &dout, dtype);
        for (by, found) in self.run_soft(client, &inputs, values, &grad_out) {
            let judge = |name: &str, found: &[f32], expected: &Tensor, bound: f64| {
                let error = relative_error(&wide(found), expected.data());
                assert!(
                    error <= bound,
                    "{name}: {error:.2e} > {bound:.2e} by {by} in {self:?}"
                );
            };
            judge("out", &found.out, &forward.out, out_bound);
            let error = relative_error(&wide(&found.lse), forward.lse.data());
            assert!(
                error <= lse_bound,
                "lse: {error:.2e} > {lse_bound:.2e} by {by} in {self:?}"
            );
            for (at, name) in ["dq", "dk", "dv", "dweights"].into_iter().enumerate() {
                let mut bound = plain::gradient_bound(&plain[at], &expected[at], dtype);
                if name == "dweights" {
                    // As in `SoftCase::check`.
                    bound *= 2.0;
                }
                judge(name, &found.grads[at], &expected[at], bound);
            }
        }
    }
}
