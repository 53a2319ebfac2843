//! Starts, watches and ends the processes of a run: on one machine, on several, under Slurm, Lepton or Kubernetes.
//!
//! [`placement`] decides which process runs where. [`local`] starts a run on this machine, keeps logs, starts again what
//! dies, and ends it. [`multi_node`] is one node's share of a run over several, and [`slurm`], [`lepton`] and
//! [`kubernetes`] have a scheduler start that on every node. The crate knows processes and files; what the roles do is theirs.

mod error;
pub mod kubernetes;
pub mod lepton;
mod log_file;
pub mod multi_node;
mod parent;
pub mod placement;
mod process;
pub mod slurm;
mod stop;
mod supervise;
#[cfg(test)]
mod tests;
mod this_machine;
mod yaml;

pub use error::{LaunchError, Result};
pub use parent::{LAUNCHED_VARIABLE, end_with_the_launcher};
pub use process::RESTARTED_VARIABLE;
pub use supervise::{BROKER_VARIABLE, LaunchOptions, Outcome, REDIS_FOLDER_VARIABLE, local};
pub use this_machine::{LocalPlan, LocalProcess, Machine, local_plan, starts_redis};
