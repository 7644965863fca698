//! Which engine and tiles run a problem on a device.
//!
//! A plan is a pure function of the problem and the device's properties: the same question always
//! has the same answer, which can be printed, and needs no device to be asked. Engines are tried
//! from the fastest to the most portable; a plan keeps why the faster ones were passed over.
//!
//! What sizes cannot tell can be [measured](ForwardPlan::tuned) instead: see [`Choice`].

mod answers;
mod backward;
mod low_bit;
mod matmul;
mod sla;
mod tune;

pub use answers::CacheFault;
pub use backward::{BackwardPlan, SlaBackwardPlan};
pub use cubesla_kernels::attention::{ForwardInputs, ForwardOutputs};
pub use low_bit::{LowBitEngine, LowBitPlan};
pub use matmul::{MatmulEngine, MatmulPlan};
pub use sla::{SlaEngine, SlaPlan};
pub use tune::{Choice, cache_fault, choice, set_choice};

use std::fmt;

use cubecl::client::Client;
use cubecl::ir::DeviceProperties;
use cubesla_kernels::attention;
use cubesla_kernels::linear::FeatureMap;
use cubesla_kernels::sla::{SlaSaved, SoftInputs, soft_forward};
use cubesla_kernels::{AttentionProblem, DeviceTensor, ProblemError};

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
        let tried = FORWARD
            .iter()
            .map(|(name, try_new)| (*name, try_new(problem, device)));
        let engines = runnable(device, tried)?;
        let plan = |(engine, passed_over)| Self {
            engine,
            passed_over,
        };
        Ok(engines.into_iter().map(plan).collect())
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
        soft_forward(client, problem, inputs, phi, |inputs, outputs| {
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

/// The end of a printed plan: why faster engines were passed over, if any were.
fn write_passed_over(f: &mut fmt::Formatter<'_>, passed_over: &[(&str, &str)]) -> fmt::Result {
    if passed_over.is_empty() {
        return Ok(());
    }
    write!(f, " ({})", reasons(passed_over))
}

/// Engines, and why they cannot run a problem.
type PassedOver = Vec<(&'static str, &'static str)>;

/// Those of the `tried` engines that can run a problem, each with the ones before it that cannot.
///
/// # Errors
/// [`ProblemError::NoPlan`] with every engine's reason, if none can.
fn runnable<E>(
    device: &DeviceProperties,
    tried: impl Iterator<Item = (&'static str, Result<E, &'static str>)>,
) -> Result<Vec<(E, PassedOver)>, ProblemError> {
    let (mut engines, mut passed_over) = (Vec::new(), Vec::new());
    for (name, engine) in tried {
        match engine {
            Ok(engine) => engines.push((engine, passed_over.clone())),
            Err(reason) => passed_over.push((name, reason)),
        }
    }
    if engines.is_empty() {
        return Err(ProblemError::NoPlan {
            device: device.identity.name.clone(),
            reason: reasons(&passed_over),
        });
    }
    Ok(engines)
}

fn reasons(passed_over: &[(&str, &str)]) -> String {
    let reasons: Vec<String> = passed_over
        .iter()
        .map(|(name, reason)| format!("not {name}: {reason}"))
        .collect();
    reasons.join("; ")
}
