//! Devices of this build, the GPU's driver and its libraries.

use std::path::Path;

use cosmos_launch::placement::uses_gpus;

use super::files::{entries, library, read};
use super::{Finding, Status};

/// The CUDA version that kernels are compiled with, and the oldest driver that runs what it makes.
const CUDA_MAJOR: u32 = 13;
const DRIVER_MIN: u32 = 580;

/// Whether a driver as in `570.86.15` is older than what this build needs. One whose number cannot be read is not called old.
fn is_too_old(driver: &str) -> bool {
    driver.split('.').next().and_then(|major| major.parse::<u32>().ok()).is_some_and(|major| major < DRIVER_MIN)
}

/// The driver's version as the kernel module tells it.
fn driver_in(text: &str) -> Option<String> {
    text.lines()
        .next()?
        .split_whitespace()
        .find(|w| w.starts_with(|c: char| c.is_ascii_digit()) && w.contains('.'))
        .map(str::to_owned)
}

const DEVICES: &str = "`cpu`, `burn:flex` or `burn:cuda`";

/// What this build can compute on.
fn offered() -> Vec<&'static str> {
    let mut devices = vec!["cpu", "burn:flex"];
    if cfg!(feature = "burn-cuda") {
        devices.push("burn:cuda");
    }
    devices
}

/// Why this build cannot compute on the device that the config asks for, and the fix.
pub fn lacks_device(device: &str) -> Option<(String, String)> {
    let offers = format!("this build offers {}", offered().join(", "));
    if !uses_gpus(device) {
        let known = offered().contains(&device);
        return (!known)
            .then(|| (format!("`host.device` is `{device}`, which is no device: {offers}"), format!("use {DEVICES}")));
    }
    let lacks = !cfg!(feature = "burn-cuda");
    lacks.then(|| {
        (
            format!("`host.device` is `{device}`, and {offers}"),
            "build the program with `--features burn-cuda`, or set `host.device = \"cpu\"`".to_owned(),
        )
    })
}

pub fn devices() -> Finding {
    let devices = offered();
    Finding::new("devices", "`--device`", Status::Ok, format!("this build offers {}", devices.join(", ")))
        .detail("devices", devices)
}

pub fn gpu() -> Finding {
    let needed_for = "`burn:cuda`";
    let driver = read("/proc/driver/nvidia/version").and_then(|text| driver_in(&text));
    let gpus: Vec<String> = entries(Path::new("/proc/driver/nvidia/gpus"))
        .filter_map(|gpu| read(gpu.join("information")))
        .map(|text| text.lines().find_map(|l| l.strip_prefix("Model:")).unwrap_or("unknown model").trim().to_owned())
        .collect();
    let cuda = library("libcuda.so");
    let shown = cuda.as_ref().map(|p| p.display().to_string());
    let (status, found, fix) = match (&driver, gpus.is_empty(), &shown) {
        (Some(driver), ..) if is_too_old(driver) => (
            Status::Problem,
            format!("driver {driver} is too old: CUDA {CUDA_MAJOR} needs {DRIVER_MIN} or newer"),
            Some(
                "install the NVIDIA driver (580 or newer) on this node, or take nodes that have it; runs on the CPU need none",
            ),
        ),
        (Some(driver), false, Some(_)) => (Status::Ok, format!("driver {driver}, {}", gpus.join(", ")), None),
        (Some(driver), _, None) => (
            Status::Problem,
            format!("driver {driver} is loaded but libcuda.so is not to be found"),
            Some(
                "in a container, start it with the NVIDIA container toolkit; else install the driver's user-space libraries",
            ),
        ),
        _ => (
            Status::Missing,
            "no NVIDIA driver is loaded".to_owned(),
            Some("install the NVIDIA driver (580 or newer); runs on the CPU need none"),
        ),
    };
    let mut finding = Finding::new("gpu", needed_for, status, found)
        .detail("driver", driver)
        .detail("gpus", gpus)
        .detail("libcuda", shown);
    finding.fix = fix.map(str::to_owned);
    finding
}

pub fn nvrtc() -> Finding {
    shared_library(
        "nvrtc",
        "libnvrtc.so",
        "`burn:cuda`: kernels are compiled at run time",
        "install the CUDA toolkit 13, or the wheel nvidia-cuda-nvrtc==13.0.88, and put its lib folder into LD_LIBRARY_PATH",
    )
}

pub fn nccl() -> Finding {
    shared_library(
        "nccl",
        "libnccl.so",
        "weights and gradients between several GPUs",
        "install libnccl2, or the wheel nvidia-nccl-cu13, and put its lib folder into LD_LIBRARY_PATH",
    )
}

fn shared_library(id: &'static str, name: &str, needed_for: &'static str, fix: &str) -> Finding {
    match library(name) {
        Some(path) => Finding::new(id, needed_for, Status::Ok, path.display().to_string())
            .detail("path", path.display().to_string()),
        None => Finding::new(id, needed_for, Status::Missing, format!("{name} is not to be found"))
            .detail("path", None::<String>)
            .fix(fix),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_older_than_the_build_is_seen() {
        let version = |text: &str| driver_in(text).unwrap();
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: 12.3.0";
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs@host)";
        assert_eq!((version(closed).as_str(), version(open).as_str()), ("535.183.01", "580.65.06"));
        assert!(is_too_old("535.183.01") && is_too_old("575.57.08"));
        assert!(!is_too_old("580.65.06") && !is_too_old("600.1") && !is_too_old("unknown"));
        assert_eq!(driver_in(""), None);
    }
}
