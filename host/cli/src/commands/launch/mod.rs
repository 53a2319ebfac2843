//! `launch`: the processes of a run on one machine, on several, under Slurm, Lepton or Kubernetes.

mod kubernetes;
mod lepton;
mod local;
mod node;
mod plan;
pub(crate) mod sizes;
mod slurm;

use std::path::PathBuf;

use clap::Subcommand;
use cosmos_config::Resolved;

use crate::doctor;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Where to launch.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a run's controller, policies, rollouts and teachers on this machine, and Redis if there is no URL of one
    #[command(
        after_help = "Logs of every process go to DIR/logs; `cosmos-host status DIR` shows who does what. Another \
                            process can join with `cosmos-host rollout --run DIR …`. SIGTERM, SIGINT and SIGUSR1 save \
                            the run and end it with exit code 75."
    )]
    Local(Box<local::Args>),
    /// Which process runs on which node, with which devices and ports
    Plan(plan::Args),
    /// This node's share of a run over several machines without a scheduler
    Node(node::Args),
    /// A job for a Slurm cluster: saves before its time is over, and goes on where it was
    Slurm(Box<slurm::Args>),
    /// A job for NVIDIA DGX Cloud Lepton
    Lepton(Box<lepton::Args>),
    /// A manifest for Kubernetes: an Indexed Job with a headless service
    #[command(visible_alias = "k8s")]
    Kubernetes(Box<kubernetes::Args>),
}

/// Runs it.
pub fn run(command: Command, out: &mut Output) -> Result<Exit, Failure> {
    match command {
        Command::Local(args) => local::run(*args, out),
        Command::Plan(args) => plan::run(args, out),
        Command::Node(args) => node::run(args),
        Command::Slurm(args) => slurm::run(*args, out),
        Command::Lepton(args) => lepton::run(*args, out),
        Command::Kubernetes(args) => kubernetes::run(*args, out),
    }
}

/// Refuses what would end the run on its nodes, which get this program and these plugins, before anything is queued or
/// started.
fn check_here(resolved: &Resolved, plugins: &[PathBuf]) -> Result<(), Failure> {
    if let Some((message, hint)) = doctor::lacks_device(&resolved.config.host.device) {
        return Err(Failure::usage(message).with_hint(hint));
    }
    cosmos_run::prepare::check_plugins(resolved, plugins).map_err(|e| Failure::from_run(e, resolved.text()))
}
