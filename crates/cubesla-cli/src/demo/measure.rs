//! Running a layer on the device and judging the results.

use std::fmt;
use std::time::{Duration, Instant};

use cubesla::{
    AttentionOptions, BlockList, Blocks, Client, DeviceTensor, HostBlockList, RouterOptions,
    SlaOptions, block_sparse_attention, route, sla2_forward, upload,
};
use cubesla_reference::attention::Forward;
use cubesla_reference::sla::combine_sla2;
use cubesla_reference::{Tensor, relative_error};
use indicatif::ProgressBar;

use crate::error::Error;
use crate::exact::{by_head, kept, to_host};
use crate::fit::{alpha_logits, sigmoid};
use crate::layers::Layer;

/// Percent of the key blocks left out.
const SPARSITIES: [usize; 3] = [50, 75, 90];
/// Steps of progress in a layer.
pub const STEPS: usize = 1 + SPARSITIES.len();
/// Timed calls after the one that compiles the kernel; the median counts.
pub const CALLS: usize = 7;

/// How attention is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Over all keys.
    Dense,
    /// Over the critical blocks alone.
    Sparse,
    /// That, and linear attention over the other blocks.
    Sla2,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Method::Dense => "dense",
            Method::Sparse => "sparse branch alone",
            Method::Sla2 => "SLA2",
        })
    }
}

/// One method at one sparsity of one layer.
pub struct Run {
    /// How it was computed.
    pub method: Method,
    /// Percent of the key blocks left out, before rounding to whole blocks.
    pub sparsity: usize,
    /// The blocks of exact attention.
    pub list: HostBlockList,
    /// Relative error of the device's result against the same in f64.
    pub kernel_error: f64,
    /// Relative error, in exact arithmetic, against attention to all blocks.
    pub approximation_error: f64,
    /// The same for each head.
    pub head_errors: Vec<f64>,
    /// Share of the softmax that lies in the blocks of exact attention, for each head.
    pub head_mass: Vec<f64>,
    /// Median time of a call, from its launch until the device is done.
    pub time: Duration,
    /// Device memory of inputs, block list and outputs.
    pub bytes: usize,
}

/// Runs `layer` densely, then sparsely and as SLA2 at each sparsity.
pub fn layer(
    client: &Client,
    layer: &Layer,
    options: &AttentionOptions,
    progress: &ProgressBar,
) -> Result<Vec<Run>, Error> {
    let on_device = layer.upload(client)?;
    let [q, k, _] = &on_device;
    let say = |what: &str| progress.set_message(format!("{}: {what}", layer.name));
    say("dense");
    let all = layer.all_blocks();
    let full = layer.sparse(&all);
    let lab = Lab {
        client,
        layer,
        options,
        inputs: &on_device,
        full: &full,
    };
    let mut runs = vec![lab.sparse(Method::Dense, 0, &all, &all.upload(client), &full)?];
    progress.inc(1);
    for sparsity in SPARSITIES {
        say(&format!("{sparsity} %"));
        let router = RouterOptions {
            critical: (100 - sparsity) as f64 / 100.0,
            ..RouterOptions::sla2()
        };
        let chosen = route(client, q, k, options, &router)?.critical;
        let list = HostBlockList::download(client, &chosen)?;
        let sparse = layer.sparse(&list);
        let linear = layer.linear(&list);
        runs.push(lab.sparse(Method::Sparse, sparsity, &list, &chosen, &sparse)?);
        runs.push(lab.sla2(sparsity, list, router, &sparse, &linear)?);
        progress.inc(1);
    }
    Ok(runs)
}

/// What the runs of a layer share.
struct Lab<'a> {
    client: &'a Client,
    layer: &'a Layer,
    options: &'a AttentionOptions,
    inputs: &'a [DeviceTensor<4>; 3],
    full: &'a Forward,
}

impl Lab<'_> {
    fn sparse(
        &self,
        method: Method,
        sparsity: usize,
        list: &HostBlockList,
        on_device: &BlockList,
        exact: &Forward,
    ) -> Result<Run, Error> {
        let [q, k, v] = self.inputs;
        let (output, time) =
            self.timed(|| block_sparse_attention(self.client, q, k, v, on_device, self.options))?;
        let extra = list_bytes(on_device) + output.lse.len() * size_of::<f32>();
        let about = (method, sparsity, list.clone(), time);
        self.run(about, &output.out, &exact.out, exact, extra)
    }

    fn sla2(
        &self,
        sparsity: usize,
        list: HostBlockList,
        router: RouterOptions<'_>,
        sparse: &Forward,
        linear: &Tensor,
    ) -> Result<Run, Error> {
        let [q, k, v] = self.inputs;
        let problem = &self.layer.problem;
        let (heads, blocks) = (problem.query_heads(), problem.query_blocks());
        let logits = alpha_logits(&self.full.out, &sparse.out, linear, problem.block_q());
        let alpha_logit = upload(self.client, &logits, [heads, blocks], cubesla::DType::F32)?;
        let options = SlaOptions {
            attention: *self.options,
            blocks: Blocks::Routed(router),
            ..SlaOptions::sla2()
        };
        let (output, time) =
            self.timed(|| sla2_forward(self.client, q, k, v, &alpha_logit, &options))?;
        let alpha = Tensor::from_fn([1, heads, blocks, 1], |[_, h, i, _]| {
            sigmoid(logits[h * blocks + i])
        });
        let exact = combine_sla2(&sparse.out, linear, &alpha, problem.block_q());
        let extra = list_bytes(&output.critical) + logits.len() * size_of::<f32>();
        let about = (Method::Sla2, sparsity, list, time);
        self.run(about, &output.out, &exact, sparse, extra)
    }

    /// Judges the output of any method; `extra` are bytes besides inputs and output.
    fn run(
        &self,
        (method, sparsity, list, time): (Method, usize, HostBlockList, Duration),
        out: &DeviceTensor<4>,
        exact: &Tensor,
        sparse: &Forward,
        extra: usize,
    ) -> Result<Run, Error> {
        let heads = self.layer.heads();
        let full = self.full;
        let elements: usize = self.inputs.iter().chain([out]).map(DeviceTensor::len).sum();
        Ok(Run {
            method,
            sparsity,
            list,
            kernel_error: relative_error(to_host(self.client, out)?.data(), exact.data()),
            approximation_error: relative_error(exact.data(), full.out.data()),
            head_errors: by_head(exact, &full.out, heads, relative_error),
            head_mass: by_head(&sparse.lse, &full.lse, heads, kept),
            time,
            bytes: elements * out.dtype().size() + extra,
        })
    }

    fn timed<T>(
        &self,
        call: impl Fn() -> Result<T, cubesla::Error>,
    ) -> Result<(T, Duration), Error> {
        let call = || {
            let output = call()?;
            cubesla::sync(self.client)?;
            Ok::<_, Error>(output)
        };
        let output = call()?; // compiles the kernels, so it is not timed
        let mut times = Vec::with_capacity(CALLS);
        for _ in 0..CALLS {
            let start = Instant::now();
            call()?;
            times.push(start.elapsed());
        }
        times.sort_unstable();
        Ok((output, times[CALLS / 2]))
    }
}

fn list_bytes(list: &BlockList) -> usize {
    list.rows() * (list.width() + 1) * size_of::<u32>()
}
