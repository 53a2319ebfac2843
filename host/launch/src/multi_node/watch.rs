//! Watching the processes of a node: restarts, signals, the end.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::processes::{Kind, Process};
use crate::error::{LaunchError, Result};
use crate::log_file::tail_of;

/// Exit code of a process that saved and wants to be started again.
const SAVED: i32 = 75;
/// Exit code of a process that was given a wrong config: starting it again cannot help.
const WRONG_USAGE: i32 = 2;
const POLL: Duration = Duration::from_millis(50);
const PORT_WAIT_MAX: Duration = Duration::from_secs(30);
const KILL_WAIT: Duration = Duration::from_secs(10);
/// Bytes of a line that is repeated on standard output; longer ones are cut into several.
const LINE_BYTES_MAX: u64 = 1 << 16;

/// When to give up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// How often each process may be started again.
    pub restarts_max: u32,
    /// Before the first restart; doubled for each further one.
    pub restart_wait: Duration,
    /// From the first signal to the end: after half of it everybody is told to terminate, then killed.
    pub save_wait: Duration,
    /// How long the others may stay when the controller has ended.
    pub farewell_wait: Duration,
    /// A file that the first node leaves at its end, for nodes without the controller: from then on they say farewell.
    pub over_file: Option<PathBuf>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            restarts_max: 3,
            restart_wait: Duration::from_secs(1),
            save_wait: Duration::from_secs(600),
            farewell_wait: Duration::from_secs(60),
            over_file: None,
        }
    }
}

/// How a node's processes ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// The run is over.
    Done,
    /// The run was saved and is to be resumed.
    Saved,
    /// A process failed for good. Which, how, and where its log is.
    Failed(String),
    /// As failed, and starting the job again cannot help: the config or the arguments are wrong.
    Refused(String),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Saved => f.write_str("saved"),
            Self::Failed(reason) => write!(f, "failed\n{reason}"),
            Self::Refused(reason) => write!(f, "refused\n{reason}"),
        }
    }
}

/// Starts the processes, restarts those that die, passes signals on, and says how it ended. Nothing is left behind: what
/// does not end by itself is terminated, then killed.
pub fn watch(
    processes: Vec<Process>,
    logs: &Path,
    echo: bool,
    limits: &Limits,
    signals: &mpsc::Receiver<i32>,
) -> Result<Ending> {
    let mut node = Node { watched: Vec::new(), logs, echo, limits, stop: None, led: None };
    let ended = node.start_all(processes).and_then(|()| node.follow(signals));
    node.end_all();
    ended
}

struct Watched {
    process: Process,
    child: Option<Child>,
    starts: u32,
    restart_at: Option<Instant>,
    end: Option<ExitStatus>,
}

struct Node<'a> {
    watched: Vec<Watched>,
    logs: &'a Path,
    echo: bool,
    limits: &'a Limits,
    /// When the first signal came, and whether everybody was told to terminate since.
    stop: Option<(Instant, bool)>,
    /// When the controller ended, and how.
    led: Option<(Instant, Ending)>,
}

impl Node<'_> {
    fn start_all(&mut self, processes: Vec<Process>) -> Result<()> {
        for process in processes {
            let port = process.awaits_port;
            self.watched.push(Watched { process, child: None, starts: 0, restart_at: None, end: None });
            let (logs, echo) = (self.logs, self.echo);
            let Some(last) = self.watched.last_mut() else { continue };
            last.start(logs, echo)?;
            if let Some(port) = port {
                last.wait_for_port(port, logs)?;
            }
        }
        Ok(())
    }

    /// Until the run ends here.
    fn follow(&mut self, signals: &mpsc::Receiver<i32>) -> Result<Ending> {
        loop {
            while let Ok(signal) = signals.try_recv() {
                self.take_signal(signal);
            }
            if let Some(ending) = self.look_at_all()? {
                return Ok(ending);
            }
            self.urge();
            self.hear_of_the_end();
            if let Some((since, ending)) = &self.led
                && since.elapsed() >= self.limits.farewell_wait
            {
                tracing::warn!(
                    "{} still ran {} s after the controller",
                    self.names_running(),
                    self.limits.farewell_wait.as_secs()
                );
                return Ok(ending.clone());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Looks which processes ended; gives the node's end when there is nothing more to wait for.
    fn look_at_all(&mut self) -> Result<Option<Ending>> {
        let leaving = self.stop.is_some() || self.led.is_some();
        for index in 0..self.watched.len() {
            let watched = &mut self.watched[index];
            if watched.restart_at.is_some_and(|at| at <= Instant::now()) && !leaving {
                watched.restart_at = None;
                watched.start(self.logs, self.echo)?;
            }
            let Some(status) = watched.look() else { continue };
            let (name, kind) = (watched.process.name.clone(), watched.process.kind);
            tracing::info!("{name} ended: {}", describe(status));
            match status.code() {
                Some(0) if kind != Kind::Redis => {
                    if kind.leads() {
                        self.led = Some((Instant::now(), Ending::Done));
                    }
                }
                Some(SAVED) => {
                    if kind.leads() {
                        self.led = Some((Instant::now(), Ending::Saved));
                    }
                }
                _ if leaving && !kind.leads() => {}
                code => {
                    // A leader that ends by itself has said why; only one that was killed is worth another start here.
                    let hopeless = code == Some(WRONG_USAGE) || self.stop.is_some() || (kind.leads() && code.is_some());
                    if hopeless || watched.starts > self.limits.restarts_max {
                        let log = self.logs.join(format!("{name}.log"));
                        let reason = format!(
                            "{name} ended: {}, started {}; the end of {}:\n{}",
                            describe(status),
                            if watched.starts == 1 { "once".into() } else { format!("{} times", watched.starts) },
                            log.display(),
                            tail_of(&log)
                        );
                        let refused = code == Some(WRONG_USAGE);
                        return Ok(Some(if refused { Ending::Refused(reason) } else { Ending::Failed(reason) }));
                    }
                    let wait = self.limits.restart_wait * 2u32.saturating_pow(watched.starts.saturating_sub(1).min(6));
                    tracing::warn!(
                        "{name} is started again in {:.1} s ({} of {})",
                        wait.as_secs_f64(),
                        watched.starts,
                        self.limits.restarts_max
                    );
                    watched.end = None;
                    // It goes on from what it left, whatever the first start was told.
                    if kind.leads() && !watched.process.arguments.iter().any(|a| a == "--resume") {
                        watched.process.arguments.push("--resume".into());
                    }
                    watched.restart_at = Some(Instant::now() + wait);
                }
            }
        }
        Ok(self.ending())
    }

    /// The end, when all that matters has ended.
    fn ending(&self) -> Option<Ending> {
        let mut others = self.watched.iter().filter(|w| w.process.kind != Kind::Redis && !w.process.kind.leads());
        if others.any(|w| w.child.is_some() || (w.restart_at.is_some() && self.stop.is_none() && self.led.is_none())) {
            return None;
        }
        if self.watched.iter().any(|w| w.process.kind.leads()) {
            return self.led.as_ref().map(|(_, ending)| ending.clone());
        }
        // A node without the controller ends with its replicas, in the way that the first node did if that is known.
        if let Some((_, ending)) = &self.led {
            return Some(ending.clone());
        }
        let mut codes = self.watched.iter().filter_map(|w| w.end).map(|status| status.code());
        if self.stop.is_some() || codes.any(|code| code == Some(SAVED)) {
            Some(Ending::Saved)
        } else {
            Some(Ending::Done)
        }
    }

    /// The first signal asks whoever leads to save; a second one urges everybody.
    fn take_signal(&mut self, signal: i32) {
        match &mut self.stop {
            None => {
                self.stop = Some((Instant::now(), false));
                let leads: Vec<&Watched> = self.watched.iter().filter(|w| w.process.kind.leads()).collect();
                tracing::info!(
                    "signal {signal}: {}",
                    if leads.is_empty() {
                        "waiting for the controller to send everybody home"
                    } else {
                        "asking the run to save"
                    }
                );
                leads.iter().for_each(|w| w.signal(signal, false));
            }
            // The scheduler repeats its warning; only a wish to end is an urgent one.
            Some((since, _)) if signal != libc::SIGUSR1 => {
                let half = self.limits.save_wait / 2;
                *since = (*since).min(Instant::now().checked_sub(half).unwrap_or(*since));
            }
            Some(_) => {}
        }
    }

    /// Notes that the first node has ended, where this one has not its controller.
    fn hear_of_the_end(&mut self) {
        let Some(file) = self.limits.over_file.as_ref().filter(|_| self.led.is_none()) else { return };
        if self.watched.iter().any(|w| w.process.kind.leads()) {
            return;
        }
        let Ok(text) = std::fs::read_to_string(file) else { return };
        let ending = match text.lines().next() {
            Some("done") => Ending::Done,
            Some("saved") => Ending::Saved,
            _ => Ending::Failed("the first node failed".into()),
        };
        tracing::info!("the first node has ended: {}", text.lines().next().unwrap_or_default());
        self.led = Some((Instant::now(), ending));
    }

    /// Tells everybody to terminate when half the time for saving is over, and kills after all of it.
    fn urge(&mut self) {
        let Some((since, told)) = self.stop else { return };
        if since.elapsed() >= self.limits.save_wait {
            tracing::warn!(
                "{} did not end within {} s of the signal: killed",
                self.names_running(),
                self.limits.save_wait.as_secs()
            );
            self.watched.iter().for_each(|w| w.signal(libc::SIGKILL, true));
        } else if since.elapsed() >= self.limits.save_wait / 2 && !told {
            tracing::warn!("{} told to terminate", self.names_running());
            self.stop = Some((since, true));
            self.watched.iter().filter(|w| w.process.kind != Kind::Redis).for_each(|w| w.signal(libc::SIGTERM, true));
        }
    }

    fn names_running(&self) -> String {
        let names: Vec<&str> =
            self.watched.iter().filter(|w| w.child.is_some()).map(|w| w.process.name.as_str()).collect();
        names.join(", ")
    }

    /// Ends whatever still runs, Redis last.
    fn end_all(&mut self) {
        let mut redis_last: Vec<&mut Watched> = self.watched.iter_mut().filter(|w| w.child.is_some()).collect();
        redis_last.sort_by_key(|w| w.process.kind == Kind::Redis);
        let (servers, others): (Vec<_>, Vec<_>) = redis_last.into_iter().partition(|w| w.process.kind == Kind::Redis);
        for mut group in [others, servers] {
            group.iter().for_each(|w| w.signal(libc::SIGTERM, true));
            let until = Instant::now() + KILL_WAIT;
            while group.iter_mut().any(|w| w.child.is_some() && w.look().is_none()) && Instant::now() < until {
                std::thread::sleep(POLL);
            }
            for watched in group {
                watched.signal(libc::SIGKILL, true);
                if let Some(mut child) = watched.child.take() {
                    // Killed for certain; reaping it cannot last.
                    let _ = child.wait();
                }
            }
        }
    }
}

impl Watched {
    fn start(&mut self, logs: &Path, echo: bool) -> Result<()> {
        let process = &self.process;
        let path = logs.join(format!("{}.log", process.name));
        let log = OpenOptions::new().create(true).append(true).open(&path).map_err(LaunchError::io("write", &path))?;
        let failed = |source| LaunchError::Start {
            program: process.program.display().to_string(),
            source,
            hint: match process.kind {
                Kind::Redis => {
                    "apt-get install redis-server, or name a server with `redis = \"redis://…\"` in the config".into()
                }
                _ => "the program must be at the same path on every node".into(),
            },
        };
        let output = |file: &File| {
            if echo { Ok(Stdio::piped()) } else { file.try_clone().map(Stdio::from) }
        };
        // The pipe stays open as long as this process lives: a role that sees its end saves and leaves (`parent`).
        let input = if process.kind == Kind::Whole { Stdio::null() } else { Stdio::piped() };
        let mut child = Command::new(&process.program)
            .args(&process.arguments)
            .envs(process.environment.iter().map(|(name, value)| (name, value)))
            .stdin(input)
            .stdout(output(&log).map_err(LaunchError::io("write", &path))?)
            .stderr(output(&log).map_err(LaunchError::io("write", &path))?)
            // Its own group: a signal to ours must not end it before it is asked to save.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        if let Some(text) = &process.input
            && let Some(mut pipe) = child.stdin.take()
        {
            // One that closes its input has ended, which is seen where processes are looked at.
            let _ = pipe.write_all(text.as_bytes());
        }
        if let Some(pipe) = child.stdout.take() {
            repeat(pipe, process.name.clone(), log.try_clone().map_err(LaunchError::io("write", &path))?);
        }
        if let Some(pipe) = child.stderr.take() {
            repeat(pipe, process.name.clone(), log);
        }
        self.starts += 1;
        tracing::info!("{} started (process {})", process.name, child.id());
        self.child = Some(child);
        Ok(())
    }

    /// How it ended, once.
    fn look(&mut self) -> Option<ExitStatus> {
        let status = self.child.as_mut()?.try_wait().ok()??;
        self.child = None;
        self.end = Some(status);
        Some(status)
    }

    fn wait_for_port(&mut self, port: u16, logs: &Path) -> Result<()> {
        let until = Instant::now() + PORT_WAIT_MAX;
        loop {
            if let Some(status) = self.look() {
                let name = &self.process.name;
                let log = logs.join(format!("{name}.log"));
                return Err(LaunchError::Ended {
                    message: format!(
                        "{name} ended at once: {}; the end of {}:\n{}",
                        describe(status),
                        log.display(),
                        tail_of(&log)
                    ),
                    hint: format!("is port {port} taken? choose another with `--redis-port`"),
                });
            }
            if TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok() {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(LaunchError::Waited {
                    whom: format!("{} to answer on port {port}", self.process.name),
                    waited_s: PORT_WAIT_MAX.as_secs(),
                    hint: format!("see {}", logs.join(format!("{}.log", self.process.name)).display()),
                });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Sends a signal to the process, or to it and everything that it started.
    fn signal(&self, signal: i32, to_group: bool) {
        let Some(pid) = self.child.as_ref().and_then(|child| i32::try_from(child.id()).ok()).filter(|pid| *pid > 1)
        else {
            return;
        };
        let target = if to_group { -pid } else { pid };
        // SAFETY: `kill` takes two integers and touches no memory. The child is not reaped, so its id is not used again.
        #[allow(unsafe_code)]
        let sent = unsafe { libc::kill(target, signal) };
        if sent != 0 {
            tracing::debug!("signal {signal} did not reach {}", self.process.name);
        }
    }
}

/// Copies lines to the log and, with the process's name, to standard output.
fn repeat(pipe: impl Read + Send + 'static, name: String, mut log: File) {
    std::thread::spawn(move || {
        let mut reader = BufReader::new(pipe);
        let mut line = Vec::new();
        loop {
            line.clear();
            match reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            if line.last() != Some(&b'\n') {
                line.push(b'\n');
            }
            // A full disk or a closed terminal must not stop the process whose output this is.
            let _ = log.write_all(&line);
            let mut out = std::io::stdout().lock();
            let _ = write!(out, "[{name}] ").and_then(|()| out.write_all(&line)).and_then(|()| out.flush());
        }
    });
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "unknown".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Role;

    fn shell(name: &str, kind: Kind, script: &str) -> Process {
        Process {
            name: name.into(),
            kind,
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            environment: vec![("GREETING".into(), "good day".into())],
            input: None,
            awaits_port: None,
        }
    }

    fn limits() -> Limits {
        Limits {
            restarts_max: 2,
            restart_wait: Duration::from_millis(1),
            save_wait: Duration::from_secs(60),
            farewell_wait: Duration::from_secs(60),
            over_file: None,
        }
    }

    struct Watching {
        folder: tempfile::TempDir,
        ending: Result<Ending>,
    }

    fn watching(processes: Vec<Process>, limits: &Limits, signals: &[i32]) -> Watching {
        let folder = tempfile::tempdir().unwrap();
        let (sender, receiver) = mpsc::channel();
        signals.iter().for_each(|s| sender.send(*s).unwrap());
        let ending = watch(processes, folder.path(), false, limits, &receiver);
        Watching { folder, ending }
    }

    #[test]
    fn the_run_ends_with_the_controller_and_leaves_nobody_behind() {
        let teacher = Kind::Replica(Role::Teacher);
        let processes = vec![
            shell("controller", Kind::Controller, "echo $GREETING; exit 0"),
            shell("teacher-0", teacher, "exec sleep 600"),
        ];
        let quick = Limits { farewell_wait: Duration::from_millis(10), ..limits() };
        let seen = watching(processes, &quick, &[]);
        assert_eq!(seen.ending.unwrap(), Ending::Done);
        let log = std::fs::read_to_string(seen.folder.path().join("controller.log")).unwrap();
        assert_eq!(log, "good day\n");
    }

    #[test]
    fn a_teacher_that_dies_is_started_again_and_the_run_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("second").display().to_string();
        // The first teacher is killed; the controller ends when there has been a second.
        let teacher = format!("if [ -e {mark}.first ]; then touch {mark}; exit 0; fi; touch {mark}.first; kill -9 $$");
        let processes = vec![
            shell("controller", Kind::Controller, &format!("while [ ! -e {mark} ]; do sleep 0.01; done")),
            shell("teacher-0", Kind::Replica(Role::Teacher), &teacher),
        ];
        assert_eq!(watching(processes, &limits(), &[]).ending.unwrap(), Ending::Done);
    }

    #[test]
    fn a_role_that_keeps_dying_ends_the_node_and_is_named() {
        let processes = vec![
            shell("controller", Kind::Controller, "exec sleep 600"),
            shell("rollout-1", Kind::Replica(Role::Rollout), "exit 3"),
        ];
        let Ending::Failed(reason) = watching(processes, &limits(), &[]).ending.unwrap() else { panic!("not failed") };
        assert!(
            reason.contains("rollout-1 ended: exit code 3, started 3 times") && reason.contains("rollout-1.log"),
            "{reason}"
        );
        let wrong = vec![shell("controller", Kind::Controller, "exit 2")];
        let Ending::Refused(reason) = watching(wrong, &limits(), &[]).ending.unwrap() else { panic!("not refused") };
        assert!(reason.contains("started once"), "{reason}");
    }

    #[test]
    fn a_signal_asks_the_controller_to_save() {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("saved").display().to_string();
        let controller = format!("trap 'touch {mark}; exit 75' USR1; while true; do sleep 0.01; done");
        let processes = vec![
            shell("controller", Kind::Controller, &controller),
            shell(
                "policy-0",
                Kind::Replica(Role::Policy),
                &format!("while [ ! -e {mark} ]; do sleep 0.01; done; exit 75"),
            ),
        ];
        // The shell must have set its trap before the signal comes.
        let (sender, receiver) = mpsc::channel();
        let logs = folder.path().to_path_buf();
        let watcher = std::thread::spawn(move || watch(processes, &logs, false, &limits(), &receiver).unwrap());
        std::thread::sleep(Duration::from_millis(500));
        sender.send(libc::SIGUSR1).unwrap();
        assert_eq!(watcher.join().unwrap(), Ending::Saved);
        assert!(folder.path().join("saved").exists());
    }

    #[test]
    fn who_does_not_save_in_time_is_killed() {
        let stubborn = "trap '' USR1 TERM; while true; do sleep 0.01; done";
        let processes = vec![shell("controller", Kind::Controller, stubborn)];
        let quick = Limits { save_wait: Duration::from_millis(200), ..limits() };
        let Ending::Failed(reason) = watching(processes, &quick, &[libc::SIGUSR1]).ending.unwrap() else {
            panic!("not failed")
        };
        assert!(reason.contains("signal"), "{reason}");
    }

    #[test]
    fn a_node_without_the_controller_ends_with_its_replicas() {
        let rollout = Kind::Replica(Role::Rollout);
        let done = vec![shell("rollout-0", rollout, "exit 0"), shell("rollout-1", rollout, "exit 0")];
        assert_eq!(watching(done, &limits(), &[]).ending.unwrap(), Ending::Done);
        let saved = vec![shell("rollout-0", rollout, "exit 0"), shell("rollout-1", rollout, "exit 75")];
        assert_eq!(watching(saved, &limits(), &[]).ending.unwrap(), Ending::Saved);
    }

    #[test]
    fn a_node_does_not_outstay_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let over_file = folder.path().join("node-0.end");
        std::fs::write(&over_file, "saved\n").unwrap();
        let quick = Limits { over_file: Some(over_file), farewell_wait: Duration::from_millis(10), ..limits() };
        let stuck = vec![shell("teacher-0", Kind::Replica(Role::Teacher), "exec sleep 600")];
        assert_eq!(watching(stuck, &quick, &[]).ending.unwrap(), Ending::Saved);
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let mut missing = shell("redis", Kind::Redis, "");
        missing.program = "/no/such/redis-server".into();
        let error = watching(vec![missing], &limits(), &[]).ending.unwrap_err();
        assert!(
            error.to_string().contains("/no/such/redis-server") && error.hint().unwrap().contains("apt-get"),
            "{error}"
        );
    }
}
