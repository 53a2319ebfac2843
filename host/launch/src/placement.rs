//! Which process runs on which node, with which devices and ports.
//!
//! [`place`] is a pure function: the same demands on the same space give the same placement on every node that computes
//! it. Replicas smaller than a node share nodes, whatever their roles; a replica that fills a node or more takes whole nodes.

mod demand;
mod pack;
mod table;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use cosmos_controller::Role;
pub use demand::{Counts, Demand, demands, uses_gpus};

use crate::error::{LaunchError, Result};

/// Replicas of a run at most.
pub const REPLICAS_MAX: usize = 4096;
/// Ranks (devices) of a run at most.
pub const RANKS_MAX: usize = 1 << 16;
/// Devices or cores of one node at most.
const PER_NODE_MAX: usize = 4096;

/// What there is to place replicas on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Space {
    /// Devices of one node; 0: the run computes on CPUs.
    pub gpus_per_node: usize,
    /// Cores of one node; 0: unknown, then none are handed out.
    pub cores_per_node: usize,
    /// On CPUs: ranks of one replica on a node at most, so that a larger one has a process on each of several; 0: no limit.
    pub ranks_per_node: usize,
    /// Nodes at most; for a run on CPUs, nodes to spread over. None: as many as are needed, one on CPUs.
    pub nodes: Option<usize>,
    /// TCP ports.
    pub ports: Ports,
}

/// TCP ports of a run. Every part of a replica has one of its own, so that parts on one node never meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// Of the controller, on the first node.
    pub controller: u16,
    /// Of the Redis server, on the first node, where the launcher starts one.
    pub redis: u16,
    /// Of the first part of the first replica; the next ones follow.
    pub first: u16,
}

impl Default for Ports {
    fn default() -> Self {
        Self { controller: 8082, redis: 12800, first: 29345 }
    }
}

/// Who runs where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Nodes, numbered from 0. The controller runs on node 0, with the first replica.
    pub nodes: usize,
    /// Devices of one node; 0: the run computes on CPUs.
    pub gpus_per_node: usize,
    /// TCP ports.
    pub ports: Ports,
    /// All replicas: policies, rollouts, teachers.
    pub replicas: Vec<Replica>,
}

/// One replica of a role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// Unique in the run, as `policy-0` or `teacher-math-0`.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Among the replicas of its kind (of several teachers: of its teacher), from 0.
    pub index: usize,
    /// Ranks in all its parts.
    pub ranks: usize,
    /// Where its ranks meet: the first part's node and port.
    pub rendezvous: Rendezvous,
    /// A part on each of its nodes, in the order of the ranks.
    pub parts: Vec<Part>,
}

/// Where the ranks of a replica meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rendezvous {
    /// Node.
    pub node: usize,
    /// Port on that node.
    pub port: u16,
}

/// The ranks of a replica on one node: one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Node.
    pub node: usize,
    /// Its first rank.
    pub first_rank: usize,
    /// How many ranks.
    pub ranks: usize,
    /// Devices of its node, one for each rank in their order, as `CUDA_VISIBLE_DEVICES` names them; none on CPUs.
    pub devices: Vec<usize>,
    /// Threads it may keep busy; 0: unknown.
    pub cores: usize,
    /// A port that no other part of the run has.
    pub port: u16,
}

impl Replica {
    /// Which of its parts this is, from 0.
    pub fn place_of(&self, part: &Part) -> usize {
        self.parts.iter().position(|own| own.first_rank == part.first_rank).unwrap_or(0)
    }

    /// What a part's process is called in logs: as the replica, the further ones with their number behind it.
    pub fn process_name(&self, part: &Part) -> String {
        match self.place_of(part) {
            0 => self.name.clone(),
            place => format!("{}.{place}", self.name),
        }
    }
}

impl Placement {
    /// The replicas with a part on a node, and that part; several on one node follow each other.
    pub fn on_node(&self, node: usize) -> impl Iterator<Item = (&Replica, &Part)> {
        self.replicas.iter().flat_map(move |r| r.parts.iter().filter(move |p| p.node == node).map(move |p| (r, p)))
    }

    /// How many replicas of a role there are.
    pub fn count(&self, role: Role) -> usize {
        self.replicas.iter().filter(|r| r.role == role).count()
    }

    /// Devices that nobody was given.
    pub fn idle_devices(&self) -> usize {
        let given: usize = self.replicas.iter().flat_map(|r| &r.parts).map(|p| p.devices.len()).sum();
        (self.nodes * self.gpus_per_node).saturating_sub(given)
    }
}

/// Places replicas, or says with the numbers why they do not fit.
pub fn place(demands: &[Demand], space: &Space) -> Result<Placement> {
    check(demands, space)?;
    let mut slots =
        if space.gpus_per_node == 0 { on_cores(demands, space)? } else { pack::pack(demands, space.gpus_per_node)? };
    let nodes = number_nodes(&mut slots);
    if let Some(limit) = space.nodes.filter(|limit| nodes > *limit) {
        return Err(too_many_nodes(demands, space, nodes, limit));
    }
    let mut crowd = vec![0usize; nodes];
    slots.iter().for_each(|slot| crowd[slot.node] += 1);
    let mut seated = vec![0usize; nodes];
    let mut placement =
        Placement { nodes, gpus_per_node: space.gpus_per_node, ports: space.ports, replicas: Vec::new() };
    for (offset, slot) in slots.into_iter().enumerate() {
        let cores =
            if space.cores_per_node == 0 { 0 } else { cores_of(&slot, space, crowd[slot.node], seated[slot.node]) };
        seated[slot.node] += 1;
        let demand = &demands[slot.demand];
        let name = format!("{}-{}", demand.name, slot.index);
        // `check` has made sure that the ports are there.
        let port = space.ports.first.saturating_add(u16::try_from(offset).unwrap_or(u16::MAX));
        let part = Part {
            node: slot.node,
            first_rank: slot.first_rank,
            ranks: slot.ranks,
            devices: if space.gpus_per_node == 0 {
                Vec::new()
            } else {
                (slot.device..slot.device + slot.ranks).collect()
            },
            cores,
            port,
        };
        match placement.replicas.last_mut().filter(|r| r.name == name) {
            Some(replica) => {
                replica.ranks += part.ranks;
                replica.parts.push(part);
            }
            None => placement.replicas.push(Replica {
                name,
                role: demand.role,
                index: slot.index,
                ranks: part.ranks,
                rendezvous: Rendezvous { node: part.node, port: part.port },
                parts: vec![part],
            }),
        }
    }
    Ok(placement)
}

/// A part before the nodes have their final numbers.
#[derive(Debug, Clone)]
struct Slot {
    /// Whose replica, by the order of the demands.
    demand: usize,
    index: usize,
    node: usize,
    first_rank: usize,
    ranks: usize,
    device: usize,
}

/// With devices, each rank has its share of the cores; on CPUs the parts of a node share them evenly, the first ones what is
/// left over. `seated`: how many parts of the node came before.
fn cores_of(slot: &Slot, space: &Space, crowd: usize, seated: usize) -> usize {
    let share = match space.gpus_per_node {
        0 => space.cores_per_node / crowd.max(1) + usize::from(seated < space.cores_per_node % crowd.max(1)),
        gpus => space.cores_per_node * slot.ranks / gpus,
    };
    share.max(1)
}

/// Replicas in their order over the nodes, as evenly as can be.
fn on_cores(demands: &[Demand], space: &Space) -> Result<Vec<Slot>> {
    let parts = demands.iter().map(|demand| parts_of(demand, space.ranks_per_node)).collect::<Result<Vec<_>>>()?;
    let total: usize = demands.iter().zip(&parts).map(|(demand, parts)| demand.replicas * parts).sum();
    let nodes = space.nodes.unwrap_or(1).min(total).max(1);
    let mut slots = Vec::new();
    for ((demand, wanted), parts) in demands.iter().enumerate().zip(parts) {
        for index in 0..wanted.replicas {
            let (first, ranks) = (slots.len() * nodes / total.max(1), wanted.ranks / parts);
            // The parts of a replica are on different nodes where there are enough.
            let slot =
                |part| Slot { demand, index, node: (first + part) % nodes, first_rank: part * ranks, ranks, device: 0 };
            slots.extend((0..parts).map(slot));
        }
    }
    Ok(slots)
}

/// Processes of a replica on CPUs.
fn parts_of(demand: &Demand, ranks_max: usize) -> Result<usize> {
    // A rollout decodes with the whole model, whatever its table says.
    if ranks_max == 0 || demand.role == Role::Rollout {
        return Ok(1);
    }
    let parts = demand.ranks.div_ceil(ranks_max);
    if demand.ranks.is_multiple_of(parts.max(1)) {
        return Ok(parts);
    }
    Err(LaunchError::usage(
        format!(
            "a {} of {} ranks needs {parts} processes of at most {ranks_max}, and its ranks cannot be spread evenly over them",
            demand.name, demand.ranks
        ),
        "choose another `--ranks-per-node`, or other sizes in its parallelism table",
    ))
}

/// Sorts the parts and numbers the nodes by the first replica on each, so that node 0 has the first policy and the nodes
/// of a large replica follow each other. Gives the number of nodes.
fn number_nodes(slots: &mut [Slot]) -> usize {
    slots.sort_by_key(|s| (s.demand, s.index, s.first_rank));
    let mut numbers = std::collections::BTreeMap::new();
    for slot in slots.iter_mut() {
        let next = numbers.len();
        slot.node = *numbers.entry(slot.node).or_insert(next);
    }
    numbers.len()
}

fn check(demands: &[Demand], space: &Space) -> Result<()> {
    for (index, demand) in demands.iter().enumerate() {
        if demands[..index].iter().any(|d| d.name == demand.name) {
            return Err(LaunchError::usage(format!("replicas called `{}` are demanded twice", demand.name), ""));
        }
    }
    let replicas = demands.iter().try_fold(0usize, |sum, d| sum.checked_add(d.replicas)).unwrap_or(usize::MAX);
    let ranks = demands
        .iter()
        .try_fold(0usize, |sum, d| sum.checked_add(d.replicas.checked_mul(d.ranks)?))
        .unwrap_or(usize::MAX);
    if replicas == 0 || demands.iter().any(|d| d.replicas > 0 && d.ranks == 0) {
        return Err(LaunchError::usage(
            "there is no replica to place",
            "set `policy.parallelism.n_init_replicas` to 1 or more",
        ));
    }
    if replicas > REPLICAS_MAX || ranks > RANKS_MAX {
        return Err(LaunchError::usage(
            format!(
                "{replicas} replicas with {ranks} ranks are wanted, at most {REPLICAS_MAX} with {RANKS_MAX} can be placed"
            ),
            "lower the replica counts or the sizes in `[policy|rollout|distillation.parallelism]`",
        ));
    }
    if space.gpus_per_node > PER_NODE_MAX || space.cores_per_node > PER_NODE_MAX {
        return Err(LaunchError::usage(
            format!(
                "a node with {} GPUs and {} cores is more than {PER_NODE_MAX}",
                space.gpus_per_node, space.cores_per_node
            ),
            "give the numbers of one node",
        ));
    }
    if space.nodes == Some(0) {
        return Err(LaunchError::usage("0 nodes hold no replica", "give 1 or more nodes"));
    }
    let Ports { controller, redis, first } = space.ports;
    // A replica has at most as many parts as ranks.
    let limit = if space.gpus_per_node > 0 { space.gpus_per_node } else { space.ranks_per_node };
    let parts = ranks.checked_div(limit).map_or(replicas, |nodes| ranks.min(replicas + nodes));
    let last = usize::from(first) + parts - 1;
    let taken = |port: u16| (usize::from(first)..=last).contains(&usize::from(port));
    if last > usize::from(u16::MAX) || controller == redis || taken(controller) || taken(redis) {
        return Err(LaunchError::usage(
            format!(
                "the ports overlap or run out: controller {controller}, Redis {redis}, {parts} for the replicas from {first} on"
            ),
            "choose others with `--port`, `--redis-port` and `--rdzv-port`",
        ));
    }
    Ok(())
}

fn too_many_nodes(demands: &[Demand], space: &Space, nodes: usize, limit: usize) -> LaunchError {
    let wanted: Vec<String> = demands
        .iter()
        .filter(|d| d.replicas > 0)
        .map(|d| format!("{} × {} of {} GPUs", d.replicas, d.name, d.ranks))
        .collect();
    let ranks: usize = demands.iter().map(|d| d.replicas * d.ranks).sum();
    LaunchError::usage(
        format!(
            "{} need {ranks} GPUs on {nodes} nodes of {}, and there are {limit} nodes with {} GPUs",
            wanted.join(", "),
            space.gpus_per_node,
            limit * space.gpus_per_node
        ),
        "allow more nodes, or lower the replica counts or the sizes in `[policy|rollout|distillation.parallelism]`",
    )
}
