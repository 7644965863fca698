use burn_core::config::Config;
use burn_core::module::Module;
use burn_core::tensor::{Bool, Tensor};
use burn_nn::attention::MultiHeadAttentionConfig;
use cubesla_burn::{
    Error, FeatureMapConfig, LinearAttentionConfig, SlaMhaInput, SlaMultiHeadAttentionConfig,
    SlaVariant, SparseLinearAttentionConfig,
};

use crate::common::{assert_close, device, heads, leaf, noise};

fn small() -> SparseLinearAttentionConfig {
    SparseLinearAttentionConfig::new(32)
        .with_block_q(32)
        .with_block_k(16)
        .with_critical(0.4)
}

#[test]
fn sla_starts_as_its_sparse_branch_and_sla2_between_its_branches() {
    let device = device();
    let [q, k, v] = [1, 2, 3].map(|seed| heads([1, 2, 70, 32], seed, &device));
    let sla = small().with_variant(SlaVariant::Sla).init(&device);
    let sparse = sla.forward(q.clone(), k.clone(), v.clone());
    let blocks = sla.try_route(q.clone(), k.clone()).unwrap();
    assert!(sla.alpha_logit.is_none());

    // All weight on the sparse branch.
    let sla2 = small().with_alpha_logit(30.0).init(&device);
    let all = sla2
        .try_forward_with(q.clone(), k.clone(), v.clone(), &blocks)
        .unwrap();
    assert_close("sparse", sparse, all, 1e-5);
    assert!(sla2.proj_l.is_none());
}

#[test]
fn identity_projections_route_as_none() {
    let device = device().autodiff();
    let [q, k, v] = [1, 2, 3].map(|seed| heads([1, 2, 70, 32], seed, &device));
    let plain = small().init(&device);
    let learnable = small().with_router_weights(true).init(&device);
    let found = learnable.forward(q.clone(), k.clone(), v.clone());
    let expected = plain.forward(q.clone(), k.clone(), v.clone());
    assert_close("out", found, expected, 1e-6);

    let mut tracked = learnable;
    let proj_q = tracked.proj_q.take().expect("the router has weights");
    tracked.proj_q = Some(burn_nn::Linear {
        weight: proj_q.weight.set_require_grad(true),
        bias: None,
    });
    let error = tracked.try_forward(leaf(q), k, v).unwrap_err();
    assert!(
        matches!(
            error,
            Error::NotDifferentiable {
                argument: "proj_q",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn linear_attention_is_the_function() {
    let device = device();
    let [q, k, v] = [1, 2, 3].map(|seed| heads([1, 2, 40, 32], seed, &device));
    let config = LinearAttentionConfig::new().with_feature_map(FeatureMapConfig::EluPlusOne);
    let found = config.init().forward(q.clone(), k.clone(), v.clone());
    let phi = cubesla_burn::FeatureMap::EluPlusOne;
    assert_close(
        "out",
        found,
        cubesla_burn::linear_attention(q, k, v, phi, false),
        1e-7,
    );
}

/// With every block critical and all weight on them it is Burn's multi-head attention.
#[test]
fn multi_head_attention_takes_the_place_of_burns() {
    let device = device();
    let burns = MultiHeadAttentionConfig::new(64, 2)
        .with_dropout(0.0)
        .init(&device);
    let dense = small().with_critical(1.0).with_alpha_logit(30.0);
    let ours = SlaMultiHeadAttentionConfig::new(64, 2)
        .with_attention(Some(dense))
        .init(&device);
    let ours = ours.load_record(burns.clone().into_record().allow_partial(true));

    let x = noise([2, 50, 64], 1, &device);
    let expected = burns.forward(burn_nn::attention::MhaInput::self_attn(x.clone()));
    let found = ours.forward(SlaMhaInput::self_attn(x));
    assert_close("context", found.context, expected.context, 1e-4);
}

#[test]
fn masks_and_other_features_are_refused() {
    let device = device();
    let mha = SlaMultiHeadAttentionConfig::new(64, 2).init(&device);
    let input = SlaMhaInput::self_attn(noise([1, 20, 64], 1, &device));
    let mask = Tensor::<2, Bool>::full([1, 20], false, &device);
    let error = mha.try_forward(input.clone().mask_pad(mask)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Mask {
                mask: "mask_pad",
                ..
            }
        ),
        "{error}"
    );
    let mask = Tensor::<3, Bool>::full([1, 20, 20], false, &device);
    let error = mha.try_forward(input.mask_attn(mask)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Mask {
                mask: "mask_attn",
                ..
            }
        ),
        "{error}"
    );
    let input = SlaMhaInput::self_attn(noise([1, 20, 32], 1, &device));
    let error = mha.try_forward(input).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Input {
                argument: "query",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_configuration_survives_a_file() {
    let config = small().with_variant(SlaVariant::Sla).with_mass(Some(0.9));
    let path = std::env::temp_dir().join(format!("cubesla-burn-{}.json", std::process::id()));
    config.save(&path).unwrap();
    let loaded = SparseLinearAttentionConfig::load(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    assert_eq!(config.to_string(), loaded.to_string());
}
