//! SLA and SLA2, backward.

use cubesla::{
    AttentionOptions, Causal, DType, DeviceTensor, Error, FeatureMap, HostBlockList, LinearMode,
    Precision, SlaBackwardOptions, SlaInputs, SlaSaved, sla2_backward, upload,
};
use harness::sla::Combine;
use harness::{AttentionCase, Lists, SlaCase, client, dtypes};
use proptest::prelude::*;

/// Checks `case` in every type that the device has.
fn check(case: SlaCase) {
    let client = client();
    for dtype in dtypes(&client) {
        case.with_dtype(dtype).check_backward(&client);
    }
}

/// Few enough blocks for their part of the sums to be subtracted.
fn few(key_len: usize) -> AttentionCase {
    AttentionCase {
        key_len,
        lists: Lists::TopK(2),
        ..AttentionCase::default()
    }
}

#[test]
fn every_feature_map_in_every_form() {
    for phi in FeatureMap::ALL {
        for combine in [Combine::Sla, Combine::LogitPerBlock] {
            let case = SlaCase {
                phi,
                combine,
                ..SlaCase::default()
            };
            case.forms().into_iter().for_each(check);
        }
    }
}

#[test]
fn negligible_blocks() {
    for combine in [Combine::Sla, Combine::LogitPerHead] {
        for linear in [LinearMode::Complement, LinearMode::Global] {
            for (attention, negligible) in [
                (AttentionCase::default(), 0.5),
                (few(900), 0.1),
                (few(300), 0.0),
                (few(300), 1.0),
            ] {
                check(SlaCase {
                    attention,
                    negligible: Some(negligible),
                    linear,
                    combine,
                    ..SlaCase::default()
                });
            }
        }
    }
}

#[test]
fn logits_are_broadcast() {
    for combine in [
        Combine::OneLogit,
        Combine::LogitPerHead,
        Combine::LogitPerBlock,
    ] {
        check(SlaCase {
            attention: AttentionCase {
                batch: 2,
                query_heads: 4,
                kv_heads: 2,
                ..AttentionCase::default()
            },
            combine,
            ..SlaCase::default()
        });
    }
}

#[test]
fn one_block_all_blocks_and_none() {
    for lists in [Lists::TopK(1), Lists::Dense, Lists::Empty] {
        for combine in [Combine::Sla, Combine::LogitPerBlock] {
            check(SlaCase {
                attention: AttentionCase {
                    lists,
                    ..AttentionCase::default()
                },
                combine,
                ..SlaCase::default()
            });
        }
    }
}

#[test]
fn head_dimensions_and_blocks() {
    for (head_dim, value_dim, block_q, block_k) in [
        (40, 72, 32, 32),
        (64, 64, 128, 64),
        (128, 128, 128, 64),
        (72, 160, 48, 80),
    ] {
        for (combine, linear) in [
            (Combine::Sla, LinearMode::Complement),
            (Combine::OneLogit, LinearMode::Complement),
            (Combine::OneLogit, LinearMode::Global),
        ] {
            check(SlaCase {
                attention: AttentionCase {
                    query_len: 50,
                    key_len: 420,
                    head_dim,
                    value_dim,
                    options: AttentionOptions {
                        block_q,
                        block_k,
                        ..AttentionOptions::default()
                    },
                    lists: Lists::TopK(1),
                    ..AttentionCase::default()
                },
                combine,
                linear,
                ..SlaCase::default()
            });
        }
    }
}

/// Blocks that Hopper's engine takes, with grouped heads and lengths that divide nothing.
#[test]
fn every_engine_in_both_modes() {
    let [complement, global] = [LinearMode::Complement, LinearMode::Global];
    for (head_dim, block_q, block_k, linear, combine) in [
        (64, 128, 64, complement, Combine::Sla),
        (64, 128, 64, global, Combine::LogitPerBlock),
        (128, 64, 128, complement, Combine::LogitPerBlock),
        (128, 64, 128, global, Combine::Sla),
    ] {
        check(SlaCase {
            attention: AttentionCase {
                query_heads: 4,
                kv_heads: 2,
                query_len: 150,
                key_len: 600,
                head_dim,
                value_dim: head_dim,
                options: AttentionOptions {
                    block_q,
                    block_k,
                    ..AttentionOptions::default()
                },
                lists: Lists::TopK(2),
                ..AttentionCase::default()
            },
            linear,
            combine,
            ..SlaCase::default()
        });
    }
}

#[test]
fn strided_inputs_without_a_copy() {
    for combine in [Combine::Sla, Combine::LogitPerBlock] {
        let case = SlaCase {
            attention: AttentionCase {
                batch: 2,
                query_heads: 4,
                kv_heads: 2,
                strided: true,
                ..few(300)
            },
            combine,
            ..SlaCase::default()
        };
        check(case);
        check(SlaCase {
            linear: LinearMode::Global,
            ..case
        });
    }
}

#[test]
fn large_scores_stay_finite() {
    let client = client();
    for dtype in dtypes(&client) {
        for spread in [10.0, 100.0] {
            for phi in FeatureMap::ALL {
                let case = SlaCase {
                    attention: AttentionCase { spread, ..few(300) },
                    phi,
                    ..SlaCase::default()
                }
                .with_dtype(dtype);
                let grads = case.run_backward(&client, &case.inputs(), &case.attention.grad_out());
                // exp(x) + 1 and its like leave f16's range at 100 times the spread, in the forward.
                let within = dtype == DType::F32 || spread < 100.0 || phi == FeatureMap::Softmax;
                let finite = grads.iter().flatten().all(|x| x.is_finite());
                assert!(finite || !within, "{case:?}");
            }
        }
    }
}

#[test]
fn two_runs_are_bit_equal() {
    let client = client();
    for dtype in dtypes(&client) {
        let (complement, global) = (LinearMode::Complement, LinearMode::Global);
        for (attention, linear) in [
            (AttentionCase::default(), complement),
            (few(600), complement),
            (few(600), global),
        ] {
            for combine in [Combine::Sla, Combine::OneLogit] {
                let case = SlaCase {
                    attention,
                    combine,
                    linear,
                    ..SlaCase::default()
                }
                .with_dtype(dtype);
                let (inputs, grad_out) = (case.inputs(), case.attention.grad_out());
                let run = || case.run_backward(&client, &inputs, &grad_out);
                assert!(run() == run(), "{case:?}");
            }
        }
    }
}

/// The output is the key's value whatever query and key are, so that their gradients are 0 but for
/// what rounding leaves of terms that cancel.
#[test]
fn one_key() {
    for linear in [LinearMode::Complement, LinearMode::Global] {
        for (query_len, density) in [(1, 0.0), (1, 1.0), (60, 0.3)] {
            for phi in [FeatureMap::Softmax, FeatureMap::EluPlusOne] {
                for seed in [2286, 7] {
                    let attention = AttentionCase {
                        query_len,
                        key_len: 1,
                        lists: Lists::Random(density),
                        seed,
                        ..AttentionCase::default()
                    };
                    check(SlaCase {
                        attention,
                        linear,
                        phi,
                        ..SlaCase::default()
                    });
                }
            }
        }
    }
}

/// Where the linear branch has one key its gradients cancel too, beside a sparse branch's that do not.
#[test]
fn a_last_block_of_one_key() {
    check(SlaCase {
        attention: AttentionCase {
            batch: 2,
            query_heads: 1,
            query_len: 33,
            key_len: 33,
            lists: Lists::Random(0.155_898_093_200_946_75),
            seed: 1_744_256_187_828_095_716,
            ..AttentionCase::default()
        },
        combine: Combine::LogitPerHead,
        ..SlaCase::default()
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn any_shape(
        batch in 1..3usize,
        (kv_heads, group) in (1..3usize, 1..3usize),
        query_len in 1..100usize,
        key_len in 1..300usize,
        density in 0.0..0.6f64,
        negligible in prop_oneof![Just(None), (0.0..0.5f64).prop_map(Some)],
        phi in prop_oneof![Just(FeatureMap::Softmax), Just(FeatureMap::EluPlusOne)],
        linear in prop_oneof![Just(LinearMode::Complement), Just(LinearMode::Global)],
        combine in prop_oneof![Just(Combine::Sla), Just(Combine::LogitPerHead)],
        strided in any::<bool>(),
        seed in any::<u64>(),
    ) {
        check(SlaCase {
            attention: AttentionCase {
                batch,
                query_heads: kv_heads * group,
                kv_heads,
                query_len,
                key_len,
                lists: Lists::Random(density),
                strided,
                seed,
                ..AttentionCase::default()
            },
            negligible,
            phi,
            linear,
            combine,
            ..SlaCase::default()
        });
    }
}

#[test]
fn bad_arguments_are_named() {
    let client = client();
    let zeros = |shape: [usize; 4], dtype| {
        upload(&client, &vec![0.0; shape.iter().product()], shape, dtype).unwrap()
    };
    let x = zeros([1, 2, 40, 32], DType::F32);
    let short = zeros([1, 2, 39, 32], DType::F32);
    let half = zeros([1, 2, 40, 32], DType::F16);
    let strided = zeros([1, 40, 2, 32], DType::F32).permute([0, 2, 1, 3]);
    let lse = upload(&client, &[0.0; 80], [1, 2, 40], DType::F32).unwrap();
    let list = HostBlockList::dense([1, 2, 2, 2]).upload(&client);
    let logits = |shape: [usize; 2]| {
        upload(&client, &vec![0.0; shape[0] * shape[1]], shape, DType::F32).unwrap()
    };
    let attention = AttentionCase::default().options;
    let short_lse = upload(&client, &[0.0; 78], [1, 2, 39], DType::F32).unwrap();
    let call = |sparse: &DeviceTensor<4>,
                linear: &DeviceTensor<4>,
                grad_out: &DeviceTensor<4>,
                logit_shape,
                causal,
                lse: &DeviceTensor<3>| {
        let inputs = SlaInputs {
            q: &x,
            k: &x,
            v: &x,
            critical: &list,
            negligible: None,
        };
        let saved = SlaSaved {
            sparse: sparse.clone(),
            linear: linear.clone(),
            lse: lse.clone(),
        };
        let options = SlaBackwardOptions {
            attention: AttentionOptions {
                causal,
                ..attention
            },
            phi: FeatureMap::Softmax,
            linear: LinearMode::Complement,
            precision: Precision::Full,
        };
        let logits = logits(logit_shape);
        match sla2_backward(&client, inputs, &saved, &logits, grad_out, &options) {
            Err(Error::Problem(refusal)) => refusal.to_string(),
            other => panic!("{other:?} instead of a refusal"),
        }
    };
    let none = Causal::None;
    for (text, names) in [
        (call(&short, &x, &x, [1, 1], none, &lse), "`saved.sparse`"),
        (call(&x, &half, &x, [1, 1], none, &lse), "`saved.linear`"),
        (call(&x, &strided, &x, [1, 1], none, &lse), "`saved.linear`"),
        (call(&x, &x, &short, [1, 1], none, &lse), "`grad_out`"),
        (call(&x, &x, &half, [1, 1], none, &lse), "`grad_out`"),
        (call(&x, &x, &x, [3, 1], none, &lse), "`alpha_logit`"),
        (call(&x, &x, &x, [1, 1], none, &short_lse), "`saved.lse`"),
        (
            call(&x, &x, &x, [1, 1], Causal::TopLeft, &lse),
            "causal mask",
        ),
    ] {
        assert!(text.contains(names), "{text} does not name {names}");
    }
}
