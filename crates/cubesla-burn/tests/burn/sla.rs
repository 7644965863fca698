use burn_core::tensor::{Bool, Tensor, activation};
use cubesla_burn::{
    AttentionOptions, BlockList, Blocks, FeatureMap, HostBlockList, LinearMode, SlaOptions, sla,
    sla2,
};

use crate::common::{assert_close, backward, constant, device, gradient, heads, leaf, noise};
use crate::formula::{self, BLOCK};

const LENS: [usize; 2] = [70, 90];
const SHAPE: [usize; 4] = [1, 4, 3, 6];

fn options(phi: FeatureMap, linear: LinearMode) -> SlaOptions {
    SlaOptions {
        attention: AttentionOptions {
            block_q: BLOCK[0],
            block_k: BLOCK[1],
            ..AttentionOptions::default()
        },
        phi,
        linear,
        ..SlaOptions::default()
    }
}

/// Blocks of each row by what `pick` says of their number after a rotation by the row's.
fn list(pick: impl Fn(usize) -> bool) -> HostBlockList {
    let [batch, heads, rows, columns] = SHAPE;
    let mask: Vec<bool> = (0..batch * heads * rows * columns)
        .map(|at| pick((at % columns + at / columns) % columns))
        .collect();
    HostBlockList::from_mask(SHAPE, &mask).unwrap()
}

/// Both branches by the formulas.
fn branches(
    [q, k, v]: [Tensor<4>; 3],
    phi: FeatureMap,
    critical: Tensor<4, Bool>,
    linear: Tensor<4, Bool>,
) -> [Tensor<4>; 2] {
    [
        formula::attention(q.clone(), k.clone(), v.clone(), critical),
        formula::linear(q, k, v, phi, linear),
    ]
}

struct Case {
    inputs: [Tensor<4>; 3],
    blocks: Blocks,
    critical: Tensor<4, Bool>,
    linear: Tensor<4, Bool>,
}

/// Of six blocks of a row `critical` are, and `negligible` are left out.
fn case(critical: usize, negligible: usize, mode: LinearMode) -> Case {
    let plain = device();
    let device = plain.clone().autodiff();
    let kept = list(|block| block < critical);
    let dropped = list(|block| block >= 6 - negligible);
    let marginal =
        list(|block| mode == LinearMode::Global || (critical..6 - negligible).contains(&block));
    Case {
        inputs: [
            leaf(heads([1, 4, LENS[0], 32], 1, &device)),
            leaf(heads([1, 2, LENS[1], 32], 2, &device)),
            leaf(heads([1, 2, LENS[1], 32], 3, &device)),
        ],
        blocks: Blocks {
            critical: BlockList::from_host(&kept, &plain),
            negligible: (negligible > 0).then(|| BlockList::from_host(&dropped, &plain)),
        },
        critical: formula::element_mask(&kept, LENS, &device),
        linear: formula::element_mask(&marginal, LENS, &device),
    }
}

fn check_sla2(case: Case, phi: FeatureMap, mode: LinearMode, logits: [usize; 2]) {
    let Case {
        inputs,
        blocks,
        critical,
        linear,
    } = case;
    let alpha = leaf(noise(logits, 4, &inputs[0].device()));
    let [q, k, v] = inputs.clone();
    let found = sla2(q, k, v, alpha.clone(), &blocks, &options(phi, mode));

    let [sparse, linear] = branches(inputs.clone(), phi, critical, linear);
    let blocks = SHAPE[2] * BLOCK[0];
    let rows = alpha
        .clone()
        .expand([SHAPE[1], SHAPE[2]])
        .reshape([SHAPE[1], SHAPE[2], 1]);
    let rows = rows
        .repeat_dim(2, BLOCK[0])
        .reshape([1, SHAPE[1], blocks, 1]);
    let a = activation::sigmoid(rows.slice([0..1, 0..SHAPE[1], 0..LENS[0], 0..1]));
    let exact = sparse * a.clone() + linear * (a.neg() + 1.0);

    assert_close("out", found.clone(), exact.clone(), 1e-5);
    let (found, exact) = (backward(found, 5), backward(exact, 5));
    for (name, leaf) in ["dq", "dk", "dv"].into_iter().zip(&inputs) {
        assert_close(name, gradient(leaf, &found), gradient(leaf, &exact), 1e-4);
    }
    let grads = (gradient(&alpha, &found), gradient(&alpha, &exact));
    assert_close("dalpha", grads.0, grads.1, 1e-4);
}

#[test]
fn sla2_with_a_logit_to_a_block() {
    let mode = LinearMode::Complement;
    check_sla2(case(1, 0, mode), FeatureMap::Softmax, mode, [4, 3]);
}

#[test]
fn sla2_with_negligible_blocks_and_one_logit() {
    let mode = LinearMode::Complement;
    check_sla2(case(3, 1, mode), FeatureMap::EluPlusOne, mode, [1, 1]);
}

#[test]
fn sla2_over_all_keys_with_a_logit_to_a_head() {
    let mode = LinearMode::Global;
    check_sla2(case(2, 0, mode), FeatureMap::Softmax, mode, [4, 1]);
}

#[test]
fn sla_with_its_projection() {
    let mode = LinearMode::Complement;
    let Case {
        inputs,
        blocks,
        critical,
        linear,
    } = case(2, 1, mode);
    let device = inputs[0].device();
    let weight = leaf(noise([32, 32], 6, &device));
    let bias = leaf(noise([32], 7, &device));
    let [q, k, v] = inputs.clone();
    let options = options(FeatureMap::Softmax, mode);
    let found = sla(q, k, v, weight.clone(), bias.clone(), &blocks, &options);

    let [sparse, linear] = branches(inputs.clone(), FeatureMap::Softmax, critical, linear);
    let projected = linear.matmul(weight.clone().reshape([1, 1, 32, 32]));
    let exact = sparse + projected + bias.clone().reshape([1, 1, 1, 32]);

    assert_close("out", found.clone(), exact.clone(), 1e-5);
    let (found, exact) = (backward(found, 5), backward(exact, 5));
    for (name, leaf) in ["dq", "dk", "dv"].into_iter().zip(&inputs) {
        assert_close(name, gradient(leaf, &found), gradient(leaf, &exact), 1e-4);
    }
    let grads = (gradient(&weight, &found), gradient(&weight, &exact));
    assert_close("dweight", grads.0, grads.1, 1e-4);
    let grads = (gradient(&bias, &found), gradient(&bias, &exact));
    assert_close("dbias", grads.0, grads.1, 1e-4);
}

#[test]
fn tracked_or_not_gives_the_same_bits() {
    let mode = LinearMode::Complement;
    let Case { inputs, blocks, .. } = case(1, 0, mode);
    let alpha = noise([4, 3], 4, &inputs[0].device());
    let options = options(FeatureMap::Softmax, mode);
    let run = |[q, k, v]: [Tensor<4>; 3]| sla2(q, k, v, alpha.clone(), &blocks, &options);
    let tracked = run(inputs.clone());
    let untracked = run(inputs.each_ref().map(constant));
    assert!(tracked.is_tracked() && !untracked.is_tracked());
    tracked.into_data().assert_eq(&untracked.into_data(), true);
}
