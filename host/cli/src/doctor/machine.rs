//! System, processor, memory, disk.

use std::path::Path;

use super::files::read;
use super::{Finding, Status};

const GIB: f64 = (1u64 << 30) as f64;

pub fn system() -> Finding {
    let release = read("/etc/os-release").unwrap_or_default();
    let name = release
        .lines()
        .find_map(|l| l.strip_prefix("PRETTY_NAME="))
        .map_or(std::env::consts::OS, |v| v.trim_matches('"'))
        .to_owned();
    let kernel = read("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    Finding::new("system", "everything", Status::Ok, format!("{name}, kernel {kernel}, {}", std::env::consts::ARCH))
        .detail("os", name)
        .detail("kernel", kernel)
        .detail("arch", std::env::consts::ARCH)
}

pub fn cpu() -> Finding {
    let info = read("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find(|l| l.starts_with("model name"))
        .and_then(|l| l.split_once(':'))
        .map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, v)| v.trim().to_owned());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let features = cpu_features();
    let fast = features.iter().any(|f| matches!(*f, "avx2" | "avx512f" | "neon"));
    let found = format!("{model}, {cores} cores for this process, {}", features.join(" "));
    let finding = Finding::new("cpu", "every run on `cpu`", if fast { Status::Ok } else { Status::Problem }, found)
        .detail("model", model)
        .detail("cores", cores)
        .detail("features", features);
    if fast { finding } else { finding.fix("use a machine with AVX2, AVX-512 or NEON; kernels run scalar here") }
}

fn cpu_features() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let known = [
        ("sse4.2", std::arch::is_x86_feature_detected!("sse4.2")),
        ("avx", std::arch::is_x86_feature_detected!("avx")),
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("f16c", std::arch::is_x86_feature_detected!("f16c")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        ("avx512bf16", std::arch::is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(target_arch = "aarch64")]
    let known = [
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("fp16", std::arch::is_aarch64_feature_detected!("fp16")),
        ("bf16", std::arch::is_aarch64_feature_detected!("bf16")),
    ];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let known: [(&'static str, bool); 0] = [];
    known.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect()
}

pub fn memory() -> Finding {
    let info = read("/proc/meminfo").unwrap_or_default();
    let total = meminfo_bytes(&info, "MemTotal");
    let available = meminfo_bytes(&info, "MemAvailable");
    // A container's own limit, where there is one below the machine's.
    let limit = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .find_map(|path| read(path)?.trim().parse::<u64>().ok())
        .filter(|limit| total.is_none_or(|total| *limit < total));
    let needed_for = "models, optimizer state, activations";
    let Some(total) = total else {
        return Finding::new("memory", needed_for, Status::Ok, "unknown: /proc/meminfo cannot be read");
    };
    let available = available.unwrap_or(total).min(limit.unwrap_or(u64::MAX));
    let mut found = format!("{:.1} GiB free of {:.1} GiB", available as f64 / GIB, total as f64 / GIB);
    if let Some(limit) = limit {
        found.push_str(&format!(", this container may use {:.1} GiB", limit as f64 / GIB));
    }
    let enough = available >= 2 << 30;
    let finding = Finding::new("memory", needed_for, if enough { Status::Ok } else { Status::Problem }, found)
        .detail("bytes_total", total)
        .detail("bytes_available", available)
        .detail("bytes_limit", limit);
    if enough { finding } else { finding.fix("free some memory: the quickstart needs about 2 GiB") }
}

fn meminfo_bytes(info: &str, key: &str) -> Option<u64> {
    let line = info.lines().find(|l| l.split(':').next() == Some(key))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

pub fn disk() -> Finding {
    let needed_for = "run folders and checkpoints under the current folder";
    let folder = std::env::current_dir().unwrap_or_else(|_| Path::new(".").to_owned());
    let writable = rustix::fs::access(&folder, rustix::fs::Access::WRITE_OK).is_ok();
    let free = rustix::fs::statvfs(&folder).ok().map(|s| s.f_bavail.saturating_mul(s.f_frsize));
    let (status, found, fix) = match free {
        _ if !writable => (
            Status::Problem,
            format!("{} cannot be written", folder.display()),
            Some("start from a folder you own, or pass --output-dir"),
        ),
        None => (Status::Ok, format!("{}: free space unknown", folder.display()), None),
        Some(free) => (
            if free < 1 << 30 { Status::Problem } else { Status::Ok },
            format!("{:.1} GiB free under {}", free as f64 / GIB, folder.display()),
            (free < 1 << 30).then_some("free some space, or pass --output-dir on another disk"),
        ),
    };
    let mut finding = Finding::new("disk", needed_for, status, found)
        .detail("path", folder.display().to_string())
        .detail("bytes_free", free)
        .detail("writable", writable);
    finding.fix = fix.map(str::to_owned);
    finding
}

pub fn open_files() -> Finding {
    let limits = read("/proc/self/limits").unwrap_or_default();
    let soft = limits
        .lines()
        .find_map(|l| l.strip_prefix("Max open files"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|value| value.parse::<u64>().ok());
    let needed_for = "sharded checkpoints and datasets of many files";
    match soft {
        None => Finding::new("open_files", needed_for, Status::Ok, "no limit known"),
        Some(soft) if soft >= 1024 => {
            Finding::new("open_files", needed_for, Status::Ok, format!("at most {soft} at a time"))
                .detail("soft_max", soft)
        }
        Some(soft) => Finding::new("open_files", needed_for, Status::Problem, format!("at most {soft} at a time"))
            .detail("soft_max", soft)
            .fix("raise it: ulimit -n 4096"),
    }
}

#[cfg(test)]
mod tests {
    use super::meminfo_bytes;

    #[test]
    fn meminfo_is_in_kib() {
        let info = "MemTotal:       24000000 kB\nMemAvailable:   1000 kB\n";
        assert_eq!(meminfo_bytes(info, "MemAvailable"), Some(1_024_000));
        assert_eq!(meminfo_bytes(info, "Swap"), None);
        assert_eq!(meminfo_bytes("MemTotal: junk", "MemTotal"), None);
    }
}
