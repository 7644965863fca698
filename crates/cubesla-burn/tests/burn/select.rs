use burn_core::tensor::Tensor;
use cubesla_burn::{Error, TopKOrder, soft_top_k, top_k, try_soft_top_k, try_top_k};

use crate::common::{assert_close, backward, device, floats, gradient, leaf, noise, values};

#[test]
fn the_largest_of_each_row() {
    let device = device();
    // Transposed: rows are not contiguous.
    let rows = noise([50, 3], 1, &device).transpose();
    let (found, indices) = top_k(rows.clone(), 5, TopKOrder::Value);
    let found = floats(found);
    let indices = indices.into_data().try_to_vec::<i32>().unwrap();
    for (row, values) in floats(rows).chunks(50).enumerate() {
        let mut order: Vec<usize> = (0..50).collect();
        order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
        for place in 0..5 {
            assert_eq!(indices[row * 5 + place] as usize, order[place]);
            assert_eq!(found[row * 5 + place], values[order[place]]);
        }
    }
}

#[test]
fn tracked_rows_are_refused() {
    let rows = leaf(noise([2, 8], 1, &device().autodiff()));
    let error = try_top_k(rows, 2, TopKOrder::Index).unwrap_err();
    assert!(
        matches!(
            error,
            Error::NotDifferentiable {
                operation: "top_k",
                ..
            }
        ),
        "{error}"
    );
    let scores = noise([1, 1, 1, 8], 1, &device());
    assert!(try_soft_top_k(scores.clone(), 0.0, 0.5).is_err());
    assert!(try_soft_top_k(scores, 0.1, 1.0).is_err());
}

/// Row sums, and the gradient against differences.
#[test]
fn a_soft_selection_sums_to_its_ratio_and_has_a_gradient() {
    const TAU: f32 = 0.5;
    let device = device().autodiff();
    let shape = [1, 2, 1, 8];
    let scores = leaf(noise(shape, 1, &device));
    let soft = soft_top_k(scores.clone(), TAU, 0.25);
    let sums = floats(soft.clone().sum_dim(3));
    assert!(sums.iter().all(|sum| (sum - 2.0).abs() < 1e-3), "{sums:?}");

    let grads = backward(soft, 2);
    let found = gradient(&scores, &grads);
    let weights = values(16, 2);
    let start = floats(scores);
    let loss = |at: usize, step: f32| {
        let mut moved = start.clone();
        moved[at] += step;
        let data = burn_core::tensor::TensorData::new(moved, shape);
        let soft = soft_top_k(Tensor::from_data(data, &device), TAU, 0.25);
        let terms = floats(soft).into_iter().zip(&weights);
        terms
            .map(|(m, w)| f64::from(m) * f64::from(*w))
            .sum::<f64>()
    };
    let step = 0.02;
    let numeric: Vec<f32> = (0..16)
        .map(|at| ((loss(at, step) - loss(at, -step)) / f64::from(2.0 * step)) as f32)
        .collect();
    let data = burn_core::tensor::TensorData::new(numeric, shape);
    assert_close("dscores", found, Tensor::from_data(data, &device), 1e-2);
}
