//! SLA and SLA2 with a sparse branch in low bits, and the backward of training with it.

use cubesla::{AttentionOptions, LinearMode, Precision};
use cubesla_reference::attention::{Causal, Forward};
use cubesla_reference::{Tensor, linear, low_bit, relative_error};
use harness::case::{exact, wide};
use harness::low_bit::reference_formats;
use harness::sla::{Combine, reference_phi};
use harness::{AttentionCase, Lists, SlaCase, client, dtypes, plain};
use proptest::prelude::*;

const PRECISIONS: [Precision; 3] = [Precision::Int8, Precision::Int8Fp8, Precision::Fp8];

/// The sparse branch by the low-bit reference, within what rounding makes; the linear branch and the combination by the error rules, whatever the sparse branch gave;
/// gradients by the error rules, for the forward that there was.
fn check(case: SlaCase) {
    let client = client();
    for dtype in dtypes(&client) {
        for precision in PRECISIONS {
            let case = SlaCase { precision, ..case }.with_dtype(dtype);
            let inputs = case.inputs();
            let outputs = case.run(&client, &inputs, true);
            let unsaved = case.run(&client, &inputs, false);
            assert_eq!(outputs.out, unsaved.out, "saving changes {case:?}");
            let shape = case.attention.out_shape();
            let [sparse, branch, lse] = outputs.saved.expect("it was asked for");
            let (sparse, branch) = (exact(&sparse, shape), exact(&branch, shape));
            let lse = Tensor::new([shape[0], shape[1], shape[2], 1], wide(&lse));

            let ([q, k, v], critical) = case.attention.reference_inputs(&inputs);
            let (scale, none) = (case.attention.scale(), Causal::None);
            let low = reference_formats(precision.formats().expect("low bits"));
            let low = low_bit::forward(&q, &k, &v, &critical, scale, none, low);
            let near = |what: &str, found: &Tensor, exact: &Tensor, bound: f64| {
                let error = relative_error(found.data(), exact.data());
                assert!(
                    error <= bound,
                    "{what}: {error:.2e} > {bound:.2e} in {case:?}"
                );
            };
            // FP8 weights are rounded relative to another maximum; 16-bit ones have their own rounding.
            let bound = match precision {
                Precision::Int8 => 8e-3,
                _ => 0.045,
            };
            near("sparse", &sparse, &low.out, bound);
            near("lse", &lse, &low.lse, 1e-3);
            let (phi, marginal) = (reference_phi(case.phi), case.linear_weights(&inputs));
            let exact_branch = linear::forward(&q, &k, &v, phi, &marginal, none);
            let plain_branch = plain::linear(&q, &k, &v, phi, &marginal, none, dtype);
            let bound = plain::bound(&plain_branch, &exact_branch, dtype);
            near("linear", &branch, &exact_branch, bound);
            let combined = case.combined(&sparse, &exact_branch);
            let plain = plain::stored(&case.combined(&sparse, &plain_branch), dtype);
            let bound = plain::bound(&plain, &combined, dtype);
            near("out", &exact(&outputs.out, shape), &combined, bound);

            let grad_out = case.attention.grad_out();
            let gradients = case.run_backward(&client, &inputs, &grad_out);
            let forward = Forward { out: sparse, lse };
            let by = "the public call";
            case.check_gradients_of(&forward, &inputs, &grad_out, &gradients, by);
            let full = SlaCase {
                precision: Precision::Full,
                ..case
            };
            let gradients_as_is = case.run_backward_as(&client, &inputs, &grad_out, full.precision);
            let by = "the papers' backward";
            full.check_gradients_of(&forward, &inputs, &grad_out, &gradients_as_is, by);
            let again = case.run_backward(&client, &inputs, &grad_out);
            assert!(gradients == again, "two runs of {case:?}");
        }
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
fn every_form_of_both_combinations() {
    for combine in [Combine::Sla, Combine::LogitPerBlock] {
        let case = SlaCase {
            combine,
            ..SlaCase::default()
        };
        case.forms().into_iter().for_each(check);
    }
}

#[test]
fn negligible_blocks() {
    for linear in [LinearMode::Complement, LinearMode::Global] {
        for attention in [AttentionCase::default(), few(600)] {
            check(SlaCase {
                attention,
                negligible: Some(0.2),
                linear,
                combine: Combine::LogitPerHead,
                ..SlaCase::default()
            });
        }
    }
}

#[test]
fn no_blocks_and_all_blocks() {
    for lists in [Lists::Empty, Lists::Dense] {
        check(SlaCase {
            attention: AttentionCase {
                lists,
                ..AttentionCase::default()
            },
            ..SlaCase::default()
        });
    }
}

#[test]
fn wide_heads_in_several_batches_and_strides() {
    check(SlaCase {
        attention: AttentionCase {
            batch: 2,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 64,
            value_dim: 40,
            strided: true,
            ..few(300)
        },
        combine: Combine::OneLogit,
        ..SlaCase::default()
    });
}

/// Shapes of Hopper's engine, which is tried in the types that it takes.
#[test]
fn blocks_of_128_and_64() {
    for combine in [Combine::Sla, Combine::LogitPerBlock] {
        for linear in [LinearMode::Complement, LinearMode::Global] {
            check(SlaCase {
                attention: AttentionCase {
                    query_len: 200,
                    head_dim: 64,
                    value_dim: 64,
                    options: AttentionOptions::default(),
                    ..few(421)
                },
                combine,
                linear,
                ..SlaCase::default()
            });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn any_lengths(query_len in 1..100usize, key_len in 9..300usize, seed in any::<u64>()) {
        let attention = AttentionCase { query_len, key_len, seed, ..few(key_len) };
        check(SlaCase { attention, ..SlaCase::default() });
    }
}
