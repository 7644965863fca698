//! Gradients of block-sparse attention in low bits.

use cubesla::{
    AttentionOptions, Causal, DType, Error, LowBitFormats, LowBitValues, ProblemError, download,
    low_bit_attention, low_bit_attention_backward, upload,
};
use cubesla_reference::attention::Forward;
use cubesla_reference::{Tensor, low_bit};
use harness::case::{Inputs, causal, exact, wide};
use harness::low_bit::{CODES, FORMATS, reference_formats};
use harness::{AttentionCase, Lists, client, dtypes, plain};
use proptest::prelude::*;

/// Every format in every type that the device has: gradients by the error rules for the forward that
/// there was, and two runs bit by bit.
fn check(case: &AttentionCase) {
    for dtype in dtypes(&client()) {
        let case = AttentionCase { dtype, ..*case };
        for formats in FORMATS {
            check_inputs(&case, &case.inputs(), formats, CODES);
        }
    }
}

/// `codes` is what codes that the reference rounds the other way may change.
fn check_inputs(case: &AttentionCase, inputs: &Inputs, formats: LowBitFormats, codes: f64) {
    let client = client();
    let grad_out = case.grad_out();
    let (tensors, list) = case.upload_inputs(&client, inputs);
    let [q, k, v] = &tensors;
    let options = &case.options;
    let forward = low_bit_attention(&client, q, k, v, &list, options, formats).unwrap();
    let grad = case.upload(&client, &grad_out, case.out_shape());
    let run = || {
        let (out, lse) = (&forward.out, &forward.lse);
        let grads =
            low_bit_attention_backward(&client, q, k, v, out, lse, &grad, &list, options, formats);
        let grads = grads.unwrap();
        [grads.dq, grads.dk, grads.dv].map(|x| download(&client, &x).unwrap())
    };
    let found = run();
    assert!(found == run(), "two runs of {formats:?} in {case:?}");

    let shape = case.out_shape();
    let lse = wide(&download(&client, &forward.lse).unwrap());
    let low = Forward {
        out: exact(&download(&client, &forward.out).unwrap(), shape),
        lse: Tensor::new([shape[0], shape[1], shape[2], 1], lse),
    };
    let ([q, k, v], weights) = case.reference_inputs(inputs);
    let (scale, mask) = (case.scale(), causal(case.options.causal));
    let dout = exact(&grad_out, shape);
    let rounding = reference_formats(formats);
    let gradients = |low: &Forward| {
        let of = low_bit::backward(&q, &k, &v, &weights, scale, mask, rounding, low, &dout);
        [of.dq, of.dk, of.dv]
    };
    let at = low_bit::rounded(&q, &k, &v, &weights, rounding);
    let [q8, k8, v8] = [at.q, at.k, at.v].map(|x| plain::stored(&x, case.dtype));
    let plain =
        plain::attention_backward(&q8, &k8, &v8, &weights, scale, mask, &dout, case.factors());
    let by = format!("{formats:?}");
    case.check_gradients_of(&found, low, gradients, &plain, codes, &by);
}

#[test]
fn irregular_lists_of_every_kind() {
    for lists in [
        AttentionCase::default().lists,
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
fn wide_and_different_heads() {
    for (head_dim, value_dim) in [(64, 40), (128, 128)] {
        check(&AttentionCase {
            head_dim,
            value_dim,
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

/// Shapes of Hopper's engine, in the types that it takes.
#[test]
fn blocks_of_128_and_64() {
    for dim in [64, 128] {
        check(&AttentionCase {
            query_len: 300,
            key_len: 421,
            head_dim: dim,
            value_dim: dim,
            options: AttentionOptions::default(),
            lists: Lists::Random(0.4),
            ..AttentionCase::default()
        });
    }
}

/// Scores of the keys as they are differ from those that are computed with by much more than rounding.
#[test]
fn keys_far_from_zero() {
    let case = AttentionCase {
        lists: Lists::Dense,
        ..AttentionCase::default()
    };
    let mut inputs = case.inputs();
    inputs.k.iter_mut().for_each(|x| *x += 30.0);
    for formats in FORMATS {
        // A mean of that size has fewer digits for what keys differ by.
        check_inputs(&case, &inputs, formats, 4.0 * CODES);
    }
}

/// The gradient of what was computed: where only scores are in low bits it does not change the sum of
/// a row's weights, so that the keys' gradients of a head add up to nothing. At the inputs as they are
/// they do not.
#[test]
fn gradients_of_keys_add_up_to_nothing() {
    let client = client();
    let case = AttentionCase {
        lists: Lists::Dense,
        ..AttentionCase::default()
    };
    let formats = LowBitFormats {
        values: LowBitValues::Full,
        ..LowBitFormats::default()
    };
    let ([q, k, v], list) = case.upload_inputs(&client, &case.inputs());
    let forward = low_bit_attention(&client, &q, &k, &v, &list, &case.options, formats).unwrap();
    let grad = case.upload(&client, &case.grad_out(), case.out_shape());
    let (out, lse, options) = (&forward.out, &forward.lse, &case.options);
    let rounded = low_bit_attention_backward(
        &client, &q, &k, &v, out, lse, &grad, &list, options, formats,
    );
    let as_is = cubesla::block_sparse_attention_backward(
        &client, &q, &k, &v, out, lse, &grad, &list, options,
    );
    let [rounded, as_is] = [rounded, as_is].map(|grads| {
        let dk = wide(&download(&client, &grads.unwrap().dk).unwrap());
        let mut sums = vec![0.0; case.head_dim];
        for row in dk.chunks_exact(case.head_dim) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        plain::norm(&sums) / plain::norm(&dk)
    });
    assert!(rounded < 1e-5, "{rounded:.2e}");
    assert!(as_is > 10.0 * rounded, "{as_is:.2e} beside {rounded:.2e}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn any_lengths(query_len in 1..150usize, key_len in 1..150usize, seed in any::<u64>()) {
        check(&AttentionCase { query_len, key_len, seed, ..AttentionCase::default() });
    }
}

#[test]
fn bad_arguments_are_named() {
    let client = client();
    let case = AttentionCase::default();
    let ([q, k, v], list) = case.upload_inputs(&client, &case.inputs());
    let grad = case.upload(&client, &case.grad_out(), case.out_shape());
    let [batch, heads, len, _] = case.q_shape();
    let short = vec![0.0; batch * heads * (len - 1)];
    let short = upload(&client, &short, [batch, heads, len - 1], DType::F32).unwrap();
    let refused = low_bit_attention_backward(
        &client,
        &q,
        &k,
        &v,
        &grad,
        &short,
        &grad,
        &list,
        &case.options,
        FORMATS[1],
    );
    let Err(Error::Problem(ProblemError::ShapeMismatch { argument, .. })) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(argument, "lse");
}
