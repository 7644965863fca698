//! Gradients of block-sparse attention, run on the device and through the reference.

use cubesla::plan::BackwardPlan;
use cubesla::{AttentionProblem, Client, DType};
use cubesla_kernels::FactorType;
use cubesla_kernels::attention::{BackwardInputs, BackwardOutputs};
use cubesla_reference::{Tensor, attention, relative_error};

use crate::case::{Inputs, Poisoned, causal, exact, wide};
use crate::{AttentionCase, Rng, plain, rounded};

/// `dQ`, `dK` and `dV`.
pub type Gradients = [Vec<f32>; 3];

impl AttentionCase {
    /// A random gradient of the output.
    pub fn grad_out(&self) -> Vec<f32> {
        let [b, h, l, _] = self.q_shape();
        let values = Rng::new(self.seed ^ 0x96AD).normals(b * h * l * self.value_dim, DType::F32);
        values.into_iter().map(|x| rounded(x, self.dtype)).collect()
    }

    /// Shape of the output and its gradient.
    pub fn out_shape(&self) -> [usize; 4] {
        let [b, h, l, _] = self.q_shape();
        [b, h, l, self.value_dim]
    }

    /// Runs the forward, then the backward with every engine that can, each into poisoned, guarded
    /// outputs.
    pub fn run_backward(
        &self,
        client: &Client,
        inputs: &Inputs,
        grad_out: &[f32],
    ) -> Vec<(BackwardPlan, Gradients)> {
        self.run_backward_plans(client, inputs, grad_out, |plans| plans)
    }

    /// The same with those of the plans, fastest first, that are `chosen`.
    pub fn run_backward_plans(
        &self,
        client: &Client,
        inputs: &Inputs,
        grad_out: &[f32],
        chosen: impl FnOnce(Vec<BackwardPlan>) -> Vec<BackwardPlan>,
    ) -> Vec<(BackwardPlan, Gradients)> {
        let ([q, k, v], list) = self.upload_inputs(client, inputs);
        let grad_out = self.upload(client, grad_out, self.out_shape());
        let forward = cubesla::block_sparse_attention(client, &q, &k, &v, &list, &self.options)
            .expect("a valid forward");
        let problem = AttentionProblem::new(&q, &k, &v, &self.options).expect("a valid problem");
        let plans = BackwardPlan::all(&problem, client.properties()).expect("a plan");
        let run = |plan: BackwardPlan| {
            let [dq, dk, dv] = [&q, &k, &v].map(|x| Poisoned::new(client, x.shape(), self.dtype));
            let inputs = BackwardInputs {
                q: &q,
                k: &k,
                v: &v,
                out: &forward.out,
                lse: &forward.lse,
                grad_out: &grad_out,
                list: &list,
            };
            let outputs = BackwardOutputs {
                dq: &dq.tensor,
                dk: &dk.tensor,
                dv: &dv.tensor,
            };
            plan.launch(client, &problem, inputs, outputs)
                .expect("a valid launch");
            (plan, [dq, dk, dv].map(|x| x.read(client)))
        };
        chosen(plans).into_iter().map(run).collect()
    }

    /// Runs forward and backward with every engine and compares the gradients with the reference by
    /// the error rules.
    pub fn check_backward(&self, client: &Client) {
        let inputs = self.inputs();
        let grad_out = self.grad_out();
        for (plan, found) in self.run_backward(client, &inputs, &grad_out) {
            self.check_gradients(&inputs, &grad_out, &found, &plan.to_string());
        }
    }

    /// Compares `[dQ, dK, dV]` with the reference by the error rules.
    pub fn check_gradients(&self, inputs: &Inputs, grad_out: &[f32], found: &Gradients, by: &str) {
        let ([q, k, v], weights) = self.reference_inputs(inputs);
        let (scale, causal) = (self.scale(), causal(self.options.causal));
        let dout = exact(grad_out, self.out_shape());
        let forward = attention::forward(&q, &k, &v, &weights, scale, causal);
        let gradients = |forward: &attention::Forward| {
            let of = attention::backward(&q, &k, &v, &weights, scale, causal, forward, &dout);
            [of.dq, of.dk, of.dv]
        };
        let plain =
            plain::attention_backward(&q, &k, &v, &weights, scale, causal, &dout, self.factors());
        self.check_gradients_of(found, forward, gradients, &plain, 0.0, by);
    }

    /// Compares `[dQ, dK, dV]` with what `gradients` makes of `forward`, by the error rules with
    /// `plain` for a plain computation's and so much to `spare`.
    pub fn check_gradients_of(
        &self,
        found: &Gradients,
        mut forward: attention::Forward,
        gradients: impl Fn(&attention::Forward) -> [Tensor; 3],
        plain: &[Tensor],
        spare: f64,
        by: &str,
    ) {
        let exact = gradients(&forward);
        // Without an output nothing is subtracted from `dP`.
        forward.out = Tensor::zeros(self.out_shape());
        let terms = gradients(&forward);
        for (at, what) in ["dq", "dk", "dv"].into_iter().enumerate() {
            let cancelled = plain::cancelled_bound(&terms[at], &exact[at], self.factors());
            let bound = plain::gradient_bound(&plain[at], &exact[at], self.factors());
            let bound = bound.max(cancelled) + spare;
            let error = relative_error(&wide(&found[at]), exact[at].data());
            assert!(
                error <= bound,
                "{what}: {error:.2e} > {bound:.2e} by {by} in {self:?}"
            );
        }
    }

    /// As [`check_backward`](Self::check_backward) for scores so large that rows are one key's: the
    /// two terms of `dS = P (dP - delta)` then cancel to nothing, so errors are measured against the
    /// gradients that the first term alone would give.
    pub fn check_large_scores(&self, client: &Client) {
        let (inputs, grad_out) = (self.inputs(), self.grad_out());
        let ([q, k, v], weights) = self.reference_inputs(&inputs);
        let (scale, causal) = (self.scale(), causal(self.options.causal));
        let dout = exact(&grad_out, self.out_shape());
        let mut forward = attention::forward(&q, &k, &v, &weights, scale, causal);
        let largest = forward
            .lse
            .data()
            .iter()
            .fold(0.0, |m: f64, x| m.max(x.abs()));
        let mut run = |zero: bool| {
            if zero {
                forward.out = Tensor::zeros(self.out_shape());
            }
            let grads = attention::backward(&q, &k, &v, &weights, scale, causal, &forward, &dout);
            [grads.dq, grads.dk, grads.dv]
        };
        let (exact, terms) = (run(false), run(true));
        let limit = match self.dtype {
            // Scores are rounded before the exponential: an error of theirs is one of the weights.
            DType::F32 => 1e-5 + epsilon(DType::F32) * largest,
            DType::F16 | DType::BF16 => 8.0 * epsilon(self.dtype),
        };
        for (plan, found) in self.run_backward(client, &inputs, &grad_out) {
            for at in 0..3 {
                let pairs = wide(&found[at]).into_iter().zip(exact[at].data());
                let difference: Vec<f64> = pairs.map(|(x, y)| x - y).collect();
                let error = plain::norm(&difference) / plain::norm(terms[at].data());
                assert!(error <= limit, "{at}: {error:.2e} by {plan} in {self:?}");
            }
        }
    }
}

/// Half the distance from 1 to the next number.
pub fn epsilon(dtype: impl Into<FactorType>) -> f64 {
    match dtype.into() {
        FactorType::F32 => 2f64.powi(-24),
        FactorType::Tf32 | FactorType::F16 => 2f64.powi(-11),
        FactorType::BF16 => 2f64.powi(-8),
    }
}
