//! Block-sparse attention, forward.

use cubesla::{
    AttentionOptions, Causal, DType, DeviceTensor, Error, ProblemError, block_sparse_attention,
    download, upload,
};
use harness::case::{blocks, causal_cases};
use harness::{AttentionCase, Lists, client, dtypes};
use proptest::prelude::*;

/// Checks `case` in every type that the device has.
fn check(case: AttentionCase) {
    let client = client();
    for dtype in dtypes(&client) {
        AttentionCase { dtype, ..case }.check(&client);
    }
}

#[test]
fn irregular_lists_with_empty_rows() {
    check(AttentionCase::default());
}

#[test]
fn a_dense_list_is_dense_attention() {
    check(AttentionCase {
        lists: Lists::Dense,
        ..AttentionCase::default()
    });
}

#[test]
fn one_block_per_row() {
    check(AttentionCase {
        lists: Lists::TopK(1),
        ..AttentionCase::default()
    });
}

#[test]
fn no_block_at_all() {
    let client = client();
    let case = AttentionCase {
        lists: Lists::Empty,
        ..AttentionCase::default()
    };
    let outputs = case.run(&client, &case.inputs());
    assert!(outputs.out.iter().all(|&x| x == 0.0));
    assert!(outputs.lse.iter().all(|&x| x == f32::NEG_INFINITY));
}

#[test]
fn head_dimensions() {
    for (head_dim, value_dim) in [(40, 40), (64, 64), (72, 160), (128, 128), (256, 32)] {
        check(AttentionCase {
            head_dim,
            value_dim,
            query_len: 33,
            key_len: 70,
            ..AttentionCase::default()
        });
    }
}

#[test]
fn the_widest_heads() {
    check(AttentionCase {
        head_dim: 256,
        value_dim: 256,
        query_len: 20,
        key_len: 40,
        ..AttentionCase::default()
    });
}

#[test]
fn block_sizes() {
    for (block_q, block_k) in [(16, 16), (48, 80), (128, 64), (64, 128)] {
        check(AttentionCase {
            query_len: 150,
            key_len: 170,
            options: blocks(block_q, block_k),
            ..AttentionCase::default()
        });
    }
}

#[test]
fn lengths() {
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
fn grouped_heads() {
    for (query_heads, kv_heads) in [(4, 2), (6, 1), (3, 3)] {
        check(AttentionCase {
            batch: 2,
            query_heads,
            kv_heads,
            query_len: 40,
            ..AttentionCase::default()
        });
    }
}

#[test]
fn more_query_blocks_than_multiprocessors() {
    for (head_dim, value_dim, spread) in [(64, 64, 1.0), (40, 64, 4.0), (64, 32, 1.0)] {
        check(AttentionCase {
            batch: 2,
            query_heads: 16,
            kv_heads: 4,
            query_len: 600,
            key_len: 300,
            head_dim,
            value_dim,
            spread,
            options: blocks(128, 64),
            ..AttentionCase::default()
        });
    }
}

#[test]
fn causal_masks_cut_inside_blocks() {
    causal_cases().into_iter().for_each(check);
}

#[test]
fn strided_inputs_without_a_copy() {
    check(AttentionCase {
        batch: 2,
        query_heads: 4,
        kv_heads: 2,
        strided: true,
        ..AttentionCase::default()
    });
}

#[test]
fn columns_that_are_not_neighbours() {
    // [B, H, D, L] seen as [B, H, L, D]: no vector load is possible.
    let client = client();
    let case = AttentionCase::default();
    let inputs = case.inputs();
    let transposed = |data: &[f32], [b, h, l, d]: [usize; 4]| {
        let moved: Vec<f32> = (0..data.len())
            .map(|at| {
                let (bh, rest) = (at / (l * d), at % (l * d));
                data[bh * l * d + rest % l * d + rest / l]
            })
            .collect();
        upload(&client, &moved, [b, h, d, l], case.dtype)
            .unwrap()
            .permute([0, 1, 3, 2])
    };
    let q = transposed(&inputs.q, case.q_shape());
    let k = transposed(&inputs.k, case.k_shape());
    let v = transposed(&inputs.v, case.v_shape());
    let list = inputs.list.upload(&client);
    let output = block_sparse_attention(&client, &q, &k, &v, &list, &case.options).unwrap();
    let outputs = harness::case::Outputs {
        out: download(&client, &output.out).unwrap(),
        lse: download(&client, &output.lse).unwrap(),
    };
    case.check_outputs(&inputs, &outputs, "the public call");
}

#[test]
fn scales() {
    for scale in [0.0, -0.4, 1.0] {
        check(AttentionCase {
            options: AttentionOptions {
                scale: Some(scale),
                ..blocks(32, 32)
            },
            ..AttentionCase::default()
        });
    }
}

#[test]
fn large_scores_do_not_overflow() {
    for spread in [10.0, 100.0] {
        AttentionCase {
            spread,
            ..AttentionCase::default()
        }
        .check(&client());
    }
}

#[test]
fn two_runs_are_bit_equal() {
    let client = client();
    for dtype in dtypes(&client) {
        let case = AttentionCase {
            dtype,
            ..AttentionCase::default()
        };
        let inputs = case.inputs();
        assert_eq!(case.run(&client, &inputs), case.run(&client, &inputs));
    }
}

#[test]
fn nan_and_infinity_stay_in_the_rows_that_see_them() {
    let client = client();
    let case = AttentionCase {
        query_heads: 1,
        lists: Lists::TopK(1),
        ..AttentionCase::default()
    };
    let mut inputs = case.inputs();
    let clean = case.run(&client, &inputs);
    // Query 3 is NaN; key 40 is infinite and lies in key block 1.
    inputs.q[3 * case.head_dim] = f32::NAN;
    inputs.v[40 * case.value_dim] = f32::INFINITY;
    let spoilt = case.run(&client, &inputs);
    for i in 0..case.query_len {
        let row = |outputs: &harness::case::Outputs| {
            outputs.out[i * case.value_dim..][..case.value_dim].to_vec()
        };
        let sees_key = inputs.list.row(i / case.options.block_q).contains(&1);
        if i == 3 {
            assert!(row(&spoilt).iter().all(|x| x.is_nan()), "row {i}");
        } else if sees_key {
            assert!(!row(&spoilt)[0].is_finite(), "row {i}");
            assert_eq!(row(&spoilt)[1..], row(&clean)[1..], "row {i}");
        } else {
            assert_eq!(row(&spoilt), row(&clean), "row {i}");
        }
    }
}

#[test]
fn a_future_key_that_is_nan_stays_hidden() {
    let client = client();
    let case = AttentionCase {
        query_len: 64,
        key_len: 64,
        lists: Lists::Dense,
        options: AttentionOptions {
            causal: Causal::TopLeft,
            ..blocks(32, 32)
        },
        ..AttentionCase::default()
    };
    let mut inputs = case.inputs();
    let clean = case.run(&client, &inputs);
    inputs.k[50 * case.head_dim] = f32::NAN;
    let spoilt = case.run(&client, &inputs);
    let before = |outputs: &harness::case::Outputs| outputs.out[..50 * case.value_dim].to_vec();
    assert_eq!(before(&spoilt), before(&clean));
    assert!(spoilt.out[50 * case.value_dim].is_nan());
}

#[test]
fn a_long_sequence() {
    // The length of a Wan2.1 video, which is no multiple of any block.
    AttentionCase {
        query_heads: 1,
        query_len: 200,
        key_len: 32_760,
        lists: Lists::TopK(3),
        options: blocks(128, 64),
        ..AttentionCase::default()
    }
    .check(&client());
}

#[test]
fn several_threads_share_a_device() {
    let client = client();
    std::thread::scope(|scope| {
        for seed in 0..6 {
            let client = client.clone();
            scope.spawn(move || {
                for round in 0..4 {
                    AttentionCase {
                        seed: seed * 10 + round,
                        ..AttentionCase::default()
                    }
                    .check(&client);
                }
            });
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_shape(
        batch in 1..3usize,
        (kv_heads, group) in (1..3usize, 1..3usize),
        query_len in 1..130usize,
        key_len in 1..130usize,
        density in 0.0..1.0f64,
        causal in prop_oneof![
            Just(Causal::None), Just(Causal::TopLeft), Just(Causal::BottomRight)
        ],
        strided in any::<bool>(),
        seed in any::<u64>(),
    ) {
        check(AttentionCase {
            batch,
            query_heads: kv_heads * group,
            kv_heads,
            query_len,
            key_len,
            options: AttentionOptions { causal, ..blocks(32, 32) },
            lists: Lists::Random(density),
            strided,
            seed,
            ..AttentionCase::default()
        });
    }
}

/// The refusal of a call with zeros of these shapes.
fn refusal(
    q: [usize; 4],
    k: [usize; 4],
    v: [usize; 4],
    options: AttentionOptions,
    list_shape: [usize; 4],
) -> ProblemError {
    let client = client();
    let zeros = |shape: [usize; 4]| {
        let values = vec![0.0; shape.iter().product::<usize>().max(1)];
        let buffer = upload(&client, &values, [values.len()], DType::F32).unwrap();
        DeviceTensor::new(buffer.handle().clone(), shape, [0, 0, 0, 1], DType::F32).unwrap()
    };
    let list = cubesla::HostBlockList::dense(list_shape).upload(&client);
    let result = block_sparse_attention(&client, &zeros(q), &zeros(k), &zeros(v), &list, &options);
    match result {
        Err(Error::Problem(refusal)) => refusal,
        other => panic!("{other:?} instead of a refusal"),
    }
}

#[test]
fn bad_arguments_are_named() {
    let good = [1, 2, 40, 32];
    let list = [1, 2, 2, 2];
    let opts = blocks(32, 32);
    let cases = [
        (refusal([0, 2, 40, 32], good, good, opts, list), "`q`"),
        (refusal(good, [1, 2, 0, 32], good, opts, list), "`k`"),
        (refusal(good, [1, 2, 40, 64], good, opts, list), "`k`"),
        (refusal(good, good, [1, 2, 41, 32], opts, list), "`v`"),
        (
            refusal([1, 3, 40, 32], good, good, opts, list),
            "3 query heads",
        ),
        (
            refusal([1, 2, 40, 36], [1, 2, 40, 36], good, opts, list),
            "`q`",
        ),
        (
            refusal([1, 2, 40, 264], [1, 2, 40, 264], good, opts, list),
            "264",
        ),
        (refusal(good, good, [1, 2, 40, 24], opts, list), "`v`"),
        (refusal(good, good, good, blocks(24, 32), list), "`block_q`"),
        (
            refusal(good, good, good, blocks(32, 144), list),
            "`block_k`",
        ),
        (refusal(good, good, good, opts, [1, 2, 3, 2]), "M = 3"),
        (refusal(good, good, good, opts, [1, 2, 2, 1]), "N = 1"),
    ];
    for (refusal, names) in cases {
        let text = refusal.to_string();
        assert!(text.contains(names), "{text} does not name {names}");
    }
    for scale in [f32::NAN, f32::INFINITY] {
        let options = AttentionOptions {
            scale: Some(scale),
            ..opts
        };
        let refusal = refusal(good, good, good, options, list);
        assert!(matches!(refusal, ProblemError::Scale { .. }), "{refusal}");
    }
}

#[test]
fn mixed_and_missing_types_are_refused() {
    let client = client();
    let tensor = |dtype| upload(&client, &[0.0; 32 * 32], [1, 1, 32, 32], dtype).unwrap();
    let list = cubesla::HostBlockList::dense([1, 1, 1, 1]).upload(&client);
    let call = |q: &DeviceTensor<4>, k: &DeviceTensor<4>| {
        block_sparse_attention(&client, q, k, k, &list, &blocks(32, 32))
    };
    let mixed = call(&tensor(DType::F32), &tensor(DType::F16));
    assert!(
        matches!(
            mixed,
            Err(Error::Problem(ProblemError::DTypeMismatch { .. }))
        ),
        "{mixed:?}"
    );
    if !dtypes(&client).contains(&DType::BF16) {
        let missing = call(&tensor(DType::BF16), &tensor(DType::BF16));
        assert!(
            matches!(
                missing,
                Err(Error::Problem(ProblemError::UnsupportedDType { .. }))
            ),
            "{missing:?}"
        );
    }
}

#[test]
fn strides_past_the_buffer_are_refused() {
    let buffer = upload(&client(), &[0.0; 100], [100], DType::F32).unwrap();
    let view = DeviceTensor::new(
        buffer.handle().clone(),
        [1, 1, 4, 32],
        [0, 0, 32, 1],
        DType::F32,
    );
    assert!(matches!(
        view,
        Err(ProblemError::BufferTooSmall {
            needed: 512,
            found: 400,
            ..
        })
    ));
}
