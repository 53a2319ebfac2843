//! One node's share of a run: `launch node`, the same under Slurm, Lepton, Kubernetes and by hand.
//!
//! Every node computes the same placement from the same config, finds out which node it is, starts its processes and
//! watches them. The first node has the controller, and Redis where the run needs one.

mod arguments;
mod files;
mod processes;
mod watch;
mod whereabouts;

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

pub use arguments::NodeCommand;
pub(crate) use files::write_whole;
pub use files::{TOKEN_FILE, attempt_folder, launch_folder, read_token, write_token};
pub use processes::{Kind, Process, Run};
pub use watch::{Ending, Limits, watch};
pub use whereabouts::{SERVICE_VARIABLE, Whereabouts, addresses};

use crate::error::{LaunchError, Result};
use crate::placement::{Placement, Role};

/// What one node is given.
#[derive(Debug)]
pub struct NodeOptions {
    /// The run, the same on every node.
    pub run: Run,
    /// This node and the others.
    pub whereabouts: Whereabouts,
    /// Which start of the job this is, from 1; names the folder of the logs.
    pub attempt: u32,
    /// When to give up.
    pub limits: Limits,
    /// How long to wait until the names of the others can be resolved.
    pub names_wait: Duration,
    /// Whether what the processes print goes to standard output too, each line with the process's name.
    pub echo: bool,
}

/// Refuses what can be placed but not run.
pub fn check_runnable(placement: &Placement) -> Result<()> {
    match placement.replicas.iter().find(|r| r.parts.len() > 1 && r.role == Role::Rollout) {
        None => Ok(()),
        Some(replica) => Err(LaunchError::usage(
            format!(
                "`{}` has {} ranks on {} nodes of {} GPUs, and a rollout is one process: only policies and teachers can have several",
                replica.name,
                replica.ranks,
                replica.parts.len(),
                placement.gpus_per_node
            ),
            "make it fit a node by the sizes in `[rollout.parallelism]`, and raise its `n_init_replicas`",
        )),
    }
}

/// Runs this node's processes to their end. Signals come in by number; the first asks to save and leave.
pub fn run_node(options: &NodeOptions, signals: &mpsc::Receiver<i32>) -> Result<Ending> {
    let Whereabouts { index, .. } = options.whereabouts;
    check_runnable(&options.run.placement)?;
    if index >= options.run.placement.nodes {
        return Err(LaunchError::usage(
            format!("this is worker {index}, and the run has {} nodes", options.run.placement.nodes),
            "start as many workers as `cosmos-host launch plan` says",
        ));
    }
    options.whereabouts.wait_for_names(options.names_wait)?;
    if index == 0 && !options.run.one_process {
        crate::supervise::refuse_a_running_one(&options.run.folder)?;
    }
    let token = token_of_run(&options.run)?;
    let logs = attempt_folder(&options.run.folder, options.attempt).join("logs");
    std::fs::create_dir_all(&logs).map_err(LaunchError::io("create", &logs))?;
    let processes = processes::of_node(&options.run, &options.whereabouts, &token)?;
    tracing::info!(
        "node {index} of {} starts {}",
        options.run.placement.nodes,
        processes.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ")
    );
    watch(processes, &logs, options.echo, &options.limits, signals)
}

/// From the environment, else from the run folder; one node alone needs no agreement and makes one.
fn token_of_run(run: &Run) -> Result<String> {
    if run.one_process {
        return Ok(String::new());
    }
    if let Some(token) = std::env::var(cosmos_control::TOKEN_VARIABLE).ok().filter(|t| !t.is_empty()) {
        return Ok(token);
    }
    if let Some(token) = read_token(&run.folder)? {
        return Ok(token);
    }
    if run.placement.nodes == 1 {
        return write_token(&run.folder);
    }
    let path = launch_folder(&run.folder).join(TOKEN_FILE);
    Err(LaunchError::usage(
        format!(
            "the nodes of this run share no token: {} is not set and `{}` is not there",
            cosmos_control::TOKEN_VARIABLE,
            path.display()
        ),
        format!(
            "set {} to the same 32 to 256 random characters on every node (`openssl rand -hex 32`), or put them into that file on a shared file system",
            cosmos_control::TOKEN_VARIABLE
        ),
    ))
}

/// How often a node looks for the file that asks to save.
const SAVE_FILE_LOOK: Duration = Duration::from_millis(500);

/// SIGTERM, SIGINT and SIGUSR1 as they come; from now on none of them ends this process by itself. The appearance of
/// `save_file` counts as SIGUSR1: a scheduler's signal to a job step goes to every process in it, Redis and all roles at
/// once, where only the controller should hear of it.
pub fn signals(save_file: Option<PathBuf>) -> Result<mpsc::Receiver<i32>> {
    let listened = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1];
    let mut signals = signal_hook::iterator::Signals::new(listened).map_err(LaunchError::io("listen to", "signals"))?;
    let (sender, receiver) = mpsc::channel();
    if let Some(file) = save_file {
        let sender = sender.clone();
        std::thread::spawn(move || {
            while !file.exists() {
                std::thread::sleep(SAVE_FILE_LOOK);
            }
            // Nobody listens any more when the node has ended.
            let _ = sender.send(libc::SIGUSR1);
        });
    }
    std::thread::spawn(move || signals.forever().take_while(|signal| sender.send(*signal).is_ok()).for_each(drop));
    Ok(receiver)
}

/// Writes how a node ended into a file: the word for scripts, then the reason for people.
pub fn write_ending(path: &Path, ending: &Ending) -> Result<()> {
    files::write_whole(path, format!("{ending}\n").as_bytes(), 0o644)
}
