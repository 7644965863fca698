//! Plans of attention in low bits.

use std::fmt;

use cubecl::client::Client;
use cubecl::ir::DeviceProperties;
use cubesla_kernels::attention::{self, ForwardInputs, ForwardOutputs, LowBitFormats};
use cubesla_kernels::{AttentionProblem, ProblemError};

use super::{runnable, write_passed_over};

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
    /// The portable kernel, on warp-level tensor cores or without any.
    Tile(attention::LowBitPlan),
}

type Candidate =
    fn(&AttentionProblem, &DeviceProperties, LowBitFormats) -> Result<LowBitEngine, &'static str>;

/// Engines by name, fastest first.
const ENGINES: &[(&str, Candidate)] = &[
    #[cfg(feature = "cuda")]
    ("wgmma", |problem, device, formats| {
        cubesla_cuda::low_bit::WgmmaLowBitPlan::new(problem, device, formats)
            .map(LowBitEngine::Wgmma)
    }),
    ("mma", |problem, device, formats| {
        attention::LowBitPlan::mma(problem, device, formats).map(LowBitEngine::Tile)
    }),
    ("simt", |problem, device, formats| {
        attention::LowBitPlan::simt(problem, device, formats).map(LowBitEngine::Tile)
    }),
];

impl LowBitPlan {
    /// The plan for `problem` on a device.
    ///
    /// # Errors
    /// [`ProblemError::NoPlan`] with every engine's reason, if none can run the problem.
    pub fn new(
        problem: &AttentionProblem,
        device: &DeviceProperties,
        formats: LowBitFormats,
    ) -> Result<Self, ProblemError> {
        Self::all(problem, device, formats).map(|mut plans| plans.swap_remove(0))
    }

    /// A plan for every engine that can run `problem`, fastest first: for comparing engines.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn all(
        problem: &AttentionProblem,
        device: &DeviceProperties,
        formats: LowBitFormats,
    ) -> Result<Vec<Self>, ProblemError> {
        attention::expect_low_bit(problem)?;
        let tried = ENGINES
            .iter()
            .map(|(name, try_new)| (*name, try_new(problem, device, formats)));
        let engines = runnable(device, tried)?;
        let plan = |(engine, passed_over)| Self {
            engine,
            formats,
            passed_over,
        };
        Ok(engines.into_iter().map(plan).collect())
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
            LowBitEngine::Tile(plan) => {
                attention::launch_low_bit(client, problem, plan, inputs, outputs, self.formats)
            }
        }
    }
}

impl fmt::Display for LowBitPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.engine {
            #[cfg(feature = "cuda")]
            LowBitEngine::Wgmma(plan) => write!(f, "{plan}")?,
            LowBitEngine::Tile(plan) => write!(f, "{plan}")?,
        }
        write_passed_over(f, &self.passed_over)
    }
}
