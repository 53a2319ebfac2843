//! Stands in for `cubecl-llvm`. That crate's build script downloads LLVM, and `cubecl-cuda` names it even when its `cpp`
//! feature compiles every kernel through NVRTC. Here are those names; asked for a kernel, this crate refuses.

use cubecl_core::ir::nvidia::SmArch;
use cubecl_core::prelude::KernelDefinition;
use cubecl_server::compiler::CompilationError;
use cubecl_server::kernel::BufferIOAttr;
use nvptx::ptx_version::PtxVersion;

/// What a kernel would be compiled for.
#[derive(Clone, Copy, Debug)]
pub enum LlvmTarget {
    /// NVIDIA.
    Nvptx,
}

/// The compiler that is not here.
#[derive(Clone, Debug)]
pub struct PlironCompiler {
    /// Read by nobody.
    pub target: LlvmTarget,
}

/// Its options.
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    /// Architecture by name.
    pub arch: Option<String>,
    /// Compute capability.
    pub sm_arch: Option<SmArch>,
    /// PTX version of the driver.
    pub ptx_version: Option<PtxVersion>,
    /// Whether parameters are grid constants.
    pub grid_constants: bool,
    /// What the real crate has beside these.
    pub more: (),
}

/// What it would make.
pub enum PlironArtifact {
    /// A module for NVIDIA.
    NvptxCode(NvptxModule),
    /// A module for anything else.
    Other,
}

/// A compiled module.
#[derive(Clone, Debug)]
pub struct NvptxModule {
    /// Intermediate code.
    pub ir: String,
    /// Machine code for the driver.
    pub ptx: Vec<std::ffi::c_char>,
    /// Dynamic shared memory, bytes.
    pub shared_memory_size: usize,
    /// Which buffers are read and written.
    pub io: Vec<BufferIOAttr>,
}

impl PlironCompiler {
    /// Refuses.
    pub fn compile(&mut self, _kernel: KernelDefinition, _options: &PlironOptions) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic {
            reason: "this program was built without LLVM; CUDA kernels are compiled by NVRTC".to_string(),
            backtrace: cubecl_environment::backtrace::BackTrace::capture(),
        })
    }

    /// Names the language in caches.
    pub fn lang_tag(&self) -> &'static str {
        "none"
    }
}

/// Names for NVIDIA.
pub mod nvptx {
    /// Versions of PTX.
    pub mod ptx_version {
        /// A version that the driver loads; NVRTC chooses by itself, so there is never one.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum PtxVersion {}

        impl PtxVersion {
            /// None.
            pub fn for_driver(_driver: i32) -> Option<Self> {
                None
            }
        }

        impl std::fmt::Display for PtxVersion {
            fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match *self {}
            }
        }
    }
}

/// Names for all targets.
pub mod shared {
    /// What a device may advertise.
    pub mod lowered_features {
        use cubecl_core::ir::DeviceProperties;

        /// The device's family.
        #[derive(Clone, Copy, Debug)]
        pub enum GpuTarget {
            /// NVIDIA.
            Nvptx,
        }

        /// Changes nothing: only the LLVM path would narrow a device.
        pub fn restrict_features(_properties: &mut DeviceProperties, _target: GpuTarget) {}
    }
}
