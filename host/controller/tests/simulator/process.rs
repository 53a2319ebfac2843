//! Policies, rollouts and teachers as the controller sees them.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use cosmos_controller::{Event, Order, OrderId, Outcome, Role};

use crate::chance::mix;

/// Weights and optimizer with everything that went into them. The weights are a hash over it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    pub step: u64,
    pub weights: u64,
    pub trained: BTreeSet<u64>,
    pub outdated: BTreeSet<u64>,
}

impl State {
    pub fn start() -> Rc<Self> {
        Rc::new(Self { step: 0, weights: 7, trained: BTreeSet::new(), outdated: BTreeSet::new() })
    }
}

/// What a rollout with these weights writes.
pub fn text(sample: u64, weights: u64) -> u64 {
    mix(sample, weights)
}

/// What a process has to tell the controller until it is answered.
#[derive(Debug, Clone)]
pub enum Report {
    Done(OrderId, Outcome),
    Failed(OrderId, String),
    Leave,
}

/// A process; it may be dead.
#[derive(Debug, Clone)]
pub struct Process {
    pub name: String,
    pub role: Role,
    /// Lives of this name so far; what an earlier life still does is ignored.
    pub life: u64,
    pub alive: bool,
    pub removed: bool,
    pub cut_off_until: u64,
    pub wakes_at: u64,
    pub joined: bool,
    /// Number of its messages, so that late copies of old joins are told apart.
    pub sent: u64,
    pub work: Option<(OrderId, Order)>,
    pub report: Option<Report>,
    /// The newest order that it has ever begun.
    pub newest: u64,
    pub state: Option<Rc<State>>,
    /// The completions of the step under way.
    pub fetched: BTreeMap<u64, u64>,
}

impl Process {
    pub fn new(name: String, role: Role) -> Self {
        Self {
            name,
            role,
            life: 0,
            alive: true,
            removed: false,
            cut_off_until: 0,
            wakes_at: 0,
            joined: false,
            sent: 0,
            work: None,
            report: None,
            newest: 0,
            state: None,
            fetched: BTreeMap::new(),
        }
    }

    pub fn restart(&mut self) {
        *self = Self { life: self.life + 1, newest: 0, ..Self::new(self.name.clone(), self.role) };
    }

    pub fn join(&self) -> Event {
        let holds = self.state.as_ref().map(|state| state.step);
        let address = (self.role == Role::Policy).then(|| format!("{}:{}", self.name, self.life));
        Event::Joined { replica: self.name.clone(), role: self.role, holds, address }
    }

    pub fn event(&self, report: &Report) -> Event {
        let replica = self.name.clone();
        match report.clone() {
            Report::Done(order, outcome) => Event::Done { replica, order, outcome },
            Report::Failed(order, reason) => Event::Failed { replica, order, reason },
            Report::Leave => Event::Removed { replica },
        }
    }

    /// Ends the current work with something to report.
    pub fn end(&mut self, outcome: Outcome) {
        if let Some((id, _)) = self.work.take() {
            self.report = Some(Report::Done(id, outcome));
        }
    }

    pub fn give_up(&mut self, reason: &str) {
        if let Some((id, _)) = self.work.take() {
            self.report = Some(Report::Failed(id, reason.to_string()));
        }
    }
}
