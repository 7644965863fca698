//! Launches every kernel of the golden plans on a CUDA device, real or fake.
//!
//! On a machine without a GPU, `cargo xtask cuda` runs it over a driver that executes nothing, once
//! for each architecture, and reads registers and spills off the compiled kernels. Its argument names
//! the part to compile; without one it compiles all.

use std::process::ExitCode;

use cubesla::plan::{ForwardEngine, ForwardPlan};
use cubesla::{
    AttentionOptions, AttentionOutput, AttentionProblem, BlockList, Causal, Client, Critical,
    DType, DeviceTensor, FeatureMap, Format, Granularity, InverseBlockList, LinearMode, Precision,
    RouterOptions, TopKOrder, block_sparse_attention, block_sparse_attention_backward, download,
    dynamic_matmul, fake_quantize, linear_attention, low_bit_attention, low_bit_attention_backward,
    quantize, quantized_matmul, quantized_matmul_backward, route, select_blocks, soft_top_k,
    soft_top_k_backward, top_k, upload, weight_only_matmul,
};
use cubesla_kernels::FactorType;
use cubesla_kernels::attention::{self, ForwardInputs};
use harness::low_bit::FORMATS;
use harness::sla::Combine;
use harness::soft::SoftCase;
use harness::{AttentionCase, SlaCase};

/// The name of a part, and what launches its kernels.
type Part = (&'static str, fn(&Client));

const PARTS: [Part; 5] = [
    ("attention", compile_attention),
    ("widths", compile_widths_of_hopper),
    ("sla", compile_sla_cases),
    ("selection", compile_selection),
    ("low-bits", compile_low_bits),
];

fn main() -> ExitCode {
    let part = std::env::args().nth(1);
    let chosen = |name: &str| part.as_deref().is_none_or(|part| part == name);
    let parts: Vec<_> = PARTS.into_iter().filter(|(name, _)| chosen(name)).collect();
    if parts.is_empty() {
        let names = PARTS.map(|(name, _)| name).join(", ");
        eprintln!("error: there is no such part; the parts are {names}");
        return ExitCode::FAILURE;
    }
    let client = harness::client();
    println!("compiling for {}", client.properties().identity.name);
    for (_, compile) in parts {
        compile(&client);
    }
    // Kernels are compiled on the device's thread, which ends with the program.
    cubesla::sync(&client).expect("every kernel to be launched");
    ExitCode::SUCCESS
}

/// A kernel that does not compile is found out where what it should have computed is read.
fn expect_computed<const R: usize>(client: &Client, result: &DeviceTensor<R>) {
    download(client, result).expect("kernels that compile");
}

/// The same of a list.
fn expect_list(client: &Client, list: &BlockList) {
    for words in [list.counts(), list.indices()] {
        client
            .read_one(words.clone())
            .expect("kernels that compile");
    }
}

/// Attention with every engine, forward and backward, with its lists.
fn compile_attention(client: &Client) {
    for case in harness::golden::forward_cases() {
        let inputs = case.inputs();
        for (plan, _) in case.run_all(client, &inputs) {
            println!(
                "{} D={} Dv={}: {plan}",
                case.factors(),
                case.head_dim,
                case.value_dim
            );
        }
        let list = inputs.list.upload(client);
        InverseBlockList::new(client, &list).expect("the inverse to be built");
        // Gradients have several kernels of each shape, so not every shape has its turn.
        let usual = case.head_dim == case.value_dim && case.options.block_q == 128;
        if usual && matches!(case.head_dim, 64 | 128) {
            for (plan, _) in case.run_backward(client, &inputs, &case.grad_out()) {
                println!(
                    "{} D={} Dv={}: backward {plan}",
                    case.factors(),
                    case.head_dim,
                    case.value_dim
                );
            }
        }
        // Weights of blocks: Hopper's forward has all shapes, with every number of warpgroups.
        if matches!(case.head_dim, 64 | 128) && case.head_dim == case.value_dim {
            let weights = vec![0.5; case.list_shape().iter().product()];
            let mut firsts = case.run_soft(client, &inputs, &weights, &case.grad_out());
            let (plans, _) = firsts.swap_remove(0);
            println!(
                "{} D={}: soft attention {plans}",
                case.factors(),
                case.head_dim
            );
        }
        // The operations of both branches have many kernels of each shape: one shape will do.
        let rescaled = case.options.scale.is_some();
        if usual && case.head_dim == 128 && !rescaled {
            compile_both_branches(client, case);
            compile_candidates(client, case);
        }
    }
}

/// What tuning may choose where there is no Hopper engine.
fn compile_candidates(client: &Client, case: AttentionCase) {
    let candidates = |problem: &AttentionProblem, _: ForwardInputs<'_>| {
        let device = client.properties();
        let Ok(plan) = attention::ForwardPlan::mma(problem, device) else {
            return Vec::new();
        };
        let plans = plan.choices(problem, device).into_iter();
        let forward = |plan| ForwardPlan {
            engine: ForwardEngine::Tile(plan),
            passed_over: Vec::new(),
        };
        plans.map(forward).collect()
    };
    for (plan, _) in case.run_plans(client, &case.inputs(), candidates) {
        println!("{} D={}: candidate {plan}", case.factors(), case.head_dim);
    }
}

/// The forwards of SLA in every form, linear attention and the router.
fn compile_sla_cases(client: &Client) {
    for case in harness::golden::sla_cases() {
        compile_sla(client, &case);
    }
}

/// The gradients of SLA, in every form, and of soft masks.
fn compile_both_branches(client: &Client, attention: AttentionCase) {
    for linear in [LinearMode::Complement, LinearMode::Global] {
        for combine in [Combine::Sla, Combine::LogitPerBlock] {
            let case = SlaCase {
                attention,
                negligible: None,
                phi: FeatureMap::Softmax,
                linear,
                combine,
                precision: Precision::Full,
            };
            let (inputs, grad_out) = (case.inputs(), attention.grad_out());
            for (plan, _) in case.run_backward_all(client, &inputs, &grad_out) {
                println!("{} {linear:?}: backward of SLA {plan}", attention.factors());
            }
            if combine != Combine::Sla {
                for (plans, _) in SoftCase(case).run_all(client, &inputs, &grad_out) {
                    println!("{}: soft masks {plans}", attention.factors());
                }
            }
        }
    }
}

/// One case of them.
fn compile_sla(client: &Client, case: &SlaCase) {
    let inputs = case.inputs();
    for save in [false, true] {
        case.run(client, &inputs, save);
    }
    if case.attention.factors() == FactorType::Tf32 {
        // What follows has no products of tf32.
        return;
    }
    for precision in [Precision::Int8, Precision::Int8Fp8] {
        let low_bit = SlaCase { precision, ..*case };
        low_bit.run(client, &inputs, true);
    }
    let ([q, k, v], _) = case.attention.upload_inputs(client, &inputs);
    let plain = linear_attention(client, &q, &k, &v, case.phi, false).expect("a valid call");
    let causal = linear_attention(client, &q, &q, &q, case.phi, true).expect("a valid call");
    for out in [plain, causal] {
        expect_computed(client, &out);
    }
    let options = AttentionOptions {
        block_q: 128,
        block_k: 32,
        ..AttentionOptions::default()
    };
    let routed = route(client, &q, &k, &options, &RouterOptions::sla()).expect("a valid call");
    expect_list(client, &routed.critical);
}

/// Selections from rows.
fn compile_selection(client: &Client) {
    // Rows that a plane, a cube, and several elements of a unit hold.
    for len in [40, 600, 1200, 5000] {
        let scores = upload(client, &vec![0.0; 2 * len], [1, 1, 2, len], DType::F32).unwrap();
        let mass = Critical::Mass {
            mass: 0.5,
            min: 1,
            max: 20,
        };
        for critical in [Critical::Count(4), mass] {
            let selection = select_blocks(client, &scores, critical, 8).expect("a valid call");
            expect_list(client, &selection.critical);
        }
        let soft = soft_top_k(client, &scores, 0.1, 0.1).expect("a valid call");
        let gradient = soft_top_k_backward(client, &soft, &scores, 0.1).expect("a valid call");
        expect_computed(client, &gradient);
        let rows = upload(client, &vec![0.0; 2 * len], [2, len], DType::F32).unwrap();
        let largest = top_k(client, &rows, 8, TopKOrder::Value).expect("a valid call");
        expect_computed(client, &largest.values);
    }
}

/// Attention, its gradients and low bits at every width of Hopper's products, whose registers each width
/// spends in its own way.
fn compile_widths_of_hopper(client: &Client) {
    for dim in (32..=128).step_by(16) {
        let case = AttentionCase {
            head_dim: dim,
            value_dim: dim,
            dtype: DType::F16,
            options: AttentionOptions {
                block_q: 128,
                block_k: 64,
                ..AttentionOptions::default()
            },
            ..AttentionCase::default()
        };
        let inputs = case.inputs();
        let ([q, k, v], list) = case.upload_inputs(client, &inputs);
        let problem = AttentionProblem::new(&q, &k, &v, &case.options).expect("a valid problem");
        let plan = ForwardPlan::new(&problem, client.properties()).expect("a plan");
        if !matches!(plan.engine, ForwardEngine::Wgmma(_)) {
            return; // Of no interest on devices that have other engines.
        }
        println!("D={dim}: {plan}");
        let (q, k, v, options) = (&q, &k, &v, &case.options);
        let AttentionOutput { out, lse } =
            block_sparse_attention(client, q, k, v, &list, options).expect("a valid call");
        let gradients =
            block_sparse_attention_backward(client, q, k, v, &out, &lse, &out, &list, options)
                .expect("a valid call");
        for computed in [&out, &gradients.dq, &gradients.dk, &gradients.dv] {
            expect_computed(client, computed);
        }
        for formats in FORMATS {
            let low = low_bit_attention(client, q, k, v, &list, options, formats);
            expect_computed(client, &low.expect("a valid call").out);
        }
    }
}

/// Low-bit attention of narrow and wide heads, in one and in two warpgroups, and its gradients.
fn compile_low_bit_attention(client: &Client) {
    for (dim, block_q, causal) in [
        (64, 128, Causal::None),
        (128, 128, Causal::None),
        (128, 64, Causal::TopLeft),
    ] {
        for formats in FORMATS {
            let case = AttentionCase {
                head_dim: dim,
                value_dim: dim,
                dtype: DType::BF16,
                options: AttentionOptions {
                    block_q,
                    causal,
                    ..AttentionOptions::default()
                },
                ..AttentionCase::default()
            };
            let inputs = case.inputs();
            let ([q, k, v], list) = case.upload_inputs(client, &inputs);
            let (q, k, v, options) = (&q, &k, &v, &case.options);
            let AttentionOutput { out, lse } =
                low_bit_attention(client, q, k, v, &list, options, formats).expect("a valid call");
            let gradients = low_bit_attention_backward(
                client, q, k, v, &out, &lse, &out, &list, options, formats,
            )
            .expect("a valid call");
            for computed in [&out, &gradients.dq, &gradients.dk, &gradients.dv] {
                expect_computed(client, computed);
            }
        }
    }
}

/// Products of low-bit matrices that large tiles take: one tile and a cluster of them, scales along the
/// sum and not.
fn compile_large_products(client: &Client) {
    let (row, group, block) = (
        Granularity::Row,
        Granularity::Group(128),
        Granularity::Block,
    );
    let zeros = |rows: usize| upload(client, &vec![0.0; rows * 128], [rows, 128], DType::F32);
    let bias = upload(client, &[0.0; 256], [256], DType::F32).unwrap();
    for (rows, x, w, bias) in [
        (64, row, row, None),
        (256, row, row, None),
        (256, row, row, Some(&bias)),
        (256, group, row, None),
        (256, row, block, None),
        (256, group, block, Some(&bias)),
    ] {
        for format in [Format::Int8, Format::Fp8] {
            let quantized = |rows, granularity| {
                quantize(client, &zeros(rows).unwrap(), format, granularity, false).unwrap()
            };
            let (x, w) = (quantized(rows, x), quantized(256, w));
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let y = quantized_matmul(client, &x, &w, bias, dtype).expect("a valid call");
                expect_computed(client, &y);
            }
        }
    }
}

/// Every format and granularity, products with all sizes of tiles, and low-bit attention.
fn compile_low_bits(client: &Client) {
    compile_low_bit_attention(client);
    compile_large_products(client);
    for dtype in [DType::F32, DType::BF16] {
        let zeros = |rows: usize| upload(client, &vec![0.0; rows * 128], [rows, 128], dtype);
        let w = zeros(1024).unwrap();
        for granularity in [
            Granularity::Tensor,
            Granularity::Row,
            Granularity::Column,
            Granularity::Group(64),
            Granularity::Block,
        ] {
            for (format, zero_point) in [
                (Format::Int8, false),
                (Format::Int8, true),
                (Format::Int4, false),
                (Format::Int4, true),
                (Format::Fp8, false),
            ] {
                let near = fake_quantize(client, &w, format, granularity, zero_point);
                expect_computed(client, &near.expect("a valid call"));
                if granularity != Granularity::Row {
                    continue;
                }
                let low = quantize(client, &w, format, granularity, zero_point).unwrap();
                for rows in [1, 16, 64, 1024] {
                    let x = zeros(rows).unwrap();
                    let y = weight_only_matmul(client, &x, &low, None, dtype);
                    expect_computed(client, &y.expect("a valid call"));
                    if format != Format::Int4 && !zero_point {
                        let y = dynamic_matmul(client, &x, &low, None, dtype);
                        expect_computed(client, &y.expect("a valid call"));
                    }
                }
                // Columns enough for wide cubes.
                let wide = quantize(
                    client,
                    &zeros(8192).unwrap(),
                    format,
                    granularity,
                    zero_point,
                );
                let x = zeros(1).unwrap();
                let y = weight_only_matmul(client, &x, &wide.unwrap(), None, dtype);
                expect_computed(client, &y.expect("a valid call"));
                let dy = upload(client, &vec![0.0; 16 * 1024], [16, 1024], dtype).unwrap();
                let dx = quantized_matmul_backward(client, &dy, &low).expect("a valid call");
                expect_computed(client, &dx);
            }
        }
        // Scales that change along the sum.
        for format in [Format::Int8, Format::Fp8] {
            let blocks = quantize(client, &w, format, Granularity::Block, false).unwrap();
            for rows in [16, 1024] {
                let x = zeros(rows).unwrap();
                let y = dynamic_matmul(client, &x, &blocks, None, dtype).expect("a valid call");
                expect_computed(client, &y);
            }
        }
    }
}
