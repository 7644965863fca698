//! Selection in rows: top-k, block lists, soft top-k.

use cubesla::{
    Critical, DType, DeviceTensor, HostBlockList, ProblemError, TopKOrder, download,
    download_top_k, select_blocks, soft_top_k, soft_top_k_backward, top_k, upload,
};
use cubesla_reference::router::{self, Block};
use cubesla_reference::soft_top_k as reference;
use harness::case::wide;
use harness::select::hard_row;
use harness::{Rng, client};
use proptest::prelude::*;

fn check_top_k(rows: &[Vec<f32>], k: usize) {
    let client = client();
    let len = rows[0].len();
    let tensor = upload(&client, &rows.concat(), [rows.len(), len], DType::F32).unwrap();
    for order in [TopKOrder::Value, TopKOrder::Index] {
        let selected = top_k(&client, &tensor, k, order).unwrap();
        let (values, indices) = download_top_k(&client, &selected).unwrap();
        for (r, row) in rows.iter().enumerate() {
            let mut expected = router::rank(&wide(row));
            expected.truncate(k);
            if order == TopKOrder::Index {
                expected.sort_unstable();
            }
            let found = &indices[r * k..][..k];
            assert!(
                found
                    .iter()
                    .map(|&i| i as usize)
                    .eq(expected.iter().copied()),
                "row {r} of {len}, k {k}, by {order:?}: {found:?} is not {expected:?}"
            );
            for (&value, &i) in values[r * k..][..k].iter().zip(&expected) {
                assert_eq!(value.to_bits(), row[i].to_bits());
            }
        }
    }
}

#[test]
fn top_k_of_every_length_class() {
    let mut rng = Rng::new(3);
    for len in [1, 2, 31, 32, 33, 100, 500, 1000, 2048, 2049, 4097, 8192] {
        let rows: Vec<Vec<f32>> = (0..3).map(|_| hard_row(&mut rng, len)).collect();
        for k in [1, len.div_ceil(20), len] {
            check_top_k(&rows, k);
        }
    }
}

#[test]
fn rows_of_equal_values_and_of_nan() {
    for value in [0.0, f32::NAN, f32::NEG_INFINITY, -1.5] {
        check_top_k(&[vec![value; 77], vec![value; 77]], 10);
    }
}

#[test]
fn top_k_of_a_mixture_of_experts() {
    let mut rng = Rng::new(8);
    let rows: Vec<Vec<f32>> = (0..300).map(|_| rng.normals(256, DType::F32)).collect();
    check_top_k(&rows, 8);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn top_k_of_any_row(len in 1..700usize, part in 0.0..1.0f64, seed in any::<u64>()) {
        let mut rng = Rng::new(seed);
        let rows: Vec<Vec<f32>> = (0..5).map(|_| hard_row(&mut rng, len)).collect();
        check_top_k(&rows, ((part * len as f64) as usize).max(1));
    }
}

/// Checks the lists of `scores` against the reference, row by row.
fn check_lists(shape: [usize; 4], scores: &[f32], critical: Critical, negligible: usize) {
    let client = client();
    let tensor = upload(&client, scores, shape, DType::F32).unwrap();
    let selection = select_blocks(&client, &tensor, critical, negligible).unwrap();
    let critical_rows = HostBlockList::download(&client, &selection.critical).unwrap();
    let negligible_rows = selection
        .negligible
        .map(|list| HostBlockList::download(&client, &list).unwrap());
    for (r, row) in scores.chunks(shape[3]).enumerate() {
        let row = wide(row);
        let count = match critical {
            Critical::Count(count) => count,
            Critical::Mass { mass, min, max } => {
                router::top_p_count(&row, f64::from(mass), min, max)
            }
        };
        let map = router::map_row(&row, count, negligible.min(row.len() - count));
        let of = |kind| {
            let kept = map
                .iter()
                .enumerate()
                .filter(move |(_, block)| **block == kind);
            kept.map(|(j, _)| j as u32).collect::<Vec<u32>>()
        };
        assert_eq!(
            critical_rows.row(r),
            of(Block::Critical),
            "row {r} of {shape:?}"
        );
        let found = negligible_rows.as_ref().map_or(&[][..], |rows| rows.row(r));
        assert_eq!(found, of(Block::Negligible), "row {r} of {shape:?}");
    }
}

fn hard_scores(shape: [usize; 4], seed: u64) -> Vec<f32> {
    hard_row(&mut Rng::new(seed), shape.iter().product())
}

#[test]
fn counted_lists() {
    for (shape, critical, negligible) in [
        ([2, 3, 7, 20], 3, 0),
        ([1, 1, 1, 1], 1, 0),
        ([1, 2, 5, 40], 40, 0),
        ([1, 2, 5, 40], 1, 39),
        ([1, 2, 5, 512], 25, 51),
        ([1, 1, 3, 8192], 400, 800),
    ] {
        check_lists(
            shape,
            &hard_scores(shape, 5),
            Critical::Count(critical),
            negligible,
        );
    }
}

#[test]
fn lists_by_mass() {
    let shape = [1, 2, 8, 50];
    let scores = Rng::new(6).normals(800, DType::F32);
    for mass in [0.05, 0.5, 0.9, 1.0] {
        for (min, max, negligible) in [(1, 50, 0), (4, 20, 5), (7, 7, 0)] {
            check_lists(
                shape,
                &scores,
                Critical::Mass { mass, min, max },
                negligible,
            );
        }
    }
}

#[test]
fn mass_of_equal_scores_is_shared_evenly() {
    // Sixteen blocks of 1/16 each: half the mass is eight blocks, those of lowest index.
    let critical = Critical::Mass {
        mass: 0.5,
        min: 1,
        max: 16,
    };
    check_lists([1, 1, 1, 16], &[0.25; 16], critical, 0);
}

#[test]
fn a_row_of_nan_still_has_its_blocks() {
    let scores = [vec![f32::NAN; 30], Rng::new(1).normals(30, DType::F32)].concat();
    check_lists([1, 1, 2, 30], &scores, Critical::Count(4), 3);
    // Without a mass to share, the least that was asked for.
    let client = client();
    let tensor = upload(&client, &[f32::NAN; 30], [1, 1, 1, 30], DType::F32).unwrap();
    let critical = Critical::Mass {
        mass: 0.9,
        min: 2,
        max: 30,
    };
    let lists = select_blocks(&client, &tensor, critical, 0).unwrap();
    let rows = HostBlockList::download(&client, &lists.critical).unwrap();
    assert!(rows.row(0).len() >= 2);
    assert!(
        rows.row(0)
            .iter()
            .enumerate()
            .all(|(at, &j)| at == j as usize)
    );
}

#[test]
fn bad_selections_are_refused() {
    let client = client();
    let tensor = upload(&client, &[0.0; 40], [1, 1, 4, 10], DType::F32).unwrap();
    let mass = |mass, min, max| Critical::Mass { mass, min, max };
    for (critical, negligible) in [
        (Critical::Count(0), 0),
        (Critical::Count(11), 0),
        (Critical::Count(5), 6),
        (mass(0.0, 1, 10), 0),
        (mass(1.1, 1, 10), 0),
        (mass(f32::NAN, 1, 10), 0),
        (mass(0.5, 0, 10), 0),
        (mass(0.5, 8, 4), 0),
        (mass(0.5, 1, 11), 0),
    ] {
        let refused = select_blocks(&client, &tensor, critical, negligible);
        assert!(refused.is_err(), "{critical:?} {negligible}");
    }
    let rows = upload(&client, &[0.0; 40], [4, 10], DType::F32).unwrap();
    for k in [0, 11] {
        let refused = top_k(&client, &rows, k, TopKOrder::Value);
        assert!(matches!(
            refused,
            Err(ProblemError::Count { argument: "k", .. })
        ));
    }
    let half = upload(&client, &[0.0; 40], [4, 10], DType::F16).unwrap();
    let refused = top_k(&client, &half, 1, TopKOrder::Value);
    assert!(matches!(refused, Err(ProblemError::DTypeMismatch { .. })));
    let long = upload(&client, &vec![0.0; 8193], [1, 8193], DType::F32).unwrap();
    let refused = top_k(&client, &long, 1, TopKOrder::Value);
    assert!(matches!(refused, Err(ProblemError::RowTooLong { .. })));
    let view = DeviceTensor::new(rows.handle().clone(), [10, 4], [1, 10], DType::F32).unwrap();
    let refused = top_k(&client, &view, 1, TopKOrder::Value);
    assert!(matches!(refused, Err(ProblemError::NotContiguous { .. })));
}

/// Soft selection and its gradient for rows of normal scores times `spread`.
fn check_soft(shape: [usize; 4], spread: f32, tau: f32, ratio: f32) {
    let client = client();
    let count = shape.iter().product();
    let mut rng = Rng::new(11);
    let scores: Vec<f32> = rng
        .normals(count, DType::F32)
        .into_iter()
        .map(|x| x * spread)
        .collect();
    let grad = rng.normals(count, DType::F32);
    let device = |values: &[f32]| upload(&client, values, shape, DType::F32).unwrap();
    let soft = soft_top_k(&client, &device(&scores), tau, ratio).unwrap();
    let dscores = soft_top_k_backward(&client, &soft, &device(&grad), tau).unwrap();
    let (soft, dscores) = (
        download(&client, &soft).unwrap(),
        download(&client, &dscores).unwrap(),
    );

    let len = shape[3];
    let total = f64::from(ratio) * len as f64;
    for r in 0..count / len {
        let row = |values: &[f32]| wide(&values[r * len..][..len]);
        let sum: f64 = row(&soft).iter().sum();
        assert!(
            (sum - total).abs() <= 1e-4 * total.max(1.0),
            "row {r} sums to {sum}, not {total}"
        );
        let exact = reference::forward(&row(&scores), f64::from(tau), total);
        for (j, (found, exact)) in row(&soft).iter().zip(&exact).enumerate() {
            assert!((found - exact).abs() < 2e-4, "{j}: {found} {exact}");
        }
        // The device's own selection, so that this is the gradient's error alone.
        let exact = reference::backward(&row(&soft), &row(&grad), f64::from(tau));
        let size = exact.iter().map(|x| x.abs()).sum::<f64>().max(1e-6);
        let sum: f64 = row(&dscores).iter().sum();
        assert!(
            sum.abs() <= 1e-5 * size,
            "row {r} of the gradient sums to {sum:e} of {size:e}"
        );
        for (found, exact) in row(&dscores).iter().zip(&exact) {
            assert!((found - exact).abs() <= 1e-5 * size, "{found} {exact}");
        }
    }
}

#[test]
fn soft_selections() {
    for (shape, spread, tau, ratio) in [
        ([1, 2, 5, 20], 1.0, 0.1, 0.05),
        ([1, 1, 3, 512], 1.0, 0.1, 0.03),
        ([1, 1, 2, 3000], 0.3, 0.1, 0.5),
        ([1, 1, 2, 8192], 1.0, 0.1, 0.95),
        ([2, 1, 3, 33], 10.0, 0.1, 0.2),
        ([1, 1, 4, 16], 0.0, 0.1, 0.25),
        ([1, 1, 4, 64], 1.0, 5.0, 0.1),
    ] {
        check_soft(shape, spread, tau, ratio);
    }
}

#[test]
fn bad_temperatures_and_ratios_are_refused() {
    let client = client();
    let scores = upload(&client, &[0.0; 10], [1, 1, 1, 10], DType::F32).unwrap();
    for tau in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let refused = soft_top_k(&client, &scores, tau, 0.5);
        assert!(
            matches!(refused, Err(ProblemError::Temperature { .. })),
            "{tau}"
        );
    }
    for ratio in [0.0, 1.0, -0.5, f32::NAN] {
        let refused = soft_top_k(&client, &scores, 0.1, ratio);
        assert!(
            matches!(refused, Err(ProblemError::Ratio { .. })),
            "{ratio}"
        );
    }
}
