//! Which processes a run on this machine has.

use cosmos_config::{Config, Wire};

use crate::error::{LaunchError, Result};
use crate::placement::{self, Demand, Ports, Role, Space, demands, place, uses_gpus};

/// Processes of one role.
const REPLICAS_MAX: usize = 256;

/// How many of each, where the command line says so.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// In place of `policy.parallelism.n_init_replicas`.
    pub policies: Option<usize>,
    /// In place of `rollout.parallelism.n_init_replicas`.
    pub rollouts: Option<usize>,
    /// In place of `distillation.parallelism.n_init_replicas`; of each of several teachers that has no table of its own.
    pub teachers: Option<usize>,
}

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its name in the run, in logs and in the status.
    pub name: String,
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

/// All processes of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// Redis, if it is started, the controller, then the roles.
    pub places: Vec<Place>,
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
        Self { cores, gpus, share_gpus: false }
    }
}

/// Decides it: [`place`] for this machine as the only node.
pub fn placement(config: &Config, counts: Counts, machine: &Machine) -> Result<Placement> {
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
        nodes: Some(1),
        ports: Ports::default(),
    };
    let placed = place(&roles, &space)?;
    let mut places = Vec::new();
    let plain = |role: &'static str, listens: &str| Place {
        name: role.into(),
        role,
        ranks: 1,
        cores: None,
        devices: Vec::new(),
        listens: listens.into(),
    };
    if starts_redis(config) {
        let listens = if config.redis.is_empty() { "127.0.0.1, any free port" } else { "127.0.0.1" };
        let port = if config.redis.is_empty() { String::new() } else { format!(":{}", config.redis) };
        places.push(plain("redis", &format!("{listens}{port}")));
    }
    places.push(plain("controller", &config.host.control_address));
    for (replica, part) in placed.on_node(0) {
        let device = |index: &usize| machine.gpus.get(index % machine.gpus.len().max(1)).cloned();
        places.push(Place {
            name: replica.name.clone(),
            role: replica.role.name(),
            ranks: replica.ranks,
            cores: Some(part.cores),
            devices: part.devices.iter().filter_map(device).collect(),
            listens: if replica.role == Role::Policy { "127.0.0.1, any free port" } else { "" }.into(),
        });
    }
    Ok(Placement { places, cores: machine.cores, gpus: if on_gpus { machine.gpus.len() } else { 0 } })
}

fn demands_of(config: &Config, counts: Counts) -> Result<Vec<Demand>> {
    if let Some(count) = counts.teachers.filter(|count| *count > 0 && !config.distillation.enable) {
        return Err(LaunchError::Config {
            message: format!("`--teachers {count}`, but the config has no distillation"),
            hint: "set `distillation.enable = true`, or leave the flag away".into(),
        });
    }
    let flags = [
        ("policy", "policies", counts.policies.unwrap_or(config.policy.parallelism.n_init_replicas)),
        ("rollout", "rollouts", counts.rollouts.unwrap_or(config.rollout.parallelism.n_init_replicas)),
        ("teacher", "teachers", counts.teachers.unwrap_or(config.distillation.parallelism.n_init_replicas)),
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
    let counts = placement::Counts { policy: counts.policies, rollout: counts.rollouts, teacher: counts.teachers };
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
pub(crate) fn starts_redis(config: &Config) -> bool {
    config.redis.is_empty() || config.redis.bytes().all(|b| b.is_ascii_digit())
}
