//! Plans of the forward of SLA and SLA2.

use std::fmt;

use cubecl::client::Client;
use cubecl::ir::DeviceProperties;
use cubesla_kernels::linear::FeatureMap;
use cubesla_kernels::sla::{self, Combination, LinearMode, Precision, SlaInputs, SlaOutput};
use cubesla_kernels::{AttentionProblem, F32Products, ProblemError};

use super::write_passed_over;

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
    /// The portable kernels, and how they multiply f32 inputs.
    Tile(F32Products),
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
                Err(reason) => (SlaEngine::Tile(problem.products()), vec![("wgmma", reason)]),
            }
        };
        #[cfg(not(feature = "cuda"))]
        let (engine, passed_over) = (SlaEngine::Tile(problem.products()), Vec::new());
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
            SlaEngine::Tile(_) => sla::sla_forward(
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
            SlaEngine::Tile(F32Products::F32) => write!(f, "portable")?,
            SlaEngine::Tile(F32Products::Tf32) => write!(f, "portable tf32")?,
        }
        write_passed_over(f, &self.passed_over)
    }
}
