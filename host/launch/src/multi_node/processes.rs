//! The processes of one node: programs, arguments, environment.

use std::path::PathBuf;

use cosmos_broker::ServerConfig;

use super::files::random_hex;
use super::whereabouts::Whereabouts;
use crate::BROKER_VARIABLE;
use crate::error::{LaunchError, Result};
use crate::placement::{Part, Placement, Replica, Role};
use crate::supervise::part_arguments;

/// A run, the same on every node.
#[derive(Debug, Clone)]
pub struct Run {
    /// This program, as the processes are started from it.
    pub program: PathBuf,
    /// The config.
    pub config: PathBuf,
    /// Changes of single keys, as `--set` takes them.
    pub overrides: Vec<String>,
    /// Plugins.
    pub plugins: Vec<PathBuf>,
    /// The run folder.
    pub folder: PathBuf,
    /// Everything in one process, on one node: no controller, no Redis.
    pub one_process: bool,
    /// Who runs where.
    pub placement: Placement,
    /// Whether the launcher starts a Redis server on the first node; otherwise the config names one.
    pub starts_redis: bool,
    /// Go on from the newest checkpoint.
    pub resume: bool,
    /// Milliseconds that a role may take to save and leave when this process is gone.
    pub stop_ms: u64,
}

/// What a process is in the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The Redis server that the launcher starts.
    Redis,
    /// The controller: when it ends, the run ends.
    Controller,
    /// The whole run in one process.
    Whole,
    /// A replica.
    Replica(Role),
}

impl Kind {
    /// Whether the run ends with it, and whether it is the one that is told to save.
    pub fn leads(self) -> bool {
        matches!(self, Self::Controller | Self::Whole)
    }
}

/// A process to start.
#[derive(Debug, Clone)]
pub struct Process {
    /// As in logs, `policy-0`.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// What to start.
    pub program: PathBuf,
    /// With which arguments.
    pub arguments: Vec<String>,
    /// Environment on top of ours.
    pub environment: Vec<(String, String)>,
    /// What it reads from standard input.
    pub input: Option<String>,
    /// Waited for until this local port answers, before the next process is started.
    pub awaits_port: Option<u16>,
}

/// The processes of the node that `whereabouts` says, in the order of starting.
pub(super) fn of_node(run: &Run, whereabouts: &Whereabouts, token: &str) -> Result<Vec<Process>> {
    let ports = run.placement.ports;
    if run.one_process {
        return Ok(if whereabouts.index == 0 { vec![whole(run)] } else { Vec::new() });
    }
    let mut all = Vec::new();
    let alone = run.placement.nodes == 1;
    let host = whereabouts.first_host();
    if whereabouts.index == 0 {
        let mut environment = variables(run, token);
        if run.starts_redis {
            let password = random_hex()?;
            all.push(redis(run, alone, &password)?);
            environment.push((BROKER_VARIABLE.into(), format!("redis://:{password}@{host}:{}/0", ports.redis)));
        }
        let mut arguments = role_arguments(run, "controller");
        arguments.extend(["--run".into(), run.folder.display().to_string()]);
        if run.resume {
            arguments.push("--resume".into());
        }
        let (name, kind) = ("controller".into(), Kind::Controller);
        let program = run.program.clone();
        all.push(Process { name, kind, program, arguments, environment, input: None, awaits_port: None });
    }
    for (replica, part) in run.placement.on_node(whereabouts.index) {
        all.push(of_replica(run, replica, part, whereabouts, token));
    }
    Ok(all)
}

fn whole(run: &Run) -> Process {
    let mut arguments = vec!["run".to_owned()];
    arguments.extend(common_arguments(run));
    if run.resume {
        arguments.push("--resume".into());
    }
    let environment = match run.placement.on_node(0).next() {
        Some((_, part)) if run.placement.gpus_per_node > 0 => devices(part),
        _ => Vec::new(),
    };
    Process {
        name: "run".into(),
        kind: Kind::Whole,
        program: run.program.clone(),
        arguments,
        environment,
        input: None,
        awaits_port: None,
    }
}

fn of_replica(run: &Run, replica: &Replica, part: &Part, whereabouts: &Whereabouts, token: &str) -> Process {
    let mut arguments = role_arguments(run, replica.role.name());
    if run.placement.nodes == 1 {
        arguments.extend(["--run".into(), run.folder.display().to_string()]);
    } else {
        let controller = format!("http://{}:{}", whereabouts.first_host(), run.placement.ports.controller);
        arguments.extend(["--controller".into(), controller]);
    }
    arguments.extend(["--name".into(), replica.name.clone()]);
    if replica.parts.len() > 1 {
        let meeting = format!("{}:{}", whereabouts.host_of(replica.rendezvous.node), replica.rendezvous.port);
        arguments.extend(part_arguments((replica.place_of(part), replica.parts.len()), &meeting));
    }
    let mut environment = variables(run, token);
    environment.extend(devices(part));
    if part.cores > 0 {
        environment.push(("RAYON_NUM_THREADS".into(), part.cores.to_string()));
    }
    Process {
        name: replica.process_name(part),
        kind: Kind::Replica(replica.role),
        program: run.program.clone(),
        arguments,
        environment,
        input: None,
        awaits_port: None,
    }
}

/// The token, and the wish to end with this process.
fn variables(run: &Run, token: &str) -> Vec<(String, String)> {
    vec![
        (cosmos_control::TOKEN_VARIABLE.into(), token.into()),
        (crate::LAUNCHED_VARIABLE.into(), run.stop_ms.to_string()),
    ]
}

fn devices(part: &Part) -> Vec<(String, String)> {
    if part.devices.is_empty() {
        return Vec::new();
    }
    let list = part.devices.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    vec![("CUDA_VISIBLE_DEVICES".into(), list)]
}

fn common_arguments(run: &Run) -> Vec<String> {
    let mut arguments = vec!["--config".to_owned(), run.config.display().to_string()];
    for set in &run.overrides {
        arguments.extend(["--set".into(), set.clone()]);
    }
    for plugin in &run.plugins {
        arguments.extend(["--plugin".into(), plugin.display().to_string()]);
    }
    arguments
}

fn role_arguments(run: &Run, role: &str) -> Vec<String> {
    let mut arguments = vec![role.to_owned()];
    arguments.extend(common_arguments(run));
    // The same for every process of the run, as all of the config is.
    let listen = if run.placement.nodes == 1 { "127.0.0.1" } else { "0.0.0.0" };
    arguments.extend(["--set".into(), format!("host.control_address={listen}:{}", run.placement.ports.controller)]);
    arguments
}

/// A server that nobody reaches without the password; its config goes through standard input, which nobody can list.
fn redis(run: &Run, alone: bool, password: &str) -> Result<Process> {
    let folder = super::launch_folder(&run.folder).join("redis");
    std::fs::create_dir_all(&folder).map_err(LaunchError::io("create", &folder))?;
    let port = run.placement.ports.redis;
    let bind = if alone { "127.0.0.1" } else { "0.0.0.0" };
    let config = ServerConfig { bind, port, password, dir: &folder, log: None, maxmemory_bytes: None };
    Ok(Process {
        name: "redis".into(),
        kind: Kind::Redis,
        program: "redis-server".into(),
        arguments: vec!["-".into()],
        environment: Vec::new(),
        input: Some(config.to_string()),
        awaits_port: Some(port),
    })
}
