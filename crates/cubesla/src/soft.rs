//! SLA2's first training stage: soft masks, and the router that learns from them.

use cubecl::client::Client;
use cubesla_kernels::attention::{BackwardInputs, BackwardOutputs, ForwardInputs, ForwardOutputs};
use cubesla_kernels::linear::FeatureMap;
use cubesla_kernels::router::{self, RouterGradients, RouterWeights};
use cubesla_kernels::sla::{self, CombinationGradients, SlaSaved, SoftInputs};
use cubesla_kernels::{AttentionOptions, AttentionProblem, DeviceTensor};

use crate::Error;
use crate::attention::AttentionOutput;
use crate::plan::{BackwardPlan, ForwardPlan, SlaBackwardPlan};

/// Softmax attention over all blocks, each with a weight:
/// `P = m exp(S) / sum m exp(S)`, `O = P V`, `L = ln sum m exp(S)`.
///
/// | argument | shape | type |
/// |---|---|---|
/// | `q`, `k`, `v` | `[B, Hq, Lq, D]`, `[B, Hkv, Lk, D]`, `[B, Hkv, Lk, Dv]`, any strides | f32, f16 or bf16 |
/// | `weights` | `m [B, Hq, M, N]`, 0 or more, contiguous | f32 |
///
/// With weights of 0 and 1 it is [`block_sparse_attention`](crate::block_sparse_attention). No
/// matrix of scores is stored, but every block is visited, and at most 8192 key blocks.
///
/// Source: SLA2 (arXiv 2602.12675), the first training stage; the reference is
/// `cubesla_reference::attention::forward`.
///
/// # Errors
/// [`Error::Problem`] if an argument is refused; no result is returned then. A device that fails says
/// so when results are read.
pub fn soft_attention(
    client: &Client,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    v: &DeviceTensor<4>,
    weights: &DeviceTensor<4>,
    options: &AttentionOptions,
) -> Result<AttentionOutput, Error> {
    let problem = AttentionProblem::new(q, k, v, options)?;
    let plan = ForwardPlan::new(&problem, client.properties())?;
    let launch = |inputs: ForwardInputs<'_>, outputs: ForwardOutputs<'_>| {
        plan.launch_weighted(client, &problem, inputs, Some(weights), outputs)
    };
    let (out, lse) = sla::soft_attention(client, &problem, [q, k, v], weights, launch)?;
    Ok(AttentionOutput { out, lse })
}

/// What [`soft_attention_backward`] returns, contiguous.
#[derive(Clone, Debug)]
pub struct SoftAttentionGradients {
    /// `dQ [B, Hq, Lq, D]`, the inputs' type.
    pub dq: DeviceTensor<4>,
    /// `dK [B, Hkv, Lk, D]`, likewise.
    pub dk: DeviceTensor<4>,
    /// `dV [B, Hkv, Lk, Dv]`, likewise.
    pub dv: DeviceTensor<4>,
    /// `dm [B, Hq, M, N]`, f32; 0 for a weight of 0.
    pub dweights: DeviceTensor<4>,
}

/// Gradients of [`soft_attention`] for the incoming gradient `grad_out [B, Hq, Lq, Dv]`, of any
/// strides and the inputs' type; `forward` is what it returned. Two runs give the same bits.
///
/// The reference is `cubesla_reference::attention::backward`.
///
/// # Errors
/// [`Error::Problem`] if an argument is refused; no result is returned then. A device that fails says
/// so when results are read.
pub fn soft_attention_backward(
    client: &Client,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    v: &DeviceTensor<4>,
    weights: &DeviceTensor<4>,
    forward: &AttentionOutput,
    grad_out: &DeviceTensor<4>,
    options: &AttentionOptions,
) -> Result<SoftAttentionGradients, Error> {
    let problem = AttentionProblem::new(q, k, v, options)?;
    let [dq, dk, dv] = [q, k, v].map(|x| DeviceTensor::empty(client, x.shape(), x.dtype()));
    let plan = BackwardPlan::new(&problem, client.properties())?;
    let launch = |inputs: BackwardInputs<'_>, grad: &DeviceTensor<4>| {
        let outputs = BackwardOutputs {
            dq: &dq,
            dk: &dk,
            dv: &dv,
        };
        plan.launch_weighted(client, &problem, inputs, Some([weights, grad]), outputs)
    };
    let AttentionOutput { out, lse } = forward;
    let ((), dweights) = sla::soft_attention_backward(
        client,
        &problem,
        [q, k, v],
        weights,
        [out, grad_out],
        lse,
        launch,
    )?;
    Ok(SoftAttentionGradients {
        dq,
        dk,
        dv,
        dweights,
    })
}

/// What [`sla2_soft_forward`] returns.
#[derive(Clone, Debug)]
pub struct Sla2SoftOutput {
    /// `O [B, Hq, Lq, Dv]`, contiguous, the inputs' type.
    pub out: DeviceTensor<4>,
    /// What the backward needs.
    pub saved: SlaSaved,
}

/// SLA2 with a soft mask: `O = a O^s + (1 - a) O^l`, where block `j` has the weight `m_ij` in the
/// sparse branch and `1 - m_ij` in the linear one.
///
/// `inputs.weights` come from [`soft_top_k`](crate::soft_top_k). With weights of 0 and 1 it is
/// [`sla2_forward`](crate::sla2_forward) without negligible blocks.
///
/// Source: SLA2 (arXiv 2602.12675), the first training stage.
///
/// # Errors
/// [`Error::Problem`] if an argument is refused; no result is returned then. A device that fails says
/// so when results are read.
pub fn sla2_soft_forward(
    client: &Client,
    inputs: SoftInputs<'_>,
    phi: FeatureMap,
    options: &AttentionOptions,
) -> Result<Sla2SoftOutput, Error> {
    let problem = AttentionProblem::new(inputs.q, inputs.k, inputs.v, options)?;
    let plan = ForwardPlan::new(&problem, client.properties())?;
    let (out, saved) = plan.launch_soft(client, &problem, inputs, phi)?;
    Ok(Sla2SoftOutput { out, saved })
}

/// What [`sla2_soft_backward`] returns, contiguous.
#[derive(Clone, Debug)]
pub struct Sla2SoftGradients {
    /// `dQ [B, Hq, Lq, D]`, the inputs' type.
    pub dq: DeviceTensor<4>,
    /// `dK [B, Hkv, Lk, D]`, likewise.
    pub dk: DeviceTensor<4>,
    /// `dV [B, Hkv, Lk, Dv]`, likewise.
    pub dv: DeviceTensor<4>,
    /// `dm [B, Hq, M, N]`, f32, for [`soft_top_k_backward`](crate::soft_top_k_backward).
    pub dweights: DeviceTensor<4>,
    /// Gradient of the logits, f32, of their shape.
    pub dalpha_logit: DeviceTensor<2>,
}

/// Gradients of [`sla2_soft_forward`] for the incoming gradient `grad_out [B, Hq, Lq, Dv]`, of any
/// strides and the inputs' type; `saved` is what it returned. Two runs give the same bits. Those of the
/// branches are added and rounded as in [`sla_backward`](crate::sla_backward).
///
/// # Errors
/// [`Error::Problem`] if an argument is refused; no result is returned then. A device that fails says
/// so when results are read.
pub fn sla2_soft_backward(
    client: &Client,
    inputs: SoftInputs<'_>,
    saved: &SlaSaved,
    grad_out: &DeviceTensor<4>,
    phi: FeatureMap,
    options: &AttentionOptions,
) -> Result<Sla2SoftGradients, Error> {
    let problem = AttentionProblem::new(inputs.q, inputs.k, inputs.v, options)?;
    let plan = SlaBackwardPlan::new(&problem, client.properties())?;
    let (grads, dweights) = plan.launch_soft(client, &problem, inputs, phi, saved, grad_out)?;
    let CombinationGradients::Sla2 { alpha_logit } = grads.weights else {
        unreachable!("soft masks are SLA2's");
    };
    Ok(Sla2SoftGradients {
        dq: grads.inputs.dq,
        dk: grads.inputs.dk,
        dv: grads.inputs.dv,
        dweights,
        dalpha_logit: alpha_logit,
    })
}

/// Gradients of the projections of a learnable router, for the gradient `grad` of its scores: f32
/// `[B, Hq, M, N]`, contiguous, as [`soft_top_k_backward`](crate::soft_top_k_backward) returns it.
///
/// `q` and `k` are as for [`route`](crate::route), and so is `options`.
///
/// Source: SLA2 (arXiv 2602.12675); the reference is `cubesla_reference::router::scores_backward`.
///
/// # Errors
/// [`Error::Problem`] if an argument is refused; no result is returned then. A device that fails says
/// so when results are read.
pub fn router_backward(
    client: &Client,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    weights: RouterWeights<'_>,
    grad: &DeviceTensor<4>,
    options: &AttentionOptions,
) -> Result<RouterGradients, Error> {
    // Values play no part in routing; keys stand in for them.
    let problem = AttentionProblem::new(q, k, k, options)?;
    Ok(router::router_backward(
        client, &problem, q, k, weights, grad,
    )?)
}
