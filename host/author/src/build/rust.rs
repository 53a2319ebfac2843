//! Rust through cargo: with the target of the user's own compiler where it has one, else with Debian's compiler.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;

use super::{Build, Step};
use crate::error::{AuthorError, Result};
use crate::toolchain::{self, Found, Need, Tool};

/// Targets that give a component, the best first: the first one needs no WASI.
const TARGETS: [&str; 2] = ["wasm32-unknown-unknown", "wasm32-wasip2"];
/// Unpacks Debian's compiler and builds its library for the first target.
const INSTALL: &str = include_str!("../../scripts/rust-toolchain.sh");
/// Downloads of 300 MB and a build of the standard library.
const INSTALL_SECONDS_MAX: u64 = 3600;
const FIX: &str = "run `rustup target add wasm32-unknown-unknown`, or `cosmos-host plugin toolchain rust --install` for Debian's compiler";

/// A compiler with a target.
#[derive(Debug)]
struct Compiler {
    rustc: PathBuf,
    version: String,
    target: &'static str,
    /// Where Debian's is unpacked; the user's own needs nothing.
    prefix: Option<PathBuf>,
}

/// What building needs.
pub fn needs() -> Vec<Need> {
    let cargo = toolchain::find(Tool::Cargo).map(|f| shown(&f));
    let compiler = compiler(Path::new(".")).map(|c| c.to_string());
    vec![
        Need { what: "cargo", found: cargo, fix: "install Rust from https://rustup.rs".into() },
        Need { what: "rustc with a WebAssembly target", found: compiler, fix: FIX.into() },
    ]
}

fn shown(found: &Found) -> String {
    format!("{} ({})", found.version, found.path.display())
}

impl std::fmt::Display for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {} ({})", self.version, self.target, self.rustc.display())
    }
}

/// Gets Debian's compiler.
///
/// # Errors
/// What could not be fetched.
pub fn install(tell: &mut dyn FnMut(&str)) -> Result<()> {
    if let Some(compiler) = compiler(Path::new(".")) {
        tell(&format!("nothing to do: {compiler}"));
        return Ok(());
    }
    toolchain::need(Tool::Cargo, "cargo", "install Rust from https://rustup.rs")?;
    let prefix = debian_dir()?;
    let above = prefix.parent().unwrap_or(&prefix);
    std::fs::create_dir_all(above).map_err(AuthorError::io("cannot make folder", above))?;
    tell(&format!("Debian's Rust compiler goes to {} (1 GB, some minutes)", prefix.display()));
    let log = above.join("wasm-toolchain.log");
    Step::new("rust-toolchain.sh", Path::new("bash"), log, Duration::from_secs(INSTALL_SECONDS_MAX), false)
        .args([std::ffi::OsStr::new("-c"), INSTALL.as_ref(), "rust-toolchain.sh".as_ref(), prefix.as_os_str()])
        .hint("with rustup, `rustup target add wasm32-unknown-unknown` is enough")
        .run()
}

/// Where Debian's compiler is or goes. `plugins/build.sh` uses the same folder.
fn debian_dir() -> Result<PathBuf> {
    let cache = toolchain::cache_dir();
    Ok(cache
        .ok_or_else(|| AuthorError::project("no place for a compiler", "set HOME or XDG_CACHE_HOME"))?
        .join("wasm-toolchain"))
}

/// The compiler for a project in `folder`, where a `rust-toolchain.toml` may choose one.
fn compiler(folder: &Path) -> Option<Compiler> {
    own_compiler(folder).or_else(debian_compiler)
}

fn own_compiler(folder: &Path) -> Option<Compiler> {
    let rustc = match std::env::var_os("RUSTC").filter(|r| !r.is_empty()) {
        Some(rustc) => PathBuf::from(rustc),
        None => toolchain::find(Tool::Rustc)?.path,
    };
    let ask = |args: &[&str]| toolchain::answer_of(Command::new(&rustc).args(args).current_dir(folder));
    let target = TARGETS.into_iter().find(|target| {
        ask(&["--print", "target-libdir", "--target", target]).is_some_and(|dir| has_std(Path::new(dir.trim())))
    })?;
    let version = ask(&["--version"])?.trim().to_owned();
    Some(Compiler { rustc, version, target, prefix: None })
}

fn has_std(libraries: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(libraries) else { return false };
    entries.flatten().any(|e| e.file_name().to_str().is_some_and(|n| n.starts_with("libstd-") && n.ends_with(".rlib")))
}

fn debian_compiler() -> Option<Compiler> {
    let place = debian_dir().ok()?;
    // The installation writes this file last.
    if !place.join("complete").is_file() {
        return None;
    }
    let prefix = place.join("root");
    let rustc = prefix.join("usr/bin/rustc");
    let version =
        toolchain::answer_of(Command::new(&rustc).arg("--version").env("LD_LIBRARY_PATH", library_path(&prefix)))?;
    Some(Compiler { rustc, version: version.trim().to_owned(), target: TARGETS[0], prefix: Some(prefix) })
}

/// Folders of the libraries that Debian's compiler loads, before those that are set already.
fn library_path(prefix: &Path) -> std::ffi::OsString {
    let lib = prefix.join("usr/lib");
    // The folders carry the architecture and LLVM's version in their names.
    let named = |start: &str, below: &str| {
        let entries = std::fs::read_dir(&lib).into_iter().flatten().flatten();
        let folders =
            entries.filter(|e| e.file_name().to_str().is_some_and(|n| n.ends_with(start) || n.starts_with(start)));
        folders.map(|e| e.path().join(below)).collect::<Vec<_>>()
    };
    let mut folders = named("-linux-gnu", "");
    folders.extend(named("llvm-", "lib"));
    let mut joined = std::env::join_paths(folders).unwrap_or_default();
    if let Some(set) = std::env::var_os("LD_LIBRARY_PATH").filter(|v| !v.is_empty()) {
        joined.push(":");
        joined.push(set);
    }
    joined
}

/// Settings of the caller's shell that are meant for other builds.
const HIDDEN: [&str; 10] = [
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_INCREMENTAL",
    "CARGO_PROFILE_RELEASE_INCREMENTAL",
    "CARGO_PROFILE_RELEASE_LTO",
    "CARGO_PROFILE_RELEASE_OPT_LEVEL",
    "CARGO_PROFILE_RELEASE_STRIP",
    "CARGO_PROFILE_RELEASE_PANIC",
];

/// Builds the component `made`; what built it comes back.
///
/// # Errors
/// A tool is missing or failed.
pub fn build(build: &Build<'_>, made: &Path) -> Result<String> {
    let folder = &build.project.folder;
    let cargo = toolchain::need(Tool::Cargo, "cargo", "install Rust from https://rustup.rs")?;
    let compiler = compiler(folder).ok_or_else(|| AuthorError::Missing {
        what: "a Rust compiler with the target wasm32-unknown-unknown or wasm32-wasip2".into(),
        hint: FIX.into(),
    })?;
    let messages = build.dir.join("cargo.json");
    let mut step = build
        .step("cargo", &cargo.path)
        .args(["build", "--release", "--lib", "--message-format=json-render-diagnostics", "--target", compiler.target])
        .current_dir(folder)
        .stdout_to(messages.clone())
        .env_remove(&HIDDEN)
        .env("CARGO_TARGET_DIR", build.dir.join("cargo"))
        // The author's folders are nobody's business who gets the component.
        .env("CARGO_ENCODED_RUSTFLAGS", remaps(folder).join("\x1f"));
    if let Some(prefix) = &compiler.prefix {
        let mut path = prefix.join("usr/bin").into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        step = step
            .env_remove(&["RUSTUP_TOOLCHAIN", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"])
            .env("RUSTC", &compiler.rustc)
            .env("PATH", path)
            .env("LD_LIBRARY_PATH", library_path(prefix));
    }
    step.run()?;
    let module = artifact(&messages, folder)?;
    super::componentize(&module, made)?;
    Ok(format!("{} for {}", compiler.version, compiler.target))
}

fn remaps(folder: &Path) -> Vec<String> {
    let mut remaps = vec![format!("--remap-path-prefix={}=/plugin", folder.display())];
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    if let Some(home) = home {
        remaps.push(format!("--remap-path-prefix={}=/cargo", home.display()));
    }
    remaps
}

/// A line of cargo's messages, as far as it matters here.
#[derive(Deserialize)]
struct Message {
    reason: String,
    #[serde(default)]
    manifest_path: PathBuf,
    #[serde(default)]
    filenames: Vec<PathBuf>,
}

/// The module that cargo says it made of the project's own package.
fn artifact(messages: &Path, folder: &Path) -> Result<PathBuf> {
    let text = std::fs::read_to_string(messages).map_err(AuthorError::io("cannot read", messages))?;
    let manifest = folder.join("Cargo.toml");
    let made = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok())
        .filter(|message| message.reason == "compiler-artifact" && message.manifest_path == manifest);
    let mut modules = made.flat_map(|m| m.filenames).filter(|f| f.extension().is_some_and(|e| e == "wasm"));
    modules.next_back().ok_or_else(|| {
        AuthorError::project(
            format!("`{}` made no WebAssembly module", manifest.display()),
            "a plugin's Cargo.toml has `[lib]` with `crate-type = [\"cdylib\", \"rlib\"]`",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_artifact_is_the_projects_own() {
        let folder = tempfile::tempdir().unwrap();
        let messages = folder.path().join("cargo.json");
        let own = folder.path().join("Cargo.toml");
        let line = |manifest: &Path, file: &str| {
            format!(
                "{}\n",
                serde_json::json!({"reason": "compiler-artifact", "manifest_path": manifest, "filenames": [file]})
            )
        };
        let mut text = line(Path::new("/other/Cargo.toml"), "/t/other.wasm");
        text += "{\"reason\":\"build-finished\",\"success\":true}\nnot json\n";
        std::fs::write(&messages, &text).unwrap();
        assert!(artifact(&messages, folder.path()).unwrap_err().hint().unwrap().contains("cdylib"));
        text += &line(&own, "/t/libx.rlib");
        text += &line(&own, "/t/x.wasm");
        std::fs::write(&messages, &text).unwrap();
        assert_eq!(artifact(&messages, folder.path()).unwrap(), Path::new("/t/x.wasm"));
    }
}
