//! Which engine and tiles run a problem on a device.
//!
//! A plan is a pure function of the problem and the device's properties: the same question always
//! has the same answer, which can be printed, and needs no device to be asked. Engines are tried
//! from the fastest to the most portable; a plan keeps why the faster ones were passed over.
//!
//! What sizes cannot tell can be [measured](ForwardPlan::tuned) instead: see [`Choice`].

mod answers;
mod matmul;
mod tune;

pub use answers::CacheFault;
pub use cubesla_kernels::attention::{ForwardInputs, ForwardOutputs};
pub use matmul::{MatmulEngine, MatmulPlan};
pub use tune::{Choice, cache_fault, choice, set_choice};

use std::fmt;

use cubecl::client::Client;
use cubecl::ir::DeviceProperties;
use cubesla_kernels::attention::{self, BackwardInputs, BackwardOutputs, LowBitFormats};
use cubesla_kernels::linear::{FeatureMap, Gradients};
use cubesla_kernels::sla::{
    self, Combination, LinearMode, Precision, SlaBackward, SlaGradients, SlaInputs, SlaOutput,
    SlaSaved, SoftInputs,
};
use cubesla_kernels::{AttentionProblem, DType, DeviceTensor, ProblemError};

/// How block-sparse attention's forward is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardPlan {
    /// The engine and its sizes.
    pub engine: ForwardEngine,
    /// Faster engines, and why they cannot run the problem.
    pub passed_over: Vec<(&'static str, &'static str)>,
}

/// An engine of the forward, with its sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForwardEngine {
    /// Hopper's warpgroup products and bulk copies.
    #[cfg(feature = "cuda")]
    Wgmma(cubesla_cuda::forward::WgmmaPlan),
    /// A tile program of the portable kernels.
    Tile(attention::ForwardPlan),
}

type Candidate = fn(&AttentionProblem, &DeviceProperties) -> Result<ForwardEngine, &'static str>;

/// The engines, fastest first.
const FORWARD: &[(&str, Candidate)] = &[
    #[cfg(feature = "cuda")]
    ("wgmma", |problem, device| {
        cubesla_cuda::forward::WgmmaPlan::new(problem, device).map(ForwardEngine::Wgmma)
    }),
    ("mma", |problem, device| {
        attention::ForwardPlan::mma(problem, device).map(ForwardEngine::Tile)
    }),
    ("simt", |problem, device| {
        attention::ForwardPlan::simt(problem, device).map(ForwardEngine::Tile)
    }),
];

impl ForwardPlan {
    /// The plan for `problem` on a device.
    ///
    /// # Errors
    /// [`ProblemError::NoPlan`] with every engine's reason, if none can run the problem.
    pub fn new(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Self, ProblemError> {
        Self::all(problem, device).map(|mut plans| plans.swap_remove(0))
    }

    /// A plan for every engine that can run `problem`, fastest first: for comparing engines.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn all(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Vec<Self>, ProblemError> {
        let mut plans = Vec::new();
        let mut passed_over = Vec::new();
        for (name, candidate) in FORWARD {
            match candidate(problem, device) {
                Ok(engine) => plans.push(Self {
                    engine,
                    passed_over: passed_over.clone(),
                }),
                Err(reason) => passed_over.push((*name, reason)),
            }
        }
        if plans.is_empty() {
            return Err(ProblemError::NoPlan {
                device: device.identity.name.clone(),
                reason: reasons(&passed_over),
            });
        }
        Ok(plans)
    }

    /// The plans among which [`tuned`](Self::tuned) measures: that of [`new`](Self::new) first, then
    /// other sizes of its engine, and for an engine of one size the next engine.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn candidates(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Vec<Self>, ProblemError> {
        let mut plans = Self::all(problem, device)?;
        match plans[0].engine {
            ForwardEngine::Tile(plan) => {
                let choices = plan.choices(problem, device).into_iter();
                let passed_over = &plans[0].passed_over;
                let sized = |plan| Self {
                    engine: ForwardEngine::Tile(plan),
                    passed_over: passed_over.clone(),
                };
                Ok(choices.map(sized).collect())
            }
            #[cfg(feature = "cuda")]
            ForwardEngine::Wgmma(_) => {
                plans.truncate(2);
                Ok(plans)
            }
        }
    }

    /// Runs the plan. Nothing is launched if an argument is refused.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the argument at fault.
    pub fn launch(
        &self,
        client: &Client,
        problem: &AttentionProblem,
        inputs: ForwardInputs<'_>,
        outputs: ForwardOutputs<'_>,
    ) -> Result<(), ProblemError> {
        self.launch_weighted(client, problem, inputs, None, outputs)
    }

    /// The same with a weight for every block of the list, if there are `weights`: see
    /// [`launch_forward_weighted`](attention::launch_forward_weighted).
    ///
    /// # Errors
    /// A [`ProblemError`] that names the argument at fault.
    pub fn launch_weighted(
        &self,
        client: &Client,
        problem: &AttentionProblem,
        inputs: ForwardInputs<'_>,
        weights: Option<&DeviceTensor<4>>,
        outputs: ForwardOutputs<'_>,
    ) -> Result<(), ProblemError> {
        match &self.engine {
            #[cfg(feature = "cuda")]
            ForwardEngine::Wgmma(plan) => {
                attention::check_forward(client, problem, &inputs, &outputs)?;
                if let Some(weights) = weights {
                    cubesla_kernels::block_list::expect_weights(problem, weights)?;
                }
                cubesla_cuda::forward::launch_forward_wgmma(
                    client, problem, plan, inputs, weights, outputs,
                );
                Ok(())
            }
            ForwardEngine::Tile(plan) => {
                attention::launch_forward_weighted(client, problem, plan, inputs, weights, outputs)
            }
        }
    }

    /// Runs the first stage of SLA2 with the plan for its sparse branch; the portable kernels of the
    /// linear branch choose their own tiles. No result is returned if an argument is refused.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the argument at fault.
    pub fn launch_soft(
        &self,
        client: &Client,
        problem: &AttentionProblem,
        inputs: SoftInputs<'_>,
        phi: FeatureMap,
    ) -> Result<(DeviceTensor<4>, SlaSaved), ProblemError> {
        let weights = inputs.weights;
        sla::soft_forward(client, problem, inputs, phi, |inputs, outputs| {
            self.launch_weighted(client, problem, inputs, Some(weights), outputs)
        })
    }
}

impl fmt::Display for ForwardEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            #[cfg(feature = "cuda")]
            Self::Wgmma(plan) => write!(f, "{plan}"),
            Self::Tile(plan) => write!(f, "{plan}"),
        }
    }
}

impl fmt::Display for ForwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.engine)?;
        write_passed_over(f, &self.passed_over)
    }
}

/// How block-sparse attention in low bits is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LowBitPlan {
    /// The engine; tiles of the portable kernel are chosen when it is launched.
    pub engine: LowBitEngine,
    /// Formats of scores and values.
    pub formats: LowBitFormats,
    /// Faster engines, and why they cannot run the problem.
    pub passed_over: Vec<(&'static str, &'static str)>,
}

/// An engine of low-bit attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LowBitEngine {
    /// Hopper's warpgroup products and bulk copies.
    #[cfg(feature = "cuda")]
    Wgmma(cubesla_cuda::low_bit::WgmmaLowBitPlan),
    /// The portable kernel.
    Tile,
}

impl LowBitPlan {
    /// The plan for `problem` on a device.
    pub fn new(
        problem: &AttentionProblem,
        device: &DeviceProperties,
        formats: LowBitFormats,
    ) -> Self {
        Self::all(problem, device, formats).swap_remove(0)
    }

    /// A plan for every engine that may run `problem`, fastest first: for comparing engines.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub fn all(
        problem: &AttentionProblem,
        device: &DeviceProperties,
        formats: LowBitFormats,
    ) -> Vec<Self> {
        let plan = |engine, passed_over| Self {
            engine,
            formats,
            passed_over,
        };
        let portable = plan(LowBitEngine::Tile, Vec::new());
        #[cfg(feature = "cuda")]
        return match cubesla_cuda::low_bit::WgmmaLowBitPlan::new(problem, device, formats) {
            Ok(hopper) => vec![plan(LowBitEngine::Wgmma(hopper), Vec::new()), portable],
            Err(reason) => vec![plan(LowBitEngine::Tile, vec![("wgmma", reason)])],
        };
        #[cfg(not(feature = "cuda"))]
        vec![portable]
    }

    /// Runs the plan. Nothing is launched if an argument is refused.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the argument at fault.
    pub fn launch(
        &self,
        client: &Client,
        problem: &AttentionProblem,
        inputs: ForwardInputs<'_>,
        outputs: ForwardOutputs<'_>,
    ) -> Result<(), ProblemError> {
        match &self.engine {
            #[cfg(feature = "cuda")]
            LowBitEngine::Wgmma(plan) => {
                attention::check_forward(client, problem, &inputs, &outputs)?;
                cubesla_cuda::low_bit::launch_low_bit_wgmma(client, problem, plan, inputs, outputs);
                Ok(())
            }
            LowBitEngine::Tile => {
                attention::launch_low_bit(client, problem, inputs, outputs, self.formats)
            }
        }
    }
}

impl fmt::Display for LowBitPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.engine {
            #[cfg(feature = "cuda")]
            LowBitEngine::Wgmma(plan) => write!(f, "{plan}")?,
            LowBitEngine::Tile => write!(f, "portable")?,
        }
        write_passed_over(f, &self.passed_over)
    }
}

/// How the forward of SLA and SLA2 is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlaPlan {
    /// The engine; tiles of the portable kernels are chosen when they are launched.
    pub engine: SlaEngine,
    /// Arithmetic of the sparse branch.
    pub precision: Precision,
    /// Faster engines, and why they cannot run the problem.
    pub passed_over: Vec<(&'static str, &'static str)>,
}

/// An engine of the SLA forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlaEngine {
    /// Hopper's warpgroup products and bulk copies.
    #[cfg(feature = "cuda")]
    Wgmma(cubesla_cuda::sla::WgmmaSlaPlan),
    /// The portable kernels.
    Tile,
}

impl SlaPlan {
    /// The plan for `problem`; `projects` for SLA, whose linear branch is projected.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub fn new(
        problem: &AttentionProblem,
        device: &DeviceProperties,
        projects: bool,
        precision: Precision,
    ) -> Self {
        #[cfg(feature = "cuda")]
        let (engine, passed_over) = {
            let formats = precision.formats();
            match cubesla_cuda::sla::WgmmaSlaPlan::new(problem, device, projects, formats) {
                Ok(plan) => (SlaEngine::Wgmma(plan), Vec::new()),
                Err(reason) => (SlaEngine::Tile, vec![("wgmma", reason)]),
            }
        };
        #[cfg(not(feature = "cuda"))]
        let (engine, passed_over) = (SlaEngine::Tile, Vec::new());
        Self {
            engine,
            precision,
            passed_over,
        }
    }

    /// Runs the plan. Nothing is launched if an argument is refused.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the argument at fault.
    pub fn launch(
        &self,
        client: &Client,
        problem: &AttentionProblem,
        inputs: SlaInputs<'_>,
        combination: Combination<'_>,
        (phi, mode): (FeatureMap, LinearMode),
        save: bool,
    ) -> Result<SlaOutput, ProblemError> {
        match &self.engine {
            #[cfg(feature = "cuda")]
            SlaEngine::Wgmma(plan) => {
                sla::check_sla(client, problem, &inputs, &combination)?;
                cubesla_cuda::sla::launch_sla_wgmma(
                    client,
                    problem,
                    plan,
                    inputs,
                    combination,
                    phi,
                    mode,
                    save,
                )
            }
            SlaEngine::Tile => sla::sla_forward(
                client,
                problem,
                inputs,
                combination,
                phi,
                mode,
                self.precision,
                save,
            ),
        }
    }
}

impl fmt::Display for SlaPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.engine {
            #[cfg(feature = "cuda")]
            SlaEngine::Wgmma(plan) => write!(f, "{}", plan.forward)?,
            SlaEngine::Tile => write!(f, "portable")?,
        }
        write_passed_over(f, &self.passed_over)
    }
}

/// How the backward of block-sparse attention is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackwardPlan {
    /// Hopper's warpgroup products and bulk copies.
    #[cfg(feature = "cuda")]
    Wgmma(cubesla_cuda::backward::WgmmaBackwardPlan),
    /// Tile programs of the portable kernels.
    Tile(attention::BackwardPlan),
}

impl BackwardPlan {
    /// The plan of the fastest engine that can run `problem`.
    ///
    /// # Errors
    /// [`ProblemError::NoPlan`] with every engine's reason, if none can.
    pub fn new(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Self, ProblemError> {
        Self::all(problem, device).map(|mut plans| plans.swap_remove(0))
    }

    /// A plan for every engine that can run `problem`, fastest first.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn all(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Vec<Self>, ProblemError> {
        let mut plans = Vec::new();
        #[cfg(feature = "cuda")]
        if let Ok(plan) = cubesla_cuda::backward::WgmmaBackwardPlan::new(problem, device) {
            plans.push(Self::Wgmma(plan));
        }
        match attention::BackwardPlan::all(problem, device) {
            Ok(portable) => plans.extend(portable.into_iter().map(Self::Tile)),
            Err(error) if plans.is_empty() => return Err(error),
            Err(_) => {}
        }
        Ok(plans)
    }

    /// Runs the plan; gradients in f32, or of an output gradient that bulk copies cannot read, fall
    /// back to the portable kernels. No gradient is computed if an argument is refused.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the argument at fault.
    pub fn launch(
        &self,
        client: &Client,
        problem: &AttentionProblem,
        inputs: BackwardInputs<'_>,
        outputs: BackwardOutputs<'_>,
    ) -> Result<(), ProblemError> {
        self.launch_weighted(client, problem, inputs, None, outputs)
    }

    /// The same with a weight for every block of the list, if there are `weights`, and where their
    /// gradients go: see [`launch_backward_weighted`](attention::launch_backward_weighted).
    ///
    /// # Errors
    /// A [`ProblemError`] that names the argument at fault.
    pub fn launch_weighted(
        &self,
        client: &Client,
        problem: &AttentionProblem,
        inputs: BackwardInputs<'_>,
        weights: Option<[&DeviceTensor<4>; 2]>,
        outputs: BackwardOutputs<'_>,
    ) -> Result<(), ProblemError> {
        use attention::launch_backward_weighted;
        match self {
            #[cfg(feature = "cuda")]
            Self::Wgmma(plan) => {
                use cubesla_cuda::backward::{WgmmaBackwardPlan, launch_backward_wgmma};
                attention::check_backward(client, problem, &inputs, &outputs)?;
                for weights in weights.into_iter().flatten() {
                    cubesla_kernels::block_list::expect_weights(problem, weights)?;
                }
                if WgmmaBackwardPlan::takes(&inputs, &outputs) {
                    return launch_backward_wgmma(client, problem, plan, inputs, weights, outputs);
                }
                let plan = attention::BackwardPlan::new(problem, client.properties())?;
                launch_backward_weighted(client, problem, &plan, inputs, weights, outputs)
            }
            Self::Tile(plan) => {
                launch_backward_weighted(client, problem, plan, inputs, weights, outputs)
            }
        }
    }

    /// Buffers for the gradients of the sparse branch: f32, but for those of `wgmma`, which writes the
    /// inputs' type where it can read the output's gradient.
    fn branch_gradients(
        &self,
        client: &Client,
        inputs: &BackwardInputs<'_>,
    ) -> Result<Gradients, ProblemError> {
        let dtype = match self {
            #[cfg(feature = "cuda")]
            Self::Wgmma(_) if inputs.grad_out.is_aligned() => inputs.q.dtype(),
            _ => DType::F32,
        };
        Gradients::empty(client, [inputs.q, inputs.k, inputs.v], dtype)
    }
}

impl fmt::Display for BackwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            #[cfg(feature = "cuda")]
            Self::Wgmma(plan) => write!(f, "{plan}"),
            Self::Tile(plan) => write!(f, "{plan}"),
        }
    }
}

/// How the backward of SLA and SLA2 is run, and of SLA2's first stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlaBackwardPlan {
    /// Of the sparse branch; the portable kernels of the linear branch choose their own tiles.
    pub sparse: BackwardPlan,
    /// Faster engines, and why they cannot run the problem.
    pub passed_over: Vec<(&'static str, &'static str)>,
}

impl SlaBackwardPlan {
    /// The plan of the fastest engine that can run `problem`.
    ///
    /// # Errors
    /// [`ProblemError::NoPlan`] with every engine's reason, if none can.
    pub fn new(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Self, ProblemError> {
        Self::all(problem, device).map(|mut plans| plans.swap_remove(0))
    }

    /// A plan for every engine that can run `problem`, fastest first: for comparing engines.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn all(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<Vec<Self>, ProblemError> {
        #[cfg(feature = "cuda")]
        let passed_over = cubesla_cuda::backward::WgmmaBackwardPlan::new(problem, device)
            .err()
            .map(|reason| vec![("wgmma", reason)])
            .unwrap_or_default();
        #[cfg(not(feature = "cuda"))]
        let passed_over = Vec::new();
        let plans = BackwardPlan::all(problem, device)?.into_iter();
        Ok(plans
            .map(|sparse| Self {
                sparse,
                passed_over: passed_over.clone(),
            })
            .collect())
    }

    /// Runs the plan. No result is returned if an argument is refused.
    ///
    /// Gradients of the sparse branch are f32, but for those of `wgmma`, which writes the inputs' type;
    /// for an output gradient that bulk copies cannot read it falls back to the portable kernels. The
    /// linear branch's are added in f32: the sum is rounded once, with `wgmma` one of its terms before.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the argument at fault.
    pub fn launch(
        &self,
        client: &Client,
        problem: &AttentionProblem,
        inputs: SlaInputs<'_>,
        given: SlaBackward<'_>,
    ) -> Result<SlaGradients, ProblemError> {
        let sparse_branch = |inputs: BackwardInputs<'_>| {
            let grads = self.sparse.branch_gradients(client, &inputs)?;
            self.sparse
                .launch(client, problem, inputs, grads.outputs())?;
            Ok(grads)
        };
        sla::sla_backward(client, problem, inputs, given, sparse_branch)
    }

    /// Runs the backward of [`ForwardPlan::launch_soft`], with types and sums as [`launch`](Self::launch)
    /// has them: the gradients, and that of the weights, f32 `[B, Hq, M, N]`.
    ///
    /// # Errors
    /// A [`ProblemError`] that names the argument at fault.
    pub fn launch_soft(
        &self,
        client: &Client,
        problem: &AttentionProblem,
        inputs: SoftInputs<'_>,
        phi: FeatureMap,
        saved: &SlaSaved,
        grad_out: &DeviceTensor<4>,
    ) -> Result<(SlaGradients, DeviceTensor<4>), ProblemError> {
        let weights = inputs.weights;
        let sparse_branch = |inputs: BackwardInputs<'_>, grad: &DeviceTensor<4>| {
            let grads = self.sparse.branch_gradients(client, &inputs)?;
            let weights = Some([weights, grad]);
            self.sparse
                .launch_weighted(client, problem, inputs, weights, grads.outputs())?;
            Ok(grads)
        };
        sla::soft_backward(client, problem, inputs, phi, saved, grad_out, sparse_branch)
    }
}

impl fmt::Display for SlaBackwardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.sparse)?;
        write_passed_over(f, &self.passed_over)
    }
}

/// The end of a printed plan: why faster engines were passed over, if any were.
fn write_passed_over(f: &mut fmt::Formatter<'_>, passed_over: &[(&str, &str)]) -> fmt::Result {
    if passed_over.is_empty() {
        return Ok(());
    }
    write!(f, " ({})", reasons(passed_over))
}

fn reasons(passed_over: &[(&str, &str)]) -> String {
    let reasons: Vec<String> = passed_over
        .iter()
        .map(|(name, reason)| format!("not {name}: {reason}"))
        .collect();
    reasons.join("; ")
}
