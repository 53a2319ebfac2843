//! Device strings.

use burn::tensor::Device;

use crate::{EngineError, Result};

/// An open device.
pub(super) struct Found {
    pub device: Device,
    pub on_cpu: bool,
}

/// Opens `burn:flex` or `burn:cuda[:N]`.
pub(super) fn open(name: &str) -> Result<Found> {
    let refuse = |message: &str, hint: &str| {
        Err(EngineError::Device { device: name.into(), message: message.into(), hint: hint.into() })
    };
    match name {
        "burn:flex" => Ok(Found { device: Device::flex(), on_cpu: true }),
        "cuda" => refuse(
            "the native CUDA engine is not there yet",
            "use `burn:cuda`, or `burn:flex` on a machine without a GPU",
        ),
        _ if name.starts_with("cuda:") => refuse(
            "the native CUDA engine is not there yet",
            "use `burn:cuda`, or `burn:flex` on a machine without a GPU",
        ),
        "burn:cuda" => open_cuda(name, 0),
        _ => match name.strip_prefix("burn:cuda:").and_then(|index| index.parse().ok()) {
            Some(index) => open_cuda(name, index),
            None => refuse("no such device", "use `cpu`, `burn:flex` or `burn:cuda`"),
        },
    }
}

#[cfg(not(feature = "burn-cuda"))]
fn open_cuda(name: &str, _index: usize) -> Result<Found> {
    Err(EngineError::Device {
        device: name.into(),
        message: "this program was built without CUDA".into(),
        hint: "build it with `--features burn-cuda`, or use `burn:flex`".into(),
    })
}

/// Burn panics at the first use of a device without a driver, so everything that can be missing is asked for first.
#[cfg(feature = "burn-cuda")]
fn open_cuda(name: &str, index: usize) -> Result<Found> {
    let refuse = |message: String, hint: &str| EngineError::Device { device: name.into(), message, hint: hint.into() };
    if !cuda_libraries::driver() {
        return Err(refuse(
            "the NVIDIA driver (`libcuda.so`) is not on this machine".into(),
            "use `burn:flex`, or install the driver",
        ));
    }
    if !cuda_libraries::nvrtc() {
        let hint = "install the CUDA toolkit's NVRTC and put its folder into `LD_LIBRARY_PATH`";
        return Err(refuse("the kernel compiler (`libnvrtc.so`) is not on this machine".into(), hint));
    }
    let count = cudarc::driver::result::init().and_then(|()| cudarc::driver::result::device::get_count());
    let count = count.map_err(|e| refuse(format!("the driver does not start: {e:?}"), "see `nvidia-smi`"))?;
    if index >= usize::try_from(count).unwrap_or(0) {
        return Err(refuse(
            format!("the machine has {count} GPUs, counted from 0"),
            "name one of them, or see `CUDA_VISIBLE_DEVICES`",
        ));
    }
    Ok(Found { device: Device::cuda(index), on_cpu: false })
}

#[cfg(feature = "burn-cuda")]
mod cuda_libraries {
    /// Whether the driver's library can be opened.
    #[allow(unsafe_code)]
    pub fn driver() -> bool {
        // SAFETY: opens the library by name and closes it again; the driver's own initialisers run, as in any CUDA program.
        unsafe { cudarc::driver::sys::is_culib_present() }
    }

    /// Whether the kernel compiler's library can be opened.
    #[allow(unsafe_code)]
    pub fn nvrtc() -> bool {
        // SAFETY: as above.
        unsafe { cudarc::nvrtc::sys::is_culib_present() }
    }
}
