//! Plans are data: those of the golden problems, on devices written down here, must be the ones in
//! `plans.txt`. `UPDATE_PLANS=1 cargo test -p cubesla-tests --test plans` writes the file anew.

use std::fmt::Write;

use cubecl::features::MmaConfig;
use cubecl::ir::{
    DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties, IntKind,
    MemoryDeviceProperties,
};
use cubesla::plan::{ForwardPlan, LowBitPlan, MatmulPlan, SlaBackwardPlan};
use cubesla::{
    AttentionOptions, AttentionProblem, DType, F32Products, Format, Granularity, LowBitForm,
    LowBitFormats, MatmulProblem,
};
use cubesla_kernels::FactorType;
use harness::AttentionCase;

/// A device as far as plans look at it.
struct Profile {
    name: &'static str,
    fingerprint: &'static str,
    shared_memory: usize,
    units: u32,
    plane: u32,
    multiprocessors: Option<u32>,
    tensor_cores: bool,
}

const PROFILES: [Profile; 6] = [
    Profile {
        name: "llvmpipe",
        fingerprint: "spirv_65541_0",
        shared_memory: 32 << 10,
        units: 1024,
        plane: 8,
        multiprocessors: None,
        tensor_cores: false,
    },
    Profile {
        name: "WebGPU defaults",
        fingerprint: "spirv_0_0",
        shared_memory: 16 << 10,
        units: 256,
        plane: 32,
        multiprocessors: None,
        tensor_cores: false,
    },
    Profile {
        name: "A100",
        fingerprint: "ptx_sm80",
        shared_memory: 163 << 10,
        units: 1024,
        plane: 32,
        multiprocessors: Some(108),
        tensor_cores: true,
    },
    Profile {
        name: "RTX 4090",
        fingerprint: "ptx_sm89",
        shared_memory: 99 << 10,
        units: 1024,
        plane: 32,
        multiprocessors: Some(128),
        tensor_cores: true,
    },
    Profile {
        name: "H200",
        fingerprint: "ptx_sm90",
        shared_memory: 227 << 10,
        units: 1024,
        plane: 32,
        multiprocessors: Some(132),
        tensor_cores: true,
    },
    Profile {
        name: "RTX 5090",
        fingerprint: "ptx_sm120",
        shared_memory: 99 << 10,
        units: 1024,
        plane: 32,
        multiprocessors: Some(170),
        tensor_cores: true,
    },
];

impl Profile {
    fn properties(&self) -> DeviceProperties {
        let hardware = HardwareProperties {
            load_width: 128,
            vector_register_count: None,
            plane_size_min: self.plane,
            plane_size_max: self.plane,
            max_bindings: 1024,
            max_shared_memory_size: self.shared_memory,
            max_cube_count: (65_535, 65_535, 65_535),
            max_units_per_cube: self.units,
            max_cube_dim: (self.units, self.units, 64),
            num_streaming_multiprocessors: self.multiprocessors,
            num_tensor_cores: None,
            min_tensor_cores_dim: None,
            num_cpu_cores: None,
            last_level_cache_size: None,
            max_vector_size: 16,
            cube_mma_reserved_shared_memory: 0,
        };
        let identity = DeviceIdentity {
            name: self.name.into(),
            fingerprint: self.fingerprint.into(),
            physical: None,
        };
        let mut properties = DeviceProperties::new(
            Default::default(),
            MemoryDeviceProperties::new(1 << 30, 512),
            hardware,
            cubecl::profile::TimingMethod::Device,
            identity,
        );
        if self.tensor_cores {
            properties.features.copy_async = true;
            let matmul = &mut properties.features.matmul;
            for elem in [DType::F16, DType::BF16].map(DType::elem_type) {
                matmul.ldmatrix.insert(elem);
            }
            for (kind, k) in [
                (FloatKind::F16, 16),
                (FloatKind::BF16, 16),
                (FloatKind::TF32, 8),
            ] {
                matmul.mma.insert(MmaConfig {
                    a_type: ElemType::Float(kind),
                    b_type: ElemType::Float(kind),
                    cd_type: ElemType::Float(FloatKind::F32),
                    m: 16,
                    n: 8,
                    k,
                });
            }
            let int8 = ElemType::Int(IntKind::I8);
            matmul.mma.insert(MmaConfig {
                a_type: int8,
                b_type: int8,
                cd_type: ElemType::Int(IntKind::I32),
                m: 16,
                n: 8,
                k: 32,
            });
        }
        properties
    }
}

fn problem_of(case: &AttentionCase) -> AttentionProblem {
    AttentionProblem::from_shapes(
        case.q_shape(),
        case.k_shape(),
        case.v_shape(),
        case.dtype,
        &case.options,
    )
    .expect("a valid case")
}

#[test]
fn plans_are_the_ones_written_down() {
    let mut table = String::new();
    for profile in &PROFILES {
        writeln!(table, "{}", profile.name).unwrap();
        let device = profile.properties();
        for case in harness::golden::forward_cases() {
            let problem = problem_of(&case);
            let plan = match ForwardPlan::new(&problem, &device) {
                Ok(plan) => plan.to_string(),
                Err(refusal) => refusal.to_string(),
            };
            writeln!(
                table,
                "  {:4} D={:<3} Dv={:<3} blocks {:>3}x{:<3} scale {:+.3} causal {}: {plan}",
                case.factors().to_string(),
                case.head_dim,
                case.value_dim,
                case.options.block_q,
                case.options.block_k,
                problem.scale(),
                case.options.causal,
            )
            .unwrap();
        }
    }
    expect_file("plans.txt", &table);
}

#[test]
fn plans_in_low_bits_are_the_ones_written_down() {
    let formats = [
        ("int8", LowBitFormats::INT8),
        ("int8-fp8", LowBitFormats::INT8_FP8),
        ("fp8", LowBitFormats::FP8),
    ];
    let mut table = String::new();
    for profile in &PROFILES {
        writeln!(table, "{}", profile.name).unwrap();
        let device = profile.properties();
        for dtype in [DType::F32, DType::BF16] {
            for (d, dv) in [(40, 40), (64, 64), (128, 128), (128, 72), (256, 256)] {
                let shape = |dim| [1, 2, 256, dim];
                let options = AttentionOptions::default();
                let (qk, v) = (shape(d), shape(dv));
                let problem = AttentionProblem::from_shapes(qk, qk, v, dtype, &options).unwrap();
                for (name, formats) in formats {
                    let plan = match LowBitPlan::new(&problem, &device, formats) {
                        Ok(plan) => plan.to_string(),
                        Err(refusal) => refusal.to_string(),
                    };
                    writeln!(table, "  {dtype} D={d} Dv={dv} {name}: {plan}").unwrap();
                }
            }
        }
    }
    expect_file("low_bits.txt", &table);
}

#[test]
fn f32_is_rounded_to_tf32_only_where_that_was_asked_for() {
    for device in PROFILES.map(|profile| profile.properties()) {
        for case in harness::golden::forward_cases() {
            let problem = problem_of(&case);
            let forward = ForwardPlan::all(&problem, &device).unwrap_or_default();
            let sla = SlaBackwardPlan::all(&problem, &device).unwrap_or_default();
            let plans = forward.iter().map(ForwardPlan::to_string);
            for plan in plans.chain(sla.iter().map(SlaBackwardPlan::to_string)) {
                let asked = case.factors() == FactorType::Tf32;
                assert_eq!(plan.starts_with("mma tf32 "), asked, "{plan}");
            }
        }
    }
}

#[test]
fn what_tf32_has_no_registers_for_is_refused() {
    let shape = [1, 2, 256, 256];
    let options = AttentionOptions {
        products: F32Products::Tf32,
        ..AttentionOptions::default()
    };
    let problem = AttentionProblem::from_shapes(shape, shape, shape, DType::F32, &options).unwrap();
    let device = find("H200").properties();
    assert!(ForwardPlan::new(&problem, &device).is_ok());
    let refusal = SlaBackwardPlan::new(&problem, &device)
        .unwrap_err()
        .to_string();
    assert!(
        refusal.contains("not mma: the accumulators do not fit the registers; not simt"),
        "{refusal}"
    );
}

#[test]
fn candidates_are_the_ones_written_down() {
    let mut table = String::new();
    for profile in &PROFILES {
        writeln!(table, "{}", profile.name).unwrap();
        let device = profile.properties();
        let cases = harness::golden::forward_cases();
        for case in cases
            .into_iter()
            .filter(|case| matches!(case.factors(), FactorType::Tf32 | FactorType::BF16))
        {
            let problem = problem_of(&case);
            writeln!(
                table,
                "  {} D={} Dv={} blocks {}x{} scale {:+.3}",
                case.factors(),
                case.head_dim,
                case.value_dim,
                case.options.block_q,
                case.options.block_k,
                problem.scale(),
            )
            .unwrap();
            let plans = ForwardPlan::candidates(&problem, &device).unwrap_or_default();
            if let Some(table) = plans.first() {
                assert_eq!(*table, ForwardPlan::new(&problem, &device).unwrap());
            }
            for (number, plan) in plans.iter().enumerate() {
                assert!(!plans[..number].contains(plan), "{plan} twice");
                writeln!(table, "    {}", plan.engine).unwrap();
            }
        }
    }
    expect_file("candidates.txt", &table);
}

/// Compares `table` with what a file of this folder says, or writes it down.
fn expect_file(name: &str, table: &str) {
    let file = format!("{}/plans/{name}", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("UPDATE_PLANS").is_some() {
        std::fs::write(&file, table).unwrap();
    }
    let golden = std::fs::read_to_string(&file).unwrap_or_default();
    for (line, (found, expected)) in table.lines().zip(golden.lines()).enumerate() {
        assert_eq!(found, expected, "line {} of {name}", line + 1);
    }
    assert_eq!(
        table.lines().count(),
        golden.lines().count(),
        "{name} has other lines"
    );
}

/// A product of 8-bit matrices that Hopper's engine takes.
fn product() -> MatmulProblem {
    let form = LowBitForm {
        format: Format::Int8,
        granularity: Granularity::Row,
        zero_point: false,
    };
    MatmulProblem {
        size: [4096, 4096, 4096],
        x: form,
        w: form,
        bias: false,
        dtype: DType::BF16,
        aligned: true,
    }
}

fn with_granularity([x, w]: [Granularity; 2]) -> MatmulProblem {
    let mut problem = product();
    (problem.x.granularity, problem.w.granularity) = (x, w);
    problem
}

fn with_formats(format: Format, dtype: DType) -> MatmulProblem {
    let mut problem = product();
    (problem.x.format, problem.w.format) = (format, format);
    MatmulProblem { dtype, ..problem }
}

fn find(name: &str) -> &'static Profile {
    PROFILES
        .iter()
        .find(|profile| profile.name == name)
        .unwrap()
}

#[test]
fn the_backward_of_sla_has_the_engine_that_can_run_it() {
    let plans = |device: &str, dtype, value_dim| {
        let shape = |dim| [1, 2, 256, dim];
        let options = AttentionOptions::default();
        let (qk, v) = (shape(128), shape(value_dim));
        let problem = AttentionProblem::from_shapes(qk, qk, v, dtype, &options).unwrap();
        let plans = SlaBackwardPlan::all(&problem, &find(device).properties()).unwrap();
        let first = SlaBackwardPlan::new(&problem, &find(device).properties()).unwrap();
        assert_eq!(first, plans[0]);
        plans
            .iter()
            .map(SlaBackwardPlan::to_string)
            .collect::<Vec<_>>()
    };
    let hopper = plans("H200", DType::BF16, 128);
    assert_eq!(
        hopper[0],
        "wgmma dq 128x64, 3 stages; dk dv 64x128, 3 stages"
    );
    assert!(hopper[1].starts_with("mma dq"), "{hopper:?}");
    assert!(hopper[2].starts_with("simt dq"), "{hopper:?}");
    for (device, dtype, value_dim, engine, reason) in [
        (
            "A100",
            DType::BF16,
            128,
            "mma",
            "wgmma needs compute capability 9.0",
        ),
        (
            "H200",
            DType::F32,
            128,
            "simt",
            "wgmma multiplies 16-bit elements",
        ),
        (
            "H200",
            DType::F16,
            64,
            "mma",
            "both accumulators fit the registers for D = Dv up to 128",
        ),
    ] {
        let plan = &plans(device, dtype, value_dim)[0];
        assert!(plan.starts_with(&format!("{engine} dq")), "{plan}");
        assert!(plan.ends_with(&format!("(not wgmma: {reason})")), "{plan}");
    }
}

#[test]
fn products_have_the_engine_that_can_run_them() {
    use Granularity::{Block, Column, Group, Row, Tensor};
    let hopper = find("H200").properties();
    let takes = |problem: MatmulProblem, expected: &str| {
        assert_eq!(MatmulPlan::new(&problem, &hopper).to_string(), expected);
        let engines = MatmulPlan::all(&problem, &hopper);
        assert_eq!(engines.len(), 2, "{problem:?}");
        assert_eq!(engines[1].to_string(), "portable");
    };
    let large = "wgmma 256x256, 4 stages, 132 cubes";
    takes(product(), large);
    takes(with_formats(Format::Int8, DType::F32), large);
    takes(with_formats(Format::Fp8, DType::BF16), large);
    for shared in [
        [Tensor, Row],
        [Row, Tensor],
        [Group(128), Block],
        [Group(128), Row],
        [Row, Block],
    ] {
        takes(with_granularity(shared), large);
    }
    let size = [100, 1000, 33];
    takes(
        MatmulProblem { size, ..product() },
        "wgmma 128x256, 4 stages, 4 cubes",
    );
    let size = [300, 1000, 33];
    takes(
        MatmulProblem { size, ..product() },
        "wgmma 128x256, 4 stages, 12 cubes",
    );

    let passes = |problem: MatmulProblem, device: &DeviceProperties, reason: &str| {
        let plan = MatmulPlan::new(&problem, device).to_string();
        assert_eq!(plan, format!("portable (not wgmma: {reason})"));
    };
    let capability = "wgmma needs compute capability 9.0";
    passes(product(), &find("RTX 5090").properties(), capability);
    passes(product(), &find("llvmpipe").properties(), capability);
    let mut zero_point = product();
    zero_point.w.zero_point = true;
    passes(zero_point, &hopper, "zero points need sums of codes");
    let formats = "wgmma multiplies INT8 by INT8 or FP8 by FP8";
    passes(with_formats(Format::Int4, DType::F32), &hopper, formats);
    let rounded = "tensor cores keep about 14 bits of a sum of FP8 products";
    passes(with_formats(Format::Fp8, DType::F32), &hopper, rounded);
    let few = "of so few rows, warp-level products read W faster";
    let size = [32, 4096, 4096];
    passes(MatmulProblem { size, ..product() }, &hopper, few);
    let fp8 = with_formats(Format::Fp8, DType::BF16);
    passes(MatmulProblem { size, ..fp8 }, &hopper, few);
    let size = [33, 4096, 4096];
    takes(
        MatmulProblem { size, ..product() },
        "wgmma 128x256, 4 stages, 16 cubes",
    );
    let bytes = "bulk copies need rows that are multiples of 16 bytes";
    let size = [100, 1004, 4096];
    passes(MatmulProblem { size, ..product() }, &hopper, bytes);
    let aligned = false;
    passes(
        MatmulProblem {
            aligned,
            ..product()
        },
        &hopper,
        bytes,
    );
    let within = "scales of X change within a step of 128";
    passes(with_granularity([Group(64), Block]), &hopper, within);
    passes(with_granularity([Column, Row]), &hopper, within);
    let across = "scales of W change from column to column of a step";
    passes(with_granularity([Row, Group(128)]), &hopper, across);
}
