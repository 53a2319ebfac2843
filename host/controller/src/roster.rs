//! Who is there and what each is doing.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{Order, OrderId, Role};

/// Which state, of weights and optimizer: the attempt that made it, 0 for the start of the run. The step alone does not say
/// it: after a rollback, or for a replica that was away, the same step has other weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct StateId(pub u64);

/// A state with the step it is named by in messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Held {
    pub step: u64,
    pub state: StateId,
}

/// An order under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Job {
    pub id: OrderId,
    pub order: Order,
    /// The run's state when it was given out.
    pub state: StateId,
    /// The run's count of changes then.
    pub changes: u64,
    /// Its result is no longer wanted.
    pub void: bool,
}

/// A known process; one that is lost stays known until it is removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Replica {
    pub role: Role,
    pub live: bool,
    pub address: String,
    pub job: Option<Job>,
    /// The state that it holds for certain.
    pub held: Option<Held>,
    /// The state that it holds if its last order was carried out; it was lost before it could say so.
    pub maybe: Option<Held>,
    /// Orders that it failed at since it last carried one out.
    pub failures: u64,
    /// Why it failed the last time.
    pub reason: String,
}

/// The replicas by name, with indexes of those that are asked for all the time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Roster {
    replicas: BTreeMap<String, Replica>,
    policies: BTreeSet<String>,
    idle_rollouts: BTreeSet<String>,
}

impl Roster {
    pub fn len(&self) -> usize {
        self.replicas.len()
    }

    pub fn get(&self, name: &str) -> Option<&Replica> {
        self.replicas.get(name)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&String, &Replica)> {
        self.replicas.iter()
    }

    /// Puts a replica down as there and free. What it did before is the caller's to settle.
    pub fn join(&mut self, name: &str, role: Role, address: String) {
        let fresh = Replica {
            role,
            live: true,
            address: String::new(),
            job: None,
            held: None,
            maybe: None,
            failures: 0,
            reason: String::new(),
        };
        let replica = self.replicas.entry(name.to_string()).or_insert(fresh);
        replica.live = true;
        replica.address = address;
        replica.job = None;
        if role == Role::Policy {
            self.policies.insert(name.to_string());
        }
        self.index(name);
    }

    /// Takes the order that a replica is working on.
    pub fn take_job(&mut self, name: &str) -> Option<Job> {
        let job = self.replicas.get_mut(name)?.job.take();
        self.index(name);
        job
    }

    pub fn give(&mut self, name: &str, job: Job) {
        if let Some(replica) = self.replicas.get_mut(name) {
            replica.job = Some(job);
        }
        self.index(name);
    }

    pub fn lose(&mut self, name: &str) {
        if let Some(replica) = self.replicas.get_mut(name) {
            replica.live = false;
        }
        self.index(name);
    }

    pub fn remove(&mut self, name: &str) {
        self.replicas.remove(name);
        self.policies.remove(name);
        self.index(name);
    }

    fn index(&mut self, name: &str) {
        let idle = self.replicas.get(name).is_some_and(|r| r.role == Role::Rollout && r.live && r.job.is_none());
        match idle {
            true => self.idle_rollouts.insert(name.to_string()),
            false => self.idle_rollouts.remove(name),
        };
    }

    /// Sets what a policy holds.
    pub fn set_held(&mut self, name: &str, held: Option<Held>, maybe: Option<Held>) {
        if let Some(replica) = self.replicas.get_mut(name) {
            (replica.held, replica.maybe) = (held, maybe);
        }
    }

    pub fn note_failure(&mut self, name: &str, reason: &str) {
        if let Some(replica) = self.replicas.get_mut(name) {
            replica.failures = replica.failures.saturating_add(1);
            replica.reason = reason.chars().take(REASON_CHARS_MAX).collect();
        }
    }

    pub fn note_success(&mut self, name: &str) {
        if let Some(replica) = self.replicas.get_mut(name) {
            replica.failures = 0;
            replica.reason.clear();
        }
    }

    /// What the rollouts are doing is no longer wanted.
    pub fn void_rollouts(&mut self) {
        let jobs = self.replicas.values_mut().filter(|r| r.role == Role::Rollout).filter_map(|r| r.job.as_mut());
        jobs.for_each(|job| job.void = true);
    }

    /// Policies that are known, lost ones included.
    pub fn policies_known(&self) -> u64 {
        self.policies.len() as u64
    }

    /// Policies that are there, by name.
    pub fn policies_live(&self) -> impl Iterator<Item = (&String, &Replica)> {
        self.policies.iter().filter_map(|name| self.replicas.get_key_value(name)).filter(|(_, r)| r.live)
    }

    pub fn rollouts_live(&self) -> u64 {
        self.replicas.values().filter(|r| r.live && r.role == Role::Rollout).count() as u64
    }

    pub fn idle_rollout(&self) -> Option<&String> {
        self.idle_rollouts.first()
    }

    pub fn idle_rollouts(&self) -> u64 {
        self.idle_rollouts.len() as u64
    }

    /// Replicas of any role that are there and free.
    pub fn idle(&self) -> Vec<String> {
        self.replicas.iter().filter(|(_, r)| r.live && r.job.is_none()).map(|(name, _)| name.clone()).collect()
    }

    /// Whether anybody works on an order whose result is wanted.
    pub fn busy(&self) -> bool {
        let wanted = |job: &Job| !job.void && !matches!(job.order, Order::Leave | Order::Finish);
        self.replicas.values().any(|r| r.live && r.job.as_ref().is_some_and(wanted))
    }
}

/// Length of a kept reason at most.
const REASON_CHARS_MAX: usize = 500;
