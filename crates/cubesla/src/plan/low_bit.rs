//! Plans of attention in low bits.

use std::fmt;

use cubecl::client::Client;
use cubecl::ir::DeviceProperties;
use cubesla_kernels::attention::{self, ForwardInputs, ForwardOutputs, LowBitFormats};
use cubesla_kernels::{AttentionProblem, ProblemError};

use super::write_passed_over;

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
