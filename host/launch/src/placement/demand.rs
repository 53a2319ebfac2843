//! How many replicas of which size a config asks for.

use cosmos_config::{Config, Distillation, Parallelism, TrainPolicy, Wire};
use cosmos_controller::Role;

use crate::error::{LaunchError, Result};

/// Replicas of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    /// What they do.
    pub role: Role,
    /// What their names begin with: the role's, or `teacher-NAME` for one of several teachers.
    pub name: String,
    /// How many.
    pub replicas: usize,
    /// Ranks (devices) of each.
    pub ranks: usize,
}

impl Demand {
    /// Replicas that have their names from their role.
    pub fn new(role: Role, replicas: usize, ranks: usize) -> Self {
        Self { role, name: role.name().into(), replicas, ranks }
    }
}

/// Replica counts from the command line; what is not given is the config's `n_init_replicas`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Policies.
    pub policy: Option<usize>,
    /// Rollouts.
    pub rollout: Option<usize>,
    /// Teachers; the original calls them reference replicas. Of several teachers, replicas of each that has no parallelism
    /// table of its own.
    pub teacher: Option<usize>,
}

impl Counts {
    /// `--set` arguments that put them into the config, so that all processes read the same: the controller has to know for
    /// how many policies a step waits.
    pub fn overrides(&self) -> Vec<String> {
        let counts = [("policy", self.policy), ("rollout", self.rollout), ("distillation", self.teacher)];
        let given = counts.into_iter().filter_map(|(table, count)| Some((table, count?)));
        given.map(|(table, count)| format!("{table}.parallelism.n_init_replicas={count}")).collect()
    }
}

/// Whether a device name is a GPU's.
pub fn uses_gpus(device: &str) -> bool {
    device.split(':').any(|part| part.eq_ignore_ascii_case("cuda"))
}

/// What a config asks for. SFT has policies only; without distillation there are no teachers. Each of several teachers
/// (`[[distillation.teachers]]`) is a demand of its own.
pub fn demands(config: &Config, counts: &Counts) -> Result<Vec<Demand>> {
    let mut all = vec![demand(Role::Policy, "policy", &config.policy.parallelism, counts.policy)?];
    if matches!(config.train.train_policy, TrainPolicy::Grpo(_)) {
        all.push(demand(Role::Rollout, "rollout", &config.rollout.parallelism, counts.rollout)?);
        if config.distillation.enable {
            all.extend(teachers(&config.distillation, counts.teacher)?);
        }
    }
    // The original's own teacher may answer, which is none of ours.
    all.retain(|d| d.replicas > 0 || d.role != Role::Teacher || config.distillation.wire != Wire::CosmosRl);
    for demand in &all {
        if demand.replicas == 0 {
            let name = &demand.name;
            return Err(LaunchError::usage(
                format!("the run needs a {name}, and 0 replicas of it are asked for"),
                "set `n_init_replicas` in its parallelism table, or the launcher's replica count, to 1 or more",
            ));
        }
    }
    Ok(all)
}

fn teachers(distillation: &Distillation, count: Option<usize>) -> Result<Vec<Demand>> {
    if distillation.teachers.is_empty() {
        return Ok(vec![demand(Role::Teacher, "distillation", &distillation.parallelism, count)?]);
    }
    if let Some(count) = count
        && distillation.teachers.iter().all(|teacher| teacher.parallelism.is_some())
    {
        return Err(LaunchError::usage(
            format!("{count} teacher replicas are asked for, and each teacher of the config has a number of its own"),
            "set `n_init_replicas` in `[distillation.teachers.parallelism]` below each `[[distillation.teachers]]`",
        ));
    }
    let mut all = Vec::new();
    for (index, teacher) in distillation.teachers.iter().enumerate() {
        let table = format!("distillation.teachers[{index}]");
        let demanded = match &teacher.parallelism {
            Some(own) => demand(Role::Teacher, &table, own, None)?,
            None => demand(Role::Teacher, "distillation", &distillation.parallelism, count)?,
        };
        all.push(Demand { name: format!("{}-{}", Role::Teacher.name(), teacher.name), ..demanded });
    }
    Ok(all)
}

fn demand(role: Role, table: &str, sizes: &Parallelism, count: Option<usize>) -> Result<Demand> {
    // -1 stands for "what is left", which is one for a launcher that counts devices from the sizes.
    let shards = usize::try_from(sizes.dp_shard_size).unwrap_or(1).max(1);
    let ranks = [sizes.tp_size, sizes.dp_replicate_size, sizes.pp_size, sizes.cp_size, shards]
        .iter()
        .try_fold(1usize, |product, size| product.checked_mul((*size).max(1)))
        .filter(|ranks| *ranks <= super::RANKS_MAX)
        .ok_or_else(|| {
            LaunchError::usage(
                format!(
                    "a replica of `[{table}.parallelism]` has tp {} × dp_replicate {} × pp {} × cp {} × dp_shard {shards} ranks, more than {}",
                    sizes.tp_size, sizes.dp_replicate_size, sizes.pp_size, sizes.cp_size, super::RANKS_MAX
                ),
                "lower the sizes",
            )
        })?;
    Ok(Demand::new(role, count.unwrap_or(sizes.n_init_replicas), ranks))
}
