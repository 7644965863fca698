use burn_core::tensor::Tensor;
use cubesla_burn::{
    AttentionOptions, Error, FeatureMap, RouterWeights, SlaVariant, SparseLinearAttentionConfig,
    router_scores, sla2_soft, soft_top_k, try_router_scores, try_sla2_soft,
};

use crate::common::{assert_close, backward, constant, device, gradient, heads, leaf, noise};
use crate::formula::{self, BLOCK, repeat_heads};

const LENS: [usize; 2] = [64, 96];
const BLOCKS: [usize; 2] = [2, 6];

fn options() -> AttentionOptions {
    AttentionOptions {
        block_q: BLOCK[0],
        block_k: BLOCK[1],
        ..AttentionOptions::default()
    }
}

/// The weight of each element's block.
fn of_elements(weights: Tensor<4>) -> Tensor<4> {
    let [batch, heads, rows, columns] = weights.dims();
    weights
        .reshape([batch * heads, rows, 1, columns])
        .repeat_dim(2, BLOCK[0])
        .reshape([batch * heads, rows * BLOCK[0], columns, 1])
        .repeat_dim(3, BLOCK[1])
        .reshape([batch, heads, LENS[0], LENS[1]])
}

/// SLA2 with a soft mask in Burn's operations, a logit to a head.
fn formula(
    [q, k, v]: [Tensor<4>; 3],
    weights: Tensor<4>,
    logit: Tensor<2>,
    phi: FeatureMap,
) -> Tensor<4> {
    let [_, heads, _, dim] = q.dims();
    let m = of_elements(weights);
    let (k, v) = (repeat_heads(k, heads), repeat_heads(v, heads));
    let scores = q.clone().matmul(k.clone().transpose()) / (dim as f64).sqrt();
    let p = m.clone() * scores.exp();
    let sparse = p.clone().matmul(v.clone()) / p.sum_dim(3);
    let u = formula::features(q, phi).matmul(formula::features(k, phi).transpose());
    let u = (-m + 1.0) * u;
    let linear = u.clone().matmul(v) / u.sum_dim(3);
    let a = burn_core::tensor::activation::sigmoid(logit).reshape([1, heads, 1, 1]);
    a.clone() * sparse + (-a + 1.0) * linear
}

#[test]
fn soft_masks_and_all_gradients_are_the_formulas() {
    let device = device().autodiff();
    for phi in [FeatureMap::Softmax, FeatureMap::EluPlusOne] {
        let q = leaf(heads([1, 4, LENS[0], 32], 1, &device));
        let k = leaf(heads([1, 2, LENS[1], 32], 2, &device));
        let v = leaf(heads([1, 2, LENS[1], 40], 3, &device));
        let weights = noise([1, 4, BLOCKS[0], BLOCKS[1]], 4, &device);
        let weights = leaf(weights * 0.45 + 0.5);
        let logit = leaf(noise([4, 1], 5, &device));
        let out = sla2_soft(
            q.clone(),
            k.clone(),
            v.clone(),
            weights.clone(),
            logit.clone(),
            &options(),
            phi,
        );
        let inputs = [q.clone(), k.clone(), v.clone()];
        let expected = formula(inputs, weights.clone(), logit.clone(), phi);
        assert_close("out", out.clone(), expected.clone(), 1e-5);
        let (found, expected) = (backward(out, 6), backward(expected, 6));
        for (what, leaf) in [("dq", &q), ("dk", &k), ("dv", &v), ("dm", &weights)] {
            let (found, expected) = (gradient(leaf, &found), gradient(leaf, &expected));
            assert_close(what, found, expected, 2e-5);
        }
        let (found, expected) = (gradient(&logit, &found), gradient(&logit, &expected));
        assert_close("dlogit", found, expected, 2e-5);
    }
}

#[test]
fn untracked_gives_the_same_as_tracked() {
    let device = device().autodiff();
    let [q, k, v] = [LENS[0], LENS[1], LENS[1]].map(|len| heads([1, 2, len, 32], 1, &device));
    let weights = noise([1, 2, BLOCKS[0], BLOCKS[1]], 4, &device) * 0.4 + 0.5;
    let run = |weights: Tensor<4>| {
        let logit = Tensor::zeros([1, 1], &device);
        let (q, k, v) = (q.clone(), k.clone(), v.clone());
        sla2_soft(q, k, v, weights, logit, &options(), FeatureMap::Relu).into_data()
    };
    run(constant(&weights)).assert_eq(&run(leaf(weights)), true);
}

#[test]
fn a_routers_gradients_are_the_formulas() {
    let device = device().autodiff();
    let q = heads([2, 4, LENS[0], 32], 1, &device);
    let k = heads([2, 2, LENS[1], 32], 2, &device);
    let [wq, wk] = [3, 4].map(|seed| leaf(noise([32, 32], seed, &device)));
    let weights = RouterWeights {
        proj_q: wq.clone(),
        proj_k: wk.clone(),
    };
    let scores = router_scores(q.clone(), k.clone(), &weights, &options());
    let pooled = |x: Tensor<4>, block: usize| {
        let [batch, heads, len, dim] = x.dims();
        x.reshape([batch * heads, len / block, block, dim])
            .mean_dim(2)
            .reshape([batch, heads, len / block, dim])
    };
    let smooth = k.clone() - k.mean_dim(2);
    let a = pooled(q, BLOCK[0]).matmul(wq.clone().reshape([1, 1, 32, 32]));
    let b = pooled(smooth, BLOCK[1]).matmul(wk.clone().reshape([1, 1, 32, 32]));
    let expected = a.matmul(repeat_heads(b, 4).transpose()) / 32f64.sqrt();
    assert_close("scores", scores.clone(), expected.clone(), 1e-5);
    // Through the soft selection that training has between scores and loss.
    let [found, expected] =
        [scores, expected].map(|scores| backward(soft_top_k(scores, 0.1, 0.4), 5));
    for (what, leaf) in [("dwq", &wq), ("dwk", &wk)] {
        let (found, expected) = (gradient(leaf, &found), gradient(leaf, &expected));
        assert_close(what, found, expected, 1e-3);
    }
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let device = device().autodiff();
    let [q, k, v] = [LENS[0], LENS[1], LENS[1]].map(|len| heads([1, 2, len, 32], 1, &device));
    let weights = RouterWeights {
        proj_q: Tensor::eye(32, &device),
        proj_k: Tensor::eye(32, &device),
    };
    let error = try_router_scores(leaf(q.clone()), k.clone(), &weights, &options()).unwrap_err();
    let named = matches!(error, Error::NotDifferentiable { argument: "q", .. });
    assert!(named, "{error}");
    let m = Tensor::ones([1, 2, 2, 5], &device);
    let logit = Tensor::zeros([1, 1], &device);
    let error = try_sla2_soft(
        q.clone(),
        k.clone(),
        v.clone(),
        m,
        logit,
        &options(),
        FeatureMap::Softmax,
    )
    .unwrap_err();
    assert!(error.to_string().contains("`weights`"), "{error}");

    let good = SparseLinearAttentionConfig::new(32)
        .with_block_q(BLOCK[0])
        .with_block_k(BLOCK[1])
        .with_critical(0.3)
        .with_router_weights(true);
    for (config, hint) in [
        (good.clone().with_variant(SlaVariant::Sla), "Sla2"),
        (good.clone().with_mass(Some(0.9)), "mass"),
        (good.clone().with_negligible(Some(0.1)), "negligible"),
        (
            good.clone()
                .with_linear(cubesla_burn::LinearModeConfig::Global),
            "Complement",
        ),
        (good.clone().with_router_weights(false), "router_weights"),
    ] {
        let module = config.init(&device);
        let error = module
            .try_forward_soft(q.clone(), k.clone(), v.clone(), 0.1)
            .unwrap_err();
        let first_stage = matches!(error, Error::FirstStage { .. });
        assert!(first_stage && error.to_string().contains(hint), "{error}");
    }
    let module = good.init(&device);
    assert!(module.try_forward_soft(q, k, v, 0.1).is_ok());
}
