//! SLA and SLA2 as a whole: router, sparse branch, linear branch and their combination.

use cubesla::plan::SlaPlan;
use cubesla::{
    AttentionProblem, Blocks, Client, DType, DeviceTensor, HostBlockList, LinearMode, Precision,
    RouterOptions, SlaOptions, SlaResult, sla_forward, sla2_forward,
};
use cubesla_reference::router::critical_count;
use cubesla_reference::sla::{combine_sla, combine_sla2};
use cubesla_reference::{Tensor, relative_error};

use super::{Case, Check, Cost, Qkv, Scale, Size, Work, bound, linear, sparse};
use crate::bench::host::HostTensor;
use crate::error::Error;

/// Which of the two.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Projects its linear branch.
    Sla,
    /// Weighs its branches.
    Sla2,
}

pub fn cases(scale: Scale, dtype: Option<DType>) -> Vec<Case> {
    let mut cases = Vec::new();
    for (method, name, percent) in [
        (Method::Sla, "sla_forward", 95),
        (Method::Sla2, "sla2_forward", 97),
    ] {
        for size in scale.sizes(dtype).0 {
            for (mode, precision, over) in [
                (LinearMode::Global, Precision::Full, "global"),
                (LinearMode::Complement, Precision::Full, "complement"),
                (LinearMode::Global, Precision::Int8, "global-int8"),
                (LinearMode::Global, Precision::Int8Fp8, "global-int8-fp8"),
            ] {
                if precision != Precision::Full && method == Method::Sla {
                    continue;
                }
                cases.push(Case {
                    name: format!("{name}/{percent}-{over}/{size}"),
                    prepare: Box::new(move |client| {
                        let critical = f64::from(100 - percent) / 100.0;
                        let sla = Sla::new(client, size, method, critical, mode, precision)?;
                        Ok(Box::new(sla))
                    }),
                });
            }
        }
    }
    cases
}

/// An operation with its inputs.
pub struct Sla {
    /// The device's.
    pub client: Client,
    /// Q, K and V.
    pub inputs: Qkv,
    /// SLA or SLA2.
    pub method: Method,
    /// Share of critical blocks.
    critical: f64,
    /// All but the blocks are the defaults.
    pub options: SlaOptions<'static>,
    /// `Wl [Dv, Dv]` and `bl [Dv]`, or SLA2's logits `[H, 1]` and nothing.
    pub weights: [HostTensor; 2],
    /// The first of them on the device.
    pub wl: DeviceTensor<2>,
    /// The second.
    pub bl: DeviceTensor<1>,
}

impl Sla {
    /// Random inputs and weights.
    pub fn new(
        client: &Client,
        size: Size,
        method: Method,
        critical: f64,
        mode: LinearMode,
        precision: Precision,
    ) -> Result<Self, Error> {
        // Public code of SLA sums over all keys and leaves no block out; the paper leaves out 10 %.
        let negligible = match (method, mode) {
            (Method::Sla, LinearMode::Complement) => 0.10,
            _ => 0.0,
        };
        let router = RouterOptions {
            critical,
            negligible,
            ..RouterOptions::sla()
        };
        let shape = match method {
            Method::Sla => [size.dim, size.dim],
            Method::Sla2 => [size.heads, 1],
        };
        let weights = [
            HostTensor::normal([1, 1, shape[0], shape[1]], DType::F32, 6),
            HostTensor::normal([1, 1, 1, size.dim], DType::F32, 7),
        ];
        let [wl, bl] = weights.each_ref().map(|x| x.upload(client));
        let of = cubesla::Error::from;
        Ok(Self {
            client: client.clone(),
            inputs: Qkv::new(client, size)?,
            method,
            critical,
            options: SlaOptions {
                blocks: Blocks::Routed(router),
                linear: mode,
                precision,
                ..SlaOptions::sla()
            },
            weights,
            wl: DeviceTensor::new(wl?.handle().clone(), shape, [shape[1], 1], DType::F32)
                .map_err(of)?,
            bl: DeviceTensor::new(bl?.handle().clone(), [size.dim], [1], DType::F32).map_err(of)?,
        })
    }

    /// Calls the operation.
    pub fn forward(&self, number: usize) -> Result<SlaResult, Error> {
        let [q, k, v] = self.inputs.copy(number);
        let (client, options) = (&self.client, &self.options);
        Ok(match self.method {
            Method::Sla => sla_forward(client, q, k, v, &self.wl, &self.bl, options)?,
            Method::Sla2 => sla2_forward(client, q, k, v, &self.wl, options)?,
        })
    }

    /// The attention problem of its sparse branch.
    pub fn problem(&self) -> Result<AttentionProblem, Error> {
        let [q, k, v] = self.inputs.copy(0);
        let problem = AttentionProblem::new(q, k, v, &self.options.attention);
        problem.map_err(|source| cubesla::Error::from(source).into())
    }

    /// SLA2's weight of the sparse branch.
    pub fn alpha(&self, head: usize) -> f64 {
        let logit = self.weights[0].row([0, 0, head])[[0, 0, 0, 0]];
        1.0 / (1.0 + (-logit).exp())
    }

    /// Pairs of a query and a critical key.
    pub fn critical_pairs(&self) -> f64 {
        let (len, block_k) = (self.inputs.size.len, self.options.attention.block_k);
        let critical = critical_count(self.critical, len.div_ceil(block_k));
        (len * (critical * block_k).min(len)) as f64
    }

    fn combined(&self, sparse: &Tensor, linear: &Tensor, head: usize) -> Tensor {
        let [weights, bias] = self.weights.each_ref().map(|x| x.head([0, 0]));
        match self.method {
            Method::Sla => combine_sla(sparse, linear, &weights, &bias),
            Method::Sla2 => {
                let a = self.alpha(head);
                combine_sla2(sparse, linear, &Tensor::full([1, 1, 1, 1], a), 1)
            }
        }
    }
}

impl Work for Sla {
    fn call(&self, number: usize) -> Result<(), Error> {
        self.forward(number).map(drop)
    }

    /// Judges the branches over the blocks that the router chose; the router has a case of its own.
    fn check(&self) -> Result<Check, Error> {
        let problem = self.problem()?;
        let result = self.forward(0)?;
        let out = HostTensor::download(&self.client, &result.out)?;
        let critical = HostBlockList::download(&self.client, &result.critical)?;
        let negligible = match &result.negligible {
            Some(list) => Some(HostBlockList::download(&self.client, list)?),
            None => None,
        };
        let (mut found, mut exact) = (Vec::new(), Vec::new());
        for [b, h, i] in self.inputs.sample() {
            let row =
                (b * problem.query_heads() + h) * problem.query_blocks() + i / problem.block_q();
            let listed =
                |list: &HostBlockList, j: usize| list.row(row).binary_search(&(j as u32)).is_ok();
            let marginal = |j: usize| {
                self.options.linear == LinearMode::Global
                    || !(listed(&critical, j)
                        || negligible.as_ref().is_some_and(|list| listed(list, j)))
            };
            let at = [b, h, i];
            let sparse = sparse::attended(&self.inputs, &problem, &critical, at);
            let linear = linear::attended(&self.inputs, at, problem.block_k(), marginal);
            found.extend_from_slice(out.row(at).data());
            exact.extend_from_slice(self.combined(&sparse, &linear, h).data());
        }
        Ok(Check {
            error: relative_error(&found, &exact),
            // Low bits make an error of the sparse branch that its share in the sum lessens.
            bound: match self.options.precision {
                Precision::Full => bound(self.inputs.size.dtype),
                Precision::Int8 => 0.03,
                Precision::Int8Fp8 | Precision::Fp8 => 0.06,
            },
        })
    }

    fn cost(&self) -> Cost {
        let size = self.inputs.size;
        let projection = match self.method {
            Method::Sla => size.linear_flops() / 2.0,
            Method::Sla2 => 0.0,
        };
        let sparse = size.pair_flops() * self.critical_pairs();
        Cost {
            flops: sparse + size.linear_flops() + projection,
            low_bit_flops: match self.options.precision {
                Precision::Full => 0.0,
                Precision::Int8 => sparse / 2.0,
                Precision::Int8Fp8 | Precision::Fp8 => sparse,
            },
            dense_flops: Some(size.dense_flops()),
            bytes: (4 * size.tensor_bytes()) as f64,
            dtype: size.dtype,
        }
    }

    fn plan(&self) -> Option<String> {
        let projects = self.method == Method::Sla;
        let problem = self.problem().ok()?;
        Some(
            SlaPlan::new(
                &problem,
                self.client.properties(),
                projects,
                self.options.precision,
            )
            .to_string(),
        )
    }
}
