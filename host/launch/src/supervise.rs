//! Starts the processes of a run on this machine, keeps them alive, and ends them.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cosmos_broker::{RedisAddress, RedisLimits, RedisLink, RedisServer, ServerOptions, open_or_start};
use cosmos_config::{Config, Host};
use cosmos_control::{ControlFile, TOKEN_VARIABLE, Target, Token, fetch_status};

use crate::error::{LaunchError, Result};
use crate::parent::LAUNCHED_VARIABLE;
use crate::process::{Process, Show, Spec, in_words};
use crate::stop::StopFlag;
use crate::this_machine::{LocalPlan, LocalProcess, starts_redis};

/// Hands the broker's URL, password included, to the controller.
pub const BROKER_VARIABLE: &str = "COSMOS_BROKER_URL";

/// Names the folder of the Redis that the launcher has started to the controller, which ends it if the launcher cannot.
pub const REDIS_FOLDER_VARIABLE: &str = "COSMOS_REDIS_FOLDER";

const LOOK_MS: u64 = 20;
/// Between two looks at Redis.
const REDIS_LOOK_MS: u64 = 1_000;
/// Looks in a row that Redis may fail.
const REDIS_MISSES_MAX: u32 = 3;
/// How long processes get between being asked to stop for good and being killed.
const GRACE_MS: u64 = 10_000;

/// What to launch.
pub struct LaunchOptions {
    /// This program.
    pub program: PathBuf,
    /// What every process gets after its command: `--config`, `--plugin`, `--set` and the like.
    pub arguments: Vec<OsString>,
    /// What the controller alone gets besides.
    pub controller_arguments: Vec<OsString>,
    /// Folder of the run.
    pub run_folder: PathBuf,
    /// Which processes.
    pub plan: LocalPlan,
}

/// How a launched run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps made.
    Done,
    /// Saved, to be resumed.
    Saved,
}

/// Runs it to its end.
///
/// # Errors
/// [`LaunchError::Died`] for a process that ended too often, or with exit code 2; the others are ended first.
pub fn local(options: LaunchOptions, config: &Config) -> Result<Outcome> {
    let stop = StopFlag::listen()?;
    let logs = options.run_folder.join("logs");
    fs::create_dir_all(&logs).map_err(|source| LaunchError::Io { doing: "make", path: logs.clone(), source })?;
    refuse_a_running_one(&options.run_folder)?;
    let show: Show = Arc::new(|line: &str| drop(writeln!(std::io::stderr(), "{line}")));
    let redis = Redis::open(config, &options.run_folder)?;
    let token = Token::random()?;
    let broker_url = redis.address.secret_url();
    let rendezvous = rendezvous_of(&options.plan)?;
    let spec = |process: &LocalProcess| {
        let is_controller = process.role == "controller";
        let mut arguments: Vec<OsString> = vec![process.role.into()];
        arguments.extend(options.arguments.iter().cloned());
        arguments.extend(["--run".into(), options.run_folder.clone().into_os_string()]);
        let mut variables = vec![(LAUNCHED_VARIABLE.to_owned(), (config.host.stop_ms_max + GRACE_MS).to_string())];
        if is_controller {
            arguments.extend(options.controller_arguments.iter().cloned());
            variables.push((TOKEN_VARIABLE.into(), token.reveal().into()));
            variables.push((BROKER_VARIABLE.into(), broker_url.clone()));
            if starts_redis(config) {
                variables.push((REDIS_FOLDER_VARIABLE.into(), options.run_folder.join("redis").display().to_string()));
            }
        } else {
            arguments.extend(["--name".into(), process.replica.clone().into()]);
            if let Some(port) = rendezvous.get(&process.replica) {
                let meeting = format!("127.0.0.1:{port}");
                arguments.extend(part_arguments(process.part, &meeting).map(OsString::from));
            }
        }
        if !process.devices.is_empty() {
            variables.push(("CUDA_VISIBLE_DEVICES".into(), process.devices.join(",")));
        }
        variables.extend(process.cores.map(|cores| ("RAYON_NUM_THREADS".to_owned(), cores.to_string())));
        Spec {
            name: process.name.clone(),
            program: options.program.clone(),
            arguments,
            variables,
            shown: is_controller,
        }
    };
    let specs: Vec<Spec> = options.plan.processes.iter().filter(|process| process.role != "redis").map(spec).collect();
    let mut crew = Crew::start(specs, &logs, &config.host, show)?;
    crew.redis = Some(redis);
    let outcome = crew.watch(&stop)?;
    if let Some(redis) = crew.redis.take().filter(|redis| redis.server.is_some() && outcome == Outcome::Done) {
        let folder = redis.folder.clone();
        drop(redis);
        // It held what was under way, and nothing is any more.
        if let Err(error) = fs::remove_dir_all(&folder) {
            tracing::debug!("{} stays: {error}", folder.display());
        }
    }
    Ok(outcome)
}

/// A free port for every replica that has several processes.
fn rendezvous_of(plan: &LocalPlan) -> Result<HashMap<String, u16>> {
    let several = plan.processes.iter().filter(|process| process.part.1 > 1 && process.part.0 == 0);
    several.map(|process| Ok((process.replica.clone(), free_port()?))).collect()
}

/// What a process of several of a replica is told besides.
pub(crate) fn part_arguments((node, nodes): (usize, usize), rendezvous: &str) -> [String; 6] {
    let given = ["--node-rank", &node.to_string(), "--nodes", &nodes.to_string(), "--rendezvous", rendezvous];
    given.map(str::to_owned)
}

/// A folder whose controller answers belongs to a run that is going on; one whose controller does not is left over.
pub(crate) fn refuse_a_running_one(run_folder: &Path) -> Result<()> {
    let Ok(file) = ControlFile::read(run_folder) else { return Ok(()) };
    if fetch_status(&Target::Run(run_folder.into()), 2_000).is_ok() {
        return Err(LaunchError::Running { path: run_folder.into(), pid: file.pid });
    }
    file.remove(run_folder);
    Ok(())
}

/// The run's Redis: another's, or one of ours, which is started again when it is gone.
struct Redis {
    address: RedisAddress,
    server: Option<RedisServer>,
    folder: PathBuf,
    looked: Instant,
    misses: u32,
}

impl Redis {
    fn open(config: &Config, run_folder: &Path) -> Result<Self> {
        let folder = run_folder.join("redis");
        let (address, server) = match config.redis.as_str() {
            "" => {
                let server = RedisServer::start(&folder, free_port()?, None, &ServerOptions::default())?;
                (server.address().clone(), Some(server))
            }
            redis => open_or_start(redis, &folder, &ServerOptions::default())?,
        };
        if server.is_some() {
            tracing::info!("Redis listens on 127.0.0.1:{} with a password", address.port());
        } else if starts_redis(config) {
            tracing::info!("joined the Redis on 127.0.0.1:{}", address.port());
        }
        // One that must not be used is refused before anything is started.
        let away_ms_max = config.host.broker_wait_ms_max;
        RedisLink::connect(&address, RedisLimits { away_ms_max, ..RedisLimits::default() })?;
        Ok(Self { address, server, folder, looked: Instant::now(), misses: 0 })
    }

    /// Starts our own server again, where it was, when it no longer answers. What it had acknowledged is in its file.
    fn look_after(&mut self) -> Result<()> {
        if self.server.is_none() || self.looked.elapsed() < Duration::from_millis(REDIS_LOOK_MS) {
            return Ok(());
        }
        self.looked = Instant::now();
        let at = std::net::SocketAddr::from(([127, 0, 0, 1], self.address.port()));
        match std::net::TcpStream::connect_timeout(&at, Duration::from_millis(500)) {
            Ok(_) => self.misses = 0,
            Err(error) => {
                self.misses += 1;
                if self.misses < REDIS_MISSES_MAX {
                    return Ok(());
                }
                tracing::warn!("Redis on {at} does not answer ({error}) and is started again");
                // The old one, if it still is, must be gone before its folder and port are used again.
                self.server = None;
                let url = self.address.secret_url();
                let password = url.split_once("://:").and_then(|(_, rest)| rest.split_once('@')).map(|(p, _)| p);
                let options = ServerOptions { next_ports: false, ..ServerOptions::default() };
                self.server = Some(RedisServer::start(&self.folder, self.address.port(), password, &options)?);
                self.misses = 0;
            }
        }
        Ok(())
    }
}

fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|l| l.local_addr());
    Ok(listener
        .map_err(|source| LaunchError::Io { doing: "find a free port on", path: "127.0.0.1".into(), source })?
        .port())
}

/// The processes of a run.
pub(crate) struct Crew {
    controller: Process,
    roles: Vec<Process>,
    redis: Option<Redis>,
    restarts_max: usize,
    window: Duration,
    stop_ms_max: u64,
}

/// What the crew is at.
enum Phase {
    Running,
    /// The controller was asked to save and end.
    Stopping {
        until: Instant,
    },
    /// The controller has ended, or is given up: the others are to end.
    Ending {
        with: Result<Outcome>,
        asked: bool,
        until: Instant,
    },
}

impl Crew {
    /// Starts all of them; the first is the controller.
    pub fn start(specs: Vec<Spec>, logs: &Path, host: &Host, show: Show) -> Result<Self> {
        let bytes_max = host.log_mb_max << 20;
        let mut processes = Vec::new();
        for spec in specs {
            processes.push(Process::start(spec, logs, bytes_max, Arc::clone(&show))?);
        }
        let mut processes = processes.into_iter();
        let Some(controller) = processes.next() else {
            return Err(LaunchError::Config { message: "there is nothing to launch".into(), hint: String::new() });
        };
        Ok(Self {
            controller,
            roles: processes.collect(),
            redis: None,
            restarts_max: host.restarts_max,
            window: Duration::from_millis(host.restart_window_ms),
            stop_ms_max: host.stop_ms_max,
        })
    }

    /// Looks after them until none is left.
    pub fn watch(&mut self, stop: &StopFlag) -> Result<Outcome> {
        let mut phase = Phase::Running;
        loop {
            if stop.is_set() && matches!(phase, Phase::Running) {
                tracing::info!("asked to stop: the run is saved; a second Ctrl-C ends it at once");
                self.controller.ask_to_stop();
                phase = Phase::Stopping { until: Instant::now() + Duration::from_millis(self.stop_ms_max) };
            }
            phase = match phase {
                Phase::Ending { with, asked, until } => match self.end(with, asked, until) {
                    Ok(ended) => return ended,
                    Err(going_on) => going_on,
                },
                phase => self.keep_going(phase),
            };
            std::thread::sleep(Duration::from_millis(LOOK_MS));
        }
    }

    fn keep_going(&mut self, phase: Phase) -> Phase {
        if let Phase::Stopping { until } = &phase
            && *until <= Instant::now()
        {
            let message = format!("the run was not saved within {} ms of being asked to stop", self.stop_ms_max);
            let hint = "`host.stop_ms_max` is how long that may take".to_owned();
            return self.ending(Err(LaunchError::Config { message, hint }));
        }
        if let Err(error) = self.redis.as_mut().map_or(Ok(()), Redis::look_after) {
            return self.ending(Err(error));
        }
        if let Some(status) = self.controller.ended() {
            let with = match status.code() {
                Some(0) => Ok(Outcome::Done),
                Some(75) => Ok(Outcome::Saved),
                // It has said why it gives up. Only what it could not help is worth another try.
                Some(1 | 2) => Err(self.controller.died(status)),
                _ => match self.again(None, status) {
                    Ok(()) => return self.after_restart(phase),
                    Err(error) => Err(error),
                },
            };
            return self.ending(with);
        }
        for index in 0..self.roles.len() {
            let Some(status) = self.roles[index].ended() else { continue };
            let failed = match status.code() {
                Some(0 | 75) => {
                    tracing::debug!("`{}` left", self.roles[index].name());
                    continue;
                }
                Some(2) => Err(self.roles[index].died(status)),
                _ => self.again(Some(index), status),
            };
            if let Err(error) = failed {
                return self.ending(Err(error));
            }
        }
        let started = std::iter::once(&mut self.controller).chain(&mut self.roles).try_for_each(Process::start_if_due);
        match started {
            Ok(()) => phase,
            Err(error) => self.ending(Err(error)),
        }
    }

    /// Plans the restart of a role, or of the controller.
    fn again(&mut self, role: Option<usize>, status: std::process::ExitStatus) -> Result<()> {
        let process = match role {
            Some(index) => &mut self.roles[index],
            None => &mut self.controller,
        };
        match process.start_again(self.restarts_max, self.window) {
            Some(pause) => {
                tracing::warn!(
                    "`{}` ended with {}: again in {} ms",
                    process.name(),
                    in_words(status),
                    pause.as_millis()
                );
                Ok(())
            }
            None => Err(process.died(status)),
        }
    }

    /// A controller that died while it was to stop has forgotten that.
    fn after_restart(&mut self, phase: Phase) -> Phase {
        match phase {
            Phase::Stopping { until } => {
                let started = loop {
                    if let Err(error) = self.controller.start_if_due() {
                        break Err(error);
                    }
                    if self.controller.is_alive() {
                        break Ok(());
                    }
                    std::thread::sleep(Duration::from_millis(LOOK_MS));
                };
                if let Err(error) = started {
                    return self.ending(Err(error));
                }
                self.controller.ask_to_stop();
                Phase::Stopping { until }
            }
            phase => phase,
        }
    }

    fn ending(&mut self, with: Result<Outcome>) -> Phase {
        if let Err(error) = &with {
            let text = error.to_string();
            let what = text.split(['\n', ';']).next().unwrap_or_default();
            tracing::error!("{what}: the other processes are ended");
        }
        self.everybody().for_each(Process::rest);
        // After a good end the roles have left or are about to; after a bad one they are asked at once.
        let asked = with.is_err();
        if asked {
            self.everybody().for_each(Process::ask_to_stop);
        }
        Phase::Ending { with, asked, until: Instant::now() + Duration::from_millis(GRACE_MS) }
    }

    /// The end, once nobody is left; else the phase that goes on.
    #[expect(clippy::result_large_err, reason = "a few times a second")]
    fn end(
        &mut self,
        with: Result<Outcome>,
        asked: bool,
        until: Instant,
    ) -> std::result::Result<Result<Outcome>, Phase> {
        for process in self.everybody() {
            if let Some(status) = process.ended()
                && !matches!(status.code(), Some(0 | 75))
            {
                tracing::debug!("`{}` ended with {} as the run ended", process.name(), in_words(status));
            }
        }
        if !self.everybody().any(|p| p.is_alive() || p.will_start()) {
            return Ok(with);
        }
        if Instant::now() < until {
            return Err(Phase::Ending { with, asked, until });
        }
        if !asked {
            self.everybody().for_each(Process::ask_to_stop);
            let until = Instant::now() + Duration::from_millis(GRACE_MS);
            return Err(Phase::Ending { with, asked: true, until });
        }
        for process in self.everybody().filter(|process| process.is_alive()) {
            tracing::warn!("`{}` did not end and is killed", process.name());
            process.kill();
        }
        Ok(with)
    }

    fn everybody(&mut self) -> impl Iterator<Item = &mut Process> {
        std::iter::once(&mut self.controller).chain(&mut self.roles)
    }

    #[cfg(test)]
    pub fn id_of(&self, name: &str) -> Option<u32> {
        std::iter::once(&self.controller).chain(&self.roles).find(|p| p.name() == name)?.id()
    }
}
