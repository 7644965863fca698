//! Block-sparse attention.

use cubecl::client::Client;
use cubesla_kernels::attention::{
    BackwardInputs, BackwardOutputs, ForwardInputs, ForwardOutputs, LowBitFormats, RoundedInputs,
    rounded_inputs,
};
use cubesla_kernels::{AttentionOptions, AttentionProblem, BlockList, DType, DeviceTensor};

use crate::Error;
use crate::plan::{self, BackwardPlan, Choice, ForwardPlan, LowBitPlan};

/// What [`block_sparse_attention`] returns.
#[derive(Clone, Debug)]
pub struct AttentionOutput {
    /// `O [B, Hq, Lq, Dv]`, contiguous, the inputs' type.
    pub out: DeviceTensor<4>,
    /// `L [B, Hq, Lq]`, the natural log-sum-exp of each row's scaled scores, f32; `-inf` for a row
    /// that saw no key. Enough to merge the results of several calls over different keys.
    pub lse: DeviceTensor<3>,
}

/// Softmax attention of each query block over the key blocks of its list:
/// `O_i = softmax(scale * Q_i K_j^T) V_j` over the selected `j`.
///
/// | argument | shape | type |
/// |---|---|---|
/// | `q` | `[B, Hq, Lq, D]`, any strides | f32, f16 or bf16 |
/// | `k` | `[B, Hkv, Lk, D]`, any strides | as `q` |
/// | `v` | `[B, Hkv, Lk, Dv]`, any strides | as `q` |
/// | `list` | `[B, Hq, M, N]`, `M = ceil(Lq / block_q)`, `N = ceil(Lk / block_k)` | u32 |
///
/// `D` and `Dv` go from 32 to 256 in steps of 8; `Hq` is a multiple of `Hkv`. Accumulation is f32.
/// Lengths need not be multiples of the blocks. A list of all blocks gives dense attention. A row
/// that sees no key is 0 with a log-sum-exp of `-inf`. A NaN or infinity spoils the rows that see
/// it; in `v` under a causal mask, also rows that share a tile of keys with those.
///
/// With [`F32Products::Tf32`](crate::F32Products::Tf32) among the options f32 inputs are multiplied by
/// tensor cores, which round the factors to 10 bits of mantissa: errors are then of the order of 1e-4.
///
/// The plan is the table's unless [`plan::set_choice`] says otherwise.
///
/// Source: SLA (arXiv 2509.24006), section 3; the reference is
/// `cubesla_reference::attention::forward`.
///
/// # Errors
/// [`Error::Problem`] if an argument is refused; nothing is launched then. A device that fails says so
/// when results are read.
pub fn block_sparse_attention(
    client: &Client,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    v: &DeviceTensor<4>,
    list: &BlockList,
    options: &AttentionOptions,
) -> Result<AttentionOutput, Error> {
    let problem = AttentionProblem::new(q, k, v, options)?;
    let inputs = ForwardInputs { q, k, v, list };
    let plan = match plan::choice() {
        Choice::Table => ForwardPlan::new(&problem, client.properties())?,
        Choice::Tuned => ForwardPlan::tuned(client, &problem, inputs)?,
    };
    let out = DeviceTensor::empty(client, problem.out_shape(), problem.dtype());
    let lse = DeviceTensor::empty(client, problem.lse_shape(), DType::F32);
    plan.launch(
        client,
        &problem,
        inputs,
        ForwardOutputs {
            out: &out,
            lse: &lse,
        },
    )?;
    Ok(AttentionOutput { out, lse })
}

/// [`block_sparse_attention`] with scores in INT8 or FP8, and values in their own type or in FP8.
///
/// Keys are smoothed (`K - mean(K)`, per head), queries and keys quantized with a scale to each
/// block, values to FP8 with a scale to each column. The log-sum-exp is that of the unsmoothed scores.
/// Arguments and results are those of [`block_sparse_attention`]; on unit normals the output has a
/// cosine of at least 0.999 with the exact one and a relative L1 difference of at most 0.05.
///
/// A NaN in `q` spoils its block of queries, a NaN or infinity in `k` its head; an infinity saturates in
/// `q`, and in `v` in FP8. [`low_bit_attention_backward`] has its gradients, for quantization-aware
/// training.
///
/// Sources: SageAttention2++ (arXiv 2505.21136), SLA2 (arXiv 2602.12675); the reference is
/// `cubesla_reference::low_bit::forward`.
///
/// # Errors
/// As for [`block_sparse_attention`].
pub fn low_bit_attention(
    client: &Client,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    v: &DeviceTensor<4>,
    list: &BlockList,
    options: &AttentionOptions,
    formats: LowBitFormats,
) -> Result<AttentionOutput, Error> {
    let problem = AttentionProblem::new(q, k, v, options)?;
    let plan = LowBitPlan::new(&problem, client.properties(), formats)?;
    let out = DeviceTensor::empty(client, problem.out_shape(), problem.dtype());
    let lse = DeviceTensor::empty(client, problem.lse_shape(), DType::F32);
    let outputs = ForwardOutputs {
        out: &out,
        lse: &lse,
    };
    plan.launch(client, &problem, ForwardInputs { q, k, v, list }, outputs)?;
    Ok(AttentionOutput { out, lse })
}

/// What [`block_sparse_attention_backward`] and [`low_bit_attention_backward`] return, contiguous and of
/// the inputs' type.
#[derive(Clone, Debug)]
pub struct AttentionGradients {
    /// `dQ [B, Hq, Lq, D]`.
    pub dq: DeviceTensor<4>,
    /// `dK [B, Hkv, Lk, D]`, summed in f32 over the query heads that share a key head.
    pub dk: DeviceTensor<4>,
    /// `dV [B, Hkv, Lk, Dv]`, summed likewise.
    pub dv: DeviceTensor<4>,
}

/// Gradients of [`block_sparse_attention`] for the incoming gradient `grad_out` of its output.
///
/// | argument | shape | type |
/// |---|---|---|
/// | `q`, `k`, `v` | as for the forward, any strides | f32, f16 or bf16 |
/// | `out` | the forward's `O [B, Hq, Lq, Dv]`, any strides | as `q` |
/// | `lse` | the forward's `L [B, Hq, Lq]`, contiguous | f32 |
/// | `grad_out` | `dO [B, Hq, Lq, Dv]`, any strides | as `q` |
/// | `list` | the forward's | u32 |
///
/// `options` are the forward's too. Accumulation is f32, without atomics: two runs give the same
/// bits. Queries that see no key and keys that no query sees have gradients of 0.
///
/// ```text
/// P = exp(scale Q K^T - L)    dS = P (dO V^T - rowsum(dO * O))
/// dQ = scale dS K             dK = scale dS^T Q             dV = P^T dO
/// ```
///
/// Source: SLA (arXiv 2509.24006), equations of the backward pass; FlashAttention-2
/// (arXiv 2307.08691). The reference is `cubesla_reference::attention::backward`.
///
/// # Errors
/// [`Error::Problem`] if an argument is refused, before any gradient is computed: among others if
/// no tile of these head dimensions fits the device's shared memory. A device that fails says so when
/// results are read.
pub fn block_sparse_attention_backward(
    client: &Client,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    v: &DeviceTensor<4>,
    out: &DeviceTensor<4>,
    lse: &DeviceTensor<3>,
    grad_out: &DeviceTensor<4>,
    list: &BlockList,
    options: &AttentionOptions,
) -> Result<AttentionGradients, Error> {
    let problem = AttentionProblem::new(q, k, v, options)?;
    let inputs = BackwardInputs {
        q,
        k,
        v,
        out,
        lse,
        grad_out,
        list,
    };
    gradients(client, &problem, inputs)
}

/// Gradients of [`low_bit_attention`] for the incoming gradient `grad_out` of its output, straight
/// through the rounding, in the arithmetic of the inputs.
///
/// Arguments are those of [`block_sparse_attention_backward`], `out` and `lse` the low-bit forward's,
/// and the forward's `formats`; gradients are those of that backward at queries, keys and values as
/// the forward rounded them:
///
/// ```text
/// P = exp(scale Q' K'^T - L)    dS = P (dO V'^T - rowsum(dO * O))
/// dQ = scale dS K'              dK = scale dS^T Q'             dV = P^T dO
/// ```
///
/// The papers' backward takes `Q`, `K` and `V` as they are, which [`block_sparse_attention_backward`]
/// does if given this forward's `out` and `lse`. Its `P` is not the forward's, so that what rounding
/// did to `O` stays in `dS`: training can then end worse than it began. The book's chapter on accuracy
/// has both measured.
///
/// Sources: SageAttention2++ (arXiv 2505.21136) for the rounding, straight-through gradients
/// (arXiv 1308.3432); the reference is `cubesla_reference::low_bit::backward`.
///
/// # Errors
/// As for [`block_sparse_attention_backward`].
pub fn low_bit_attention_backward(
    client: &Client,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    v: &DeviceTensor<4>,
    out: &DeviceTensor<4>,
    lse: &DeviceTensor<3>,
    grad_out: &DeviceTensor<4>,
    list: &BlockList,
    options: &AttentionOptions,
    formats: LowBitFormats,
) -> Result<AttentionGradients, Error> {
    let problem = AttentionProblem::new(q, k, v, options)?;
    let RoundedInputs { q, k, v, lse } = rounded_inputs(client, &problem, [q, k, v], lse, formats)?;
    let inputs = BackwardInputs {
        q: &q,
        k: &k,
        v: &v,
        out,
        lse: &lse,
        grad_out,
        list,
    };
    gradients(client, &problem, inputs)
}

fn gradients(
    client: &Client,
    problem: &AttentionProblem,
    inputs: BackwardInputs<'_>,
) -> Result<AttentionGradients, Error> {
    let plan = BackwardPlan::new(problem, client.properties())?;
    let empty = |like: &DeviceTensor<4>| DeviceTensor::empty(client, like.shape(), like.dtype());
    let gradients = AttentionGradients {
        dq: empty(inputs.q),
        dk: empty(inputs.k),
        dv: empty(inputs.v),
    };
    let outputs = BackwardOutputs {
        dq: &gradients.dq,
        dk: &gradients.dk,
        dv: &gradients.dv,
    };
    plan.launch(client, problem, inputs, outputs)?;
    Ok(gradients)
}
