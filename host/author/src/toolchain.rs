//! Which compilers this machine has, and where the ones that we fetched lie.
//!
//! A program of the user in `PATH` comes before a private one under [`private_dir`]; nothing is ever installed elsewhere.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::build::{c, js, python, rust};
use crate::error::{AuthorError, Result};
use crate::manifest::Language;

/// A program that only says its version takes no longer than this, even when it is a script on a slow disk.
const ANSWER_SECONDS_MAX: u64 = 30;
/// More than that is no version.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// Programs that building may need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// Rust's build tool.
    Cargo,
    /// Rust's compiler, whatever its targets.
    Rustc,
    /// Rust's toolchain manager.
    Rustup,
    /// A C compiler that knows wasm32, any version.
    Clang,
    /// LLVM's linker for WebAssembly.
    WasmLd,
    /// For componentize-py.
    Python,
    /// Python and its package in, component out.
    ComponentizePy,
    /// For jco.
    Node,
    /// Node's package manager.
    Npm,
    /// JavaScript in, component out.
    Jco,
}

/// A program on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Where it is.
    pub path: PathBuf,
    /// The first line that it says to `--version`.
    pub version: String,
}

/// One thing that building in a language needs.
#[derive(Debug, Clone)]
pub struct Need {
    /// What, in words.
    pub what: &'static str,
    /// What was found, in words: version and place.
    pub found: Option<String>,
    /// The command that gets it where it is missing.
    pub fix: String,
}

impl Tool {
    /// File names to look for, the best first.
    fn names(self) -> Vec<String> {
        let numbered = |stem: &str| {
            std::iter::once(stem.to_owned()).chain((11..=30).rev().map(|v| format!("{stem}-{v}"))).collect::<Vec<_>>()
        };
        match self {
            Self::Cargo => vec!["cargo".into()],
            Self::Rustc => vec!["rustc".into()],
            Self::Rustup => vec!["rustup".into()],
            Self::Clang => numbered("clang"),
            Self::WasmLd => numbered("wasm-ld"),
            Self::Python => vec!["python3".into(), "python".into()],
            Self::ComponentizePy => vec!["componentize-py".into()],
            Self::Node => vec!["node".into(), "nodejs".into()],
            Self::Npm => vec!["npm".into()],
            Self::Jco => vec!["jco".into()],
        }
    }

    /// Folders of programs that `plugin toolchain --install` filled.
    fn private_folders(self) -> Vec<PathBuf> {
        let Some(tools) = private_dir() else { return Vec::new() };
        match self {
            Self::ComponentizePy => vec![tools.join("python/bin")],
            Self::Jco => vec![tools.join("js/node_modules/.bin")],
            _ => Vec::new(),
        }
    }
}

/// `$XDG_CACHE_HOME/cosmos-host`, or under `~/.cache`.
pub fn cache_dir() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    Some(set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?.join("cosmos-host"))
}

/// Where `plugin toolchain --install` puts things: `tools` in [`cache_dir`].
pub fn private_dir() -> Option<PathBuf> {
    Some(cache_dir()?.join("tools"))
}

/// [`private_dir`] for an installation, which needs one.
///
/// # Errors
/// Neither `XDG_CACHE_HOME` nor `HOME` is set.
pub fn private_dir_needed() -> Result<PathBuf> {
    private_dir().ok_or_else(|| AuthorError::project("no place for private tools", "set HOME or XDG_CACHE_HOME"))
}

/// The program, from `PATH` or from a private installation.
pub fn find(tool: Tool) -> Option<Found> {
    let in_path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&in_path).filter(|p| !p.as_os_str().is_empty()).chain(tool.private_folders());
    let folders: Vec<PathBuf> = folders.collect();
    let names = tool.names();
    let candidates = names.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    candidates.filter(|path| is_program(path)).find_map(|path| {
        let version = answer(&path, ["--version"])?.lines().next()?.trim().to_owned();
        Some(Found { path, version })
    })
}

/// [`find`], or the error that says how to get it.
///
/// # Errors
/// The program is not there.
pub fn need(tool: Tool, what: &str, fix: impl Into<String>) -> Result<Found> {
    find(tool).ok_or_else(|| AuthorError::Missing { what: what.to_owned(), hint: fix.into() })
}

/// Whether `path` is a file that may be run.
pub fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// What a program prints on standard output when it ends well within half a minute.
pub fn answer<I, S>(program: &Path, args: I) -> Option<String>
where
    I: IntoIterator<Item = S>,
    S: AsRef<OsStr>,
{
    let mut command = Command::new(program);
    command.args(args);
    answer_of(&mut command)
}

/// [`answer`] of a command made ready, with its environment and folder.
pub fn answer_of(command: &mut Command) -> Option<String> {
    answer_within(command, Duration::from_secs(ANSWER_SECONDS_MAX))
}

/// What a command prints on standard output when it ends well within `wait_max`; past that it is killed.
pub fn answer_within(command: &mut Command, wait_max: Duration) -> Option<String> {
    use std::io::Read;
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
    let mut pipe = child.stdout.take()?;
    // Reading on a thread: a program that never closes its output would hold this one.
    let (sender, answered) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let read = pipe.by_ref().take(ANSWER_BYTES_MAX as u64).read_to_end(&mut text);
        // The receiver is gone when the deadline has passed.
        let _ = sender.send(read.map(|_| text));
    });
    let until = Instant::now() + wait_max;
    let text = answered.recv_timeout(until - Instant::now());
    let ended = wait_until(&mut child, until);
    if !ended.is_some_and(|status| status.success()) {
        return None;
    }
    String::from_utf8(text.ok()?.ok()?).ok()
}

/// The status of a child that ends in time; one that does not is killed.
pub(crate) fn wait_until(child: &mut std::process::Child, until: Instant) -> Option<std::process::ExitStatus> {
    let mut pause_ms = 1;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(pause_ms)),
            Ok(None) | Err(_) => {
                // It may have ended meanwhile; either way it is gone.
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
        pause_ms = (pause_ms * 2).min(50);
    }
}

/// What `language` needs, each with what was found.
pub fn needs(language: Language) -> Vec<Need> {
    match language {
        Language::Rust => rust::needs(),
        Language::Python => python::needs(),
        Language::Js => js::needs(),
        Language::C => c::needs(),
    }
}

/// Gets what `language` lacks into [`private_dir`]; `tell` hears what is being done.
///
/// # Errors
/// What could not be fetched, and the command that would.
pub fn install(language: Language, tell: &mut dyn FnMut(&str)) -> Result<()> {
    match language {
        Language::Rust => rust::install(tell),
        Language::Python => python::install(tell),
        Language::Js => js::install(tell),
        Language::C => c::install(tell),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_end_in_time_and_failures_are_none() {
        let shell = Path::new("/bin/sh");
        assert_eq!(answer(shell, ["-c", "echo 1.2; echo more"]).as_deref(), Some("1.2\nmore\n"));
        assert_eq!(answer(shell, ["-c", "echo 1.2; exit 1"]), None);
        assert_eq!(answer(Path::new("/no/such/program"), ["--version"]), None);
    }

    #[test]
    fn folders_and_plain_files_are_no_programs() {
        assert!(is_program(Path::new("/bin/sh")));
        assert!(!is_program(Path::new("/bin")) && !is_program(Path::new("/etc/passwd")));
    }
}
