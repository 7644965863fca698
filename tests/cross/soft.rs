//! SLA2's first training stage: soft masks and the router's gradient.

use cubesla::{
    AttentionOptions, AttentionProblem, Causal, DType, DeviceTensor, Error, FeatureMap,
    RouterWeights, SoftInputs, block_sparse_attention, download, pooled_scores, router_backward,
    sla2_soft_backward, sla2_soft_forward, soft_attention, soft_attention_backward, soft_top_k,
    soft_top_k_backward, upload,
};
use cubesla_reference::blocks::BlockWeights;
use cubesla_reference::{
    Tensor, attention, linear, relative_error, router, sla, soft_top_k as soft,
};
use harness::case::{causal, exact, wide};
use harness::sla::{Combine, reference_phi};
use harness::soft::SoftCase;
use harness::{AttentionCase, Lists, Rng, SlaCase, client, dtypes};
use proptest::prelude::*;

/// Checks `case` in every type that the device has.
fn check(case: SlaCase) {
    let client = client();
    for dtype in dtypes(&client) {
        SoftCase(case.with_dtype(dtype)).check(&client);
    }
}

#[test]
fn every_feature_map() {
    for phi in FeatureMap::ALL {
        check(SlaCase {
            phi,
            ..SlaCase::default()
        });
    }
}

#[test]
fn head_dimensions_and_blocks() {
    for (head_dim, value_dim, block_q, block_k) in [
        (40, 72, 32, 32),
        (64, 64, 128, 64),
        (128, 64, 64, 128),
        (72, 160, 48, 80),
    ] {
        check(SlaCase {
            attention: AttentionCase {
                query_len: 70,
                key_len: 150,
                head_dim,
                value_dim,
                options: AttentionOptions {
                    block_q,
                    block_k,
                    ..AttentionOptions::default()
                },
                ..AttentionCase::default()
            },
            ..SlaCase::default()
        });
    }
}

/// Weights of which some are 0 and some 1, whole rows among them.
fn extreme_weights(case: &AttentionCase) -> Vec<f32> {
    let [_, _, _, blocks] = case.list_shape();
    let mut rng = Rng::new(case.seed ^ 0x0E1);
    let mut weight = |at: usize| match (at / blocks % 5, at % 3) {
        (0, _) => 0.0,
        (1, _) => 1.0,
        (_, 0) => f32::from(u8::from(rng.uniform() < 0.5)),
        (2, _) => 1e-6 * rng.uniform() as f32,
        _ => rng.uniform() as f32,
    };
    let len = case.list_shape().iter().product();
    (0..len).map(&mut weight).collect()
}

/// Blocks that Hopper's engine takes and that it does not.
fn engines_cases() -> Vec<AttentionCase> {
    let case = |dim, block_q, block_k, key_len| AttentionCase {
        query_heads: 4,
        kv_heads: 2,
        query_len: 3 * block_q - 30,
        key_len,
        head_dim: dim,
        value_dim: dim,
        options: AttentionOptions {
            block_q,
            block_k,
            ..AttentionOptions::default()
        },
        ..AttentionCase::default()
    };
    vec![
        case(64, 64, 64, 200),
        // The last tile of the last block lies past the last key.
        case(128, 128, 128, 310),
        case(96, 64, 128, 450),
        case(128, 128, 64, 250),
        case(64, 128, 64, 250),
        case(80, 128, 64, 200),
        case(40, 64, 48, 150),
    ]
}

#[test]
fn extreme_weights_by_every_engine() {
    let client = client();
    for case in engines_cases() {
        for dtype in dtypes(&client) {
            for strided in [false, true] {
                let case = AttentionCase {
                    dtype,
                    strided,
                    ..case
                };
                case.check_soft(&client, &extreme_weights(&case));
            }
        }
    }
}

/// Weights of 1 are dense attention; any other number for all blocks gives the same but for `L`.
#[test]
fn equal_weights_by_every_engine() {
    let client = client();
    let len = |case: &AttentionCase| case.list_shape().iter().product();
    for case in engines_cases() {
        for dtype in dtypes(&client) {
            for weight in [1.0, 1e-20, 1e4] {
                let case = AttentionCase { dtype, ..case };
                case.check_soft(&client, &vec![weight; len(&case)]);
            }
        }
    }
}

#[test]
fn extreme_weights_under_masks() {
    let client = client();
    for causal in [Causal::TopLeft, Causal::BottomRight] {
        for mut case in engines_cases() {
            if case.head_dim % 64 != 0 {
                continue; // Other widths have nothing of their own under a mask.
            }
            case.options.causal = causal;
            for dtype in dtypes(&client) {
                let case = AttentionCase { dtype, ..case };
                // The gradient of a row's only visible block is 0, and what is left of its sum is
                // divided by the weight: a tiny one would leave nothing but rounding errors.
                let mut weights = extreme_weights(&case);
                for weight in &mut weights {
                    *weight = if *weight > 0.0 { weight.max(0.1) } else { 0.0 };
                }
                case.check_soft(&client, &weights);
            }
        }
    }
}

#[test]
fn every_engine_in_both_branches() {
    for attention in engines_cases() {
        check(SlaCase {
            attention,
            ..SlaCase::default()
        });
    }
}

#[test]
fn two_runs_are_bit_equal() {
    let client = client();
    for dtype in dtypes(&client) {
        let case = SoftCase(SlaCase::default().with_dtype(dtype));
        let (inputs, grad_out) = (case.0.inputs(), case.0.attention.grad_out());
        let run = || case.run(&client, &inputs, &grad_out);
        assert!(run() == run(), "{case:?}");
        for case in engines_cases() {
            let case = AttentionCase { dtype, ..case };
            let (inputs, grad_out) = (case.inputs(), case.grad_out());
            let weights = extreme_weights(&case);
            let run = || case.run_soft(&client, &inputs, &weights, &grad_out);
            // Gradients of weights are never NaN, so equality is that of bits but for signs of 0.
            assert!(run() == run(), "{case:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn any_shape(
        batch in 1..3usize,
        (kv_heads, group) in (1..3usize, 1..3usize),
        query_len in 33..100usize,
        // A block alone leaves gradients of weights that are 0, and a few leave errors to chance.
        key_len in 65..160usize,
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
                strided,
                seed,
                ..AttentionCase::default()
            },
            ..SlaCase::default()
        });
    }
}

fn weights_of(case: &AttentionCase, client: &cubesla::Client, values: &[f32]) -> DeviceTensor<4> {
    upload(client, values, case.list_shape(), DType::F32).unwrap()
}

#[test]
fn weights_of_0_and_1_are_a_list() {
    let client = client();
    for lists in [Lists::Random(0.5), Lists::Empty] {
        let case = AttentionCase {
            lists,
            ..AttentionCase::default()
        };
        let inputs = case.inputs();
        let ([q, k, v], list) = case.upload_inputs(&client, &inputs);
        let mask: Vec<f32> = inputs.list.to_mask().into_iter().map(f32::from).collect();
        let mask = weights_of(&case, &client, &mask);
        let options = &case.options;
        let hard = block_sparse_attention(&client, &q, &k, &v, &list, options).unwrap();
        let found = soft_attention(&client, &q, &k, &v, &mask, options).unwrap();
        let read = |x: &DeviceTensor<4>| wide(&download(&client, x).unwrap());
        assert!(relative_error(&read(&found.out), &read(&hard.out)) < 1e-6);
        let (found_lse, lse) = [&found.lse, &hard.lse]
            .map(|x| download(&client, x).unwrap())
            .into();
        assert!(relative_error(&wide(&found_lse), &wide(&lse)) < 1e-6);

        let grad_out = case.grad_out();
        let dout = case.upload(&client, &grad_out, case.out_shape());
        let grads =
            soft_attention_backward(&client, &q, &k, &v, &mask, &found, &dout, options).unwrap();
        let found = [&grads.dq, &grads.dk, &grads.dv].map(|x| download(&client, x).unwrap());
        case.check_gradients(&inputs, &grad_out, &found, "weights of 0 and 1");
        assert!(read(&grads.dweights).iter().all(|x| x.is_finite()));
    }
}

#[test]
fn soft_attention_has_causal_masks_and_large_scores() {
    let client = client();
    for (spread, mask) in [
        (1.0, Causal::TopLeft),
        (1.0, Causal::BottomRight),
        (10.0, Causal::None),
    ] {
        let mut case = AttentionCase {
            query_len: 90,
            key_len: 110,
            spread,
            ..AttentionCase::default()
        };
        case.options.causal = mask;
        let soft = SoftCase(SlaCase {
            attention: case,
            ..SlaCase::default()
        });
        let inputs = case.inputs();
        let ([q, k, v], _) = case.upload_inputs(&client, &inputs);
        let ([rq, rk, rv], hard) = case.reference_inputs(&inputs);
        let values = soft.weights();
        let blocks = BlockWeights {
            weights: exact(&values, case.list_shape()),
            ..hard
        };
        let (scale, mask) = (case.scale(), causal(mask));
        let expected = attention::forward(&rq, &rk, &rv, &blocks, scale, mask);
        let weights = weights_of(&case, &client, &values);
        let found = soft_attention(&client, &q, &k, &v, &weights, &case.options).unwrap();
        let read = |x: &DeviceTensor<4>| wide(&download(&client, x).unwrap());
        assert!(relative_error(&read(&found.out), expected.out.data()) < 1e-5);
        let lse = wide(&download(&client, &found.lse).unwrap());
        assert!(relative_error(&lse, expected.lse.data()) < 1e-5);

        let grad_out = case.grad_out();
        let dout = exact(&grad_out, case.out_shape());
        let grads = attention::backward(&rq, &rk, &rv, &blocks, scale, mask, &expected, &dout);
        let dout = case.upload(&client, &grad_out, case.out_shape());
        let found =
            soft_attention_backward(&client, &q, &k, &v, &weights, &found, &dout, &case.options)
                .unwrap();
        // At ten times the spread scores have ten times ten times the rounding errors.
        let bound = f64::from(spread) * 1e-5;
        for (what, found, exact) in [
            ("dq", &found.dq, &grads.dq),
            ("dk", &found.dk, &grads.dk),
            ("dv", &found.dv, &grads.dv),
            ("dweights", &found.dweights, &grads.dweights),
        ] {
            let error = relative_error(&read(found), exact.data());
            assert!(error <= bound, "{what}: {error:.2e} in {case:?}");
        }
    }
}

#[test]
fn gradients_of_the_projections() {
    let client = client();
    for dtype in dtypes(&client) {
        let case = AttentionCase {
            batch: 2,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 40,
            dtype,
            strided: true,
            ..AttentionCase::default()
        };
        let inputs = case.inputs();
        let ([q, k, _], _) = case.upload_inputs(&client, &inputs);
        let mut rng = Rng::new(9);
        let dim = case.head_dim;
        let [wq, wk] = [(); 2].map(|()| rng.normals(dim * dim, DType::F32));
        let grad = rng.normals(case.list_shape().iter().product(), DType::F32);
        let matrix = |w: &[f32]| upload(&client, w, [dim, dim], DType::F32).unwrap();
        let (dev_wq, dev_wk) = (matrix(&wq), matrix(&wk));
        let weights = RouterWeights {
            wq: &dev_wq,
            wk: &dev_wk,
        };
        let on_device = weights_of(&case, &client, &grad);
        let found = router_backward(&client, &q, &k, weights, &on_device, &case.options).unwrap();

        let ([rq, rk, _], _) = case.reference_inputs(&inputs);
        let qp = router::mean_pool(&rq, case.options.block_q);
        let kp = router::mean_pool(&router::smooth(&rk), case.options.block_k);
        let [wq, wk] = [wq, wk].map(|w| exact(&w, [1, 1, dim, dim]));
        let grad = exact(&grad, case.list_shape());
        let expected = router::scores_backward(&qp, &kp, &wq, &wk, case.scale(), &grad);
        for (found, expected) in [&found.wq, &found.wk].into_iter().zip(&expected) {
            let found = wide(&download(&client, found).unwrap());
            let error = relative_error(&found, expected.data());
            assert!(error < 1e-5, "{error:.2e} in {dtype}");
        }
    }
}

/// The whole first stage: from the loss `sum(O dO)` back to the router's projections.
#[test]
fn from_the_output_to_the_router() {
    let client = client();
    let case = AttentionCase {
        key_len: 200,
        ..AttentionCase::default()
    };
    let sla_case = SlaCase {
        attention: case,
        combine: Combine::OneLogit,
        ..SlaCase::default()
    };
    let (tau, ratio) = (0.1f32, 0.4f32);
    let (inputs, grad_out) = (case.inputs(), case.grad_out());
    let ([q, k, v], _) = case.upload_inputs(&client, &inputs);
    let dim = case.head_dim;
    let mut rng = Rng::new(5);
    let [wq, wk] = [(); 2].map(|()| rng.normals(dim * dim, DType::F32));
    let matrix = |w: &[f32]| upload(&client, w, [dim, dim], DType::F32).unwrap();
    let (dev_wq, dev_wk) = (matrix(&wq), matrix(&wk));
    let router_weights = RouterWeights {
        wq: &dev_wq,
        wk: &dev_wk,
    };
    let problem = AttentionProblem::new(&q, &k, &v, &case.options).unwrap();
    let scores = pooled_scores(&client, &problem, &q, &k, Some(router_weights)).unwrap();
    let weights = soft_top_k(&client, &scores, tau, ratio).unwrap();
    let logits = sla_case.weights().logits;
    let alpha_logit = upload(&client, &logits, [1, 1], DType::F32).unwrap();
    let soft_inputs = SoftInputs {
        q: &q,
        k: &k,
        v: &v,
        weights: &weights,
        alpha_logit: &alpha_logit,
    };
    let (phi, options) = (sla_case.phi, &case.options);
    let forward = sla2_soft_forward(&client, soft_inputs, phi, options).unwrap();
    let dout = case.upload(&client, &grad_out, case.out_shape());
    let grads =
        sla2_soft_backward(&client, soft_inputs, &forward.saved, &dout, phi, options).unwrap();
    let dscores = soft_top_k_backward(&client, &weights, &grads.dweights, tau).unwrap();
    let found = router_backward(&client, &q, &k, router_weights, &dscores, options).unwrap();

    // Central differences of the reference along one direction of each matrix.
    let ([rq, rk, rv], _) = case.reference_inputs(&inputs);
    let qp = router::mean_pool(&rq, options.block_q);
    let kp = router::mean_pool(&router::smooth(&rk), options.block_k);
    let dout = exact(&grad_out, case.out_shape());
    let none = attention::Causal::None;
    let loss = |wq: &Tensor, wk: &Tensor| {
        let (a, b) = (router::project(&qp, wq), router::project(&kp, wk));
        let scores = router::scores(&a, &b, case.scale());
        let [_, heads, rows, columns] = scores.shape();
        let mut m = scores.clone();
        for h in 0..heads {
            for i in 0..rows {
                let total = f64::from(ratio) * columns as f64;
                let row = soft::forward(scores.row(0, h, i), f64::from(tau), total);
                m.row_mut(0, h, i).copy_from_slice(&row);
            }
        }
        let blocks = |weights| BlockWeights {
            block_q: options.block_q,
            block_k: options.block_k,
            weights,
        };
        let rest = blocks(m.map(|m| 1.0 - m));
        let sparse = attention::forward(&rq, &rk, &rv, &blocks(m), case.scale(), none);
        let branch = linear::forward(&rq, &rk, &rv, reference_phi(phi), &rest, none);
        let out = sla::combine_sla2(&sparse.out, &branch, &sla_case.alpha(), options.block_q);
        let pairs = out.data().iter().zip(dout.data());
        pairs.map(|(x, y)| x * y).sum::<f64>()
    };
    let [wq, wk] = [wq, wk].map(|w| exact(&w, [1, 1, dim, dim]));
    let direction = exact(
        &Rng::new(6).normals(dim * dim, DType::F32),
        [1, 1, dim, dim],
    );
    let shifted = |w: &Tensor, step: f64| {
        let pairs = w.data().iter().zip(direction.data());
        Tensor::new(w.shape(), pairs.map(|(x, d)| x + step * d).collect())
    };
    let step = 1e-5;
    let numeric = [
        loss(&shifted(&wq, step), &wk) - loss(&shifted(&wq, -step), &wk),
        loss(&wq, &shifted(&wk, step)) - loss(&wq, &shifted(&wk, -step)),
    ];
    for (found, numeric) in [&found.wq, &found.wk].into_iter().zip(numeric) {
        let found = wide(&download(&client, found).unwrap());
        let pairs = found.iter().zip(direction.data());
        let slope: f64 = pairs.map(|(x, d)| x * d).sum();
        let numeric = numeric / (2.0 * step);
        let size = found.iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!((slope - numeric).abs() < 1e-3 * size, "{slope} {numeric}");
    }
}

#[test]
fn bad_arguments_are_named() {
    let client = client();
    let case = AttentionCase::default();
    let inputs = case.inputs();
    let ([q, k, v], _) = case.upload_inputs(&client, &inputs);
    let [b, h, m, n] = case.list_shape();
    let zeros = |shape: [usize; 4], dtype| {
        upload(&client, &vec![0.0; shape.iter().product()], shape, dtype).unwrap()
    };
    let wrong = [
        zeros([b, h, m, n + 1], DType::F32),
        zeros([b, h, m, n], DType::F16),
        zeros([b, h, n, m], DType::F32).permute([0, 1, 3, 2]),
    ];
    let alpha_logit = upload(&client, &[0.0], [1, 1], DType::F32).unwrap();
    let identity = upload(&client, &[0.0; 32 * 32], [32, 32], DType::F32).unwrap();
    let router = RouterWeights {
        wq: &identity,
        wk: &identity,
    };
    let refused = |error: Error, name: &str| {
        let text = error.to_string();
        assert!(text.contains(name), "{text} does not name {name}");
    };
    let options = &case.options;
    for weights in &wrong {
        let result = soft_attention(&client, &q, &k, &v, weights, options);
        refused(result.unwrap_err(), "`weights`");
        let inputs = SoftInputs {
            q: &q,
            k: &k,
            v: &v,
            weights,
            alpha_logit: &alpha_logit,
        };
        let result = sla2_soft_forward(&client, inputs, FeatureMap::Softmax, options);
        refused(result.unwrap_err(), "`weights`");
        let result = router_backward(&client, &q, &k, router, weights, options);
        refused(result.unwrap_err(), "`grad`");
    }
    let inputs = SoftInputs {
        q: &q,
        k: &k,
        v: &v,
        weights: &zeros([b, h, m, n], DType::F32),
        alpha_logit: &alpha_logit,
    };
    let causal = AttentionOptions {
        causal: Causal::TopLeft,
        ..case.options
    };
    let result = sla2_soft_forward(&client, inputs, FeatureMap::Softmax, &causal);
    refused(result.unwrap_err(), "causal mask");
}
