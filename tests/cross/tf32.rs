//! Products of f32 by tf32, on request: against the reference on devices that have them, refused on
//! others.

use cubesla::plan::{BackwardPlan, ForwardEngine, ForwardPlan, SlaBackwardPlan};
use cubesla::{
    AttentionOptions, AttentionProblem, Causal, Client, DType, Error, F32Products, FeatureMap,
    LinearMode, LowBitFormats, LowBitScores, LowBitValues, ProblemError, SlaInputs,
    block_sparse_attention, low_bit_attention, upload,
};
use cubesla_kernels::{FactorType, attention};
use cubesla_reference::relative_error;
use harness::case::{Inputs, blocks, causal_cases, wide};
use harness::sla::Combine;
use harness::soft::SoftCase;
use harness::{AttentionCase, Lists, Rng, SlaCase, client, rounded};

/// `case` by tf32.
fn by_tf32(case: AttentionCase) -> AttentionCase {
    AttentionCase {
        dtype: DType::F32,
        options: AttentionOptions {
            products: F32Products::Tf32,
            ..case.options
        },
        ..case
    }
}

fn sla_by_tf32(case: SlaCase) -> SlaCase {
    SlaCase {
        attention: by_tf32(case.attention),
        ..case
    }
}

fn problem(case: &AttentionCase) -> AttentionProblem {
    let (q, k, v) = (case.q_shape(), case.k_shape(), case.v_shape());
    AttentionProblem::from_shapes(q, k, v, case.dtype, &case.options).expect("a valid case")
}

/// The device, if it multiplies by tf32; one that does not has to say so.
fn tensor_cores() -> Option<Client> {
    let client = client();
    let case = by_tf32(AttentionCase::default());
    if problem(&case).expect_products(client.properties()).is_ok() {
        return Some(client);
    }
    let inputs = case.inputs();
    let ([q, k, v], list) = case.upload_inputs(&client, &inputs);
    let refusal = block_sparse_attention(&client, &q, &k, &v, &list, &case.options).unwrap_err();
    assert_is_refused(refusal);
    None
}

/// `refusal` is a plan's, for want of tf32.
fn assert_is_refused(refusal: Error) {
    assert!(
        matches!(&refusal, Error::Problem(ProblemError::NoPlan { reason, .. })
            if reason.contains("no 16x8x8 product of tf32") && reason.contains("tf32 was asked for")),
        "{refusal}"
    );
}

fn check(case: AttentionCase) {
    if let Some(client) = tensor_cores() {
        by_tf32(case).check(&client);
    }
}

#[test]
fn every_width() {
    for (head_dim, value_dim) in [
        (32, 32),
        (40, 40),
        (64, 64),
        (72, 160),
        (128, 128),
        (256, 32),
        (256, 256),
    ] {
        check(AttentionCase {
            head_dim,
            value_dim,
            query_len: 70,
            key_len: 150,
            ..AttentionCase::default()
        });
    }
}

#[test]
fn lists_blocks_and_lengths() {
    check(AttentionCase::default());
    for lists in [Lists::Dense, Lists::TopK(1)] {
        check(AttentionCase {
            lists,
            ..AttentionCase::default()
        });
    }
    for (block_q, block_k) in [(16, 16), (48, 80), (128, 64), (64, 128)] {
        check(AttentionCase {
            query_len: 300,
            key_len: 270,
            options: blocks(block_q, block_k),
            ..AttentionCase::default()
        });
    }
    for (query_len, key_len) in [(1, 1), (63, 1), (1, 63), (64, 64), (65, 129)] {
        check(AttentionCase {
            query_len,
            key_len,
            lists: Lists::Dense,
            ..AttentionCase::default()
        });
    }
}

#[test]
fn causal_masks() {
    causal_cases().into_iter().for_each(check);
}

#[test]
fn grouped_heads_and_strides() {
    for (query_heads, kv_heads) in [(4, 2), (6, 1), (3, 3)] {
        for strided in [false, true] {
            check(AttentionCase {
                batch: 2,
                query_heads,
                kv_heads,
                strided,
                ..AttentionCase::default()
            });
        }
    }
}

#[test]
fn long_rows_of_wide_heads() {
    // Several times around the ring of stages.
    for dim in [64, 128] {
        check(AttentionCase {
            query_len: 256,
            key_len: 1024,
            head_dim: dim,
            value_dim: dim,
            options: blocks(128, 64),
            ..AttentionCase::default()
        });
    }
}

#[test]
fn every_candidate_is_right() {
    let Some(client) = tensor_cores() else {
        return;
    };
    let case = by_tf32(AttentionCase {
        query_len: 200,
        key_len: 300,
        head_dim: 64,
        value_dim: 72,
        options: blocks(128, 64),
        ..AttentionCase::default()
    });
    let inputs = case.inputs();
    let outputs = case.run_plans(&client, &inputs, |problem, _| {
        ForwardPlan::candidates(problem, client.properties()).expect("a plan")
    });
    assert!(outputs.len() > 1, "{outputs:?}");
    case.check_all(&inputs, outputs);
}

#[test]
fn two_runs_are_bit_equal() {
    let Some(client) = tensor_cores() else {
        return;
    };
    let case = by_tf32(AttentionCase::default());
    let (inputs, grad_out) = (case.inputs(), case.grad_out());
    assert_eq!(case.run(&client, &inputs), case.run(&client, &inputs));
    let run = || case.run_backward(&client, &inputs, &grad_out);
    assert!(run() == run(), "{case:?}");
}

/// Every query sees the only key, so that the output is the factor that its value became, bit by bit.
#[test]
fn factors_are_rounded_to_the_nearest() {
    let Some(client) = tensor_cores() else {
        return;
    };
    let case = by_tf32(AttentionCase {
        key_len: 1,
        lists: Lists::Dense,
        ..AttentionCase::default()
    });
    let mut inputs = case.inputs();
    let half = 2f32.powi(-11);
    let ties = [
        1.0 + half,
        1.0 + 3.0 * half,
        -1.0 - half,
        f32::from_bits((1.0 + half).to_bits() - 1),
        f32::from_bits((1.0 + half).to_bits() + 1),
        2.0 - f32::EPSILON,
        1.5e30,
        -3e-30,
    ];
    inputs.v[..ties.len()].copy_from_slice(&ties);
    let found = case.run(&client, &inputs);
    let as_factors = |x: &[f32]| -> Vec<f32> {
        let rounded = x.iter().map(|&x| rounded(x, FactorType::Tf32));
        rounded.collect()
    };
    let value = as_factors(&inputs.v);
    for (row, out) in found.out.chunks(case.value_dim).enumerate() {
        assert_eq!(out, value, "row {row}");
    }
    // A log-sum-exp is the only score, of factors rounded likewise and summed in f32.
    let key = as_factors(&inputs.k);
    let score = |query: &[f32]| {
        let pairs = query.iter().zip(&key);
        let products = pairs.map(|(&x, &y)| f64::from(x) * f64::from(y));
        case.scale() * products.sum::<f64>()
    };
    let scores: Vec<f64> = as_factors(&inputs.q)
        .chunks(case.head_dim)
        .map(score)
        .collect();
    let error = relative_error(&wide(&found.lse), &scores);
    assert!(error < 1e-5, "{error:.2e}");
}

#[test]
fn what_is_not_a_number_spoils_the_rows_that_see_it() {
    let Some(client) = tensor_cores() else {
        return;
    };
    let case = by_tf32(AttentionCase {
        lists: Lists::Dense,
        ..AttentionCase::default()
    });
    let spoilt = |change: fn(&mut Inputs)| {
        let mut inputs = case.inputs();
        change(&mut inputs);
        let out = case.run(&client, &inputs).out;
        let rows = out.chunks(case.value_dim);
        rows.filter(|row| row.iter().any(|x| x.is_nan())).count()
    };
    let rows = case.query_heads * case.query_len;
    assert_eq!(spoilt(|inputs| inputs.q[40] = f32::NAN), 1);
    assert_eq!(spoilt(|inputs| inputs.k[40] = f32::NAN), rows);
    assert_eq!(spoilt(|inputs| inputs.v[40] = f32::NAN), rows);
}

#[test]
fn gradients() {
    let Some(client) = tensor_cores() else {
        return;
    };
    let base = AttentionCase::default();
    let mut cases = vec![
        base,
        AttentionCase {
            lists: Lists::Dense,
            query_heads: 4,
            kv_heads: 2,
            strided: true,
            ..base
        },
        AttentionCase {
            lists: Lists::Dense,
            options: AttentionOptions {
                causal: Causal::BottomRight,
                ..blocks(48, 80)
            },
            ..base
        },
    ];
    for (head_dim, value_dim) in [(40, 72), (64, 64), (72, 160), (128, 128)] {
        cases.push(AttentionCase {
            head_dim,
            value_dim,
            query_len: 150,
            key_len: 170,
            options: blocks(128, 64),
            ..base
        });
    }
    for case in cases {
        by_tf32(case).check_backward(&client);
    }
}

#[test]
fn soft_attention_and_its_gradients() {
    let Some(client) = tensor_cores() else {
        return;
    };
    for dim in [32, 64, 128] {
        let case = by_tf32(AttentionCase {
            head_dim: dim,
            value_dim: dim,
            ..AttentionCase::default()
        });
        let mut rng = Rng::new(7);
        let count = case.list_shape().iter().product();
        let weights: Vec<f32> = (0..count).map(|_| rng.uniform() as f32).collect();
        case.check_soft(&client, &weights);
    }
}

fn sla_cases() -> Vec<SlaCase> {
    let mut cases = Vec::new();
    for combine in [Combine::Sla, Combine::LogitPerBlock] {
        for phi in FeatureMap::ALL {
            let case = SlaCase {
                phi,
                combine,
                ..SlaCase::default()
            };
            cases.extend(case.forms());
        }
        for (head_dim, value_dim) in [(64, 64), (72, 40), (128, 128)] {
            for linear in [LinearMode::Complement, LinearMode::Global] {
                cases.push(SlaCase {
                    attention: AttentionCase {
                        head_dim,
                        // SLA projects values to their own width.
                        value_dim,
                        query_len: 150,
                        key_len: 300,
                        lists: Lists::TopK(2),
                        options: blocks(128, 64),
                        ..AttentionCase::default()
                    },
                    linear,
                    combine,
                    ..SlaCase::default()
                });
            }
        }
    }
    cases.into_iter().map(sla_by_tf32).collect()
}

#[test]
fn sla() {
    let Some(client) = tensor_cores() else {
        return;
    };
    for case in sla_cases() {
        case.check(&client);
    }
}

#[test]
fn gradients_of_sla() {
    let Some(client) = tensor_cores() else {
        return;
    };
    for case in sla_cases() {
        case.check_backward(&client);
    }
}

#[test]
fn soft_masks() {
    let Some(client) = tensor_cores() else {
        return;
    };
    for dim in [32, 64, 128] {
        let attention = AttentionCase {
            head_dim: dim,
            value_dim: dim,
            query_len: 150,
            key_len: 300,
            options: blocks(128, 64),
            ..AttentionCase::default()
        };
        let case = SlaCase {
            attention,
            ..SlaCase::default()
        };
        SoftCase(sla_by_tf32(case)).check(&client);
    }
}

#[test]
fn every_operation_is_refused_where_there_is_none() {
    if tensor_cores().is_some() {
        return;
    }
    let client = client();
    let case = by_tf32(AttentionCase::default());
    let (device, problem) = (client.properties(), problem(&case));
    for refusal in [
        ForwardPlan::new(&problem, device).map(|_| ()),
        BackwardPlan::new(&problem, device).map(|_| ()),
        SlaBackwardPlan::new(&problem, device).map(|_| ()),
    ] {
        assert_is_refused(refusal.unwrap_err().into());
    }
    let inputs = case.inputs();
    let ([q, k, v], list) = case.upload_inputs(&client, &inputs);
    let logits = upload(&client, &[0.0], [1, 1], DType::F32).unwrap();
    let refusal = cubesla_kernels::sla::check_sla(
        &client,
        &problem,
        &SlaInputs {
            q: &q,
            k: &k,
            v: &v,
            critical: &list,
            negligible: None,
        },
        &cubesla_kernels::sla::Combination::Sla2 {
            alpha_logit: &logits,
        },
    );
    assert_is_refused(refusal.unwrap_err().into());
}

#[test]
fn inputs_of_16_bits_are_refused() {
    let case = AttentionCase {
        dtype: DType::F16,
        ..by_tf32(AttentionCase::default())
    };
    let (q, k, v) = (case.q_shape(), case.k_shape(), case.v_shape());
    let refusal = AttentionProblem::from_shapes(q, k, v, case.dtype, &case.options).unwrap_err();
    assert!(
        matches!(&refusal, ProblemError::NotSupported { what, .. }
            if what == "F32Products::Tf32 with f16 inputs"),
        "{refusal}"
    );
}

#[test]
fn low_bits_are_refused() {
    let client = client();
    let case = by_tf32(AttentionCase::default());
    let inputs = case.inputs();
    let ([q, k, v], list) = case.upload_inputs(&client, &inputs);
    let formats = LowBitFormats {
        scores: LowBitScores::Int8,
        values: LowBitValues::Full,
    };
    let call = low_bit_attention(&client, &q, &k, &v, &list, &case.options, formats);
    let refusal = call.unwrap_err();
    assert!(
        matches!(&refusal, Error::Problem(ProblemError::NotSupported { what, .. })
            if what == "F32Products::Tf32 in low-bit attention"),
        "{refusal}"
    );
}

#[test]
fn f32_is_not_rounded_without_being_asked() {
    let client = client();
    let plans = |case: &AttentionCase| ForwardPlan::all(&problem(case), client.properties());
    let rounds = |plan: &ForwardPlan| {
        matches!(
            plan.engine,
            ForwardEngine::Tile(attention::ForwardPlan::MmaTf32(_))
        )
    };
    let case = AttentionCase::default();
    assert!(!plans(&case).unwrap().iter().any(rounds));
    if let Ok(plans) = plans(&by_tf32(case)) {
        assert!(plans.iter().all(rounds), "{plans:?}");
        assert!(
            plans[0].to_string().starts_with("mma tf32 "),
            "{}",
            plans[0]
        );
    }
}
