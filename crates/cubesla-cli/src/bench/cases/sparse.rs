//! Block-sparse attention, the block list given.

use cubesla::plan::{self, Choice, ForwardEngine, ForwardInputs, ForwardPlan};
use cubesla::{
    AttentionOptions, AttentionProblem, BlockList, Client, DType, F32Products, HostBlockList,
    block_sparse_attention,
};
use cubesla_reference::attention::{Causal, forward};
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::{Tensor, relative_error};

use super::{Case, Check, Cost, Qkv, Scale, Size, Tuning, Work, bound};
use crate::bench::host::{HostTensor, Random};
use crate::error::Error;

pub fn cases(scale: Scale, dtype: Option<DType>) -> Vec<Case> {
    let of = |(size, sparsity): (Size, usize)| {
        // What software runs has no tensor cores.
        let rounds = size.dtype == DType::F32 && scale == Scale::Large;
        let tf32 = rounds.then(|| case_by(size, sparsity, F32Products::Tf32));
        [Some(case(size, sparsity)), tf32].into_iter().flatten()
    };
    variants(scale, dtype).into_iter().flat_map(of).collect()
}

/// Sizes and percents left out, 0 for dense.
pub fn variants(scale: Scale, dtype: Option<DType>) -> Vec<(Size, usize)> {
    // The second are those of sizes that are not measured in full.
    let (sparsities, typical) = match scale {
        Scale::Large => ([0, 90, 95, 97], [95]),
        // A row has 16 blocks.
        Scale::Small => ([0, 50, 75, 90], [90]),
    };
    let (sizes, full) = scale.sizes(dtype);
    let of = |(n, size)| {
        let sparsities = if n < full { &sparsities[..] } else { &typical };
        sparsities
            .iter()
            .map(move |&sparsity| (size, sparsity))
            .collect::<Vec<_>>()
    };
    sizes.into_iter().enumerate().flat_map(of).collect()
}

/// The part of a name that tells the sparsity.
pub fn label(sparsity: usize) -> String {
    match sparsity {
        0 => "dense".to_owned(),
        percent => percent.to_string(),
    }
}

/// Random blocks, all but `sparsity` percent of each row.
pub fn case(size: Size, sparsity: usize) -> Case {
    case_by(size, sparsity, F32Products::F32)
}

/// The same with products made so.
fn case_by(size: Size, sparsity: usize, products: F32Products) -> Case {
    let by = match products {
        F32Products::F32 => "",
        F32Products::Tf32 => "-tf32",
    };
    Case {
        name: format!("sparse_forward/{}{by}/{size}", label(sparsity)),
        prepare: Box::new(move |client| {
            Ok(Box::new(Sparse::new(client, size, sparsity, products)?))
        }),
    }
}

struct Sparse {
    client: Client,
    inputs: Qkv,
    options: AttentionOptions,
    problem: AttentionProblem,
    list: HostBlockList,
    on_device: BlockList,
}

impl Sparse {
    fn new(
        client: &Client,
        size: Size,
        sparsity: usize,
        products: F32Products,
    ) -> Result<Self, Error> {
        let options = AttentionOptions {
            products,
            ..AttentionOptions::default()
        };
        let problem = problem(size, &options)?;
        let list = random_list(&problem, sparsity)?;
        Ok(Self {
            client: client.clone(),
            inputs: Qkv::new(client, size)?,
            options,
            problem,
            on_device: list.upload(client),
            list,
        })
    }
}

/// The problem of a size.
pub fn problem(size: Size, options: &AttentionOptions) -> Result<AttentionProblem, Error> {
    let shape = size.shape();
    AttentionProblem::from_shapes(shape, shape, shape, size.dtype, options)
        .map_err(|source| cubesla::Error::from(source).into())
}

/// Random blocks for each row.
pub fn random_list(problem: &AttentionProblem, sparsity: usize) -> Result<HostBlockList, Error> {
    let blocks = problem.key_blocks();
    let shape = [
        problem.batch(),
        problem.query_heads(),
        problem.query_blocks(),
        blocks,
    ];
    let count = (blocks * (100 - sparsity) / 100).max(1);
    let mut random = Random::new(11);
    let rows = (0..shape[..3].iter().product())
        .map(|_| random.subset(count, blocks))
        .collect();
    Ok(HostBlockList::from_rows(shape, rows)?)
}

impl Sparse {
    fn inputs(&self) -> ForwardInputs<'_> {
        let [q, k, v] = self.inputs.copy(0);
        ForwardInputs {
            q,
            k,
            v,
            list: &self.on_device,
        }
    }
}

impl Work for Sparse {
    fn call(&self, number: usize) -> Result<(), Error> {
        let [q, k, v] = self.inputs.copy(number);
        block_sparse_attention(&self.client, q, k, v, &self.on_device, &self.options)?;
        Ok(())
    }

    fn check(&self) -> Result<Check, Error> {
        let [q, k, v] = self.inputs.copy(0);
        let output = block_sparse_attention(&self.client, q, k, v, &self.on_device, &self.options)?;
        let out = HostTensor::download(&self.client, &output.out)?;
        let (mut found, mut exact) = (Vec::new(), Vec::new());
        for at in self.inputs.sample() {
            found.extend_from_slice(out.row(at).data());
            exact.extend_from_slice(attended(&self.inputs, &self.problem, &self.list, at).data());
        }
        Ok(Check {
            error: relative_error(&found, &exact),
            bound: match self.options.products {
                F32Products::F32 => bound(self.inputs.size.dtype),
                // Factors of f16 have as many bits.
                F32Products::Tf32 => bound(DType::F16),
            },
        })
    }

    fn cost(&self) -> Cost {
        let size = self.inputs.size;
        Cost {
            flops: pairs(&self.problem, self.list.rows()) * (4 * size.dim) as f64,
            low_bit_flops: 0.0,
            dense_flops: Some(size.dense_flops()),
            bytes: (4 * size.tensor_bytes() + 4 * size.batch * size.heads * size.len) as f64
                + list_bytes(&self.list),
            dtype: size.dtype,
        }
    }

    fn plan(&self) -> Option<String> {
        let plan = match plan::choice() {
            Choice::Table => ForwardPlan::new(&self.problem, self.client.properties()),
            Choice::Tuned => ForwardPlan::tuned(&self.client, &self.problem, self.inputs()),
        };
        plan.ok().map(|plan| plan.to_string())
    }

    fn tune(&self) -> Result<Option<Tuning>, Error> {
        let (client, problem, inputs) = (&self.client, &self.problem, self.inputs());
        let refused = |error| Error::from(cubesla::Error::from(error));
        let device = client.properties();
        let mut plans = ForwardPlan::candidates(problem, device).map_err(refused)?;
        // Sizes of the portable engine where a faster one runs the problem.
        let portable = plans.last().map(|plan| plan.engine);
        if let Some(ForwardEngine::Tile(plan)) = portable {
            for plan in plan.choices(problem, device) {
                let engine = ForwardEngine::Tile(plan);
                if plans.iter().all(|other| other.engine != engine) {
                    plans.push(ForwardPlan {
                        engine,
                        passed_over: Vec::new(),
                    });
                }
            }
        }
        let measured = ForwardPlan::measure(client, problem, inputs, plans).map_err(refused)?;
        let chosen = ForwardPlan::tuned(client, problem, inputs).map_err(refused)?;
        Ok(Some(Tuning { measured, chosen }))
    }
}

/// Pairs of a query and a key that rows of key blocks hold.
pub fn pairs<'a>(problem: &AttentionProblem, rows: impl Iterator<Item = &'a [u32]>) -> f64 {
    let block = |at: usize, size: usize, len: usize| size.min(len - at * size);
    let row_pairs = |(row, blocks): (usize, &[u32])| {
        let query_block = row % problem.query_blocks();
        let queries = block(query_block, problem.block_q(), problem.query_len());
        let keys = blocks
            .iter()
            .map(|&j| block(j as usize, problem.block_k(), problem.key_len()));
        (queries * keys.sum::<usize>()) as f64
    };
    rows.enumerate().map(row_pairs).sum()
}

/// Bytes of indices and counts.
pub fn list_bytes(list: &HostBlockList) -> f64 {
    let entries: usize = list.rows().map(<[u32]>::len).sum();
    (4 * (entries + list.rows().len())) as f64
}

/// Weights of 1 for the blocks that a row's list names.
pub fn weights(
    problem: &AttentionProblem,
    list: &HostBlockList,
    [b, h, i]: [usize; 3],
) -> BlockWeights {
    let row = (b * problem.query_heads() + h) * problem.query_blocks() + i / problem.block_q();
    let blocks = list.row(row);
    let sizes = [1, 1, 1, problem.key_len()];
    BlockWeights::from_fn(sizes, 1, problem.block_k(), |[_, _, _, j]| {
        f64::from(blocks.binary_search(&(j as u32)).is_ok())
    })
}

/// Softmax attention of one row over its listed blocks, `[1, 1, 1, D]`.
pub fn attended(
    inputs: &Qkv,
    problem: &AttentionProblem,
    list: &HostBlockList,
    at: [usize; 3],
) -> Tensor {
    let [q, k, v] = &inputs.host;
    let head = [at[0], at[1]];
    let (q, k, v) = (q.row(at), k.head(head), v.head(head));
    let weights = weights(problem, list, at);
    forward(&q, &k, &v, &weights, problem.scale().into(), Causal::None).out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_count_the_rows_and_keys_that_exist() {
        let shape = [1, 2, 200, 32];
        let options = AttentionOptions::default();
        let problem =
            AttentionProblem::from_shapes(shape, shape, shape, cubesla::DType::F32, &options)
                .unwrap();
        let all = random_list(&problem, 0).unwrap();
        assert_eq!(pairs(&problem, all.rows()), 2.0 * 200.0 * 200.0);
        // The last key block has 8 keys, the last query block 72 rows.
        let rows: [&[u32]; 2] = [&[0], &[3]];
        assert_eq!(pairs(&problem, rows.into_iter()), 128.0 * 64.0 + 72.0 * 8.0);
    }
}
