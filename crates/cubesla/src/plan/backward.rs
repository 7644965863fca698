//! Plans of gradients.

use std::fmt;

use cubecl::client::Client;
use cubecl::ir::DeviceProperties;
use cubesla_kernels::attention::{self, BackwardInputs, BackwardOutputs};
use cubesla_kernels::linear::{FeatureMap, Gradients};
use cubesla_kernels::sla::{self, SlaBackward, SlaGradients, SlaInputs, SlaSaved, SoftInputs};
use cubesla_kernels::{AttentionProblem, DType, DeviceTensor, ProblemError};

use super::{PassedOver, write_passed_over};

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
        Self::considered(problem, device).map(|(plans, _)| plans)
    }

    /// The plans of [`all`](Self::all), and why other engines have none.
    fn considered(
        problem: &AttentionProblem,
        device: &DeviceProperties,
    ) -> Result<(Vec<Self>, PassedOver), ProblemError> {
        let mut plans = Vec::new();
        #[cfg_attr(
            not(feature = "cuda"),
            allow(unused_mut, reason = "only Hopper's may have none")
        )]
        let mut passed_over = Vec::new();
        #[cfg(feature = "cuda")]
        match cubesla_cuda::backward::WgmmaBackwardPlan::new(problem, device) {
            Ok(plan) => plans.push(Self::Wgmma(plan)),
            Err(reason) => passed_over.push(("wgmma", reason)),
        }
        match attention::BackwardPlan::all(problem, device) {
            Ok(portable) => plans.extend(portable.into_iter().map(Self::Tile)),
            Err(error) if plans.is_empty() => return Err(error),
            Err(_) => {}
        }
        Ok((plans, passed_over))
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

    /// Runs the plan for the sparse branch of SLA: gradients in f32, but for those of `wgmma`, which
    /// writes the inputs' type where it can read the output's gradient.
    fn launch_branch(
        &self,
        client: &Client,
        problem: &AttentionProblem,
        inputs: BackwardInputs<'_>,
        weights: Option<[&DeviceTensor<4>; 2]>,
    ) -> Result<Gradients, ProblemError> {
        let dtype = match self {
            #[cfg(feature = "cuda")]
            Self::Wgmma(_) if inputs.grad_out.is_aligned() => inputs.q.dtype(),
            _ => DType::F32,
        };
        let grads = Gradients::empty(client, [inputs.q, inputs.k, inputs.v], dtype)?;
        self.launch_weighted(client, problem, inputs, weights, grads.outputs())?;
        Ok(grads)
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
        let (plans, passed_over) = BackwardPlan::considered(problem, device)?;
        Ok(plans
            .into_iter()
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
        let sparse_branch =
            |inputs: BackwardInputs<'_>| self.sparse.launch_branch(client, problem, inputs, None);
        sla::sla_backward(client, problem, inputs, given, sparse_branch)
    }

    /// Runs the backward of [`ForwardPlan::launch_soft`](super::ForwardPlan::launch_soft), with types
    /// and sums as [`launch`](Self::launch) has them: the gradients, and that of the weights, f32
    /// `[B, Hq, M, N]`.
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
            let weights = Some([weights, grad]);
            self.sparse.launch_branch(client, problem, inputs, weights)
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
