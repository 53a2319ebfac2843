//! The processes of a run on this machine alone, for `launch local`.

use cosmos_config::{Config, Wire};

use crate::error::{LaunchError, Result};
use crate::placement::{Counts, Demand, Ports, Role, Space, demands, place, uses_gpus};

/// Replicas of one role on one machine at most.
const REPLICAS_MAX: usize = 256;

/// One process on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalProcess {
    /// Its name in logs and messages: the replica's, and for its further processes their number behind it.
    pub name: String,
    /// The replica's name in the run.
    pub replica: String,
    /// Which process of its replica it is, and how many that has.
    pub part: (usize, usize),
    /// The command that it is.
    pub role: &'static str,
    /// Ranks in it, each a thread.
    pub ranks: usize,
    /// Cores that its computations may use; none: it computes nothing.
    pub cores: Option<usize>,
    /// GPUs that it sees, as `CUDA_VISIBLE_DEVICES` names them; none on CPUs.
    pub devices: Vec<String>,
    /// Where it listens, if it does.
    pub listens: String,
}

/// All processes of a run on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalPlan {
    /// Redis, if it is started, the controller, then the roles.
    pub processes: Vec<LocalProcess>,
    /// Cores of this machine.
    pub cores: usize,
    /// GPUs of this machine; 0 on CPUs.
    pub gpus: usize,
}

/// What this machine computes with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// Cores.
    pub cores: usize,
    /// GPUs, as `CUDA_VISIBLE_DEVICES` names them.
    pub gpus: Vec<String>,
    /// Replicas may share GPUs when there are too few of them.
    pub share_gpus: bool,
    /// On CPUs: ranks of one process at most; 0: no limit.
    pub ranks_per_node: usize,
}

impl Machine {
    /// This one. Of its GPUs those that this process may use: `visible` is its `CUDA_VISIBLE_DEVICES`.
    pub fn this(visible: Option<&str>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let gpus = match visible {
            Some(list) => {
                let named = list.split(',').map(str::trim).filter(|id| !id.is_empty() && *id != "-1");
                named.map(str::to_owned).collect()
            }
            None => {
                let count = std::fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, |all| all.flatten().count());
                (0..count).map(|index| index.to_string()).collect()
            }
        };
        Self { cores, gpus, share_gpus: false, ranks_per_node: 0 }
    }
}

/// Decides it: [`place`] for this machine as the only node.
pub fn local_plan(config: &Config, counts: Counts, machine: &Machine) -> Result<LocalPlan> {
    if config.train.train_policy.grpo().is_none() {
        return Err(LaunchError::Config {
            message: "`train.train_policy.type` is `sft`, which has no rollouts to run beside the policy".into(),
            hint: "`cosmos-host run` trains it in one process".into(),
        });
    }
    let mut roles = demands_of(config, counts)?;
    let on_gpus = uses_gpus(&config.host.device);
    if !on_gpus {
        // A rollout decodes with the whole model, whatever its table says.
        roles.iter_mut().filter(|demand| demand.role == Role::Rollout).for_each(|demand| demand.ranks = 1);
    }
    let ranks = roles.iter().map(|d| d.replicas.saturating_mul(d.ranks)).fold(0usize, usize::saturating_add);
    if on_gpus {
        check_gpus(config, &roles, machine)?;
    }
    let space = Space {
        gpus_per_node: match (on_gpus, machine.share_gpus) {
            (false, _) => 0,
            (true, false) => machine.gpus.len(),
            // As many as are wanted; some of them are the same.
            (true, true) => ranks.max(machine.gpus.len()),
        },
        cores_per_node: machine.cores,
        ranks_per_node: machine.ranks_per_node,
        nodes: Some(1),
        ports: Ports::default(),
    };
    let placed = place(&roles, &space)?;
    let mut processes = Vec::new();
    let plain = |role: &'static str, listens: &str| LocalProcess {
        name: role.into(),
        replica: role.into(),
        part: (0, 1),
        role,
        ranks: 1,
        cores: None,
        devices: Vec::new(),
        listens: listens.into(),
    };
    if starts_redis(config) {
        let listens = if config.redis.is_empty() { "127.0.0.1, any free port" } else { "127.0.0.1" };
        let port = if config.redis.is_empty() { String::new() } else { format!(":{}", config.redis) };
        processes.push(plain("redis", &format!("{listens}{port}")));
    }
    processes.push(plain("controller", &config.host.control_address));
    for (replica, part) in placed.on_node(0) {
        let device = |index: &usize| machine.gpus.get(index % machine.gpus.len().max(1)).cloned();
        processes.push(LocalProcess {
            name: replica.process_name(part),
            replica: replica.name.clone(),
            part: (replica.place_of(part), replica.parts.len()),
            role: replica.role.name(),
            ranks: part.ranks,
            cores: Some(part.cores),
            devices: part.devices.iter().filter_map(device).collect(),
            listens: if replica.role == Role::Policy { "127.0.0.1, any free port" } else { "" }.into(),
        });
    }
    Ok(LocalPlan { processes, cores: machine.cores, gpus: if on_gpus { machine.gpus.len() } else { 0 } })
}

fn demands_of(config: &Config, counts: Counts) -> Result<Vec<Demand>> {
    if let Some(count) = counts.teacher.filter(|count| *count > 0 && !config.distillation.enable) {
        return Err(LaunchError::Config {
            message: format!("`--teachers {count}`, but the config has no distillation"),
            hint: "set `distillation.enable = true`, or leave the flag away".into(),
        });
    }
    let flags = [
        ("policy", "policies", counts.policy.unwrap_or(config.policy.parallelism.n_init_replicas)),
        ("rollout", "rollouts", counts.rollout.unwrap_or(config.rollout.parallelism.n_init_replicas)),
        ("teacher", "teachers", counts.teacher.unwrap_or(config.distillation.parallelism.n_init_replicas)),
    ];
    for (role, flag, count) in flags {
        let wanted = role != "teacher" || config.distillation.enable;
        // The original's own teacher may answer, which is none of ours.
        let elsewhere = role == "teacher" && count == 0 && config.distillation.wire == Wire::CosmosRl;
        if wanted && !elsewhere && !(1..=REPLICAS_MAX).contains(&count) {
            return Err(LaunchError::Config {
                message: format!("a run on one machine has 1 to {REPLICAS_MAX} {flag}, and not {count}"),
                hint: format!("set `n_init_replicas` of the {role}'s parallelism table, or `--{flag}`"),
            });
        }
    }
    demands(config, &counts)
}

/// Refuses what this machine's GPUs cannot hold, in words that fit a single machine.
fn check_gpus(config: &Config, roles: &[Demand], machine: &Machine) -> Result<()> {
    let device = &config.host.device;
    let there = machine.gpus.len();
    if there == 0 {
        return Err(LaunchError::Config {
            message: format!("`host.device` is `{device}`, and no GPU of this machine can be seen"),
            hint: "`cosmos-host doctor` says what is missing; `--set host.device=cpu` computes without".into(),
        });
    }
    let largest = roles.iter().max_by_key(|d| d.ranks).filter(|d| d.ranks > there);
    let ranks: usize = roles.iter().map(|d| d.replicas.saturating_mul(d.ranks)).fold(0, usize::saturating_add);
    if let Some(large) = largest {
        return Err(LaunchError::Config {
            message: format!("a {} takes {} GPUs, and this machine has {there}", large.name, large.ranks),
            hint: "lower the sizes in its parallelism table, or use several machines: `launch node`, `launch slurm`"
                .into(),
        });
    }
    if ranks > there && !machine.share_gpus {
        let each: Vec<String> = roles.iter().map(|d| format!("{} × {} of {}", d.replicas, d.name, d.ranks)).collect();
        return Err(LaunchError::Config {
            message: format!("the run takes {ranks} GPUs ({}), and this machine has {there}", each.join(", ")),
            hint: "`--share-gpus` lets several replicas use one; or lower the replica counts or sizes, or use \
                   `cosmos-host run`, which does everything in one process"
                .into(),
        });
    }
    Ok(())
}

/// Whether the run's Redis is ours to start: there is no URL of another.
pub fn starts_redis(config: &Config) -> bool {
    config.redis.is_empty() || config.redis.bytes().all(|b| b.is_ascii_digit())
}
