//! Gradients of the SLA operations, run on the device and through the reference.

use cubesla::plan::SlaBackwardPlan;
use cubesla::{
    AttentionProblem, Client, DType, FeatureMap, LinearMode, Precision, SlaBackwardOptions,
    SlaInputs, download, sla_backward, sla2_backward, upload,
};
use cubesla_kernels::FactorType;
use cubesla_kernels::sla::{Combination, CombinationGradients, SlaBackward};
use cubesla_reference::attention::Causal;
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::{Tensor, attention, linear, low_bit, relative_error, sla};

use crate::backward::epsilon;
use crate::case::{Inputs, exact, wide};
use crate::low_bit::{CODES, reference_formats};
use crate::plain;
use crate::sla::{Combine, SlaCase, poison, reference_phi};

/// The names of what [`SlaCase::run_backward`] returns; SLA2 has no bias.
const NAMES: [&str; 5] = ["dq", "dk", "dv", "weights", "bias"];

impl SlaCase {
    /// Runs forward and backward on the device: `dQ`, `dK`, `dV`, then `dWl` and `dbl`, or the
    /// gradient of the logits.
    pub fn run_backward(
        &self,
        client: &Client,
        inputs: &Inputs,
        grad_out: &[f32],
    ) -> Vec<Vec<f32>> {
        self.run_backward_as(client, inputs, grad_out, self.precision)
    }

    /// The same with the sparse branch's gradients in that precision, whatever the forward's is.
    pub fn run_backward_as(
        &self,
        client: &Client,
        inputs: &Inputs,
        grad_out: &[f32],
        precision: Precision,
    ) -> Vec<Vec<f32>> {
        self.run_backward_by(client, inputs, grad_out, precision, None)
    }

    /// The same with every engine that can: the library's choice first, then each slower one's plan.
    pub fn run_backward_all(
        &self,
        client: &Client,
        inputs: &Inputs,
        grad_out: &[f32],
    ) -> Vec<(SlaBackwardPlan, Vec<Vec<f32>>)> {
        let case = &self.attention;
        let ([q, k, v], _) = case.upload_inputs(client, inputs);
        let problem = AttentionProblem::new(&q, &k, &v, &case.options).expect("a valid problem");
        let plans = SlaBackwardPlan::all(&problem, client.properties()).expect("a plan");
        let run = |(at, plan): (usize, SlaBackwardPlan)| {
            let by = (at > 0).then_some(&plan);
            let grads = self.run_backward_by(client, inputs, grad_out, self.precision, by);
            (plan, grads)
        };
        plans.into_iter().enumerate().map(run).collect()
    }

    fn run_backward_by(
        &self,
        client: &Client,
        inputs: &Inputs,
        grad_out: &[f32],
        precision: Precision,
        plan: Option<&SlaBackwardPlan>,
    ) -> Vec<Vec<f32>> {
        let case = &self.attention;
        let (tensors, critical) = case.upload_inputs(client, inputs);
        let negligible = self.negligible_list(inputs).map(|list| list.upload(client));
        let grad_out = case.upload(client, grad_out, case.out_shape());
        let forward = self
            .call(client, &tensors, &critical, negligible.as_ref(), true)
            .expect("a valid forward");
        let saved = forward.saved.expect("it was asked for");
        let [q, k, v] = &tensors;
        let inputs = SlaInputs {
            q,
            k,
            v,
            critical: &critical,
            negligible: negligible.as_ref(),
        };
        let options = SlaBackwardOptions {
            attention: case.options,
            phi: self.phi,
            linear: self.linear,
            precision,
        };
        let weights = self.weights();
        let dv = case.value_dim;
        let wl = upload(client, &weights.wl, [dv, dv], DType::F32).expect("a matrix");
        let bl = upload(client, &weights.bl, [dv], DType::F32).expect("a vector");
        let logits = upload(client, &weights.logits, self.logit_shape(), DType::F32);
        let logits = logits.expect("logits");
        poison(client, case.q_shape().iter().product::<usize>() * 4);
        let read = |x: &_| download(client, x).expect("the launch to succeed");
        if let Some(plan) = plan {
            let problem = AttentionProblem::new(q, k, v, &case.options).expect("a valid problem");
            let combination = match self.combine {
                Combine::Sla => Combination::Sla { wl: &wl, bl: &bl },
                _ => Combination::Sla2 {
                    alpha_logit: &logits,
                },
            };
            let given = SlaBackward {
                combination,
                phi: self.phi,
                mode: self.linear,
                precision,
                saved: &saved,
                grad_out: &grad_out,
            };
            let grads = plan
                .launch(client, &problem, inputs, given)
                .expect("a valid launch");
            let of_inputs = grads.inputs;
            let mut all: Vec<_> = [&of_inputs.dq, &of_inputs.dk, &of_inputs.dv]
                .map(read)
                .into();
            match grads.weights {
                CombinationGradients::Sla { wl, bl } => {
                    all.push(download(client, &wl).expect("the launch to succeed"));
                    all.push(download(client, &bl).expect("the launch to succeed"));
                }
                CombinationGradients::Sla2 { alpha_logit } => {
                    all.push(download(client, &alpha_logit).expect("the launch to succeed"));
                }
            }
            return all;
        }
        if self.combine == Combine::Sla {
            let grads = sla_backward(client, inputs, &saved, &wl, &bl, &grad_out, &options)
                .expect("a valid backward");
            let mut all: Vec<_> = [&grads.dq, &grads.dk, &grads.dv].map(read).into();
            all.push(download(client, &grads.dwl).expect("the launch to succeed"));
            all.push(download(client, &grads.dbl).expect("the launch to succeed"));
            return all;
        }
        let grads = sla2_backward(client, inputs, &saved, &logits, &grad_out, &options)
            .expect("a valid backward");
        let mut all: Vec<_> = [&grads.dq, &grads.dk, &grads.dv].map(read).into();
        all.push(download(client, &grads.dalpha_logit).expect("the launch to succeed"));
        all
    }

    /// Gradients of the branches' outputs, then those of the combination's weights.
    fn combine_backward(
        &self,
        sparse: &Tensor,
        branch: &Tensor,
        dout: &Tensor,
    ) -> ([Tensor; 2], Vec<Tensor>) {
        let weights = self.weights();
        let dv = self.attention.value_dim;
        if self.combine == Combine::Sla {
            let wl = Tensor::new([1, 1, dv, dv], wide(&weights.wl));
            let grads = sla::combine_sla_backward(branch, &wl, dout);
            return ([grads.sparse, grads.linear], vec![grads.wl, grads.bl]);
        }
        let block_q = self.attention.options.block_q;
        let alpha = self.alpha();
        let grads = sla::combine_sla2_backward(sparse, branch, &alpha, block_q, dout);
        ([grads.sparse, grads.linear], vec![grads.logits])
    }

    /// Gradients of the logits that blocks share, from those of each block.
    fn shared_logits(&self, of_blocks: &Tensor) -> Tensor {
        let [rows, columns] = self.logit_shape();
        let mut logits = Tensor::zeros([1, rows, columns, 1]);
        let [_, heads, blocks, _] = of_blocks.shape();
        for h in 0..heads {
            for i in 0..blocks {
                logits[[0, h.min(rows - 1), i.min(columns - 1), 0]] += of_blocks[[0, h, i, 0]];
            }
        }
        logits
    }

    /// The relative error that gradients of logits may have. They are few, so that a plain
    /// computation's error is left to chance: instead that of its terms, rounded to the case's type, with
    /// outputs of the branches before anything is subtracted from them.
    pub fn logit_bound(&self, exact: &Tensor, branches: [&Tensor; 2], dout: &Tensor) -> f64 {
        let case = &self.attention;
        let (alpha, block_q) = (self.alpha(), case.options.block_q);
        let [batch, heads, len, _] = dout.shape();
        let mut terms = 0.0;
        for b in 0..batch {
            for h in 0..heads {
                for i in 0..len {
                    let a = alpha[[0, h, i / block_q, 0]];
                    for branch in branches {
                        let pairs = dout.row(b, h, i).iter().zip(branch.row(b, h, i));
                        terms += pairs
                            .map(|(x, y)| (a * (1.0 - a) * x * y).powi(2))
                            .sum::<f64>();
                    }
                }
            }
        }
        // Sums of f32 numbers add some errors of their own.
        let factor = if case.factors() == FactorType::F32 {
            16.0
        } else {
            3.0
        };
        // Not less than the rule for f32, as for other gradients.
        (factor * epsilon(case.factors()) * terms.sqrt() / plain::norm(exact.data())).max(1e-5)
    }

    /// Runs the case with every engine and compares every gradient with the reference by the error
    /// rules.
    pub fn check_backward(&self, client: &Client) {
        let inputs = self.inputs();
        let grad_out = self.attention.grad_out();
        let sparse = self.exact_sparse(&inputs);
        let all = self.run_backward_all(client, &inputs, &grad_out);
        let faults: Vec<_> = all
            .iter()
            .flat_map(|(plan, found)| {
                let faults = self.gradient_faults(&sparse, &inputs, &grad_out, found);
                faults
                    .into_iter()
                    .map(move |fault| format!("{fault} by {plan}"))
            })
            .collect();
        assert!(faults.is_empty(), "{faults:#?} in {self:?}");
    }

    /// The forward's sparse branch.
    fn exact_sparse(&self, inputs: &Inputs) -> attention::Forward {
        let ([q, k, v], critical) = self.attention.reference_inputs(inputs);
        attention::forward(&q, &k, &v, &critical, self.attention.scale(), Causal::None)
    }

    /// Compares `found` with the reference by the error rules.
    pub fn check_gradients(&self, inputs: &Inputs, grad_out: &[f32], found: &[Vec<f32>], by: &str) {
        let sparse = self.exact_sparse(inputs);
        self.check_gradients_of(&sparse, inputs, grad_out, found, by);
    }

    /// Compares `found` with the reference by the error rules, where `sparse` is what the forward's
    /// sparse branch gave.
    pub fn check_gradients_of(
        &self,
        sparse: &attention::Forward,
        inputs: &Inputs,
        grad_out: &[f32],
        found: &[Vec<f32>],
        by: &str,
    ) {
        let faults = self.gradient_faults(sparse, inputs, grad_out, found);
        assert!(faults.is_empty(), "{faults:#?} by {by} in {self:?}");
    }

    /// What [`check_gradients_of`](Self::check_gradients_of) finds wrong.
    fn gradient_faults(
        &self,
        sparse: &attention::Forward,
        inputs: &Inputs,
        grad_out: &[f32],
        found: &[Vec<f32>],
    ) -> Vec<String> {
        let case = &self.attention;
        let (dtype, scale, none) = (case.factors(), case.scale(), Causal::None);
        let phi = reference_phi(self.phi);
        let low = self.precision.formats().map(reference_formats);
        let ([q, k, v], critical) = case.reference_inputs(inputs);
        let taken = self.linear_weights(inputs);
        let dout = exact(grad_out, case.out_shape());

        let branch = linear::forward(&q, &k, &v, phi, &taken, none);
        let ([ds, dl], weights) = self.combine_backward(&sparse.out, &branch, &dout);
        let gradients = |sparse: &attention::Forward, branch: &Tensor| {
            let s = match low {
                None => attention::backward(&q, &k, &v, &critical, scale, none, sparse, &ds),
                Some(formats) => {
                    low_bit::backward(&q, &k, &v, &critical, scale, none, formats, sparse, &ds)
                }
            };
            let l = linear::backward(&q, &k, &v, phi, &taken, none, branch, &dl);
            vec![sum(&s.dq, &l.dq), sum(&s.dk, &l.dk), sum(&s.dv, &l.dv)]
        };
        let mut expected = gradients(sparse, &branch);
        // Without outputs nothing is subtracted from `dP`, nor, below, by the gradient of phi: states are
        // rounded before, so that what is left of a single key's is that of each feature.
        let nothing = Tensor::zeros(case.out_shape());
        let without_out = attention::Forward {
            out: nothing.clone(),
            lse: sparse.lse.clone(),
        };
        let mut terms = gradients(&without_out, &nothing);
        let (phi_q, phi_k) = (phi.apply_all(&q), phi.apply_all(&k));
        let same = reference_phi(FeatureMap::Identity);
        let l = linear::backward(&phi_q, &phi_k, &v, same, &taken, none, &nothing, &dl);
        let through = |x: &Tensor, features: &Tensor, grad: &Tensor| match self.phi {
            FeatureMap::Softmax => Tensor::new(
                grad.shape(),
                features
                    .data()
                    .iter()
                    .zip(grad.data())
                    .map(|(y, g)| y * g)
                    .collect(),
            ),
            _ => phi.backward_all(x, grad),
        };
        terms[0] = sum(&terms[0], &through(&q, &phi_q, &l.dq));
        terms[1] = sum(&terms[1], &through(&k, &phi_k, &l.dk));
        // The branch's output, of which errors are a part.
        let mut branch_terms = branch.clone();
        if self.linear == LinearMode::Complement {
            let [out, dv] = sums_of_all_keys(&phi_q, &phi_k, &v, &taken, &dl);
            terms[2] = sum(&terms[2], &dv);
            branch_terms = out;
        }
        expected.extend(weights);

        let plain_sparse = plain::attention(&q, &k, &v, &critical, scale, none, dtype);
        let plain_branch = plain::linear(&q, &k, &v, phi, &taken, none, dtype);
        let ([ds, dl], weights) = self.combine_backward(&plain_sparse, &plain_branch, &dout);
        let (ds, dl) = (plain::stored(&ds, dtype), plain::stored(&dl, dtype));
        let s = match low {
            None => plain::attention_backward(&q, &k, &v, &critical, scale, none, &ds, dtype),
            Some(formats) => {
                let at = low_bit::rounded(&q, &k, &v, &critical, formats);
                let [q, k, v] = [at.q, at.k, at.v].map(|x| plain::stored(&x, dtype));
                plain::attention_backward(&q, &k, &v, &critical, scale, none, &ds, dtype)
            }
        };
        let l = plain::linear_backward(&q, &k, &v, phi, &taken, &dl, dtype);
        let mut plain: Vec<Tensor> = s
            .iter()
            .zip(&l)
            .take(3)
            .map(|(s, l)| plain::stored(&sum(s, l), dtype))
            .collect();
        plain.extend(weights);

        assert_eq!(found.len(), expected.len());
        let mut faults = Vec::new();
        for (at, found) in found.iter().enumerate() {
            let mut bound = plain::gradient_bound(&plain[at], &expected[at], dtype);
            let mut exact = expected[at].clone();
            if at == 3 && self.combine != Combine::Sla {
                exact = self.shared_logits(&exact);
                bound = self.logit_bound(&exact, [&sparse.out, &branch_terms], &dout);
            }
            if let Some(terms) = terms.get(at) {
                bound = bound.max(plain::cancelled_bound(terms, &exact, dtype));
            }
            // Two branches' gradients, each within 1e-5 in f32, may nearly cancel in their sum.
            let mut bound = bound.max(2e-5);
            if low.is_some() {
                bound += CODES;
            }
            let error = relative_error(&wide(found), exact.data());
            // Not a number is not within any bound.
            if error.is_nan() || error > bound {
                faults.push(format!("{}: {error:.2e} > {bound:.2e}", NAMES[at]));
            }
        }
        faults
    }

    /// Few enough blocks for their part of the sums to be subtracted, enough that they are not, and
    /// all keys.
    pub fn forms(self) -> [SlaCase; 3] {
        let few = crate::AttentionCase {
            key_len: 500,
            lists: crate::Lists::TopK(2),
            ..self.attention
        };
        [
            self,
            SlaCase {
                attention: few,
                ..self
            },
            SlaCase {
                linear: LinearMode::Global,
                ..self
            },
        ]
    }
}

/// What sums over all keys give, of which the complement takes the listed blocks' share away again: outputs,
/// and what they add to the gradient of values.
fn sums_of_all_keys(
    phi_q: &Tensor,
    phi_k: &Tensor,
    v: &Tensor,
    taken: &BlockWeights,
    grad_out: &Tensor,
) -> [Tensor; 2] {
    let [batch, heads, query_len, _] = grad_out.shape();
    let [_, kv_heads, key_len, _] = v.shape();
    let (mut out, mut dv) = (Tensor::zeros(grad_out.shape()), Tensor::zeros(v.shape()));
    let add = |to: &mut [f64], factor: f64, from: &[f64]| {
        to.iter_mut().zip(from).for_each(|(t, x)| *t += factor * x);
    };
    for b in 0..batch {
        for h in 0..heads {
            let kv = h / (heads / kv_heads);
            for i in 0..query_len {
                let query = phi_q.row(b, h, i);
                let product = |j| -> f64 {
                    let pairs = query.iter().zip(phi_k.row(b, kv, j));
                    pairs.map(|(x, y)| x * y).sum()
                };
                let products: Vec<f64> = (0..key_len).map(product).collect();
                let weighted = products.iter().enumerate();
                let n: f64 = weighted.map(|(j, x)| taken.at(b, h, i, j) * x).sum();
                if n == 0.0 {
                    continue;
                }
                for (j, x) in products.iter().enumerate() {
                    add(out.row_mut(b, h, i), x / n, v.row(b, kv, j));
                    add(dv.row_mut(b, kv, j), x / n, grad_out.row(b, h, i));
                }
            }
        }
    }
    [out, dv]
}

/// `a + b`.
pub fn sum(a: &Tensor, b: &Tensor) -> Tensor {
    let pairs = a.data().iter().zip(b.data());
    Tensor::new(a.shape(), pairs.map(|(x, y)| x + y).collect())
}
