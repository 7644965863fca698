//! SLA and SLA2 in one call.

use cubecl::client::Client;
use cubesla_kernels::linear::FeatureMap;
use cubesla_kernels::sla::{
    self, Combination, CombinationGradients, LinearMode, Precision, SlaBackward, SlaInputs,
    SlaSaved,
};
use cubesla_kernels::{AttentionOptions, AttentionProblem, BlockList, DeviceTensor, ProblemError};

use crate::Error;
use crate::plan::{SlaBackwardPlan, SlaPlan};
use crate::router::{RouterOptions, route};

/// Where the blocks come from.
#[derive(Clone, Copy, Debug)]
pub enum Blocks<'a> {
    /// A router chooses them.
    Routed(RouterOptions<'a>),
    /// The caller has them.
    Given {
        /// Blocks for exact attention.
        critical: &'a BlockList,
        /// Blocks left out, disjoint from the critical ones; the rest is marginal.
        negligible: Option<&'a BlockList>,
    },
}

/// What a caller chooses about [`sla_forward`] and [`sla2_forward`].
#[derive(Clone, Copy, Debug)]
pub struct SlaOptions<'a> {
    /// Blocks and scale; causal masks are refused.
    pub attention: AttentionOptions,
    /// Where the blocks come from.
    pub blocks: Blocks<'a>,
    /// phi of the linear branch.
    pub phi: FeatureMap,
    /// The keys that the linear branch sums over.
    pub linear: LinearMode,
    /// Arithmetic of the sparse branch.
    pub precision: Precision,
    /// Whether to return the branches and the log-sum-exp too, as a backward needs them.
    pub save: bool,
}

impl SlaOptions<'_> {
    /// SLA's defaults: 128x64 blocks, 5 % critical, 10 % negligible, softmax features, complement.
    pub fn sla() -> Self {
        Self {
            attention: AttentionOptions::default(),
            blocks: Blocks::Routed(RouterOptions::sla()),
            phi: FeatureMap::Softmax,
            linear: LinearMode::Complement,
            precision: Precision::Full,
            save: false,
        }
    }

    /// SLA2's defaults: as SLA's, with no negligible blocks.
    pub fn sla2() -> Self {
        Self {
            blocks: Blocks::Routed(RouterOptions::sla2()),
            ..Self::sla()
        }
    }
}

/// What [`sla_forward`] and [`sla2_forward`] return.
#[derive(Clone, Debug)]
pub struct SlaResult {
    /// `O [B, Hq, Lq, Dv]`, contiguous, the inputs' type.
    pub out: DeviceTensor<4>,
    /// The blocks of exact attention.
    pub critical: BlockList,
    /// The blocks left out, if there are any.
    pub negligible: Option<BlockList>,
    /// The branches and the log-sum-exp, if they were asked for.
    pub saved: Option<SlaSaved>,
}

/// SLA: `O = O^s + O^l Wl^T + bl`, with softmax attention `O^s` over the critical blocks and linear
/// attention `O^l` over the marginal ones.
///
/// | argument | shape | type |
/// |---|---|---|
/// | `q`, `k`, `v` | `[B, Hq, Lq, D]`, `[B, Hkv, Lk, D]`, `[B, Hkv, Lk, Dv]`, any strides | f32, f16 or bf16 |
/// | `wl` | `[Dv, Dv]`, contiguous | f32 |
/// | `bl` | `[Dv]`, contiguous | f32 |
///
/// `wl` and `bl` start at zero in SLA's public code, so that the linear branch contributes nothing
/// until it is trained.
///
/// Source: SLA (arXiv 2509.24006); the reference is `cubesla_reference::sla::combine_sla`.
///
/// # Errors
/// [`Error::Problem`] if an argument is refused; nothing is launched then. A device that fails says so
/// when results are read.
pub fn sla_forward(
    client: &Client,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    v: &DeviceTensor<4>,
    wl: &DeviceTensor<2>,
    bl: &DeviceTensor<1>,
    options: &SlaOptions<'_>,
) -> Result<SlaResult, Error> {
    forward(client, q, k, v, Combination::Sla { wl, bl }, options)
}

/// SLA2: `O = a O^s + (1 - a) O^l` with `a = sigmoid(alpha_logit)` per query block.
///
/// | argument | shape | type |
/// |---|---|---|
/// | `q`, `k`, `v` | `[B, Hq, Lq, D]`, `[B, Hkv, Lk, D]`, `[B, Hkv, Lk, Dv]`, any strides | f32, f16 or bf16 |
/// | `alpha_logit` | `[1, 1]`, `[Hq, 1]` or `[Hq, M]`, contiguous | f32 |
///
/// Source: SLA2 (arXiv 2602.12675); the reference is `cubesla_reference::sla::combine_sla2`.
///
/// # Errors
/// [`Error::Problem`] if an argument is refused; nothing is launched then. A device that fails says so
/// when results are read.
pub fn sla2_forward(
    client: &Client,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    v: &DeviceTensor<4>,
    alpha_logit: &DeviceTensor<2>,
    options: &SlaOptions<'_>,
) -> Result<SlaResult, Error> {
    forward(client, q, k, v, Combination::Sla2 { alpha_logit }, options)
}

fn forward(
    client: &Client,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    v: &DeviceTensor<4>,
    combination: Combination<'_>,
    options: &SlaOptions<'_>,
) -> Result<SlaResult, Error> {
    let problem = AttentionProblem::new(q, k, v, &options.attention)?;
    let (critical, negligible) = match options.blocks {
        Blocks::Routed(router) => {
            let routing = route(client, q, k, &options.attention, &router)?;
            (routing.critical, routing.negligible)
        }
        Blocks::Given {
            critical,
            negligible,
        } => (critical.clone(), negligible.cloned()),
    };
    let inputs = SlaInputs {
        q,
        k,
        v,
        critical: &critical,
        negligible: negligible.as_ref(),
    };
    let projects = matches!(combination, Combination::Sla { .. });
    let plan = SlaPlan::new(&problem, client.properties(), projects, options.precision);
    let branch = (options.phi, options.linear);
    let output = plan.launch(client, &problem, inputs, combination, branch, options.save)?;
    Ok(SlaResult {
        out: output.out,
        critical,
        negligible,
        saved: output.saved,
    })
}

/// What [`sla_backward`] and [`sla2_backward`] need to know of the forward's options.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlaBackwardOptions {
    /// Blocks and scale; causal masks are refused.
    pub attention: AttentionOptions,
    /// phi of the linear branch.
    pub phi: FeatureMap,
    /// The keys that the linear branch sums over.
    pub linear: LinearMode,
    /// The forward's arithmetic of the sparse branch. In low bits the branch's gradients are those of
    /// [`low_bit_attention_backward`](crate::low_bit_attention_backward); with [`Precision::Full`] they
    /// are taken at the inputs as they are, whatever the forward did: the papers' backward.
    pub precision: Precision,
}

impl From<&SlaOptions<'_>> for SlaBackwardOptions {
    fn from(options: &SlaOptions<'_>) -> Self {
        Self {
            attention: options.attention,
            phi: options.phi,
            linear: options.linear,
            precision: options.precision,
        }
    }
}

/// What [`sla_backward`] returns.
#[derive(Clone, Debug)]
pub struct SlaGradients {
    /// `dQ [B, Hq, Lq, D]`, contiguous, the inputs' type.
    pub dq: DeviceTensor<4>,
    /// `dK [B, Hkv, Lk, D]`, likewise.
    pub dk: DeviceTensor<4>,
    /// `dV [B, Hkv, Lk, Dv]`, likewise.
    pub dv: DeviceTensor<4>,
    /// `dWl [Dv, Dv]`, f32.
    pub dwl: DeviceTensor<2>,
    /// `dbl [Dv]`, f32.
    pub dbl: DeviceTensor<1>,
}

/// What [`sla2_backward`] returns.
#[derive(Clone, Debug)]
pub struct Sla2Gradients {
    /// `dQ [B, Hq, Lq, D]`, contiguous, the inputs' type.
    pub dq: DeviceTensor<4>,
    /// `dK [B, Hkv, Lk, D]`, likewise.
    pub dk: DeviceTensor<4>,
    /// `dV [B, Hkv, Lk, Dv]`, likewise.
    pub dv: DeviceTensor<4>,
    /// Gradient of the logits, f32, of their shape: one that several heads, blocks or batches share
    /// has the sum of their gradients.
    pub dalpha_logit: DeviceTensor<2>,
}

/// Gradients of [`sla_forward`] for the incoming gradient `grad_out` of its output.
///
/// | argument | shape | type |
/// |---|---|---|
/// | `inputs` | the forward's `q`, `k`, `v`, any strides, and the blocks that it returned | f32, f16 or bf16 |
/// | `saved` | the forward's, asked for with `save` | |
/// | `wl`, `bl` | the forward's, `[Dv, Dv]` and `[Dv]`, contiguous | f32 |
/// | `grad_out` | `dO [B, Hq, Lq, Dv]`, any strides | as `q` |
///
/// The gradients of the branches are added in f32 and the sums rounded; where the sparse branch's come
/// from Hopper's `wgmma`, they have been rounded to the inputs' type before, else they are f32
/// ([`SlaBackwardPlan`] tells). There are no atomics, and two runs give the same bits. Blocks are taken as
/// given: nothing flows into a router.
///
/// Source: SLA (arXiv 2509.24006), backward pass; the reference is
/// `cubesla_reference::sla::combine_sla_backward` with the `backward` of both branches.
///
/// # Errors
/// [`Error::Problem`] if an argument is refused; no result is returned then. A device that fails says
/// so when results are read.
pub fn sla_backward(
    client: &Client,
    inputs: SlaInputs<'_>,
    saved: &SlaSaved,
    wl: &DeviceTensor<2>,
    bl: &DeviceTensor<1>,
    grad_out: &DeviceTensor<4>,
    options: &SlaBackwardOptions,
) -> Result<SlaGradients, Error> {
    let combination = Combination::Sla { wl, bl };
    let grads = backward(client, inputs, combination, saved, grad_out, options)?;
    let CombinationGradients::Sla { wl: dwl, bl: dbl } = grads.weights else {
        unreachable!("the weights are the combination's");
    };
    Ok(SlaGradients {
        dq: grads.inputs.dq,
        dk: grads.inputs.dk,
        dv: grads.inputs.dv,
        dwl,
        dbl,
    })
}

/// Gradients of [`sla2_forward`] for the incoming gradient `grad_out` of its output.
///
/// Arguments are those of [`sla_backward`], but for `alpha_logit`, the forward's.
///
/// Source: SLA2 (arXiv 2602.12675), its second training stage; the reference is
/// `cubesla_reference::sla::combine_sla2_backward` with the `backward` of both branches.
///
/// # Errors
/// [`Error::Problem`] if an argument is refused; no result is returned then. A device that fails says
/// so when results are read.
pub fn sla2_backward(
    client: &Client,
    inputs: SlaInputs<'_>,
    saved: &SlaSaved,
    alpha_logit: &DeviceTensor<2>,
    grad_out: &DeviceTensor<4>,
    options: &SlaBackwardOptions,
) -> Result<Sla2Gradients, Error> {
    let combination = Combination::Sla2 { alpha_logit };
    let grads = backward(client, inputs, combination, saved, grad_out, options)?;
    let CombinationGradients::Sla2 {
        alpha_logit: dalpha_logit,
    } = grads.weights
    else {
        unreachable!("the weights are the combination's");
    };
    Ok(Sla2Gradients {
        dq: grads.inputs.dq,
        dk: grads.inputs.dk,
        dv: grads.inputs.dv,
        dalpha_logit,
    })
}

fn backward(
    client: &Client,
    inputs: SlaInputs<'_>,
    combination: Combination<'_>,
    saved: &SlaSaved,
    grad_out: &DeviceTensor<4>,
    options: &SlaBackwardOptions,
) -> Result<sla::SlaGradients, ProblemError> {
    let problem = AttentionProblem::new(inputs.q, inputs.k, inputs.v, &options.attention)?;
    let plan = SlaBackwardPlan::new(&problem, client.properties())?;
    let given = SlaBackward {
        combination,
        phi: options.phi,
        mode: options.linear,
        precision: options.precision,
        saved,
        grad_out,
    };
    plan.launch(client, &problem, inputs, given)
}
