//! The gradients of SLA and SLA2, the blocks and the forward's results given.

use cubesla::plan::SlaBackwardPlan;
use cubesla::{
    AttentionProblem, Client, DType, DeviceTensor, HostBlockList, LinearMode, Precision,
    SlaBackwardOptions, SlaInputs, SlaResult, SlaSaved, sla_backward, sla2_backward,
};
use cubesla_reference::attention::{Causal, Forward, backward};
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::linear::{self, FeatureMap};
use cubesla_reference::{Tensor, relative_error};

use super::backward::{download_lse, gathered, worse};
use super::sla::{Method, Sla};
use super::{Case, Check, Cost, Scale, Size, Work, bound, sparse};
use crate::bench::host::HostTensor;
use crate::error::Error;

/// Share of critical blocks.
const CRITICAL: f64 = 0.05;

pub fn cases(scale: Scale, dtype: Option<DType>) -> Vec<Case> {
    let mut cases = Vec::new();
    for (method, name) in [
        (Method::Sla, "sla_backward"),
        (Method::Sla2, "sla2_backward"),
    ] {
        for size in scale.sizes(dtype).0 {
            for (mode, over) in [
                (LinearMode::Global, "global"),
                (LinearMode::Complement, "complement"),
            ] {
                cases.push(Case {
                    name: format!("{name}/95-{over}/{size}"),
                    prepare: Box::new(move |client| {
                        Ok(Box::new(Backward::new(client, size, method, mode)?))
                    }),
                });
            }
        }
    }
    cases
}

struct Backward {
    sla: Sla,
    problem: AttentionProblem,
    forward: SlaResult,
    saved: SlaSaved,
    /// dO, on the host and on the device.
    grad: (HostTensor, DeviceTensor<4>),
}

/// Gradients on the device: of Q, K and V, and of the combination's weights.
type Gradients = ([DeviceTensor<4>; 3], DeviceTensor<2>);

impl Backward {
    fn new(client: &Client, size: Size, method: Method, mode: LinearMode) -> Result<Self, Error> {
        let mut sla = Sla::new(client, size, method, CRITICAL, mode, Precision::Full)?;
        sla.options.save = true;
        let mut forward = sla.forward(0)?;
        let saved = forward.saved.take().expect("the branches were asked for");
        let grad = HostTensor::normal(size.shape(), size.dtype, 8);
        let grad_on_device = grad.upload(client)?;
        Ok(Self {
            problem: sla.problem()?,
            sla,
            forward,
            saved,
            grad: (grad, grad_on_device),
        })
    }

    /// Every copy of the inputs has the same values, so one forward serves them all.
    fn gradients(&self, number: usize) -> Result<Gradients, Error> {
        let sla = &self.sla;
        let [q, k, v] = sla.inputs.copy(number);
        let inputs = SlaInputs {
            q,
            k,
            v,
            critical: &self.forward.critical,
            negligible: self.forward.negligible.as_ref(),
        };
        let (client, saved, grad) = (&sla.client, &self.saved, &self.grad.1);
        let options = SlaBackwardOptions::from(&sla.options);
        Ok(match sla.method {
            Method::Sla => {
                let (wl, bl) = (&sla.wl, &sla.bl);
                let grads = sla_backward(client, inputs, saved, wl, bl, grad, &options)?;
                ([grads.dq, grads.dk, grads.dv], grads.dwl)
            }
            Method::Sla2 => {
                let logits = &sla.wl;
                let grads = sla2_backward(client, inputs, saved, logits, grad, &options)?;
                ([grads.dq, grads.dk, grads.dv], grads.dalpha_logit)
            }
        })
    }
}

/// What the gradients are judged by: the forward's results, inputs of the backward, on the host.
struct Judge<'a> {
    case: &'a Backward,
    critical: HostBlockList,
    negligible: Option<HostBlockList>,
    sparse: HostTensor,
    linear: HostTensor,
    lse: HostTensor,
}

impl<'a> Judge<'a> {
    fn new(case: &'a Backward) -> Result<Self, Error> {
        let (client, forward) = (&case.sla.client, &case.forward);
        let negligible = forward.negligible.as_ref();
        Ok(Self {
            case,
            critical: HostBlockList::download(client, &forward.critical)?,
            negligible: negligible
                .map(|list| HostBlockList::download(client, list))
                .transpose()?,
            sparse: HostTensor::download(client, &case.saved.sparse)?,
            linear: HostTensor::download(client, &case.saved.linear)?,
            lse: download_lse(client, &case.saved.lse)?,
        })
    }

    /// Whether a list has key block `j` for query block `i` of a head.
    fn lists(&self, list: &HostBlockList, [b, h]: [usize; 2], [i, j]: [usize; 2]) -> bool {
        let problem = &self.case.problem;
        let row = (b * problem.query_heads() + h) * problem.query_blocks() + i;
        list.row(row).binary_search(&(j as u32)).is_ok()
    }

    /// Whether the linear branch of query block `i` sums over key block `j`.
    fn marginal(&self, head: [usize; 2], at: [usize; 2]) -> bool {
        let negligible = self.negligible.as_ref();
        self.case.sla.options.linear == LinearMode::Global
            || !(self.lists(&self.critical, head, at)
                || negligible.is_some_and(|list| self.lists(list, head, at)))
    }

    /// Gradients of the branches' outputs for rows of a head of dO.
    fn branch_gradients(&self, grad: &Tensor, head: usize) -> [Tensor; 2] {
        let sla = &self.case.sla;
        match sla.method {
            Method::Sla => {
                let wl = sla.weights[0].head([0, 0]);
                let [_, _, rows, _] = grad.shape();
                let mut linear = Tensor::zeros(grad.shape());
                for i in 0..rows {
                    let out = linear.row_mut(0, 0, i);
                    for (e, g) in grad.row(0, 0, i).iter().enumerate() {
                        add(out, *g, wl.row(0, 0, e));
                    }
                }
                [grad.clone(), linear]
            }
            Method::Sla2 => {
                let a = sla.alpha(head);
                [grad.map(|x| a * x), grad.map(|x| (1.0 - a) * x)]
            }
        }
    }

    /// `dQ` of row `i` from all keys that either branch sums over.
    fn query(&self, at: [usize; 3]) -> Vec<f64> {
        let (case, [b, h, i]) = (self.case, at);
        let problem = &case.problem;
        let [q, k, v] = &case.sla.inputs.host;
        let (q, k, v) = (q.row(at), k.head([b, h]), v.head([b, h]));
        let [sparse_grad, linear_grad] = self.branch_gradients(&case.grad.0.row(at), h);
        let forward = Forward {
            out: self.sparse.row(at),
            lse: self.lse.row(at),
        };
        let (weights, scale) = (
            sparse::weights(problem, &self.critical, at),
            problem.scale().into(),
        );
        let none = Causal::None;
        let sparse = backward(&q, &k, &v, &weights, scale, none, &forward, &sparse_grad);
        let sizes = [1, 1, 1, problem.key_len()];
        let block = i / problem.block_q();
        let weights = BlockWeights::from_fn(sizes, 1, problem.block_k(), |[_, _, _, j]| {
            f64::from(self.marginal([b, h], [block, j]))
        });
        let phi = FeatureMap::Softmax;
        let out = self.linear.row(at);
        let linear = linear::backward(&q, &k, &v, phi, &weights, none, &out, &linear_grad);
        sum(sparse.dq.data(), linear.dq.data())
    }

    /// `dK` and `dV` of row `j` from all queries whose branches sum over it.
    fn key(&self, at: [usize; 3]) -> [Vec<f64>; 2] {
        let (case, [b, h, j]) = (self.case, at);
        let problem = &case.problem;
        let [q, k, v] = &case.sla.inputs.host;
        let head = [b, h];
        let block = j / problem.block_k();
        let sees = |i: &usize| self.lists(&self.critical, head, [i / problem.block_q(), block]);
        let rows: Vec<usize> = (0..problem.query_len()).filter(sees).collect();
        let forward = Forward {
            out: gathered(&self.sparse, head, &rows),
            lse: gathered(&self.lse, head, &rows),
        };
        let [sparse_grad, _] = self.branch_gradients(&gathered(&case.grad.0, head, &rows), h);
        let sparse = backward(
            &gathered(q, head, &rows),
            &k.row(at),
            &v.row(at),
            &BlockWeights::dense([1, 1, rows.len(), 1], 1, 1),
            problem.scale().into(),
            Causal::None,
            &forward,
            &sparse_grad,
        );
        let [dk, dv] = self.linear_key(at);
        [sum(sparse.dk.data(), &dk), sum(sparse.dv.data(), &dv)]
    }

    /// The linear branch's part of them. The reference would compute every denominator from all pairs
    /// of the head; here it is `phi(Q_i) . Z` with the `Z` of the row's block.
    fn linear_key(&self, at: [usize; 3]) -> [Vec<f64>; 2] {
        let (case, [b, h, j]) = (self.case, at);
        let problem = &case.problem;
        let head = [b, h];
        let [q, k, v] = &case.sla.inputs.host;
        let phi = FeatureMap::Softmax;
        let (phi_q, phi_k) = (phi.apply_all(&q.head(head)), phi.apply_all(&k.head(head)));
        let [_, linear_grad] = self.branch_gradients(&case.grad.0.head(head), h);
        let (out, value) = (self.linear.head(head), v.row(at));
        let (dim, block_k) = (phi_k.shape()[3], problem.block_k());
        let mut block_sums = vec![vec![0.0; dim]; problem.key_blocks()];
        for key in 0..problem.key_len() {
            add(&mut block_sums[key / block_k], 1.0, phi_k.row(0, 0, key));
        }
        let (mut dphi, mut dv) = (vec![0.0; dim], vec![0.0; out.shape()[3]]);
        for block in 0..problem.query_blocks() {
            if !self.marginal(head, [block, j / block_k]) {
                continue;
            }
            let mut z = vec![0.0; dim];
            for (n, sum) in block_sums.iter().enumerate() {
                if self.marginal(head, [block, n]) {
                    add(&mut z, 1.0, sum);
                }
            }
            let first = block * problem.block_q();
            for i in first..problem.query_len().min(first + problem.block_q()) {
                let (features, grad) = (phi_q.row(0, 0, i), linear_grad.row(0, 0, i));
                let n = dot(features, &z);
                let du = (dot(grad, value.data()) - dot(grad, out.row(0, 0, i))) / n;
                add(&mut dphi, du, features);
                add(&mut dv, dot(features, phi_k.row(0, 0, j)) / n, grad);
            }
        }
        [phi.backward(k.row(at).data(), &dphi), dv]
    }

    /// SLA2's gradients of all logits, or the first row of that of SLA's projection.
    fn weights(&self) -> Vec<f64> {
        let (sla, grad) = (&self.case.sla, &self.case.grad.0);
        let size = sla.inputs.size;
        let mut exact = vec![
            0.0;
            match sla.method {
                Method::Sla => size.dim,
                Method::Sla2 => size.heads,
            }
        ];
        for (b, h) in (0..size.batch).flat_map(|b| (0..size.heads).map(move |h| (b, h))) {
            let (grad, linear) = (grad.head([b, h]), self.linear.head([b, h]));
            match sla.method {
                Method::Sla => (0..size.len)
                    .for_each(|i| add(&mut exact, grad.row(0, 0, i)[0], linear.row(0, 0, i))),
                Method::Sla2 => {
                    let a = sla.alpha(h);
                    let sparse = self.sparse.head([b, h]);
                    let difference =
                        dot(grad.data(), sparse.data()) - dot(grad.data(), linear.data());
                    exact[h] += a * (1.0 - a) * difference;
                }
            }
        }
        exact
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// `to += factor x`.
fn add(to: &mut [f64], factor: f64, x: &[f64]) {
    for (to, x) in to.iter_mut().zip(x) {
        *to += factor * x;
    }
}

fn sum(x: &[f64], y: &[f64]) -> Vec<f64> {
    x.iter().zip(y).map(|(x, y)| x + y).collect()
}

impl Work for Backward {
    fn call(&self, number: usize) -> Result<(), Error> {
        self.gradients(number).map(drop)
    }

    /// The largest of the errors of dQ, dK, dV and the weights' gradient.
    fn check(&self) -> Result<Check, Error> {
        let client = &self.sla.client;
        let judge = Judge::new(self)?;
        let (of_inputs, of_weights) = self.gradients(0)?;
        let [dq, dk, dv] = of_inputs
            .each_ref()
            .map(|grad| HostTensor::download(client, grad));
        let found = [dq?, dk?, dv?];
        let mut pairs = [(); 3].map(|()| (Vec::new(), Vec::new()));
        for at in self.sla.inputs.sample() {
            let [dk, dv] = judge.key(at);
            let exact = [judge.query(at), dk, dv];
            for ((pair, found), exact) in pairs.iter_mut().zip(&found).zip(&exact) {
                pair.0.extend_from_slice(found.row(at).data());
                pair.1.extend_from_slice(exact);
            }
        }
        let exact = judge.weights();
        let found = cubesla::download(client, &of_weights)?;
        let found = found.iter().take(exact.len()).map(|&x| x.into());
        let weights = relative_error(&found.collect::<Vec<_>>(), &exact);
        let errors = pairs.map(|(found, exact)| relative_error(&found, &exact));
        Ok(Check {
            error: errors.into_iter().fold(weights, worse),
            // As for the gradient of the sparse branch alone.
            bound: 2.0 * bound(self.sla.inputs.size.dtype),
        })
    }

    fn cost(&self) -> Cost {
        let size = self.sla.inputs.size;
        // Five products of either branch, where the forward has two.
        let products = 5.0 / 2.0;
        let projection = match self.sla.method {
            Method::Sla => size.linear_flops(),
            Method::Sla2 => 0.0,
        };
        let branches = size.pair_flops() * self.sla.critical_pairs() + size.linear_flops();
        Cost {
            flops: products * branches + projection,
            low_bit_flops: 0.0,
            dense_flops: Some(products * size.dense_flops()),
            bytes: (9 * size.tensor_bytes() + 4 * size.batch * size.heads * size.len) as f64,
            dtype: size.dtype,
        }
    }

    fn plan(&self) -> Option<String> {
        let plan = SlaBackwardPlan::new(&self.problem, self.sla.client.properties());
        plan.ok().map(|plan| plan.to_string())
    }
}
