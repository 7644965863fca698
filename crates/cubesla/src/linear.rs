//! Linear attention on its own.

use cubecl::client::Client;
use cubesla_kernels::DeviceTensor;
use cubesla_kernels::linear::{self, FeatureMap};
#[cfg(feature = "cuda")]
use cubesla_kernels::{AttentionOptions, AttentionProblem};

use crate::Error;

/// Linear attention: `O_i = phi(Q_i) H / (phi(Q_i) . Z)` with `H = sum_j phi(K_j)^T V_j` and
/// `Z = sum_j phi(K_j)`, over all keys or, `causal`, over those up to `i`.
///
/// | argument | shape | type |
/// |---|---|---|
/// | `q` | `[B, Hq, Lq, D]`, any strides | f32, f16 or bf16 |
/// | `k` | `[B, Hkv, Lk, D]`, any strides | as `q` |
/// | `v` | `[B, Hkv, Lk, Dv]`, any strides | as `q` |
///
/// Returns `[B, Hq, Lq, Dv]`, contiguous, in the inputs' type; sums are f32. `D` and `Dv` go from 32
/// to 256 in steps of 8. A row whose denominator is 0 is 0.
///
/// Source: SLA (arXiv 2509.24006) section 3.2, after Katharopoulos et al. (arXiv 2006.16236); the
/// reference is `cubesla_reference::linear::forward`.
///
/// # Errors
/// [`Error::Problem`] if an argument is refused, different lengths in the causal form among them;
/// nothing is launched then. A device that fails says so when results are read.
pub fn linear_attention(
    client: &Client,
    q: &DeviceTensor<4>,
    k: &DeviceTensor<4>,
    v: &DeviceTensor<4>,
    phi: FeatureMap,
    causal: bool,
) -> Result<DeviceTensor<4>, Error> {
    #[cfg(feature = "cuda")]
    if !causal {
        let problem = AttentionProblem::new(q, k, v, &AttentionOptions::default())?;
        if cubesla_cuda::linear::supports(&problem, client.properties()).is_ok() {
            let tensors = [q, k, v];
            return Ok(cubesla_cuda::linear::launch_linear_wgmma(
                client, &problem, tensors, phi,
            )?);
        }
    }
    Ok(linear::linear_attention(client, q, k, v, phi, causal)?)
}
