//! Block-sparse attention in low bits.

use cubesla::{
    AttentionOptions, AttentionProblem, Causal, DType, LowBitFormats, LowBitScores, LowBitValues,
    ProblemError, download, low_bit_attention, plan::LowBitPlan,
};
use cubesla_kernels::attention::{ForwardInputs, ForwardOutputs};
use cubesla_reference::{attention, cosine, low_bit, relative_error, relative_l1};
use harness::case::{Inputs, Outputs, Poisoned, causal, wide};
use harness::low_bit::{FORMATS, reference_formats};
use harness::{AttentionCase, Lists, client, dtypes};
use proptest::prelude::*;

/// Runs the case with every engine that can, fastest first, into poisoned, guarded outputs.
fn run_all(
    case: &AttentionCase,
    inputs: &Inputs,
    formats: LowBitFormats,
) -> Vec<(LowBitPlan, Outputs)> {
    let client = client();
    let ([q, k, v], list) = case.upload_inputs(&client, inputs);
    let problem = AttentionProblem::new(&q, &k, &v, &case.options).unwrap();
    let run = |plan: LowBitPlan| {
        let out = Poisoned::new(&client, problem.out_shape(), case.dtype);
        let lse = Poisoned::new(&client, problem.lse_shape(), DType::F32);
        let inputs = ForwardInputs {
            q: &q,
            k: &k,
            v: &v,
            list: &list,
        };
        let outputs = ForwardOutputs {
            out: &out.tensor,
            lse: &lse.tensor,
        };
        plan.launch(&client, &problem, inputs, outputs).unwrap();
        let outputs = Outputs {
            out: out.read(&client),
            lse: lse.read(&client),
        };
        (plan, outputs)
    };
    let plans = LowBitPlan::all(&problem, client.properties(), formats).unwrap();
    plans.into_iter().map(run).collect()
}

/// Runs the case as planned by default.
fn run(case: &AttentionCase, inputs: &Inputs, formats: LowBitFormats) -> Outputs {
    run_all(case, inputs, formats).swap_remove(0).1
}

/// Twice with every engine, against the low-bit reference, which rounds a few codes the other way as
/// its mean key is f64; and by the low-bit error rule against exact attention. FP8 weights are compared
/// with the reference where one tile has all keys, as then both round relative to the same maximum.
/// Engines have the same codes and exact sums of their products in INT8, so their log-sum-exps differ
/// by f32 rounding only.
fn check(case: &AttentionCase) {
    let inputs = case.inputs();
    let ([q, k, v], weights) = case.reference_inputs(&inputs);
    let (scale, mask) = (case.scale(), causal(case.options.causal));
    let exact = attention::forward(&q, &k, &v, &weights, scale, mask);
    // Twice what rounding weights and outputs to 16 bits makes.
    let rounding = match case.dtype {
        DType::F32 => 0.0,
        DType::F16 => 1e-3,
        DType::BF16 => 6e-3,
    };
    for formats in FORMATS {
        let runs = run_all(case, &inputs, formats);
        let fp8 = formats.values == LowBitValues::Fp8;
        let fp8_scores = formats.scores == LowBitScores::Fp8;
        let low = reference_formats(formats);
        let low = low_bit::forward(&q, &k, &v, &weights, scale, mask, low);
        let again = run_all(case, &inputs, formats);
        for ((plan, found), (_, again)) in runs.iter().zip(again) {
            let what = format!("{formats:?} by {plan} in {case:?}");
            assert_eq!(found, &again, "two runs of {what}");
            let error = relative_error(&wide(&found.lse), low.lse.data());
            let bound = if fp8_scores { 1e-3 } else { 1e-4 };
            assert!(error <= bound, "lse {error:.2e}, {what}");
            let out = wide(&found.out);
            let bound = if fp8 && case.key_len > 8 { 0.04 } else { 1e-3 };
            let bound = if fp8_scores { bound + 4e-3 } else { bound };
            let error = relative_error(&out, low.out.data());
            assert!(error <= bound + rounding, "{error:.2e}, {what}");
            let exact = exact.out.data();
            if exact.iter().all(|&x| x == 0.0) {
                assert!(out.iter().all(|&x| x == 0.0), "{what}");
                continue;
            }
            let (cosine, l1) = (cosine(&out, exact), relative_l1(&out, exact));
            let (least, most) = error_rule(formats);
            assert!(cosine >= least && l1 <= most, "{cosine} {l1}, {what}");
        }
        if let [(_, fast), (_, portable)] = &runs[..]
            && !fp8_scores
        {
            let error = relative_error(&wide(&fast.lse), &wide(&portable.lse));
            assert!(
                error <= 2e-6,
                "lse of two engines {error:.2e}, {formats:?} in {case:?}"
            );
        }
    }
}

/// The least cosine and the most relative L1 on unit normals. Scores in FP8 lose more than the error
/// rule of low bits allows.
fn error_rule(formats: LowBitFormats) -> (f64, f64) {
    match formats.scores {
        LowBitScores::Int8 => (0.999, 0.05),
        LowBitScores::Fp8 => (0.997, 0.08),
    }
}

#[test]
fn small_and_irregular() {
    for dtype in dtypes(&client()) {
        check(&AttentionCase {
            dtype,
            ..AttentionCase::default()
        });
    }
}

#[test]
fn lists_of_every_kind() {
    for lists in [
        Lists::Dense,
        Lists::TopK(1),
        Lists::Random(0.3),
        Lists::Empty,
    ] {
        check(&AttentionCase {
            lists,
            ..AttentionCase::default()
        });
    }
}

#[test]
fn few_keys() {
    for key_len in [1, 5, 8] {
        check(&AttentionCase {
            key_len,
            lists: Lists::Dense,
            ..AttentionCase::default()
        });
    }
}

#[test]
fn wide_and_different_heads() {
    for (head_dim, value_dim) in [(64, 40), (128, 128)] {
        check(&AttentionCase {
            head_dim,
            value_dim,
            ..AttentionCase::default()
        });
    }
}

/// Shapes of Hopper's engine, and one of 16 keys, which it takes with 16-bit values only.
#[test]
fn blocks_of_128_and_64() {
    let types = dtypes(&client());
    for (dtype, dims, block_q, block_k, lists, causal) in [
        (
            DType::F16,
            [64, 64],
            128,
            64,
            Lists::Random(0.4),
            Causal::None,
        ),
        (
            DType::BF16,
            [128, 128],
            128,
            64,
            Lists::Random(0.4),
            Causal::None,
        ),
        (
            DType::F16,
            [128, 128],
            128,
            64,
            Lists::Dense,
            Causal::BottomRight,
        ),
        (
            DType::BF16,
            [64, 128],
            64,
            128,
            Lists::TopK(2),
            Causal::TopLeft,
        ),
        (
            DType::F16,
            [96, 40],
            64,
            32,
            Lists::Random(0.3),
            Causal::None,
        ),
        (
            DType::BF16,
            [48, 72],
            128,
            16,
            Lists::Random(0.3),
            Causal::None,
        ),
    ] {
        if !types.contains(&dtype) {
            continue;
        }
        check(&AttentionCase {
            batch: 2,
            query_heads: 4,
            kv_heads: 2,
            query_len: 300,
            key_len: 421,
            head_dim: dims[0],
            value_dim: dims[1],
            dtype,
            options: AttentionOptions {
                block_q,
                block_k,
                causal,
                ..AttentionOptions::default()
            },
            lists,
            ..AttentionCase::default()
        });
    }
}

#[test]
fn strided_inputs_of_several_batches() {
    check(&AttentionCase {
        batch: 2,
        query_heads: 4,
        kv_heads: 2,
        strided: true,
        ..AttentionCase::default()
    });
}

#[test]
fn causal_masks() {
    for causal in [Causal::TopLeft, Causal::BottomRight] {
        check(&AttentionCase {
            options: AttentionOptions {
                causal,
                ..AttentionCase::default().options
            },
            lists: Lists::Dense,
            ..AttentionCase::default()
        });
    }
}

/// Without smoothing, keys far from zero would leave nothing of their differences in 8 bits. Of many keys a
/// sample's mean is taken from them.
#[test]
fn keys_far_from_zero() {
    let few = AttentionCase {
        lists: Lists::Dense,
        ..AttentionCase::default()
    };
    let many = AttentionCase {
        query_len: 100,
        key_len: 4500,
        head_dim: 64,
        value_dim: 64,
        options: AttentionOptions::default(),
        ..few
    };
    let halves = AttentionCase {
        dtype: DType::F16,
        ..many
    };
    let types = dtypes(&client());
    for case in [few, many, halves] {
        if types.contains(&case.dtype) {
            check_far_from_zero(&case);
        }
    }
}

fn check_far_from_zero(case: &AttentionCase) {
    let mut inputs = case.inputs();
    inputs.k.iter_mut().for_each(|x| *x += 30.0);
    let ([q, k, v], weights) = case.reference_inputs(&inputs);
    let exact = attention::forward(&q, &k, &v, &weights, case.scale(), attention::Causal::None);
    let found = run(case, &inputs, LowBitFormats::default());
    let error = relative_error(&wide(&found.out), exact.out.data());
    assert!(error <= 0.03, "{error} of {case:?}");
    let error = relative_error(&wide(&found.lse), exact.lse.data());
    assert!(error <= 1e-3, "{error} of {case:?}");
}

/// What is not finite spoils what the documentation says, and nothing else, with every engine.
#[test]
fn nan_and_infinities() {
    let small = AttentionCase {
        lists: Lists::Dense,
        ..AttentionCase::default()
    };
    let hopper = AttentionCase {
        query_len: 200,
        head_dim: 64,
        value_dim: 64,
        dtype: DType::F16,
        options: AttentionOptions::default(),
        ..small
    };
    let types = dtypes(&client());
    for case in [small, hopper] {
        if types.contains(&case.dtype) {
            check_not_finite(&case);
        }
    }
}

fn check_not_finite(case: &AttentionCase) {
    let clean = case.inputs();
    let (len, dim) = (case.query_len, case.head_dim);
    let block = case.options.block_q;
    for formats in FORMATS {
        let with = |change: &dyn Fn(&mut Inputs), check: &dyn Fn(usize, f32)| {
            let mut inputs = clean.clone();
            change(&mut inputs);
            for (_, outputs) in run_all(case, &inputs, formats) {
                let found = outputs.out.iter().enumerate();
                found.for_each(|(at, &x)| check(at, x));
            }
        };
        // The block of row 40 of the first head.
        let spoiled = 40 / block * block..(40 / block + 1) * block;
        with(&|inputs| inputs.q[40 * dim] = f32::NAN, &|at, x| {
            assert_eq!(x.is_nan(), spoiled.contains(&(at / dim)), "{at}");
        });
        with(&|inputs| inputs.q[40 * dim] = f32::INFINITY, &|at, x| {
            assert!(x.is_finite(), "{at}");
        });
        with(&|inputs| inputs.k[5] = f32::NAN, &|at, x| {
            assert!(x.is_nan(), "{at}");
        });
        with(&|inputs| inputs.v[7 * dim + 3] = f32::NAN, &|at, x| {
            assert_eq!(x.is_nan(), at % dim == 3, "{at} of {len}");
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn any_lengths(query_len in 1..150usize, key_len in 1..150usize, seed in any::<u64>()) {
        check(&AttentionCase { query_len, key_len, seed, ..AttentionCase::default() });
    }
}

#[test]
fn the_call_allocates_its_outputs_and_refuses_other_lists() {
    let client = client();
    let case = AttentionCase::default();
    let inputs = case.inputs();
    let ([q, k, v], list) = case.upload_inputs(&client, &inputs);
    let formats = FORMATS[1];
    let output = low_bit_attention(&client, &q, &k, &v, &list, &case.options, formats).unwrap();
    let expected = run(&case, &inputs, formats);
    assert_eq!(download(&client, &output.out).unwrap(), expected.out);
    let options = AttentionOptions {
        block_k: 16,
        ..case.options
    };
    let refused = low_bit_attention(&client, &q, &k, &v, &list, &options, formats);
    assert!(matches!(
        refused,
        Err(cubesla::Error::Problem(ProblemError::ListMismatch { .. }))
    ));
}
