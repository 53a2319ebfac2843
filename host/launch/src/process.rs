//! One process of the run, through all its lives.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{LaunchError, Result};
use crate::log_file::{LogFile, is_alarming, lines};

const BACK_OFF_MS: u64 = 500;
const BACK_OFF_MS_MAX: u64 = 30_000;
/// How long after a process's end its last lines are waited for.
const LAST_LINES_MS_MAX: u64 = 1_000;

/// Set for processes that are started again after they have died.
pub const RESTARTED_VARIABLE: &str = "COSMOS_RESTARTED";

/// Shows a line to the user.
pub(crate) type Show = Arc<dyn Fn(&str) + Send + Sync>;

/// How a process is started.
pub(crate) struct Spec {
    pub name: String,
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    pub variables: Vec<(String, String)>,
    /// Whether every line is shown, and not only warnings and errors.
    pub shown: bool,
}

pub(crate) struct Process {
    spec: Spec,
    log_path: PathBuf,
    log: Arc<Mutex<LogFile>>,
    show: Show,
    alive: Option<Alive>,
    starts: VecDeque<Instant>,
    /// Whether it has been started before, however long ago.
    restarted: bool,
    /// When it is to be started again.
    again_at: Option<Instant>,
}

struct Alive {
    child: Child,
    /// Closing it asks the process to stop.
    stdin: Option<ChildStdin>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    pub fn start(spec: Spec, logs: &Path, log_bytes_max: u64, show: Show) -> Result<Self> {
        let log_path = logs.join(format!("{}.log", spec.name));
        let log = LogFile::open(&log_path, log_bytes_max).map_err(|source| LaunchError::Io {
            doing: "open",
            path: log_path.clone(),
            source,
        })?;
        let log = Arc::new(Mutex::new(log));
        let mut process =
            Self { spec, log_path, log, show, alive: None, starts: VecDeque::new(), restarted: false, again_at: None };
        process.spawn()?;
        Ok(process)
    }

    pub fn name(&self) -> &str {
        &self.spec.name
    }

    pub fn is_alive(&self) -> bool {
        self.alive.is_some()
    }

    #[cfg(test)]
    pub fn id(&self) -> Option<u32> {
        self.alive.as_ref().map(|alive| alive.child.id())
    }

    fn spawn(&mut self) -> Result<()> {
        let failed = |source| LaunchError::Spawn { name: self.spec.name.clone(), source };
        self.log().forget_tail();
        let mut command = Command::new(&self.spec.program);
        command
            .args(&self.spec.arguments)
            .envs(self.spec.variables.iter().map(|(name, value)| (name, value)))
            .envs(self.restarted.then_some((RESTARTED_VARIABLE, "1")))
            // A Ctrl-C in the terminal is for the launcher, which then stops the others in order.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(failed)?;
        let stdin = child.stdin.take();
        let mut readers = Vec::new();
        if let Some(output) = child.stdout.take() {
            readers.push(self.read(output).map_err(failed)?);
        }
        if let Some(output) = child.stderr.take() {
            readers.push(self.read(output).map_err(failed)?);
        }
        self.starts.push_back(Instant::now());
        self.restarted = true;
        self.again_at = None;
        self.alive = Some(Alive { child, stdin, readers });
        Ok(())
    }

    fn read(&self, output: impl std::io::Read + Send + 'static) -> std::io::Result<JoinHandle<()>> {
        let (log, show) = (Arc::clone(&self.log), Arc::clone(&self.show));
        let (all, prefix) = (self.spec.shown, format!("[{}] ", self.spec.name));
        let read = move || {
            lines(output, |line| {
                log.lock().unwrap_or_else(PoisonError::into_inner).line(line);
                if all {
                    show(line);
                } else if is_alarming(line) {
                    show(&format!("{prefix}{line}"));
                }
            });
        };
        std::thread::Builder::new().name(format!("log-{}", self.spec.name)).spawn(read)
    }

    /// How it ended, once, after it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.alive.as_mut()?.child.try_wait().ok()??;
        if let Some(alive) = self.alive.take() {
            let started = Instant::now();
            let in_time = || started.elapsed() < Duration::from_millis(LAST_LINES_MS_MAX);
            while alive.readers.iter().any(|reader| !reader.is_finished()) && in_time() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Some(status)
    }

    /// Plans another start, unless there were too many within the window. In how long.
    pub fn start_again(&mut self, restarts_max: usize, window: Duration) -> Option<Duration> {
        while self.starts.front().is_some_and(|start| start.elapsed() > window) {
            self.starts.pop_front();
        }
        if self.starts.len() > restarts_max {
            return None;
        }
        let doublings = self.starts.len().saturating_sub(1).min(16) as u32;
        let pause = Duration::from_millis((BACK_OFF_MS << doublings).min(BACK_OFF_MS_MAX));
        self.again_at = Some(Instant::now() + pause);
        Some(pause)
    }

    /// Starts it if that is due.
    pub fn start_if_due(&mut self) -> Result<()> {
        match self.again_at {
            Some(at) if at <= Instant::now() => self.spawn(),
            _ => Ok(()),
        }
    }

    /// No more starts.
    pub fn rest(&mut self) {
        self.again_at = None;
    }

    pub fn will_start(&self) -> bool {
        self.again_at.is_some()
    }

    /// Asks it to stop.
    pub fn ask_to_stop(&mut self) {
        if let Some(alive) = &mut self.alive {
            alive.stdin = None;
        }
    }

    /// Ends it (SIGKILL) and waits for it.
    pub fn kill(&mut self) {
        if let Some(mut alive) = self.alive.take() {
            let _ = alive.child.kill();
            let _ = alive.child.wait();
        }
    }

    /// The error that its end is.
    pub fn died(&self, status: ExitStatus) -> LaunchError {
        let restarts = match self.starts.len().saturating_sub(1) {
            0 => String::new(),
            count => format!(" after {count} restarts"),
        };
        LaunchError::Died {
            name: self.spec.name.clone(),
            status: in_words(status),
            restarts,
            log: self.log_path.clone(),
            tail: self.log().tail(),
            usage: status.code() == Some(2),
        }
    }

    fn log(&self) -> MutexGuard<'_, LogFile> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// `exit code 1`, `signal 9`.
pub(crate) fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown status".into(),
    }
}
