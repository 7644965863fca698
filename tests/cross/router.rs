//! Pooled scores and the lists made from them.

use cubesla::{
    AttentionOptions, AttentionProblem, Causal, DType, Error, HostBlockList, ProblemError,
    RouterOptions, RouterWeights, Routing, download, mean_pool, pooled_scores, route, upload,
};
use cubesla_reference::router::{self, Block};
use cubesla_reference::{Tensor, relative_error};
use harness::case::wide;
use harness::{AttentionCase, Rng, client, dtypes};
use proptest::prelude::*;

/// Scores of `case`, from the device and from the reference; `weights` are `[Wq, Wk]`.
fn scores(case: &AttentionCase, weights: Option<[&[f32]; 2]>) -> (Vec<f32>, Tensor) {
    let client = client();
    let inputs = case.inputs();
    let ([q, k, v], _) = case.upload_inputs(&client, &inputs);
    let problem = AttentionProblem::new(&q, &k, &v, &case.options).unwrap();
    let dim = case.head_dim;
    let on_device =
        weights.map(|pair| pair.map(|w| upload(&client, w, [dim, dim], DType::F32).unwrap()));
    let router_weights = on_device.as_ref().map(|[wq, wk]| RouterWeights { wq, wk });
    let found = pooled_scores(&client, &problem, &q, &k, router_weights).unwrap();
    assert_eq!(found.shape(), case.list_shape());

    let ([q, k, _], _) = case.reference_inputs(&inputs);
    let mut pooled_q = router::mean_pool(&q, case.options.block_q);
    let mut pooled_k = router::mean_pool(&router::smooth(&k), case.options.block_k);
    if let Some([wq, wk]) = weights {
        let matrix = |w: &[f32]| Tensor::new([1, 1, dim, dim], wide(w));
        pooled_q = router::project(&pooled_q, &matrix(wq));
        pooled_k = router::project(&pooled_k, &matrix(wk));
    }
    let expected = router::scores(&pooled_q, &pooled_k, case.scale());
    (download(&client, &found).unwrap(), expected)
}

fn check_scores(case: AttentionCase, weights: Option<[&[f32]; 2]>) {
    for dtype in dtypes(&client()) {
        let case = AttentionCase { dtype, ..case };
        let (found, expected) = scores(&case, weights);
        // Inputs are exact in every type, and scores are f32 whatever it is.
        let error = relative_error(&wide(&found), expected.data());
        assert!(error <= 1e-5, "{error:.2e} in {case:?}");
    }
}

#[test]
fn pooled_means() {
    let client = client();
    for dtype in dtypes(&client) {
        for (dim, len, block) in [(32, 77, 32), (72, 1, 16), (256, 300, 128), (8, 65, 64)] {
            let case = AttentionCase {
                dtype,
                strided: len == 77,
                ..AttentionCase::default()
            };
            let shape = [2, 3, len, dim];
            let data = Rng::new(4).normals(shape.iter().product(), dtype);
            let x = case.upload(&client, &data, shape);
            let found = mean_pool(&client, &x, block).unwrap();
            let expected = router::mean_pool(&Tensor::new(shape, wide(&data)), block);
            assert_eq!(found.shape(), expected.shape());
            let error = relative_error(&wide(&download(&client, &found).unwrap()), expected.data());
            assert!(
                error <= 1e-6,
                "{error:.2e} for {dtype} {shape:?} by {block}"
            );
        }
    }
}

#[test]
fn scores_of_irregular_shapes() {
    check_scores(AttentionCase::default(), None);
    check_scores(
        AttentionCase {
            batch: 2,
            query_heads: 4,
            kv_heads: 2,
            query_len: 300,
            key_len: 1000,
            head_dim: 72,
            strided: true,
            ..AttentionCase::default()
        },
        None,
    );
}

#[test]
fn keys_with_a_large_mean() {
    // Smoothing removes what all keys share; f32 sums must survive it.
    let client = client();
    let case = AttentionCase::default();
    let mut inputs = case.inputs();
    for row in inputs.k.chunks_mut(case.head_dim) {
        for (d, x) in row.iter_mut().enumerate() {
            *x += 20.0 * (d as f32).sin();
        }
    }
    let ([q, k, v], _) = case.upload_inputs(&client, &inputs);
    let problem = AttentionProblem::new(&q, &k, &v, &case.options).unwrap();
    let found = pooled_scores(&client, &problem, &q, &k, None).unwrap();
    let ([q, k, _], _) = case.reference_inputs(&inputs);
    let pooled_k = router::mean_pool(&router::smooth(&k), 32);
    let expected = router::scores(&router::mean_pool(&q, 32), &pooled_k, case.scale());
    let error = relative_error(&wide(&download(&client, &found).unwrap()), expected.data());
    assert!(error <= 1e-4, "{error:.2e}");
}

#[test]
fn learned_projections() {
    let mut rng = Rng::new(9);
    for head_dim in [32, 72, 256] {
        let case = AttentionCase {
            batch: 2,
            head_dim,
            ..AttentionCase::default()
        };
        let mut matrix = || -> Vec<f32> {
            let values = rng.normals(head_dim * head_dim, DType::F32);
            values
                .iter()
                .map(|x| x / (head_dim as f32).sqrt())
                .collect()
        };
        let (wq, wk) = (matrix(), matrix());
        check_scores(case, Some([&wq, &wk]));
    }
}

#[test]
fn identity_projections_are_the_heuristic_router() {
    let case = AttentionCase::default();
    let identity: Vec<f32> = (0..32 * 32).map(|at| f32::from(at % 33 == 0)).collect();
    assert_eq!(
        scores(&case, Some([&identity, &identity])).0,
        scores(&case, None).0
    );
}

/// Routes `case` and checks the lists against the reference's ranking of the same scores.
fn check_route(
    case: &AttentionCase,
    options: RouterOptions<'_>,
    critical: usize,
    negligible: usize,
) {
    let client = client();
    let inputs = case.inputs();
    let ([q, k, _], _) = case.upload_inputs(&client, &inputs);
    let routing = route(&client, &q, &k, &case.options, &options).unwrap();
    let scores = download(&client, &routing.scores).unwrap();
    let lists = HostBlockList::download(&client, &routing.critical).unwrap();
    let negligible_lists = routing
        .negligible
        .as_ref()
        .map(|list| HostBlockList::download(&client, list).unwrap());
    assert_eq!(negligible_lists.is_some(), negligible > 0);
    let blocks = case.list_shape()[3];
    for (r, row) in scores.chunks(blocks).enumerate() {
        let map = router::map_row(&wide(row), critical, negligible);
        for (j, block) in map.iter().enumerate() {
            let j = j as u32;
            let found = if lists.row(r).contains(&j) {
                Block::Critical
            } else if negligible_lists
                .as_ref()
                .is_some_and(|lists| lists.row(r).contains(&j))
            {
                Block::Negligible
            } else {
                Block::Marginal
            };
            assert_eq!(found, *block, "block {j} of row {r} of {case:?}");
        }
    }
}

#[test]
fn routed_lists() {
    let case = AttentionCase {
        query_heads: 4,
        kv_heads: 2,
        key_len: 700,
        ..AttentionCase::default()
    };
    let with = |critical, negligible| RouterOptions {
        critical,
        negligible,
        ..RouterOptions::sla()
    };
    // 22 blocks of keys.
    check_route(&case, RouterOptions::sla(), 1, 2);
    check_route(&case, RouterOptions::sla2(), 1, 0);
    check_route(&case, with(0.0, 0.0), 1, 0);
    check_route(&case, with(1.0, 1.0), 22, 0);
    check_route(&case, with(0.5, 0.9), 11, 11);
    check_route(&case, with(0.25, 0.25), 5, 5);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn any_routing(
        (kv_heads, group) in (1..3usize, 1..3usize),
        query_len in 1..200usize,
        key_len in 1..2000usize,
        critical in 0.0..1.0f64,
        negligible in 0.0..1.0f64,
        seed in any::<u64>(),
    ) {
        let case = AttentionCase {
            query_heads: kv_heads * group,
            kv_heads,
            query_len,
            key_len,
            seed,
            ..AttentionCase::default()
        };
        let blocks = key_len.div_ceil(32);
        let count = router::critical_count(critical, blocks);
        let options = RouterOptions { critical, negligible, ..RouterOptions::sla() };
        check_route(&case, options, count, router::negligible_count(negligible, blocks, count));
    }
}

#[test]
fn mass_and_count_together() {
    let client = client();
    let case = AttentionCase {
        key_len: 640,
        spread: 3.0,
        ..AttentionCase::default()
    };
    let inputs = case.inputs();
    let ([q, k, _], _) = case.upload_inputs(&client, &inputs);
    let options = RouterOptions {
        critical: 0.1,
        mass: Some(0.8),
        negligible: 0.2,
        ..RouterOptions::sla()
    };
    let Routing {
        critical, scores, ..
    } = route(&client, &q, &k, &case.options, &options).unwrap();
    let lists = HostBlockList::download(&client, &critical).unwrap();
    for (r, row) in download(&client, &scores).unwrap().chunks(20).enumerate() {
        let row = wide(row);
        let count = router::top_p_count(&row, f64::from(0.8f32), 2, 16);
        let expected: Vec<u32> = router::top_k(&row, count)
            .iter()
            .map(|&j| j as u32)
            .collect();
        assert_eq!(lists.row(r), expected, "row {r}");
    }
}

#[test]
fn two_routings_are_equal() {
    let client = client();
    let case = AttentionCase {
        key_len: 5000,
        ..AttentionCase::default()
    };
    let inputs = case.inputs();
    let run = || {
        let ([q, k, _], _) = case.upload_inputs(&client, &inputs);
        let routing = route(&client, &q, &k, &case.options, &RouterOptions::sla()).unwrap();
        (
            HostBlockList::download(&client, &routing.critical).unwrap(),
            download(&client, &routing.scores).unwrap(),
        )
    };
    assert_eq!(run(), run());
}

#[test]
fn a_block_with_a_nan_is_the_last_choice_and_spoils_no_other() {
    let client = client();
    let case = AttentionCase {
        key_len: 320,
        ..AttentionCase::default()
    };
    let mut inputs = case.inputs();
    inputs.k[140 * case.head_dim + 3] = f32::NAN;
    let ([q, k, _], _) = case.upload_inputs(&client, &inputs);
    let options = RouterOptions {
        critical: 0.9,
        negligible: 0.1,
        ..RouterOptions::sla()
    };
    let routing = route(&client, &q, &k, &case.options, &options).unwrap();
    for row in download(&client, &routing.scores).unwrap().chunks(10) {
        assert!(
            row.iter().enumerate().all(|(j, x)| x.is_nan() == (j == 4)),
            "{row:?}"
        );
    }
    let critical = HostBlockList::download(&client, &routing.critical).unwrap();
    let negligible = HostBlockList::download(&client, &routing.negligible.unwrap()).unwrap();
    for r in 0..critical.rows().len() {
        assert_eq!(critical.row(r), [0, 1, 2, 3, 5, 6, 7, 8, 9], "row {r}");
        assert_eq!(negligible.row(r), [4], "row {r}");
    }
}

#[test]
fn bad_routers_are_refused() {
    let client = client();
    let case = AttentionCase::default();
    let ([q, k, _], _) = case.upload_inputs(&client, &case.inputs());
    let refusal = |attention: AttentionOptions, options: RouterOptions<'_>| match route(
        &client, &q, &k, &attention, &options,
    ) {
        Err(Error::Problem(refusal)) => refusal.to_string(),
        other => panic!("{other:?} instead of a refusal"),
    };
    for ratio in [-0.1, 1.5, f64::NAN] {
        let options = RouterOptions {
            critical: ratio,
            ..RouterOptions::sla()
        };
        assert!(refusal(case.options, options).contains("`critical`"));
        let options = RouterOptions {
            negligible: ratio,
            ..RouterOptions::sla()
        };
        assert!(refusal(case.options, options).contains("`negligible`"));
    }
    for mass in [0.0, 1.01, f32::NAN] {
        let options = RouterOptions {
            mass: Some(mass),
            ..RouterOptions::sla()
        };
        assert!(refusal(case.options, options).contains("mass"));
    }
    let causal = AttentionOptions {
        causal: Causal::TopLeft,
        ..case.options
    };
    assert!(refusal(causal, RouterOptions::sla()).contains("causal"));

    let right = upload(&client, &[0.0; 32 * 32], [32, 32], DType::F32).unwrap();
    let narrow = upload(&client, &[0.0; 32 * 24], [32, 24], DType::F32).unwrap();
    let half = upload(&client, &[0.0; 32 * 32], [32, 32], DType::F16).unwrap();
    for (wq, wk, names) in [(&narrow, &right, "`wq`"), (&right, &half, "`wk`")] {
        let options = RouterOptions {
            weights: Some(RouterWeights { wq, wk }),
            ..RouterOptions::sla2()
        };
        let text = refusal(case.options, options);
        assert!(text.contains(names), "{text}");
    }
    let refused = mean_pool(&client, &q, 0);
    assert!(matches!(
        refused,
        Err(ProblemError::Count {
            argument: "block",
            ..
        })
    ));
}
