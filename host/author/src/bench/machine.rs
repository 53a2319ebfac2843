//! What the numbers were measured on.

use serde::Serialize;

/// The machine, as far as the system says.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Name of the processor.
    pub processor: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Mean number of busy or waiting threads in the last minute, when measuring began.
    pub load: Option<f64>,
}

impl Machine {
    pub(super) fn look() -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = info.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Self {
            processor: name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned()),
            cores: cores(),
            load: load.split(' ').next().and_then(|text| text.parse().ok()),
        }
    }

    /// Whether other work takes part of the cores, so that the numbers are lower than they could be.
    pub fn is_busy(&self) -> bool {
        self.load.is_some_and(|load| load > 0.5 * self.cores as f64)
    }
}

pub(super) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Memory of this process in bytes: now, and the most it ever had.
pub(super) fn memory() -> (Option<u64>, Option<u64>) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bytes = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    };
    (bytes("VmRSS:"), bytes("VmHWM:"))
}

/// Seconds that all threads of this process have computed. Unlike the clock on the wall it does not count the time
/// that other programs took.
pub(super) fn computed_s() -> Option<f64> {
    let mut ns = 0_u64;
    for thread in std::fs::read_dir("/proc/self/task").ok()?.flatten() {
        // A thread may end while we look.
        let Ok(text) = std::fs::read_to_string(thread.path().join("schedstat")) else { continue };
        ns += text.split(' ').next()?.parse::<u64>().ok()?;
    }
    Some(ns as f64 * 1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_machine_is_one_with_other_work() {
        let machine = |load| Machine { processor: "p".into(), cores: 2, load };
        assert!(machine(Some(1.5)).is_busy());
        assert!(!machine(Some(0.3)).is_busy() && !machine(None).is_busy());
        assert!(Machine::look().cores > 0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_tells_memory_and_time() {
        // The kernel adds to it only when a thread gives way.
        let before = computed_s().unwrap();
        assert!(computed_s().unwrap() >= before);
        let (now, peak) = memory();
        assert!(now.unwrap() > 0 && peak.unwrap() >= now.unwrap());
    }
}
