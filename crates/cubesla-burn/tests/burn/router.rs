use burn_core::tensor::Tensor;
use cubesla_burn::{AttentionOptions, Error, RouterOptions, RouterWeights, route, try_route};

use crate::common::{assert_close, device, heads, leaf, noise};
use crate::formula::repeat_heads;

const BLOCK: usize = 16;

fn attention() -> AttentionOptions {
    AttentionOptions {
        block_q: BLOCK,
        block_k: BLOCK,
        ..AttentionOptions::default()
    }
}

fn options() -> RouterOptions {
    RouterOptions {
        critical: 0.34,
        negligible: 0.2,
        ..RouterOptions::sla()
    }
}

fn pooled(x: Tensor<4>) -> Tensor<4> {
    let [batch, heads, len, dim] = x.dims();
    x.reshape([batch * heads, len / BLOCK, BLOCK, dim])
        .mean_dim(2)
        .reshape([batch, heads, len / BLOCK, dim])
}

#[test]
fn scores_and_lists_are_the_formulas() {
    let device = device();
    let q = heads([2, 4, 64, 32], 1, &device);
    let k = heads([2, 2, 96, 32], 2, &device);
    let weights = [3, 4].map(|seed| noise([32, 32], seed, &device));
    for weights in [None, Some(weights)] {
        let options = RouterOptions {
            weights: weights
                .clone()
                .map(|[proj_q, proj_k]| RouterWeights { proj_q, proj_k }),
            ..options()
        };
        let routing = route(q.clone(), k.clone(), &attention(), &options);

        let mut pooled_q = pooled(q.clone());
        let smooth = k.clone() - k.clone().mean_dim(2);
        let mut pooled_k = pooled(smooth);
        if let Some([wq, wk]) = weights {
            pooled_q = pooled_q.matmul(wq.reshape([1, 1, 32, 32]));
            pooled_k = pooled_k.matmul(wk.reshape([1, 1, 32, 32]));
        }
        let exact = pooled_q.matmul(repeat_heads(pooled_k, 4).transpose()) / 32f64.sqrt();
        assert_close("scores", routing.scores.clone(), exact, 1e-5);

        // Of six blocks 0.34 are two, 0.2 one.
        let blocks = routing.blocks;
        let negligible = blocks.negligible.expect("some are left out");
        assert_eq!((blocks.critical.width(), negligible.width()), (2, 1));
        assert_eq!(blocks.critical.shape(), [2, 4, 4, 6]);
        let scores: Vec<f32> = routing.scores.into_data().try_to_vec().unwrap();
        let lists = [&blocks.critical, &negligible].map(|list| {
            let indices = list.indices().clone().into_data();
            indices.try_to_vec::<i32>().unwrap()
        });
        for (row, scores) in scores.chunks(6).enumerate() {
            let mut order: Vec<i32> = (0..6).collect();
            order.sort_by(|&a, &b| scores[b as usize].total_cmp(&scores[a as usize]));
            order[..2].sort();
            assert_eq!(lists[0][2 * row..2 * row + 2], order[..2], "row {row}");
            assert_eq!(lists[1][row], order[5], "row {row}");
        }
    }
}

#[test]
fn a_mass_leaves_room_for_every_block() {
    let device = device();
    let q = heads([1, 2, 64, 32], 1, &device);
    let k = heads([1, 2, 96, 32], 2, &device);
    let options = RouterOptions {
        mass: Some(0.9),
        ..RouterOptions::sla2()
    };
    let blocks = route(q, k, &attention(), &options).blocks;
    assert!(blocks.negligible.is_none());
    assert_eq!(blocks.critical.width(), 6);
    let counts = blocks.critical.counts().clone().into_data();
    let counts = counts.try_to_vec::<i32>().unwrap();
    assert!(
        counts.iter().all(|count| (1..=6).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn tracked_inputs_route_and_tracked_weights_are_refused() {
    let device = device().autodiff();
    let q = leaf(heads([1, 2, 64, 32], 1, &device));
    let k = leaf(heads([1, 2, 96, 32], 2, &device));
    let routing = route(q.clone(), k.clone(), &attention(), &options());
    assert!(!routing.scores.is_tracked());
    let options = RouterOptions {
        weights: Some(RouterWeights {
            proj_q: noise([32, 32], 3, &device),
            proj_k: leaf(noise([32, 32], 4, &device)),
        }),
        ..options()
    };
    let error = try_route(q, k, &attention(), &options).unwrap_err();
    assert!(
        matches!(
            error,
            Error::NotDifferentiable {
                operation: "route",
                argument: "proj_k",
                ..
            }
        ),
        "{error}"
    );
}
