//! The roles of a run as processes of their own, each entered here by one command of the command line.
//!
//! [`controller`] answers the others over HTTP (`cosmos-control`); [`policy`], [`rollout`] and [`teacher`] join it, carry
//! out its orders until it says that the run is over, and leave. All four are given the same config and plugins: a role
//! whose config differs is refused by the controller.

pub mod books;
mod controller;
pub mod crew;
pub mod depot;
mod foreign;
pub mod parcel;
pub mod policy;
mod policy_ranks;
mod replica;
mod rollout;
mod seat;
mod shelves;
mod teacher;
mod teacher_ranks;
pub mod trainer;
pub mod writer;

pub(crate) use controller::{LEDGER, history_at};

use std::path::{Path, PathBuf};

use cosmos_broker::RedisLimits;
use cosmos_config::{Config, Resolved};
use cosmos_control::Deadlines;

use crate::error::{Result, RunError};
use crate::prepare::{self, Base};

/// What one process of a run is given.
#[derive(Debug, Clone)]
pub struct RoleOptions {
    /// The configuration, the same for every process of the run.
    pub resolved: Resolved,
    /// Plugin components, the same for every process of the run.
    pub plugins: Vec<PathBuf>,
    /// Folder of the run. The controller writes it (and `control.json` in it, from which the others know where it
    /// listens); the others need it only for what they share by files. None: a role that knows only `controller_url`.
    pub run_folder: Option<PathBuf>,
    /// Where the controller listens, as `http://host:port`; for a role without a run folder.
    pub controller_url: Option<String>,
    /// The run's token, for a role without a run folder. For the controller: the token to use; none: a new random one.
    pub token: Option<String>,
    /// The replica's name, unique in the run; none: made from role, host and process id.
    pub name: Option<String>,
    /// Which process of its replica this is, where the replica has several.
    pub part: Option<ReplicaPart>,
    /// URL of the broker, password included, where the launcher started one; none: the `redis` key of the config. The
    /// controller hands it to the roles as they join.
    pub broker_url: Option<String>,
    /// Whether the controller goes on with a run that is in the folder already, even if that was saved and left.
    pub resume: bool,
    /// Whether the launcher has started this controller again after it has died, so that it goes on as it was.
    pub restarted: bool,
}

/// A process of a replica that is larger than a node, and has a process on each of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaPart {
    /// This process, from 0; the first one speaks for the replica.
    pub node: usize,
    /// How many processes.
    pub nodes: usize,
    /// Host and port where the first one waits for the others.
    pub rendezvous: String,
}

/// How a process of a run ended, where nothing failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RoleOutcome {
    /// The run is over.
    Done,
    /// The run was saved and is to be resumed (exit code 75).
    Saved,
}

/// Runs the controller until the run is over: endpoint, ledger, metrics and records.
pub fn controller(options: RoleOptions) -> Result<RoleOutcome> {
    controller::run(options)
}

/// Runs one policy replica until the controller says that the run is over.
pub fn policy(options: RoleOptions) -> Result<RoleOutcome> {
    policy::run(options)
}

/// Runs one rollout replica until the controller says that the run is over.
pub fn rollout(options: RoleOptions) -> Result<RoleOutcome> {
    rollout::run(options)
}

/// Runs one teacher replica until the controller says that the run is over.
pub fn teacher(options: RoleOptions) -> Result<RoleOutcome> {
    teacher::run(options)
}

/// Runs a teacher that belongs to no run of ours: it answers a trainer of the original over the Redis of the config
/// (`distillation.wire = "cosmos-rl"`), until the trainer says the end or this process is asked to stop.
pub fn teacher_alone(options: RoleOptions) -> Result<RoleOutcome> {
    teacher::alone(options)
}

/// Ends what processes have left in a run folder that one process goes on in: they would go on from another state than
/// the one that is reached then. A run without processes has nothing of it.
///
/// # Errors
/// A controller that is still at work there.
pub fn retire(run_folder: &Path) -> Result<()> {
    if cosmos_control::retire(run_folder)? {
        controller::tidy(run_folder);
    }
    Ok(())
}

/// Folder of states for policies that join.
const HAND_OVER: &str = "hand_over";

/// Refuses what a run of several processes cannot do.
fn check_processes(base: &Base) -> Result<()> {
    if base.kind() == "sft" {
        return Err(RunError::config(
            prepare::place(&base.resolved, "train.train_policy.type"),
            "supervised fine-tuning has no roles to be processes of their own",
            "`cosmos-host run` makes it in one process",
        ));
    }
    Ok(())
}

/// Whether a process ends with this error, rather than report it and take the next order: nobody who could be told is there,
/// or the same would happen again.
fn is_final(error: &RunError) -> bool {
    matches!(error, RunError::Control(_) | RunError::Config { .. } | RunError::Replica { .. })
}

/// Whether policies compare whole vocabularies, so that they need the teachers' heads.
fn wants_heads(base: &Base) -> bool {
    base.config().distillation.enable && base.config().distillation.top_k < 0
}

/// How long roles wait for a broker that is away or full.
fn redis_limits(config: &Config) -> RedisLimits {
    let wait_ms_max = config.host.broker_wait_ms_max;
    RedisLimits { away_ms_max: wait_ms_max, full_ms_max: wait_ms_max, ..RedisLimits::default() }
}

/// How long roles may be silent.
fn deadlines(config: &Config) -> Deadlines {
    let host = &config.host;
    Deadlines {
        silent_ms_max: host.silent_ms_max,
        gone_ms_max: host.gone_ms_max,
        absent_ms_max: host.absent_ms_max,
        policies_may_leave: host.policies_may_leave,
        ..Deadlines::default()
    }
}
