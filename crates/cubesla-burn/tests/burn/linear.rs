use burn_core::tensor::{Bool, Tensor};
use cubesla_burn::{Error, FeatureMap, linear_attention, try_linear_attention};

use crate::common::{assert_close, backward, constant, device, gradient, heads, leaf};
use crate::formula;

#[test]
fn output_is_the_formulas() {
    let device = device();
    let q = heads([1, 4, 70, 32], 1, &device);
    let k = heads([1, 2, 90, 32], 2, &device);
    let v = heads([1, 2, 90, 40], 3, &device);
    let all = Tensor::<4, Bool>::full([1, 4, 70, 90], true, &device);
    for phi in [FeatureMap::Softmax, FeatureMap::EluPlusOne] {
        let found = linear_attention(q.clone(), k.clone(), v.clone(), phi, false);
        let exact = formula::linear(q.clone(), k.clone(), v.clone(), phi, all.clone());
        assert_close(&format!("{phi:?}"), found, exact, 1e-5);
    }
}

#[test]
fn the_causal_form_sums_up_to_the_query() {
    let device = device();
    let [q, k, v] = [1, 2, 3].map(|seed| heads([1, 2, 70, 32], seed, &device));
    let mask = Tensor::<2, Bool>::tril_mask([70, 70], 0, &device)
        .bool_not()
        .reshape([1, 1, 70, 70])
        .expand([1, 2, 70, 70]);
    let phi = FeatureMap::Softmax;
    let found = linear_attention(q.clone(), k.clone(), v.clone(), phi, true);
    assert_close("causal", found, formula::linear(q, k, v, phi, mask), 1e-5);
}

#[test]
fn gradients_are_the_formulas() {
    let device = device().autodiff();
    let q = leaf(heads([1, 4, 70, 32], 1, &device));
    let k = leaf(heads([1, 2, 90, 32], 2, &device));
    let v = leaf(heads([1, 2, 90, 40], 3, &device));
    let all = Tensor::<4, Bool>::full([1, 4, 70, 90], true, &device);
    for phi in [FeatureMap::Softmax, FeatureMap::EluPlusOne] {
        let found = linear_attention(q.clone(), k.clone(), v.clone(), phi, false);
        let exact = formula::linear(q.clone(), k.clone(), v.clone(), phi, all.clone());
        let [a, b, c] = [&q, &k, &v].map(constant);
        let kernels = linear_attention(a, b, c, phi, false);
        assert!(!kernels.is_tracked());
        assert_close("tracked or not", found.clone(), kernels, 1e-5);
        let (found, exact) = (backward(found, 4), backward(exact, 4));
        for (name, leaf) in [("dq", &q), ("dk", &k), ("dv", &v)] {
            assert_close(name, gradient(leaf, &found), gradient(leaf, &exact), 1e-4);
        }
    }
}

#[test]
fn the_causal_form_refuses_a_gradient_by_name() {
    let device = device().autodiff();
    let [q, k, v] = [1, 2, 3].map(|seed| heads([1, 2, 32, 32], seed, &device));
    let k = leaf(k);
    let error = try_linear_attention(q, k, v, FeatureMap::Softmax, true).unwrap_err();
    assert!(
        matches!(
            error,
            Error::NotDifferentiable {
                operation: "causal linear_attention",
                argument: "k",
                ..
            }
        ),
        "{error}"
    );
}
