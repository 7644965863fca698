use std::fmt;

use cubecl::client::Client;
use cubecl::ir::DeviceProperties;
use cubesla_kernels::matmul::{self, MatmulProblem};
use cubesla_kernels::quantize::QuantizedTensor;
use cubesla_kernels::{DType, DeviceTensor, ProblemError};

use super::{runnable, write_passed_over};

/// How a product of low-bit matrices is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatmulPlan {
    /// The engine; tiles of the portable kernels are chosen when they are launched.
    pub engine: MatmulEngine,
    /// Faster engines, and why they cannot run the product.
    pub passed_over: Vec<(&'static str, &'static str)>,
}

/// An engine of the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatmulEngine {
    /// Hopper's warpgroup products and bulk copies.
    #[cfg(feature = "cuda")]
    Wgmma(cubesla_cuda::matmul::WgmmaMatmulPlan),
    /// The portable kernels.
    Portable,
}

type Candidate = fn(&MatmulProblem, &DeviceProperties) -> Result<MatmulEngine, &'static str>;

/// The engines, fastest first. The last one takes everything.
const ENGINES: &[(&str, Candidate)] = &[
    #[cfg(feature = "cuda")]
    ("wgmma", |problem, device| {
        cubesla_cuda::matmul::WgmmaMatmulPlan::new(problem, device).map(MatmulEngine::Wgmma)
    }),
    ("portable", |_, _| Ok(MatmulEngine::Portable)),
];

impl MatmulPlan {
    /// The plan for `problem` on a device.
    pub fn new(problem: &MatmulProblem, device: &DeviceProperties) -> Self {
        Self::all(problem, device).swap_remove(0)
    }

    /// A plan for every engine that can run `problem`, fastest first: for comparing engines.
    pub fn all(problem: &MatmulProblem, device: &DeviceProperties) -> Vec<Self> {
        let tried = ENGINES
            .iter()
            .map(|(name, try_new)| (*name, try_new(problem, device)));
        let engines = runnable(device, tried).expect("the last engine takes everything");
        let plan = |(engine, passed_over)| Self {
            engine,
            passed_over,
        };
        engines.into_iter().map(plan).collect()
    }

    /// Runs the plan; operands that its engine cannot multiply fall back to the portable kernels.
    /// Nothing is launched if an argument is refused.
    ///
    /// # Errors
    /// As for [`quantized_matmul`](crate::quantized_matmul).
    pub fn launch<const R: usize>(
        &self,
        client: &Client,
        x: &QuantizedTensor<R>,
        w: &QuantizedTensor<2>,
        bias: Option<&DeviceTensor<1>>,
        dtype: DType,
    ) -> Result<DeviceTensor<R>, ProblemError> {
        #[cfg(feature = "cuda")]
        if let MatmulEngine::Wgmma(plan) = &self.engine {
            use cubesla_cuda::matmul::{WgmmaMatmulPlan, launch_matmul_wgmma};
            let problem = MatmulProblem::new(x, w, bias, dtype);
            if WgmmaMatmulPlan::new(&problem, client.properties()) == Ok(*plan) {
                let out = matmul::quantized_out(client, x, w, bias, dtype)?;
                launch_matmul_wgmma(client, plan, x, w, bias, &out);
                return Ok(out);
            }
        }
        matmul::quantized_matmul(client, x, w, bias, dtype)
    }
}

impl fmt::Display for MatmulPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.engine {
            #[cfg(feature = "cuda")]
            MatmulEngine::Wgmma(plan) => write!(f, "{plan}")?,
            MatmulEngine::Portable => write!(f, "portable")?,
        }
        write_passed_over(f, &self.passed_over)
    }
}
