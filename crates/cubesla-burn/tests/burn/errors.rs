use burn_core::tensor::{DType, FloatDType, Tensor};
use cubesla_burn::{
    AttentionOptions, BlockList, Blocks, Causal, Error, F32Products, LowBitFormats, Precision,
    ProblemError, SlaOptions, try_block_sparse_attention, try_low_bit_attention, try_sla, try_sla2,
};

use crate::common::{device, heads, noise};

fn problem(error: Error) -> ProblemError {
    match error {
        Error::Library(cubesla::Error::Problem(problem)) => problem,
        other => panic!("{other}"),
    }
}

fn inputs() -> [Tensor<4>; 3] {
    let device = device();
    [1, 2, 3].map(|seed| heads([1, 2, 128, 32], seed, &device))
}

fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, list: [usize; 4]) -> Result<(), Error> {
    let list = BlockList::dense(list, &device());
    try_block_sparse_attention(q, k, v, &list, &AttentionOptions::default()).map(|_| ())
}

#[test]
fn attention_refuses_what_does_not_fit() {
    let [q, k, v] = inputs();
    let dense = [1, 2, 1, 2];
    let short = k.clone().slice([0..1, 0..2, 0..64, 0..32]);
    let error = attend(q.clone(), short, v.clone(), dense).unwrap_err();
    assert!(matches!(
        problem(error),
        ProblemError::ShapeMismatch { argument: "v", .. }
    ));
    let error = attend(q.clone(), k.clone(), v.clone(), [1, 2, 1, 3]).unwrap_err();
    assert!(matches!(
        problem(error),
        ProblemError::ListMismatch { axis: "N", .. }
    ));
    let narrow = |x: &Tensor<4>| x.clone().slice([0..1, 0..2, 0..128, 0..16]);
    let error = attend(narrow(&q), narrow(&k), narrow(&v), dense).unwrap_err();
    assert!(matches!(
        problem(error),
        ProblemError::HeadDim {
            argument: "q",
            dim: 16
        }
    ));
    if device().supports_dtype(DType::F16) {
        let half = k.clone().cast(FloatDType::F16);
        let error = attend(q, half, v, dense).unwrap_err();
        assert!(matches!(
            problem(error),
            ProblemError::DTypeMismatch { argument: "k", .. }
        ));
    }
}

#[test]
fn sla_refuses_masks_and_weights_of_other_shapes() {
    let [q, k, v] = inputs();
    let device = device();
    let blocks = Blocks {
        critical: BlockList::dense([1, 2, 1, 2], &device),
        negligible: None,
    };
    let mut options = SlaOptions::default();
    let alpha = noise([2, 3], 4, &device);
    let error = try_sla2(q.clone(), k.clone(), v.clone(), alpha, &blocks, &options).unwrap_err();
    assert!(matches!(
        problem(error),
        ProblemError::ShapeMismatch {
            argument: "alpha_logit",
            ..
        }
    ));
    let (weight, bias) = (noise([32, 32], 5, &device), noise([31], 6, &device));
    let run = (q.clone(), k.clone(), v.clone());
    let error = try_sla(run.0, run.1, run.2, weight, bias, &blocks, &options).unwrap_err();
    assert!(matches!(
        problem(error),
        ProblemError::ShapeMismatch {
            argument: "bias",
            ..
        }
    ));
    options.attention.causal = Causal::TopLeft;
    let alpha = noise([1, 1], 4, &device);
    let error = try_sla2(q, k, v, alpha, &blocks, &options).unwrap_err();
    assert!(matches!(problem(error), ProblemError::NotSupported { .. }));
}

#[test]
fn a_device_without_tf32_says_so_before_anything_is_launched() {
    let [q, k, v] = inputs();
    let device = device();
    let list = || BlockList::dense([1, 2, 1, 2], &device);
    let products = F32Products::Tf32;
    let attention = AttentionOptions {
        products,
        ..AttentionOptions::default()
    };
    let run = (q.clone(), k.clone(), v.clone());
    let attended = try_block_sparse_attention(run.0, run.1, run.2, &list(), &attention).map(|_| ());
    let blocks = Blocks {
        critical: list(),
        negligible: None,
    };
    let mut options = SlaOptions::default();
    options.attention.products = products;
    let alpha = noise([1, 1], 4, &device);
    let mixed = try_sla2(q, k, v, alpha, &blocks, &options).map(|_| ());
    for result in [attended, mixed] {
        // A device that has it runs both.
        let Err(error) = result else { continue };
        assert!(
            matches!(problem(error), ProblemError::NoPlan { reason, .. } if reason.contains("tf32"))
        );
    }
}

#[test]
fn low_bits_refuse_tf32_before_anything_is_launched() {
    let [q, k, v] = inputs();
    let device = device();
    let list = || BlockList::dense([1, 2, 1, 2], &device);
    let attention = AttentionOptions {
        products: F32Products::Tf32,
        ..AttentionOptions::default()
    };
    let run = (q.clone(), k.clone(), v.clone());
    let formats = LowBitFormats::default();
    let attended = try_low_bit_attention(run.0, run.1, run.2, &list(), &attention, formats);
    let blocks = Blocks {
        critical: list(),
        negligible: None,
    };
    let options = SlaOptions {
        attention,
        precision: Precision::Int8Fp8,
        ..SlaOptions::default()
    };
    let alpha = noise([1, 1], 4, &device);
    let mixed = try_sla2(q, k, v, alpha, &blocks, &options);
    for result in [attended.map(|_| ()), mixed.map(|_| ())] {
        let named = match problem(result.unwrap_err()) {
            ProblemError::NotSupported { what, .. } => what.contains("low-bit"),
            // A device without it has no full precision by tf32 either.
            ProblemError::NoPlan { reason, .. } => reason.contains("tf32"),
            _ => false,
        };
        assert!(named);
    }
}

#[test]
#[should_panic(expected = "block_sparse_attention: the block list has N = 3")]
fn shorthands_panic_with_the_error() {
    let [q, k, v] = inputs();
    let list = BlockList::dense([1, 2, 1, 3], &device());
    cubesla_burn::block_sparse_attention(q, k, v, &list, &AttentionOptions::default());
}

#[test]
fn lists_of_other_types_are_refused() {
    use burn_core::tensor::{Int, Shape};
    let device = device();
    let ints = |shape: Vec<usize>| Shape::from(shape);
    let indices = Tensor::<4, Int>::zeros(ints(vec![1, 2, 1, 1]), &device);
    let counts = Tensor::<3, Int>::zeros(ints(vec![1, 2, 2]), &device);
    // SAFETY: refused, and never read.
    let error = unsafe { BlockList::from_tensors(indices, counts, 2) }.unwrap_err();
    let wrong = matches!(
        error,
        Error::DType { .. }
            | Error::Library(cubesla::Error::Problem(ProblemError::ShapeMismatch { .. }))
    );
    assert!(wrong, "{error}");
}
