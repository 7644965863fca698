//! Plans are data: those of the golden problems, on devices written down here, must be the ones in
//! `plans.txt`. `UPDATE_PLANS=1 cargo test -p cubesla-tests --test plans` writes the file anew.

use std::fmt::Write;

use cubecl::features::MmaConfig;
use cubecl::ir::{
    DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties,
    MemoryDeviceProperties,
};
use cubesla::plan::ForwardPlan;
use cubesla::{AttentionProblem, DType};

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
            for elem in [DType::F16, DType::BF16].map(DType::elem_type) {
                properties.features.matmul.ldmatrix.insert(elem);
                properties.features.matmul.mma.insert(MmaConfig {
                    a_type: elem,
                    b_type: elem,
                    cd_type: ElemType::Float(FloatKind::F32),
                    m: 16,
                    n: 8,
                    k: 16,
                });
            }
        }
        properties
    }
}

#[test]
fn plans_are_the_ones_written_down() {
    let mut table = String::new();
    for profile in &PROFILES {
        writeln!(table, "{}", profile.name).unwrap();
        let device = profile.properties();
        for case in harness::golden::forward_cases() {
            let problem = AttentionProblem::from_shapes(
                case.q_shape(),
                case.k_shape(),
                case.v_shape(),
                case.dtype,
                &case.options,
            )
            .unwrap();
            let plan = match ForwardPlan::new(&problem, &device) {
                Ok(plan) => plan.to_string(),
                Err(refusal) => refusal.to_string(),
            };
            writeln!(
                table,
                "  {:4} D={:<3} Dv={:<3} blocks {:>3}x{:<3} scale {:+.3} causal {}: {plan}",
                case.dtype.to_string(),
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
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/plans/plans.txt");
    if std::env::var_os("UPDATE_PLANS").is_some() {
        std::fs::write(file, &table).unwrap();
    }
    let golden = std::fs::read_to_string(file).unwrap_or_default();
    for (line, (found, expected)) in table.lines().zip(golden.lines()).enumerate() {
        assert_eq!(found, expected, "line {} of plans.txt", line + 1);
    }
    assert_eq!(
        table.lines().count(),
        golden.lines().count(),
        "plans.txt has other lines"
    );
}
