//! Linear attention on its own.

use cubesla::{
    DType, DeviceTensor, Error, FeatureMap, ProblemError, download, feature_rows, linear_attention,
    upload,
};
use cubesla_reference::attention::Causal;
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::{Tensor, linear, relative_error};
use harness::case::wide;
use harness::sla::{poison, reference_phi};
use harness::{AttentionCase, SlaCase, client, dtypes, plain};
use proptest::prelude::*;

/// Runs `case`, whose lists do not matter here.
fn run(case: &SlaCase, causal: bool) -> Vec<f32> {
    let client = client();
    let inputs = case.inputs();
    let ([q, k, v], _) = case.attention.upload_inputs(&client, &inputs);
    poison(
        &client,
        case.attention.q_shape().iter().product::<usize>() * 4,
    );
    let out = linear_attention(&client, &q, &k, &v, case.phi, causal).expect("a valid call");
    download(&client, &out).unwrap()
}

/// Checks one case in every type that the device has.
fn check(attention: AttentionCase, phi: FeatureMap, causal: bool) {
    for dtype in dtypes(&client()) {
        let case = SlaCase {
            attention: AttentionCase { dtype, ..attention },
            phi,
            ..SlaCase::default()
        };
        let found = run(&case, causal);
        let ([q, k, v], _) = case.attention.reference_inputs(&case.inputs());
        let [b, h, m, _] = q.shape();
        let dense = BlockWeights::dense([b, h, m, k.shape()[2]], 1, 1);
        let mask = if causal {
            Causal::TopLeft
        } else {
            Causal::None
        };
        let exact = linear::forward(&q, &k, &v, reference_phi(phi), &dense, mask);
        let plain = plain::linear(&q, &k, &v, reference_phi(phi), &dense, mask, dtype);
        let error = relative_error(&wide(&found), exact.data());
        let bound = plain::bound(&plain, &exact, dtype);
        assert!(
            error <= bound,
            "{error:.2e} > {bound:.2e} in {case:?}, causal: {causal}"
        );
    }
}

#[test]
fn every_feature_map() {
    for phi in FeatureMap::ALL {
        for causal in [false, true] {
            check(
                AttentionCase {
                    key_len: 77,
                    ..AttentionCase::default()
                },
                phi,
                causal,
            );
        }
    }
}

#[test]
fn head_dimensions() {
    for (head_dim, value_dim) in [(32, 96), (40, 40), (72, 160), (128, 128), (256, 256)] {
        for causal in [false, true] {
            check(
                AttentionCase {
                    query_len: 40,
                    key_len: 40,
                    head_dim,
                    value_dim,
                    ..AttentionCase::default()
                },
                FeatureMap::Softmax,
                causal,
            );
        }
    }
}

#[test]
fn lengths() {
    for (query_len, key_len) in [(1, 1), (63, 1), (1, 300), (130, 700)] {
        let case = AttentionCase {
            query_len,
            key_len,
            ..AttentionCase::default()
        };
        check(case, FeatureMap::EluPlusOne, false);
    }
    for len in [1, 63, 128, 129, 300] {
        let case = AttentionCase {
            query_heads: 1,
            query_len: len,
            key_len: len,
            ..AttentionCase::default()
        };
        check(case, FeatureMap::EluPlusOne, true);
    }
}

#[test]
fn grouped_heads_and_strides() {
    for causal in [false, true] {
        check(
            AttentionCase {
                batch: 2,
                query_heads: 4,
                kv_heads: 2,
                query_len: 90,
                key_len: 90,
                strided: true,
                ..AttentionCase::default()
            },
            FeatureMap::Softmax,
            causal,
        );
    }
}

#[test]
fn rows_without_weight_are_zero() {
    // relu of a negative query has no features.
    let client = client();
    let tensor = |value: f32| upload(&client, &[value; 32 * 32], [1, 1, 32, 32], DType::F32);
    let (q, k) = (tensor(-1.0).unwrap(), tensor(1.0).unwrap());
    for causal in [false, true] {
        let out = linear_attention(&client, &q, &k, &k, FeatureMap::Relu, causal).unwrap();
        assert!(download(&client, &out).unwrap().iter().all(|&x| x == 0.0));
    }
}

#[test]
fn two_runs_are_bit_equal() {
    for dtype in dtypes(&client()) {
        let case = SlaCase {
            attention: AttentionCase {
                dtype,
                key_len: 1000,
                ..AttentionCase::default()
            },
            ..SlaCase::default()
        };
        assert_eq!(run(&case, false), run(&case, false));
    }
}

#[test]
fn the_future_does_not_matter() {
    let case = SlaCase {
        attention: AttentionCase {
            query_heads: 1,
            query_len: 200,
            key_len: 200,
            ..AttentionCase::default()
        },
        ..SlaCase::default()
    };
    let client = client();
    let mut inputs = case.inputs();
    let call = |inputs: &harness::case::Inputs| {
        let ([q, k, v], _) = case.attention.upload_inputs(&client, inputs);
        let out = linear_attention(&client, &q, &k, &v, case.phi, true).unwrap();
        download(&client, &out).unwrap()
    };
    let before = call(&inputs);
    for row in 150..200 {
        inputs.v[row * 32..][..32].fill(7.0);
        inputs.k[row * 32..][..32].fill(-3.0);
    }
    let after = call(&inputs);
    assert_eq!(before[..150 * 32], after[..150 * 32]);
    assert_ne!(before[150 * 32..], after[150 * 32..]);
}

#[test]
fn features_of_rows() {
    let client = client();
    for dtype in dtypes(&client) {
        for phi in FeatureMap::ALL {
            for dim in [8, 72, 256] {
                let case = AttentionCase {
                    dtype,
                    strided: true,
                    ..AttentionCase::default()
                };
                let shape = [2, 2, 37, dim];
                let data = harness::Rng::new(2).normals(shape.iter().product(), dtype);
                let x = case.upload(&client, &data, shape);
                let found = download(&client, &feature_rows(&client, &x, phi).unwrap()).unwrap();
                let exact = reference_phi(phi).apply_all(&Tensor::new(shape, wide(&data)));
                let bound = plain::bound(&plain::stored(&exact, dtype), &exact, dtype);
                let error = relative_error(&wide(&found), exact.data());
                assert!(
                    error <= bound,
                    "{error:.2e} > {bound:.2e}: {phi:?} {dtype} {dim}"
                );
            }
        }
    }
}

#[test]
fn large_rows_have_softmax_features() {
    let client = client();
    let data: Vec<f32> = (0..64)
        .map(|at| if at % 32 == 5 { 3.0e4 } else { -3.0e4 })
        .collect();
    let x = upload(&client, &data, [1, 1, 2, 32], DType::F32).unwrap();
    let found = download(
        &client,
        &feature_rows(&client, &x, FeatureMap::Softmax).unwrap(),
    )
    .unwrap();
    for (at, &y) in found.iter().enumerate() {
        assert_eq!(y, f32::from(at % 32 == 5));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn any_shape(
        batch in 1..3usize,
        (kv_heads, group) in (1..3usize, 1..3usize),
        query_len in 1..150usize,
        key_len in 1..400usize,
        phi in prop::sample::select(FeatureMap::ALL.to_vec()),
        causal in any::<bool>(),
        strided in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let case = AttentionCase {
            batch,
            query_heads: kv_heads * group,
            kv_heads,
            query_len,
            key_len: if causal { query_len } else { key_len },
            strided,
            seed,
            ..AttentionCase::default()
        };
        check(case, phi, causal);
    }
}

#[test]
fn bad_arguments_are_refused() {
    let client = client();
    let zeros = |shape: [usize; 4]| -> DeviceTensor<4> {
        upload(
            &client,
            &vec![0.0; shape.iter().product()],
            shape,
            DType::F32,
        )
        .unwrap()
    };
    let (q, k) = (zeros([1, 2, 20, 32]), zeros([1, 2, 30, 32]));
    let refused = linear_attention(&client, &q, &k, &k, FeatureMap::Relu, true);
    assert!(matches!(
        refused,
        Err(Error::Problem(ProblemError::ShapeMismatch {
            argument: "k",
            ..
        }))
    ));
    let refused = linear_attention(
        &client,
        &q,
        &zeros([1, 2, 30, 40]),
        &k,
        FeatureMap::Relu,
        false,
    );
    assert!(matches!(
        refused,
        Err(Error::Problem(ProblemError::ShapeMismatch {
            argument: "k",
            ..
        }))
    ));
    let refused = linear_attention(&client, &q, &k, &q, FeatureMap::Relu, false);
    assert!(matches!(
        refused,
        Err(Error::Problem(ProblemError::ShapeMismatch {
            argument: "v",
            ..
        }))
    ));
    let refused = feature_rows(&client, &zeros([1, 1, 4, 12]), FeatureMap::Relu);
    assert!(matches!(
        refused,
        Err(ProblemError::HeadDim {
            argument: "x",
            dim: 12
        })
    ));
}
