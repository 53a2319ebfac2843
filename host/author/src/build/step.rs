//! One run of a tool: its output in a file, a deadline, its last lines in the error.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{AuthorError, Result};
use crate::toolchain::wait_until;

/// Lines of a failed tool that the error shows.
const TAIL_LINES_MAX: usize = 40;
/// Read from the end of its output.
const TAIL_BYTES_MAX: u64 = 32 << 10;

/// A tool about to run. Standard input is closed.
#[derive(Debug)]
pub struct Step {
    name: String,
    log: PathBuf,
    stdout: Option<PathBuf>,
    deadline: Duration,
    verbose: bool,
    hint: String,
    command: Command,
}

impl Step {
    /// `program`, called `name` in errors, with its output in `log`.
    pub fn new(name: &str, program: &Path, log: PathBuf, deadline: Duration, verbose: bool) -> Self {
        let command = Command::new(program);
        Self { name: name.into(), log, stdout: None, deadline, verbose, hint: String::new(), command }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<I, S>(mut self, args: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Hides variables of this process from the tool.
    #[must_use]
    pub fn env_remove(mut self, names: &[&str]) -> Self {
        for name in names {
            self.command.env_remove(name);
        }
        self
    }

    /// Runs it in `folder`.
    #[must_use]
    pub fn current_dir(mut self, folder: &Path) -> Self {
        self.command.current_dir(folder);
        self
    }

    /// Keeps standard output, which a program reads, apart from the log.
    #[must_use]
    pub fn stdout_to(mut self, path: PathBuf) -> Self {
        self.stdout = Some(path);
        self
    }

    /// What to tell when it fails.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// It cannot be started, fails, or does not end before the deadline.
    pub fn run(mut self) -> Result<()> {
        let open = |path: &Path| File::create(path).map_err(AuthorError::io("cannot write", path));
        let mut log = open(&self.log)?;
        let line = format!("{:?}\n", self.command);
        log.write_all(line.as_bytes()).map_err(AuthorError::io("cannot write", &self.log))?;
        let again = || log.try_clone().map_err(AuthorError::io("cannot write", &self.log));
        self.command.stdin(Stdio::null());
        match (&self.stdout, self.verbose) {
            (Some(path), _) => self.command.stdout(open(path)?),
            // Our own standard output belongs to the command's result.
            (None, true) => self.command.stdout(std::io::stderr()),
            (None, false) => self.command.stdout(again()?),
        };
        self.command.stderr(if self.verbose { Stdio::inherit() } else { again()?.into() });
        tracing::debug!("{:?}", self.command);
        let until = Instant::now() + self.deadline;
        let mut child = self.command.spawn().map_err(|source| AuthorError::Io {
            doing: "cannot start",
            path: self.command.get_program().into(),
            source,
        })?;
        match wait_until(&mut child, until) {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(self.failure(status.to_string())),
            None => {
                let seconds = self.deadline.as_secs();
                Err(self.failure(format!("stopped after {seconds} s")))
            }
        }
    }

    fn failure(self, reason: String) -> AuthorError {
        let tail = if self.verbose { "(shown above)".to_owned() } else { tail(&self.log) };
        AuthorError::Tool { tool: self.name, reason, log: self.log, tail, hint: self.hint }
    }
}

/// The last lines of a file, as far as they can be read.
fn tail(path: &Path) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let bytes = file.metadata()?.len();
        file.seek(SeekFrom::Start(bytes.saturating_sub(TAIL_BYTES_MAX)))?;
        let mut end = Vec::new();
        file.take(TAIL_BYTES_MAX).read_to_end(&mut end)?;
        Ok(end)
    };
    let end = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&end);
    // The first line is the command itself, or the rest of a cut one.
    let lines: Vec<&str> = text.lines().skip(1).collect();
    let shown = &lines[lines.len().saturating_sub(TAIL_LINES_MAX)..];
    if shown.is_empty() { "(it printed nothing)".to_owned() } else { shown.join("\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(folder: &Path, script: &str, deadline: Duration) -> Result<()> {
        Step::new("sh", Path::new("/bin/sh"), folder.join("sh.log"), deadline, false)
            .args(["-c", script])
            .hint("mend it")
            .run()
    }

    #[test]
    fn a_failure_shows_its_last_lines() {
        let folder = tempfile::tempdir().unwrap();
        let long = Duration::from_secs(60);
        shell(folder.path(), "echo fine", long).unwrap();
        assert!(std::fs::read_to_string(folder.path().join("sh.log")).unwrap().ends_with("\nfine\n"));
        let error = shell(folder.path(), "for i in $(seq 99); do echo line $i >&2; done; exit 3", long).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("exit status: 3") && text.ends_with("line 99") && !text.contains("line 59\n"), "{text}");
        assert_eq!((error.hint().as_deref(), error.is_usage()), (Some("mend it"), false));
    }

    #[test]
    fn a_deadline_stops_it() {
        let folder = tempfile::tempdir().unwrap();
        let error = shell(folder.path(), "exec sleep 600", Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("stopped after"), "{error}");
        let missing = Step::new("x", Path::new("/no/such"), folder.path().join("x.log"), Duration::from_secs(1), false);
        assert!(matches!(missing.run(), Err(AuthorError::Io { .. })));
    }
}
