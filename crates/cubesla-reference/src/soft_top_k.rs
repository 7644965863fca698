//! SoftTop-k: a differentiable selection whose rows sum to `k` (arXiv 2403.19969).
//!
//! ```text
//! m_j = sigmoid(x_j / tau + lambda),  lambda such that sum_j m_j = total
//! dx_j = (s_j / tau) (g_j - sum_l s_l g_l / sum_l s_l),  s_j = m_j (1 - m_j)
//! ```

use crate::tensor::dot;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The soft selection of one row; `total` lies between 0 and the length of the row.
pub fn forward(row: &[f64], tau: f64, total: f64) -> Vec<f64> {
    let at = |lambda: f64| row.iter().map(move |x| sigmoid(x / tau + lambda));
    let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max) / tau;
    let smallest = row.iter().copied().fold(f64::INFINITY, f64::min) / tau;
    // At the ends every element is within 1e-17 of 0 and of 1.
    let (mut low, mut high) = (-largest - 40.0, -smallest + 40.0);
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        if at(middle).sum::<f64>() < total {
            low = middle;
        } else {
            high = middle;
        }
    }
    at(0.5 * (low + high)).collect()
}

/// The gradient with respect to the row, for the incoming gradient `grad` of the selection `soft`.
pub fn backward(soft: &[f64], grad: &[f64], tau: f64) -> Vec<f64> {
    let slopes: Vec<f64> = soft.iter().map(|m| m * (1.0 - m)).collect();
    let sum: f64 = slopes.iter().sum();
    let mean = if sum == 0.0 {
        0.0
    } else {
        dot(&slopes, grad) / sum
    };
    slopes
        .iter()
        .zip(grad)
        .map(|(s, g)| s / tau * (g - mean))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: [f64; 6] = [0.3, -1.0, 0.8, 0.1, 0.35, -0.2];

    #[test]
    fn rows_sum_to_the_total() {
        for total in [0.5, 2.0, 5.5] {
            let sum: f64 = forward(&ROW, 0.1, total).iter().sum();
            assert!((sum - total).abs() < 1e-9, "{sum} {total}");
        }
    }

    #[test]
    fn a_small_temperature_is_top_k() {
        let soft = forward(&ROW, 1e-3, 2.0);
        assert!(
            soft[2] > 0.999 && soft[4] > 0.99 && soft[0] < 0.01,
            "{soft:?}"
        );
    }

    #[test]
    fn backward_is_the_gradient_and_sums_to_zero() {
        let grad = [0.2, -0.4, 1.0, 0.5, -0.3, 0.1];
        let (tau, total) = (0.4, 2.5);
        let exact = backward(&forward(&ROW, tau, total), &grad, tau);
        assert!(exact.iter().sum::<f64>().abs() < 1e-12);
        for j in 0..ROW.len() {
            let shifted = |step: f64| {
                let mut row = ROW;
                row[j] += step;
                dot(&forward(&row, tau, total), &grad)
            };
            let numeric = (shifted(1e-5) - shifted(-1e-5)) / 2e-5;
            assert!(
                (numeric - exact[j]).abs() < 1e-7,
                "{j}: {numeric} {}",
                exact[j]
            );
        }
    }
}
