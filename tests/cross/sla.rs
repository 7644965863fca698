//! SLA and SLA2, forward.

use cubesla::{
    AttentionOptions, Blocks, Causal, DType, DeviceTensor, Error, FeatureMap, HostBlockList,
    LinearMode, ProblemError, RouterOptions, SlaOptions, download, sla_forward, sla2_forward,
    upload,
};
use cubesla_reference::{attention, relative_error};
use harness::case::wide;
use harness::sla::Combine;
use harness::{AttentionCase, Lists, SlaCase, client, dtypes};
use proptest::prelude::*;

/// Checks `case` in every type that the device has.
fn check(case: SlaCase) {
    let client = client();
    for dtype in dtypes(&client) {
        case.with_dtype(dtype).check(&client);
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
            // Marginal blocks added up, subtracted, and all keys.
            check(case);
            check(SlaCase {
                attention: few(500),
                ..case
            });
            check(SlaCase {
                linear: LinearMode::Global,
                ..case
            });
        }
    }
}

/// Query blocks of 64 and 128, which Hopper's own kernels take. Other devices run them as they run
/// any block, so one shape is enough there.
#[test]
fn blocks_of_whole_warpgroups() {
    let hopper = client().properties().identity.fingerprint == "ptx_sm90";
    let shapes = if hopper { 4 } else { 1 };
    for (head_dim, value_dim, block_q, block_k, lists) in [
        (64, 64, 64, 64, Lists::TopK(2)),
        (72, 96, 128, 32, Lists::TopK(1)),
        (128, 128, 128, 64, Lists::TopK(4)),
        (128, 40, 64, 48, Lists::Random(0.4)),
    ]
    .into_iter()
    .take(shapes)
    {
        for (combine, linear, negligible) in [
            (Combine::Sla, LinearMode::Complement, None),
            (Combine::LogitPerBlock, LinearMode::Complement, Some(0.2)),
            (Combine::Sla, LinearMode::Global, None),
            (Combine::LogitPerHead, LinearMode::Global, None),
        ] {
            check(SlaCase {
                attention: AttentionCase {
                    query_len: 150,
                    key_len: 390,
                    query_heads: 2,
                    head_dim,
                    value_dim,
                    options: AttentionOptions {
                        block_q,
                        block_k,
                        ..AttentionOptions::default()
                    },
                    lists,
                    ..AttentionCase::default()
                },
                negligible,
                linear,
                combine,
                phi: FeatureMap::ALL[block_k / 16 % 4],
                ..SlaCase::default()
            });
        }
    }
}

/// The complement keeps phi(Q) beside Q and phi(K) beside K: at D = 256 that is more than the 32 KiB
/// of the smallest devices, which have the global form still.
#[test]
fn widest_heads() {
    let client = client();
    let case = |linear| SlaCase {
        attention: AttentionCase {
            query_len: 50,
            key_len: 420,
            head_dim: 256,
            value_dim: 256,
            options: AttentionOptions {
                block_q: 16,
                block_k: 16,
                ..AttentionOptions::default()
            },
            lists: Lists::TopK(1),
            ..AttentionCase::default()
        },
        linear,
        combine: Combine::OneLogit,
        ..SlaCase::default()
    };
    check(case(LinearMode::Global));
    let complement = case(LinearMode::Complement);
    if client.properties().hardware.max_shared_memory_size > 48 << 10 {
        check(complement);
    } else {
        let inputs = complement.inputs();
        let (tensors, critical) = complement.attention.upload_inputs(&client, &inputs);
        let refused = complement.call(&client, &tensors, &critical, None, false);
        assert!(
            matches!(refused, Err(Error::Problem(ProblemError::NoPlan { .. }))),
            "{refused:?}"
        );
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
fn head_dimensions_and_blocks() {
    for (head_dim, value_dim, block_q, block_k) in [
        (40, 72, 32, 32),
        (64, 64, 128, 64),
        (128, 128, 128, 64),
        (72, 160, 48, 80),
    ] {
        for combine in [Combine::Sla, Combine::OneLogit] {
            for linear in [LinearMode::Complement, LinearMode::Global] {
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
                    linear,
                    combine,
                    ..SlaCase::default()
                });
            }
        }
    }
}

#[test]
fn no_critical_block_leaves_the_linear_branch() {
    for linear in [LinearMode::Complement, LinearMode::Global] {
        check(SlaCase {
            attention: AttentionCase {
                lists: Lists::Empty,
                ..AttentionCase::default()
            },
            linear,
            ..SlaCase::default()
        });
    }
}

#[test]
fn all_blocks_critical_is_dense_attention_times_a() {
    let client = client();
    for dtype in dtypes(&client) {
        let case = SlaCase {
            attention: AttentionCase {
                lists: Lists::Dense,
                ..AttentionCase::default()
            },
            ..SlaCase::default()
        }
        .with_dtype(dtype);
        case.check(&client);
        let inputs = case.inputs();
        let [sparse, linear, _] = case.run(&client, &inputs, true).saved.unwrap();
        assert!(linear.iter().all(|&x| x == 0.0), "no block is marginal");
        // Tiles may differ from those of attention alone, and with them the order of the sums.
        let dense = case.attention.run(&client, &inputs).out;
        let error = relative_error(&wide(&sparse), &wide(&dense));
        let rounding = if dtype == DType::F32 { 1e-6 } else { 4e-3 };
        assert!(error <= rounding, "{error:.2e} for {dtype}");
    }
}

/// SLA2 of `case` with these logits.
fn with_logits(case: &SlaCase, logits: &[f32], shape: [usize; 2]) -> Vec<f32> {
    let client = client();
    let inputs = case.inputs();
    let ([q, k, v], critical) = case.attention.upload_inputs(&client, &inputs);
    let logits = upload(&client, logits, shape, DType::F32).unwrap();
    let options = SlaOptions {
        attention: case.attention.options,
        blocks: Blocks::Given {
            critical: &critical,
            negligible: None,
        },
        phi: case.phi,
        linear: case.linear,
        ..SlaOptions::sla2()
    };
    let result = sla2_forward(&client, &q, &k, &v, &logits, &options).unwrap();
    download(&client, &result.out).unwrap()
}

#[test]
fn a_of_one_is_the_sparse_branch_and_a_of_zero_the_linear() {
    let client = client();
    let case = SlaCase {
        attention: few(500),
        ..SlaCase::default()
    };
    let [sparse, linear, _] = case.run(&client, &case.inputs(), true).saved.unwrap();
    assert_eq!(with_logits(&case, &[200.0], [1, 1]), sparse);
    assert_eq!(with_logits(&case, &[-200.0], [1, 1]), linear);
}

#[test]
fn the_exact_a_and_an_exact_linear_branch_are_full_attention() {
    // With one query to a block and equal keys, every feature map gives the exact branch: the mean
    // of the values. The exact `a` is the softmax mass of the selected blocks.
    let client = client();
    let case = AttentionCase {
        query_len: 16,
        key_len: 160,
        options: AttentionOptions {
            block_q: 16,
            block_k: 32,
            ..AttentionOptions::default()
        },
        ..few(160)
    };
    let mut inputs = case.inputs();
    // All queries of the block are alike, so that one `a` is exact for each; keys outside the list's
    // blocks are alike, so that linear attention over them is softmax attention over them.
    for head in 0..2 {
        for row in 1..16 {
            for d in 0..32 {
                inputs.q[(head * 16 + row) * 32 + d] = inputs.q[head * 16 * 32 + d];
            }
        }
    }
    let list = HostBlockList::from_rows([1, 2, 1, 5], vec![vec![1, 3], vec![1, 3]]).unwrap();
    for j in 0..160 {
        if !matches!(j / 32, 1 | 3) {
            inputs.k[j * 32..][..32].fill(0.25);
        }
    }
    inputs.list = list;
    let ([q, k, v], selected) = case.reference_inputs(&inputs);
    let everything = cubesla_reference::blocks::BlockWeights::dense([1, 2, 16, 160], 16, 32);
    let none = attention::Causal::None;
    let full = attention::forward(&q, &k, &v, &everything, case.scale(), none);
    let part = attention::forward(&q, &k, &v, &selected, case.scale(), none);
    let logits: Vec<f32> = (0..2)
        .map(|h| {
            let mass = (part.lse[[0, h, 0, 0]] - full.lse[[0, h, 0, 0]]).exp();
            (mass / (1.0 - mass)).ln() as f32
        })
        .collect();
    let ([q, k, v], critical) = case.upload_inputs(&client, &inputs);
    let logits = upload(&client, &logits, [2, 1], DType::F32).unwrap();
    for phi in [
        FeatureMap::Softmax,
        FeatureMap::EluPlusOne,
        FeatureMap::Relu,
    ] {
        let options = SlaOptions {
            attention: case.options,
            blocks: Blocks::Given {
                critical: &critical,
                negligible: None,
            },
            phi,
            ..SlaOptions::sla2()
        };
        let out = sla2_forward(&client, &q, &k, &v, &logits, &options)
            .unwrap()
            .out;
        let error = relative_error(&wide(&download(&client, &out).unwrap()), full.out.data());
        assert!(error <= 1e-5, "{error:.2e} with {phi:?}");
    }
}

#[test]
fn complement_and_selected_make_the_global_sums() {
    // N = N^c + N^s for numerators and denominators: check through the linear outputs of a list and
    // of its complement, weighted by their denominators in the reference.
    let client = client();
    let case = SlaCase {
        attention: few(400),
        ..SlaCase::default()
    };
    let inputs = case.inputs();
    let mask = inputs.list.to_mask();
    let swapped = HostBlockList::from_mask(
        inputs.list.shape(),
        &mask
            .iter()
            .map(|&critical| !critical)
            .collect::<Vec<bool>>(),
    )
    .unwrap();
    let run = |linear: LinearMode, list: &HostBlockList| {
        let mut inputs = inputs.clone();
        inputs.list = list.clone();
        let case = SlaCase { linear, ..case };
        case.run(&client, &inputs, true).saved.unwrap()[1].clone()
    };
    let complement = run(LinearMode::Complement, &inputs.list);
    let selected = run(LinearMode::Complement, &swapped);
    let global = run(LinearMode::Global, &inputs.list);

    let ([q, k, _], _) = case.attention.reference_inputs(&inputs);
    let phi = harness::sla::reference_phi(case.phi);
    let (phi_q, phi_k) = (phi.apply_all(&q), phi.apply_all(&k));
    let key_blocks = case.attention.list_shape()[3];
    for h in 0..2 {
        for i in 0..case.attention.query_len {
            let mut sums = [0.0f64; 2];
            for j in 0..400 {
                let block = (h * 3 + i / 32) * key_blocks + j / 32;
                let dot: f64 = phi_q
                    .row(0, h, i)
                    .iter()
                    .zip(phi_k.row(0, 0, j))
                    .map(|(x, y)| x * y)
                    .sum();
                sums[usize::from(mask[block])] += dot;
            }
            for d in 0..32 {
                let at = (h * case.attention.query_len + i) * 32 + d;
                let expected = (sums[0] * f64::from(complement[at])
                    + sums[1] * f64::from(selected[at]))
                    / (sums[0] + sums[1]);
                assert!(
                    (f64::from(global[at]) - expected).abs() < 1e-5,
                    "row {i} column {d}"
                );
            }
        }
    }
}

#[test]
fn the_order_of_key_blocks_does_not_matter() {
    let client = client();
    let case = SlaCase {
        attention: AttentionCase {
            query_heads: 1,
            ..few(32 * 12)
        },
        negligible: Some(0.2),
        ..SlaCase::default()
    };
    let inputs = case.inputs();
    let (tensors, critical) = case.attention.upload_inputs(&client, &inputs);
    let negligible = case.negligible_list(&inputs).unwrap();
    let uploaded = negligible.upload(&client);
    let plain = case
        .call(&client, &tensors, &critical, Some(&uploaded), false)
        .unwrap();

    // Block j moves to 5 j mod 12.
    let moved = |data: &[f32]| {
        let mut out = vec![0.0; data.len()];
        for (j, block) in data.chunks(32 * 32).enumerate() {
            out[5 * j % 12 * 32 * 32..][..32 * 32].copy_from_slice(block);
        }
        out
    };
    let moved_list = |list: &HostBlockList| {
        let rows = list.rows().map(|row| {
            let mut row: Vec<u32> = row.iter().map(|j| 5 * j % 12).collect();
            row.sort_unstable();
            row
        });
        HostBlockList::from_rows(list.shape(), rows.collect()).unwrap()
    };
    let tensors = [
        tensors[0].clone(),
        case.attention
            .upload(&client, &moved(&inputs.k), case.attention.k_shape()),
        case.attention
            .upload(&client, &moved(&inputs.v), case.attention.v_shape()),
    ];
    let critical = moved_list(&inputs.list).upload(&client);
    let negligible = moved_list(&negligible).upload(&client);
    let permuted = case
        .call(&client, &tensors, &critical, Some(&negligible), false)
        .unwrap();
    let (plain, permuted) = (
        download(&client, &plain.out).unwrap(),
        download(&client, &permuted.out).unwrap(),
    );
    assert!(relative_error(&wide(&permuted), &wide(&plain)) <= 1e-5);
}

#[test]
fn two_runs_are_bit_equal() {
    let client = client();
    for dtype in dtypes(&client) {
        for attention in [AttentionCase::default(), few(600)] {
            let case = SlaCase {
                attention,
                ..SlaCase::default()
            }
            .with_dtype(dtype);
            let inputs = case.inputs();
            assert_eq!(
                case.run(&client, &inputs, true),
                case.run(&client, &inputs, true)
            );
        }
    }
}

#[test]
fn strided_inputs_without_a_copy() {
    for linear in [LinearMode::Complement, LinearMode::Global] {
        check(SlaCase {
            attention: AttentionCase {
                batch: 2,
                query_heads: 4,
                kv_heads: 2,
                strided: true,
                ..few(300)
            },
            linear,
            ..SlaCase::default()
        });
    }
}

#[test]
fn large_scores_do_not_overflow() {
    for spread in [10.0, 100.0] {
        SlaCase {
            attention: AttentionCase { spread, ..few(300) },
            ..SlaCase::default()
        }
        .check(&client());
    }
}

#[test]
fn from_router_to_result_in_one_call() {
    let client = client();
    let case = SlaCase {
        attention: AttentionCase {
            key_len: 1300,
            query_len: 100,
            ..AttentionCase::default()
        },
        negligible: Some(0.0),
        combine: Combine::OneLogit,
        ..SlaCase::default()
    };
    let inputs = case.inputs();
    let ([q, k, v], _) = case.attention.upload_inputs(&client, &inputs);
    let logits = upload(&client, &case.weights().logits, [1, 1], DType::F32).unwrap();
    let options = SlaOptions {
        attention: case.attention.options,
        blocks: Blocks::Routed(RouterOptions {
            critical: 0.1,
            ..RouterOptions::sla()
        }),
        ..SlaOptions::sla()
    };
    let routed = sla2_forward(&client, &q, &k, &v, &logits, &options).unwrap();
    assert!(routed.saved.is_none());
    let lists = HostBlockList::download(&client, &routed.critical).unwrap();
    // 41 blocks of keys.
    assert!(lists.rows().all(|row| row.len() == 4));
    let negligible = routed.negligible.as_ref().unwrap();
    assert!(
        HostBlockList::download(&client, negligible)
            .unwrap()
            .rows()
            .all(|row| row.len() == 4)
    );
    let given = SlaOptions {
        blocks: Blocks::Given {
            critical: &routed.critical,
            negligible: Some(negligible),
        },
        ..options
    };
    let given = sla2_forward(&client, &q, &k, &v, &logits, &given).unwrap();
    assert_eq!(
        download(&client, &routed.out).unwrap(),
        download(&client, &given.out).unwrap()
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn any_shape(
        (kv_heads, group) in (1..3usize, 1..3usize),
        query_len in 1..120usize,
        key_len in 1..400usize,
        density in 0.0..0.6f64,
        negligible in prop::option::of(0.0..0.6f64),
        phi in prop::sample::select(FeatureMap::ALL.to_vec()),
        global in any::<bool>(),
        combine in prop::sample::select(vec![Combine::Sla, Combine::LogitPerBlock]),
        strided in any::<bool>(),
        seed in any::<u64>(),
    ) {
        check(SlaCase {
            attention: AttentionCase {
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
            linear: if global { LinearMode::Global } else { LinearMode::Complement },
            combine,
            ..SlaCase::default()
        });
    }
}

#[test]
fn bad_arguments_are_named() {
    let client = client();
    let case = AttentionCase::default();
    let inputs = case.inputs();
    let ([q, k, v], critical) = case.upload_inputs(&client, &inputs);
    let tensor = |shape: [usize; 2]| -> DeviceTensor<2> {
        upload(&client, &vec![0.0; shape[0] * shape[1]], shape, DType::F32).unwrap()
    };
    let given = |critical, negligible| SlaOptions {
        attention: case.options,
        blocks: Blocks::Given {
            critical,
            negligible,
        },
        ..SlaOptions::sla()
    };
    let fine = given(&critical, None);
    let refusal = |result: Result<cubesla::SlaResult, Error>| match result {
        Err(Error::Problem(refusal)) => refusal.to_string(),
        other => panic!("{other:?} instead of a refusal"),
    };
    let sla2 = |logits: &DeviceTensor<2>, options: &SlaOptions<'_>| {
        refusal(sla2_forward(&client, &q, &k, &v, logits, options))
    };
    // Two heads, three query blocks.
    for shape in [[3, 1], [1, 3], [2, 2], [2, 4], [1, 2]] {
        let text = sla2(&tensor(shape), &fine);
        assert!(text.contains("`alpha_logit`"), "{text}");
    }
    let one = tensor([1, 1]);
    let causal = SlaOptions {
        attention: AttentionOptions {
            causal: Causal::TopLeft,
            ..case.options
        },
        ..fine
    };
    assert!(sla2(&one, &causal).contains("causal"));
    let other_list = HostBlockList::dense([1, 2, 2, 4]).upload(&client);
    assert!(sla2(&one, &given(&other_list, None)).contains("M = 2"));
    assert!(sla2(&one, &given(&critical, Some(&other_list))).contains("M = 2"));

    let bias = |len: usize| upload(&client, &vec![0.0; len], [len], DType::F32).unwrap();
    let text = refusal(sla_forward(
        &client,
        &q,
        &k,
        &v,
        &tensor([32, 40]),
        &bias(32),
        &fine,
    ));
    assert!(text.contains("`wl`"), "{text}");
    let text = refusal(sla_forward(
        &client,
        &q,
        &k,
        &v,
        &tensor([32, 32]),
        &bias(31),
        &fine,
    ));
    assert!(text.contains("`bl`"), "{text}");
}
