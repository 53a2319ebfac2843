//! A view of the run for people.

use serde::{Deserialize, Serialize};

use crate::controller::Controller;
use crate::{Order, Role};

/// A view of the run for people and monitors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Steps made.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Next prompt ordinal.
    pub cursor: u64,
    /// Prompts of the whole run.
    pub prompts: u64,
    /// Completions waiting for a step.
    pub buffered: u64,
    /// Completions that rollouts are writing, or that wait for a rollout.
    pub in_flight: u64,
    /// Completions of the step under way.
    pub training: u64,
    /// Step of the last checkpoint.
    pub saved_step: u64,
    /// Newest version that rollouts can get.
    pub published: Option<u64>,
    /// How often the run went back to a checkpoint.
    pub rollbacks: u64,
    /// What the run waits for, if for anything; empty when it works or is over.
    pub waits_for: String,
    /// `running`, `stopping`, `stopped`, `finished` or `gave_up`.
    pub state: String,
    /// Everybody, by name.
    pub replicas: Vec<ReplicaStatus>,
}

/// One replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Its name.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Whether it is there.
    pub live: bool,
    /// What it does.
    pub does: String,
    /// For a policy: the step whose state it holds.
    pub holds: Option<u64>,
    /// Orders that it failed at since it last carried one out.
    pub failures: u64,
    /// Why it failed the last time.
    pub reason: String,
}

impl Controller {
    /// A view of the run for people and monitors.
    pub fn status(&self) -> Status {
        let replicas = self.roster.iter().map(|(name, replica)| ReplicaStatus {
            name: name.clone(),
            role: replica.role,
            live: replica.live,
            does: match (&replica.job, replica.live) {
                (_, false) => "lost".into(),
                (None, true) => "idle".into(),
                (Some(job), true) => in_words(&job.order),
            },
            holds: replica.held.map(|held| held.step),
            failures: replica.failures,
            reason: replica.reason.clone(),
        });
        let state = match (self.finished, self.left, self.stop) {
            (true, ..) if self.gave_up() => "gave_up",
            (true, ..) => "finished",
            (_, true, _) => "stopped",
            (_, _, true) => "stopping",
            _ => "running",
        };
        Status {
            step: self.step(),
            total_steps: self.total_steps(),
            cursor: self.cursor(),
            prompts: self.plan.prompts_total(),
            buffered: self.lineage.buffer.len() as u64,
            in_flight: self.lineage.awaited(&self.plan),
            training: self.attempt.as_ref().map_or(0, |attempt| attempt.samples.len() as u64),
            saved_step: self.kept.newest().step,
            published: self.published,
            rollbacks: self.rollbacks,
            waits_for: self.waits_for(),
            state: state.into(),
            replicas: replicas.collect(),
        }
    }

    fn waits_for(&self) -> String {
        if self.is_over() {
            return String::new();
        }
        let policies = self.roster.policies_live().count() as u64;
        let wanted = self.policies_wanted();
        if policies < wanted {
            let lost =
                self.roster.iter().filter(|(_, r)| r.role == Role::Policy && !r.live).map(|(name, _)| name.as_str());
            let lost: Vec<&str> = lost.collect();
            let names = if lost.is_empty() { String::new() } else { format!(": {}", lost.join(", ")) };
            return format!("{} of {wanted} policies{names}", wanted - policies);
        }
        if self.roster.rollouts_live() == 0 {
            return "a rollout".into();
        }
        String::new()
    }
}

fn in_words(order: &Order) -> String {
    match order {
        Order::Generate { prompts, version, .. } => {
            format!("generates {} prompts from {} with weights {version}", prompts.len(), prompts.first().unwrap_or(&0))
        }
        Order::Train { step, attempt, .. } => format!("trains step {step}, attempt {attempt}"),
        Order::Load { step, publish: true, .. } => format!("loads and publishes step {step}"),
        Order::Load { step, .. } => format!("loads step {step}"),
        Order::Save { step, hand_over: true, .. } => format!("hands over step {step}"),
        Order::Save { step, .. } => format!("saves step {step}"),
        Order::Validate { step, part, parts } => format!("validates step {step}, share {} of {parts}", part + 1),
        Order::Leave => "leaves".into(),
        Order::Finish => "finishes".into(),
    }
}
