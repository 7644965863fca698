//! Block-sparse attention, backward.

use cubesla::plan::BackwardPlan;
use cubesla::{
    AttentionOptions, AttentionProblem, Causal, DType, DeviceTensor, Error, HostBlockList,
    ProblemError, block_sparse_attention, block_sparse_attention_backward, download, upload,
};
use harness::case::{blocks, causal_cases};
use harness::{AttentionCase, Lists, client, dtypes};
use proptest::prelude::*;

/// Checks `case` in every type that the device has.
fn check(case: AttentionCase) {
    let client = client();
    for dtype in dtypes(&client) {
        AttentionCase { dtype, ..case }.check_backward(&client);
    }
}

#[test]
fn irregular_lists_with_empty_rows() {
    check(AttentionCase::default());
}

#[test]
fn all_blocks_and_one() {
    for lists in [Lists::Dense, Lists::TopK(1)] {
        check(AttentionCase {
            lists,
            ..AttentionCase::default()
        });
    }
}

#[test]
fn no_block_at_all() {
    let client = client();
    let case = AttentionCase {
        lists: Lists::Empty,
        ..AttentionCase::default()
    };
    let (inputs, grad_out) = (case.inputs(), case.grad_out());
    for (_, grads) in case.run_backward(&client, &inputs, &grad_out) {
        assert!(grads.iter().flatten().all(|&x| x == 0.0));
    }
}

#[test]
fn keys_that_nobody_selects_have_no_gradient() {
    let client = client();
    let case = AttentionCase::default();
    let mut inputs = case.inputs();
    let shape = case.list_shape();
    // Only key block 1 is ever selected, and by query block 2 alone.
    let rows = (0..shape[1] * shape[2]).map(|row| match row % shape[2] {
        2 => vec![1],
        _ => vec![],
    });
    inputs.list = HostBlockList::from_rows(shape, rows.collect()).unwrap();
    for (plan, [dq, dk, dv]) in case.run_backward(&client, &inputs, &case.grad_out()) {
        let outside = |grad: &[f32], len: usize, inside: std::ops::Range<usize>| {
            let rows = grad.chunks(case.head_dim).enumerate();
            rows.filter(|(at, _)| !inside.contains(&(at % len)))
                .all(|(_, row)| row.iter().all(|&x| x == 0.0))
        };
        assert!(outside(&dq, case.query_len, 64..96), "{plan}");
        assert!(outside(&dk, case.key_len, 32..64), "{plan}");
        assert!(outside(&dv, case.key_len, 32..64), "{plan}");
        assert!(dk.iter().any(|&x| x != 0.0) && dv.iter().any(|&x| x != 0.0));
    }
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

/// Registers of Hopper's kernels are named after widths and warpgroups: each kernel has a chance of its
/// own to be compiled wrongly.
#[test]
fn every_width_on_hopper() {
    let client = client();
    for head_dim in (32..=128).step_by(8) {
        for (block_q, dtype) in [(64, DType::F16), (128, DType::F16), (128, DType::BF16)] {
            let case = AttentionCase {
                query_len: 3 * block_q - 30,
                key_len: 300,
                head_dim,
                value_dim: head_dim,
                dtype,
                options: blocks(block_q, 64),
                ..AttentionCase::default()
            };
            let [q, k, v] = [case.q_shape(), case.k_shape(), case.v_shape()];
            let problem = AttentionProblem::from_shapes(q, k, v, dtype, &case.options).unwrap();
            if BackwardPlan::all(&problem, client.properties())
                .unwrap()
                .len()
                < 2
            {
                return; // Other tests have widths enough for one engine.
            }
            let (inputs, grad_out) = (case.inputs(), case.grad_out());
            let fastest = |mut plans: Vec<BackwardPlan>| {
                plans.truncate(1);
                plans
            };
            for (plan, found) in case.run_backward_plans(&client, &inputs, &grad_out, fastest) {
                case.check_gradients(&inputs, &grad_out, &found, &plan.to_string());
            }
        }
    }
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
fn the_public_call_takes_columns_that_are_not_neighbours() {
    // Everything is [B, H, D, L] seen as [B, H, L, D]: no vector load is possible.
    let client = client();
    let case = AttentionCase::default();
    let (inputs, grad_out) = (case.inputs(), case.grad_out());
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
    let dout = transposed(&grad_out, case.out_shape());
    let list = inputs.list.upload(&client);
    let options = &case.options;
    let forward = block_sparse_attention(&client, &q, &k, &v, &list, options).unwrap();
    let out = download(&client, &forward.out).unwrap();
    let out = transposed(&out, case.out_shape());
    let grads = block_sparse_attention_backward(
        &client,
        &q,
        &k,
        &v,
        &out,
        &forward.lse,
        &dout,
        &list,
        options,
    )
    .unwrap();
    let found = [&grads.dq, &grads.dk, &grads.dv].map(|x| download(&client, x).unwrap());
    case.check_gradients(&inputs, &grad_out, &found, "the public call");
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
    let client = client();
    for dtype in dtypes(&client) {
        for spread in [1.0, 10.0, 100.0] {
            let case = AttentionCase {
                spread,
                dtype,
                ..AttentionCase::default()
            };
            case.check_large_scores(&client);
        }
    }
}

#[test]
fn two_runs_are_bit_equal() {
    let client = client();
    for dtype in dtypes(&client) {
        let case = AttentionCase {
            dtype,
            query_heads: 4,
            ..AttentionCase::default()
        };
        let (inputs, grad_out) = (case.inputs(), case.grad_out());
        let run = || case.run_backward(&client, &inputs, &grad_out);
        assert!(run() == run(), "{case:?}");
    }
}

/// The output is the key's value whatever query and key are, so that their gradients are 0 but for
/// what rounding leaves of terms that cancel.
#[test]
fn one_key() {
    for query_len in [1, 70] {
        for seed in [1, 2, 3] {
            check(AttentionCase {
                query_len,
                key_len: 1,
                lists: Lists::Dense,
                seed,
                ..AttentionCase::default()
            });
        }
    }
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

#[test]
fn bad_arguments_are_named() {
    let client = client();
    let zeros = |shape: [usize; 4], dtype| {
        upload(&client, &vec![0.0; shape.iter().product()], shape, dtype).unwrap()
    };
    let x = zeros([1, 2, 40, 32], DType::F32);
    let lse = upload(&client, &[0.0; 80], [1, 2, 40], DType::F32).unwrap();
    let list = HostBlockList::dense([1, 2, 2, 2]).upload(&client);
    let call = |out: &DeviceTensor<4>, lse: &DeviceTensor<3>, grad: &DeviceTensor<4>| {
        let options = &blocks(32, 32);
        match block_sparse_attention_backward(&client, &x, &x, &x, out, lse, grad, &list, options) {
            Err(Error::Problem(refusal)) => refusal,
            other => panic!("{other:?} instead of a refusal"),
        }
    };
    let short = zeros([1, 2, 39, 32], DType::F32);
    let half = zeros([1, 2, 40, 32], DType::F16);
    let short_lse = upload(&client, &[0.0; 78], [1, 2, 39], DType::F32).unwrap();
    let half_lse = upload(&client, &[0.0; 80], [1, 2, 40], DType::F16).unwrap();
    let strided_lse = upload(&client, &[0.0; 80], [1, 40, 2], DType::F32).unwrap();
    let strided_lse = strided_lse.permute([0, 2, 1]);
    for (refusal, names) in [
        (call(&short, &lse, &x), "`out`"),
        (call(&half, &lse, &x), "`out`"),
        (call(&x, &short_lse, &x), "`lse`"),
        (call(&x, &half_lse, &x), "`lse`"),
        (call(&x, &strided_lse, &x), "`lse`"),
        (call(&x, &lse, &short), "`grad_out`"),
        (call(&x, &lse, &half), "`grad_out`"),
    ] {
        let text = refusal.to_string();
        assert!(text.contains(names), "{text} does not name {names}");
    }
}

#[test]
fn heads_that_no_tile_fits_are_refused() {
    let client = client();
    if client.properties().hardware.max_shared_memory_size > 32 * 1024 {
        return;
    }
    let x = upload(&client, &[0.0; 16 * 256], [1, 1, 16, 256], DType::F32).unwrap();
    let lse = upload(&client, &[0.0; 16], [1, 1, 16], DType::F32).unwrap();
    let list = HostBlockList::dense([1, 1, 1, 1]).upload(&client);
    let options = &blocks(16, 16);
    let result = block_sparse_attention_backward(&client, &x, &x, &x, &x, &lse, &x, &list, options);
    assert!(
        matches!(result, Err(Error::Problem(ProblemError::NoPlan { .. }))),
        "{result:?}"
    );
}
