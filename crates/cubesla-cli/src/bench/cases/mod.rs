//! What is measured: one file for each operation.

mod backward;
mod inputs;
mod linear;
mod low_bit;
mod matmul;
mod route;
mod size;
mod sla;
mod sla_backward;
mod soft;
mod sparse;
mod top_k;

use std::time::Duration;

use cubesla::plan::ForwardPlan;
use cubesla::{Client, DType};

use crate::error::Error;
use inputs::{Qkv, copies};
pub use size::Scale;
use size::Size;

/// An operation at a size, not yet prepared.
pub struct Case {
    /// `operation/variant/size/type`, which peers' results share.
    pub name: String,
    /// Makes the inputs, on the host and on the device.
    pub prepare: Box<dyn Fn(&Client) -> Prepared>,
}

/// A case with its inputs in place, or why there is none.
pub type Prepared = Result<Box<dyn Work>, Error>;

/// A prepared case.
pub trait Work {
    /// Enqueues the call of that number; numbers take turns over copies of the inputs.
    fn call(&self, number: usize) -> Result<(), Error>;
    /// Calls once and compares a sample of the results with the f64 reference.
    fn check(&self) -> Result<Check, Error>;
    /// What a call takes.
    fn cost(&self) -> Cost;
    /// The plan that runs it, where the library tells.
    fn plan(&self) -> Option<String> {
        None
    }
    /// Times of its plans, the table's first, and the one that tuning chooses, where it can.
    fn tune(&self) -> Result<Option<Tuning>, Error> {
        Ok(None)
    }
}

/// Plans of a case with the time of a call, the table's first, and the chosen one.
pub struct Tuning {
    /// All that were measured.
    pub measured: Vec<(ForwardPlan, Duration)>,
    /// Chosen by measuring, now or earlier.
    pub chosen: ForwardPlan,
}

/// A sample of results against the reference.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Relative error of the sample.
    pub error: f64,
    /// The largest that is right.
    pub bound: f64,
}

impl Check {
    /// Whether the sample is right; a NaN is not.
    pub fn is_right(&self) -> bool {
        (0.0..=self.bound).contains(&self.error)
    }
}

/// What a call takes, by its formula: padding and recomputation are not counted.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Floating-point operations of the products.
    pub flops: f64,
    /// Of these, those of 8-bit products, which have twice the rate.
    pub low_bit_flops: f64,
    /// Those of dense attention at the same size, for what replaces it.
    pub dense_flops: Option<f64>,
    /// Inputs read once and outputs written once.
    pub bytes: f64,
    /// Element type of the inputs.
    pub dtype: DType,
}

/// Every case of the default sizes.
pub fn all(scale: Scale, dtype: Option<DType>) -> Vec<Case> {
    let mut cases = sparse::cases(scale, dtype);
    cases.extend(backward::cases(scale, dtype));
    cases.extend(soft::cases(scale, dtype));
    cases.extend(route::cases(scale, dtype));
    cases.extend(top_k::cases(scale));
    cases.extend(linear::cases(scale, dtype));
    cases.extend(low_bit::cases(scale, dtype));
    cases.extend(sla::cases(scale, dtype));
    cases.extend(sla_backward::cases(scale, dtype));
    cases.extend(matmul::cases(scale, dtype));
    cases
}

/// Cases that differ in one number, which a curve is drawn over.
pub struct Series {
    /// What is added to an implementation's name for its curve.
    pub label: &'static str,
    /// The number and its case.
    pub points: Vec<(f64, Case)>,
}

/// Sparse and dense attention over lengths.
pub fn by_length(scale: Scale, dtype: Option<DType>) -> Vec<Series> {
    let lengths = match scale {
        Scale::Large => [4096, 8192, 16384, 32768, 65536, 131_072],
        Scale::Small => [256, 512, 768, 1024, 1536, 2048],
    };
    let size = scale.sizes(dtype).0[0];
    let series = |(label, sparsity)| Series {
        label,
        points: lengths
            .map(|len| (len as f64, sparse::case(Size { len, ..size }, sparsity)))
            .into(),
    };
    [("95 %", 95), ("dense", 0)].map(series).into()
}

/// Attention over sparsities, in percent.
pub fn by_sparsity(scale: Scale, dtype: Option<DType>) -> Vec<Series> {
    let sparsities = match scale {
        Scale::Large => &[0, 25, 50, 75, 85, 90, 95, 97, 99][..],
        // A row has 16 blocks.
        Scale::Small => &[0, 25, 50, 75, 90],
    };
    let size = scale.sizes(dtype).0[0];
    let points = sparsities
        .iter()
        .map(|&sparsity| (sparsity as f64, sparse::case(size, sparsity)))
        .collect();
    vec![Series { label: "", points }]
}

/// The largest relative error that is right: twice that of an unfused computation of normals in the
/// same type.
fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 1e-3,
        DType::BF16 => 6e-3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEERS: &str = include_str!("../../../../../benches/peers/peers.py");

    fn names(scale: Scale, dtype: Option<DType>) -> Vec<String> {
        all(scale, dtype)
            .into_iter()
            .map(|case| case.name)
            .collect()
    }

    #[test]
    fn names_are_unique_and_say_all() {
        for scale in [Scale::Large, Scale::Small] {
            let names = names(scale, None);
            let mut unique = names.clone();
            unique.sort();
            unique.dedup();
            assert_eq!(unique.len(), names.len());
        }
        let large = names(Scale::Large, None);
        for name in [
            "sparse_forward/dense/b1h12l32760d128/bf16",
            "sparse_forward/97/b2h16l32760d128/bf16",
            "sparse_forward/95/b1h40l75600d128/bf16",
            "sparse_forward/95/b1h4l8192d128/f32",
            "sparse_forward/95-tf32/b1h4l8192d128/f32",
            "sparse_backward/95/b1h12l32760d128/bf16",
            "soft_backward/all/b2h16l32760d128/bf16",
            "route/95/b1h12l32760d64/bf16",
            "top_k/k35/r23640n1182/f32",
            "linear/softmax/b1h4l8192d128/f32",
            "low_bit_forward/int8-fp8/97/b1h12l32760d128/bf16",
            "sla2_forward/97-global-int8-fp8/b1h12l32760d128/bf16",
            "sla_forward/95-global/b1h12l32760d128/bf16",
            "sla2_forward/97-complement/b1h12l32760d128/bf16",
            "sla2_backward/95-global/b1h12l32760d128/bf16",
            "sla_backward/95-complement/b1h12l32760d128/bf16",
            "matmul/int8/m8192n8192k8192/bf16",
            "matmul/w4a16/m1n8192k8192/bf16",
        ] {
            assert!(large.iter().any(|n| n == name), "{name} in {large:?}");
        }
        assert!(names(Scale::Large, Some(DType::F16))[0].ends_with("/f16"));
    }

    #[test]
    fn peers_have_the_same_sizes() {
        let sizes = Scale::Large.sizes(Some(DType::BF16)).0;
        let sizes: Vec<String> = sizes
            .iter()
            .map(|size| {
                format!(
                    "({}, {}, {}, {})",
                    size.batch, size.heads, size.len, size.dim
                )
            })
            .collect();
        let line = format!("SIZES = [{}]\n", sizes.join(", "));
        assert!(PEERS.contains(&line), "{line}");
        let series = by_length(Scale::Large, None);
        let lengths: Vec<String> = series[0].points.iter().map(|p| p.0.to_string()).collect();
        let line = format!("SERIES_LENGTHS = [{}]\n", lengths.join(", "));
        assert!(PEERS.contains(&line), "{line}");
        for (variant, [m, n, k]) in matmul::LARGE {
            let line = format!("    (\"{variant}\", {m}, {n}, {k}),\n");
            assert!(PEERS.contains(&line), "{line}");
        }
    }
}
