//! The problems whose plans are written down, and whose kernels are compiled for every architecture.

use cubesla::{AttentionOptions, Causal, DType, F32Products, FeatureMap, LinearMode, Precision};

use crate::sla::Combine;
use crate::{AttentionCase, Lists, SlaCase};

/// Two blocks a side, each way of choosing an engine at least once.
pub fn forward_cases() -> Vec<AttentionCase> {
    let case = |dtype, head_dim, value_dim, block_q, block_k, causal| AttentionCase {
        query_len: 2 * block_q,
        key_len: 2 * block_k,
        head_dim,
        value_dim,
        dtype,
        options: AttentionOptions {
            block_q,
            block_k,
            causal,
            ..AttentionOptions::default()
        },
        lists: Lists::Dense,
        ..AttentionCase::default()
    };
    let mut cases = Vec::new();
    for dtype in DType::ALL {
        for dim in [32, 64, 128, 256] {
            cases.push(case(dtype, dim, dim, 128, 64, Causal::None));
        }
        cases.push(case(dtype, 72, 160, 128, 64, Causal::BottomRight));
        cases.push(case(dtype, 128, 128, 64, 128, Causal::TopLeft));
        cases.push(case(dtype, 96, 40, 48, 80, Causal::None));
        cases.push(case(dtype, 64, 64, 16, 16, Causal::None));
    }
    for dtype in [DType::F16, DType::BF16] {
        // More query blocks than multiprocessors.
        cases.push(AttentionCase {
            query_heads: 160,
            kv_heads: 2,
            ..case(dtype, 64, 64, 128, 64, Causal::None)
        });
    }
    let of_tf32 = |case: &AttentionCase| AttentionCase {
        options: AttentionOptions {
            products: F32Products::Tf32,
            ..case.options
        },
        ..*case
    };
    let exact = cases.iter().filter(|case| case.dtype == DType::F32);
    let rounded: Vec<_> = exact.map(of_tf32).collect();
    cases.extend(rounded);
    let strided = case(DType::BF16, 128, 128, 128, 64, Causal::None);
    let negative = AttentionOptions {
        scale: Some(-1.0),
        ..strided.options
    };
    cases.push(AttentionCase {
        options: negative,
        ..strided
    });
    cases
}

/// The branches and their combinations, in the forms that differ in their kernels.
pub fn sla_cases() -> Vec<SlaCase> {
    let mut cases = Vec::new();
    let exact = F32Products::F32;
    for (dtype, products, dim, value_dim, block_k) in [
        (DType::F32, exact, 64, 64, 64),
        (DType::F32, F32Products::Tf32, 64, 64, 64),
        (DType::F16, exact, 72, 96, 32),
        (DType::BF16, exact, 64, 64, 64),
        (DType::BF16, exact, 128, 128, 64),
    ] {
        for (combine, linear, phi, lists) in [
            (Combine::Sla, LinearMode::Global, FeatureMap::Softmax, 1),
            (
                Combine::LogitPerBlock,
                LinearMode::Global,
                FeatureMap::EluPlusOne,
                1,
            ),
            (
                Combine::OneLogit,
                LinearMode::Complement,
                FeatureMap::Softmax,
                1,
            ),
            (Combine::Sla, LinearMode::Complement, FeatureMap::Relu, 3),
        ] {
            let options = AttentionOptions {
                block_q: 128,
                block_k,
                products,
                ..AttentionOptions::default()
            };
            cases.push(SlaCase {
                attention: AttentionCase {
                    query_len: 200,
                    key_len: 4 * block_k,
                    head_dim: dim,
                    value_dim,
                    dtype,
                    options,
                    lists: Lists::TopK(lists),
                    ..AttentionCase::default()
                },
                negligible: (lists == 1).then_some(0.2),
                phi,
                linear,
                combine,
                precision: Precision::Full,
            });
        }
    }
    cases
}
