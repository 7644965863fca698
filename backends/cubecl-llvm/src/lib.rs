//! A stand-in for `cubecl-llvm` 0.11.3 that holds no LLVM: see the README beside this crate.
//!
//! Only the names that `cubecl-cuda` 0.11.3 mentions are here. [`PlironCompiler::compile`] always
//! fails, so a build that reaches it by mistake gets an error instead of a wrong kernel.

use core::fmt;

use cubecl_core::ir::nvidia::SmArch;
use cubecl_core::prelude::KernelDefinition;
use cubecl_runtime::compiler::{CompilationError, Compiler};
use cubecl_runtime::kernel::BufferIOAttr;

/// PTX versions of the LLVM generator.
pub mod nvptx {
    /// The one type that the CUDA runtime reads.
    pub mod ptx_version {
        use core::fmt;

        /// A PTX version; none exists here, as nothing emits PTX.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum PtxVersion {}

        impl PtxVersion {
            /// The newest version that the driver loads: none.
            pub fn for_driver(_driver_version: i32) -> Option<Self> {
                None
            }
        }

        impl fmt::Display for PtxVersion {
            fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {}
            }
        }
    }
}

/// Feature restrictions of the LLVM generator.
pub mod shared {
    /// What the generator would take away from a device's features.
    pub mod lowered_features {
        use cubecl_core::ir::DeviceProperties;

        /// Targets of the generator.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum GpuTarget {
            /// NVIDIA PTX.
            Nvptx,
        }

        /// Takes nothing away: the generator never runs.
        pub fn restrict_features(_properties: &mut DeviceProperties, _target: GpuTarget) {}
    }
}

/// Targets of the compiler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LlvmTarget {
    /// Host code.
    #[default]
    Cpu,
    /// NVIDIA PTX.
    Nvptx,
}

/// Options of the compiler, as the CUDA runtime fills them in.
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    /// Target architecture by name.
    pub arch: Option<()>,
    /// Target compute capability.
    pub sm_arch: Option<SmArch>,
    /// Newest PTX version the driver loads.
    pub ptx_version: Option<nvptx::ptx_version::PtxVersion>,
    /// Whether launch parameters are grid constants.
    pub grid_constants: bool,
    /// Lets the runtime's `..Default::default()` cover a field.
    pub other: (),
}

/// A compiled module.
#[derive(Clone, Debug)]
pub struct NvptxModule {
    /// PTX text.
    pub ptx: Vec<core::ffi::c_char>,
    /// Kernel name.
    pub entrypoint: String,
    /// Intermediate representation, for display.
    pub ir: String,
    /// Bytes of dynamic shared memory.
    pub shared_memory_size: usize,
    /// How each buffer is used.
    pub io: Vec<BufferIOAttr>,
}

/// What the compiler produces.
#[derive(Clone, Debug)]
pub enum PlironArtifact {
    /// Host code.
    Jit,
    /// PTX.
    NvptxCode(NvptxModule),
}

impl fmt::Display for PlironArtifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cubecl-llvm is not part of this build")
    }
}

/// The compiler, which refuses.
#[derive(Clone, Debug, Default)]
pub struct PlironCompiler {
    /// What it would compile for.
    pub target: LlvmTarget,
}

impl Compiler for PlironCompiler {
    type Representation = PlironArtifact;
    type CompilationOptions = PlironOptions;

    fn compile(
        &mut self,
        _kernel: KernelDefinition,
        _options: &PlironOptions,
    ) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic {
            reason: "this build has no LLVM generator: enable the feature `cubecl/cuda-cpp`, \
                     which compiles kernels with NVRTC"
                .into(),
            backtrace: Default::default(),
        })
    }

    fn extension(&self) -> &'static str {
        "ll"
    }

    fn lang_tag(&self) -> &'static str {
        "llvm"
    }
}
