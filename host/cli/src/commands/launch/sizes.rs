//! Arguments that decide the placement, and the placement that they give.

use cosmos_config::Resolved;
use cosmos_launch::placement::{Counts, Demand, Placement, Ports, Role, Space, demands, place, uses_gpus};

use crate::failure::Failure;

/// GPUs of a node where nothing else is said, as in the original.
const GPUS_PER_NODE: usize = 8;

/// Replica counts and ports.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Placement")]
pub struct SizeArgs {
    /// Cores of one node, divided among its processes [default on CPUs: as many as this machine has]
    #[arg(long, value_name = "N")]
    pub cores_per_node: Option<usize>,
    /// On CPUs, ranks of one policy or teacher on a node: a larger one gets a process on each of several nodes, or several
    /// on one [default: no limit]
    #[arg(long, value_name = "N")]
    pub ranks_per_node: Option<usize>,
    /// Policy replicas [default: `policy.parallelism.n_init_replicas`]
    #[arg(long, value_name = "N")]
    pub n_policy_replicas: Option<usize>,
    /// Rollout replicas [default: `rollout.parallelism.n_init_replicas`]
    #[arg(long, value_name = "N")]
    pub n_rollout_replicas: Option<usize>,
    /// Teacher replicas [default: `distillation.parallelism.n_init_replicas`]
    #[arg(long, value_name = "N", alias = "n-teacher-replicas")]
    pub n_reference_replicas: Option<usize>,
    /// Everything in one process on one node, as `cosmos-host run` does it: no controller, no Redis
    #[arg(long)]
    pub one_process: bool,
    /// Port of the controller on the first node
    #[arg(long, value_name = "PORT", default_value_t = Ports::default().controller)]
    pub port: u16,
    /// Port of the Redis server on the first node, where the launcher starts one
    #[arg(long, value_name = "PORT", default_value_t = Ports::default().redis)]
    pub redis_port: u16,
    /// First of the replicas' ports
    #[arg(long, value_name = "PORT", default_value_t = Ports::default().first)]
    pub rdzv_port: u16,
}

impl SizeArgs {
    /// `--set` arguments that put the replica counts into the config, so that all processes read the same.
    pub fn overrides(&self) -> Vec<String> {
        self.counts().overrides()
    }

    fn counts(&self) -> Counts {
        Counts { policy: self.n_policy_replicas, rollout: self.n_rollout_replicas, teacher: self.n_reference_replicas }
    }

    /// Whether the processes need a Redis server that the launcher starts: the config names none by URL.
    pub fn starts_redis(&self, resolved: &Resolved) -> bool {
        !self.one_process && cosmos_launch::starts_redis(&resolved.config)
    }

    /// Cores of a node: as given, else this machine's where cores are all there is to divide; 0 for unknown.
    pub fn cores(&self, resolved: &Resolved) -> usize {
        let own = || std::thread::available_parallelism().map_or(0, usize::from);
        let on_cpus = !uses_gpus(&resolved.config.host.device);
        self.cores_per_node.filter(|n| *n > 0).unwrap_or_else(|| if on_cpus { own() } else { 0 })
    }

    /// Refuses what has no roles to be processes of their own.
    pub fn check_roles(&self, resolved: &Resolved) -> Result<(), Failure> {
        if self.one_process || resolved.config.train.train_policy.grpo().is_some() {
            return Ok(());
        }
        Err(Failure::usage("`train.train_policy.type` is `sft`, which has no rollouts to run beside the policy")
            .with_hint("give `--one-process`"))
    }

    /// Places the config's replicas.
    pub fn place(&self, resolved: &Resolved, gpus: Option<usize>, nodes: Option<usize>) -> Result<Placement, Failure> {
        let on_gpus = uses_gpus(&resolved.config.host.device);
        let ports = Ports { controller: self.port, redis: self.redis_port, first: self.rdzv_port };
        let space = Space {
            gpus_per_node: if on_gpus { gpus.unwrap_or(GPUS_PER_NODE) } else { 0 },
            cores_per_node: self.cores(resolved),
            ranks_per_node: self.ranks_per_node.unwrap_or(0),
            nodes,
            ports,
        };
        if on_gpus && space.gpus_per_node == 0 {
            let device = &resolved.config.host.device;
            return Err(Failure::usage(format!("`host.device` is `{device}`, and the nodes have 0 GPUs"))
                .with_hint("give `--gpus-per-node N`, or `--set host.device=cpu`"));
        }
        let wanted = if self.one_process {
            vec![Demand::new(Role::Policy, 1, 1)]
        } else {
            demands(&resolved.config, &self.counts())?
        };
        Ok(place(&wanted, &space)?)
    }
}
