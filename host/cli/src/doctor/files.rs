//! Looking for programs and libraries without running or loading them.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cosmos_author::toolchain::{answer_within, is_program};

/// How long a program may take to print its version.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(3);

/// No small system file is longer.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The text of a small system file.
pub fn read(path: impl AsRef<Path>) -> Option<String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path).ok()?.take(FILE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Where a program would be started from.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| is_program(file))
}

/// What a program prints, when it ends well and in time.
pub fn answer(program: &Path, arguments: &[&str]) -> Option<String> {
    answer_within(Command::new(program).args(arguments), ANSWER_WAIT_MAX)
}

/// Folders in which the dynamic loader and common installations keep libraries.
pub fn library_folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = Vec::new();
    if let Some(paths) = std::env::var_os("LD_LIBRARY_PATH") {
        folders.extend(std::env::split_paths(&paths));
    }
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(root) = std::env::var_os(variable) {
            folders.push(Path::new(&root).join("lib64"));
        }
    }
    folders.extend(loader_folders(Path::new("/etc/ld.so.conf")));
    for folder in [
        "/lib/x86_64-linux-gnu",
        "/usr/lib/x86_64-linux-gnu",
        "/lib/aarch64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/lib64",
        "/usr/lib64",
        "/lib",
        "/usr/lib",
        "/usr/local/lib",
        "/usr/local/cuda/lib64",
        "/usr/local/nvidia/lib64",
    ] {
        folders.push(folder.into());
    }
    if let Some(environment) = std::env::var_os("VIRTUAL_ENV") {
        folders.extend(wheel_folders(Path::new(&environment)));
    }
    folders.retain(|f| !f.as_os_str().is_empty());
    folders
}

/// The folders that `ld.so.conf` and the files it includes name.
fn loader_folders(file: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for line in read(file).unwrap_or_default().lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if let Some(pattern) = line.strip_prefix("include ") {
            let Some(folder) = Path::new(pattern.trim()).parent() else { continue };
            for included in entries(folder).filter(|p| p.extension().is_some_and(|e| e == "conf")) {
                for line in read(&included).unwrap_or_default().lines().filter(|l| l.starts_with('/')) {
                    folders.push(line.trim().into());
                }
            }
        } else if line.starts_with('/') {
            folders.push(line.into());
        }
    }
    folders
}

/// Where NVIDIA's Python wheels put their libraries.
fn wheel_folders(environment: &Path) -> Vec<PathBuf> {
    entries(&environment.join("lib"))
        .flat_map(|python| entries(&python.join("site-packages/nvidia")).collect::<Vec<_>>())
        .map(|package| package.join("lib"))
        .collect()
}

/// The entries of a folder, sorted; none when it cannot be read.
pub fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(folder).map(|r| r.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    found.sort();
    found.into_iter()
}

/// The first library whose file is `name` or `name.<version>`.
pub fn library(name: &str) -> Option<PathBuf> {
    let versioned = format!("{name}.");
    library_folders().iter().flat_map(|folder| entries(folder)).find(|file| {
        let file_name = file.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        file_name == name || file_name.starts_with(&versioned)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loader_configuration_is_followed_through_includes() {
        let folder = tempfile::tempdir().unwrap();
        let parts = folder.path().join("parts");
        std::fs::create_dir(&parts).unwrap();
        std::fs::write(parts.join("a.conf"), "# comment\n/opt/a\n").unwrap();
        std::fs::write(parts.join("a.txt"), "/opt/not\n").unwrap();
        let main = folder.path().join("ld.so.conf");
        std::fs::write(&main, format!("include {}/*.conf\n/opt/b # last\n", parts.display())).unwrap();
        assert_eq!(loader_folders(&main), [PathBuf::from("/opt/a"), PathBuf::from("/opt/b")]);
    }

    #[test]
    fn a_program_that_hangs_is_given_up() {
        if let Some(sleep) = program("sleep") {
            assert_eq!(answer(&sleep, &["60"]), None);
        }
    }
}
