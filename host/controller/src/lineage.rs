//! What a rollback takes back: the steps made, the samples and the position in the dataset.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::roster::StateId;
use crate::{OrderId, Plan, SampleRef};

/// Generations in a row without a single completion before the run gives up.
pub const EMPTY_ROUNDS_MAX: u64 = 3;
/// Prompts that those generations must have had together.
pub const EMPTY_PROMPTS_MIN: u64 = 64;

/// A prompt whose completions are awaited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Open {
    /// Under which order; none while it waits for a rollout.
    pub order: Option<OrderId>,
    /// The samples that are wanted; empty: all of them.
    pub only: Vec<u64>,
}

/// Generations counted as a single process would make them, one after the other: prompt by prompt in ascending order, so that
/// it does not matter who was faster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Rounds {
    /// Prompts of the round being counted.
    size: u64,
    seen: u64,
    kept: u64,
    /// Rounds in a row that brought nothing, and their prompts.
    empty: u64,
    empty_prompts: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lineage {
    /// Steps made; equals the version of the weights.
    pub step: u64,
    /// Which state that step has.
    pub state: StateId,
    /// Samples trained on so far.
    pub trained: u64,
    /// Next prompt ordinal to hand out.
    pub cursor: u64,
    /// Completions waiting to be trained on, by sample.
    pub buffer: BTreeMap<u64, SampleRef>,
    /// Prompts handed out, or to be handed out again, by ordinal.
    pub open: BTreeMap<u64, Open>,
    /// Samples dropped since the last step because they were too old.
    pub outdated: Vec<SampleRef>,
    pub validated_at: Option<u64>,
    pub saved_at: Option<u64>,
    /// The first prompt that has never been answered.
    frontier: u64,
    /// How many samples the prompts beyond the frontier brought that were answered before it.
    beyond: BTreeMap<u64, u64>,
    rounds: Rounds,
    /// Generation kept failing while there was not enough for a step.
    dry: bool,
}

impl Lineage {
    pub fn new() -> Self {
        Self {
            step: 0,
            state: StateId(0),
            trained: 0,
            cursor: 0,
            buffer: BTreeMap::new(),
            open: BTreeMap::new(),
            outdated: Vec::new(),
            validated_at: None,
            saved_at: None,
            frontier: 0,
            beyond: BTreeMap::new(),
            rounds: Rounds::default(),
            dry: false,
        }
    }

    pub fn prompts_left(&self, plan: &Plan) -> u64 {
        plan.prompts_total().saturating_sub(self.cursor)
    }

    pub fn empty_rounds(&self) -> u64 {
        self.rounds.empty
    }

    /// Many generations in a row brought nothing. A filter may well drop a few single prompts in a row, so the prompts
    /// count too.
    pub fn keeps_failing(&self) -> bool {
        self.rounds.empty >= EMPTY_ROUNDS_MAX && self.rounds.empty_prompts >= EMPTY_PROMPTS_MIN
    }

    /// Not enough completions for a step of `group` and nothing that could bring more.
    pub fn starved(&self, plan: &Plan, group: u64) -> bool {
        let short = (self.buffer.len() as u64) < group;
        self.dry || (short && (self.keeps_failing() || (self.prompts_left(plan) == 0 && self.open.is_empty())))
    }

    /// Samples that the open prompts may still bring.
    pub fn awaited(&self, plan: &Plan) -> u64 {
        self.open.values().map(|open| if open.only.is_empty() { plan.n() } else { open.only.len() as u64 }).sum()
    }

    /// The samples that are wanted of a prompt, ascending.
    pub fn wanted(open: &Open, prompt: u64, plan: &Plan) -> Vec<u64> {
        match open.only.is_empty() {
            true => (prompt.saturating_mul(plan.n())..(prompt + 1).saturating_mul(plan.n())).collect(),
            false => open.only.clone(),
        }
    }

    /// Takes in the answer to `order` about `prompt`, unless it has been given to somebody else since. (It cannot have been:
    /// the order is then no longer its replica's, or void. Samples of a step that are gone are of prompts before all open
    /// ones. This is the second lock on the door.)
    pub fn answered(&mut self, prompt: u64, order: OrderId, version: u64, samples: &[u64], plan: &Plan) -> bool {
        let Some(open) = self.open.get(&prompt).filter(|open| open.order == Some(order)) else {
            return false;
        };
        let wanted = Self::wanted(open, prompt, plan);
        let kept = samples.iter().filter(|sample| wanted.binary_search(sample).is_ok());
        let before = self.buffer.len();
        self.buffer.extend(kept.map(|&sample| (sample, SampleRef { sample, order, version })));
        if prompt >= self.frontier {
            self.beyond.insert(prompt, (self.buffer.len() - before) as u64);
        }
        self.open.remove(&prompt);
        true
    }

    /// Counts the prompts that have been answered without a gap.
    pub fn advance(&mut self, plan: &Plan, group: u64) {
        while self.frontier < self.cursor && !self.open.contains_key(&self.frontier) {
            let kept = self.beyond.remove(&self.frontier).unwrap_or(0);
            let before = self.frontier.saturating_mul(plan.n());
            if self.rounds.seen == self.rounds.size {
                let ready = self.buffer.range(..before).count() as u64;
                let size = group.saturating_sub(ready).div_ceil(plan.n()).max(1);
                self.rounds.size = size.min(plan.prompts_total().saturating_sub(self.frontier)).max(1);
                (self.rounds.seen, self.rounds.kept) = (0, 0);
            }
            self.frontier += 1;
            self.rounds.seen += 1;
            self.rounds.kept += kept;
            if self.rounds.seen == self.rounds.size {
                let Rounds { size, kept, empty, empty_prompts, .. } = self.rounds;
                (self.rounds.empty, self.rounds.empty_prompts) = match kept {
                    0 => (empty + 1, empty_prompts + size),
                    _ => (0, 0),
                };
                let ready = self.buffer.range(..before.saturating_add(plan.n())).count() as u64;
                self.dry |= ready < group && self.keeps_failing();
            }
        }
    }

    /// Drops what is too old for the next step.
    pub fn drop_outdated(&mut self, plan: &Plan) {
        let oldest = self.step.saturating_sub(plan.allowed_outdated_steps);
        let outdated = &mut self.outdated;
        self.buffer.retain(|_, sample| {
            let fresh = sample.version >= oldest;
            if !fresh {
                outdated.push(*sample);
            }
            fresh
        });
    }

    /// The samples of the next step, if `count` are there with no prompt before them still awaited.
    pub fn ready(&self, count: u64, plan: &Plan) -> Option<Vec<SampleRef>> {
        if (self.buffer.len() as u64) < count {
            return None;
        }
        let gap = self.open.keys().next().map_or(u64::MAX, |prompt| prompt.saturating_mul(plan.n()));
        let samples: Vec<SampleRef> = self.buffer.range(..gap).take(count as usize).map(|(_, s)| *s).collect();
        (samples.len() as u64 == count).then_some(samples)
    }

    /// The prompts of `order`, or of all orders, wait for a rollout again.
    pub fn put_back(&mut self, prompts: &[u64], order: OrderId) {
        for prompt in prompts {
            if let Some(open) = self.open.get_mut(prompt).filter(|open| open.order == Some(order)) {
                open.order = None;
            }
        }
    }

    /// These samples are to be written again.
    pub fn write_again(&mut self, samples: impl Iterator<Item = u64>, plan: &Plan) {
        let mut again: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
        for sample in samples {
            again.entry(sample / plan.n()).or_default().insert(sample);
        }
        for (prompt, mut only) in again {
            if let Some(open) = self.open.get(&prompt) {
                only.extend(Self::wanted(open, prompt, plan));
            }
            self.open.insert(prompt, Open { order: None, only: only.into_iter().collect() });
        }
    }

    /// What is left of this when it is taken up by others: all that was not trained on is to be written again.
    pub fn taken_up_again(&self, plan: &Plan) -> Self {
        let mut lineage = self.idle();
        let buffer = std::mem::take(&mut lineage.buffer);
        lineage.write_again(buffer.into_keys(), plan);
        lineage
    }

    /// The same with nobody working on it.
    pub fn idle(&self) -> Self {
        let mut lineage = self.clone();
        lineage.open.values_mut().for_each(|open| open.order = None);
        lineage
    }

    pub fn validation_due(&self, plan: &Plan, done: bool) -> bool {
        if plan.validation_freq == 0 || self.validated_at == Some(self.step) {
            return false;
        }
        match self.step {
            0 => plan.validate_before,
            step => done || step.is_multiple_of(plan.validation_freq),
        }
    }

    pub fn save_due(&self, plan: &Plan, done: bool) -> bool {
        if self.step == 0 || self.saved_at == Some(self.step) {
            return false;
        }
        (plan.save_freq > 0 && self.step.is_multiple_of(plan.save_freq)) || (done && plan.save_last)
    }
}

/// Checkpoints that are remembered beside the start. Older ones are given up: whoever has lost as many in a row has lost the
/// disk.
const CHECKPOINTS_MAX: usize = 32;

/// The lineages that the run can go back to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    /// As the run (or what was resumed) started; whoever cannot read that has to fail.
    start: Lineage,
    /// As of each checkpoint, oldest first, with the order that it was written for.
    checkpoints: VecDeque<(OrderId, Lineage)>,
}

impl Kept {
    pub fn new(start: Lineage) -> Self {
        Self { start, checkpoints: VecDeque::new() }
    }

    /// As of the newest checkpoint.
    pub fn newest(&self) -> &Lineage {
        self.checkpoints.back().map_or(&self.start, |(_, lineage)| lineage)
    }

    /// The order that the checkpoint of this state was written for; none if there is no such checkpoint. The start was
    /// written for none.
    pub fn written_for(&self, state: StateId) -> Option<OrderId> {
        let checkpoint = self.checkpoints.iter().find(|(_, lineage)| lineage.state == state).map(|(order, _)| *order);
        checkpoint.or((self.start.state == state).then_some(OrderId(0)))
    }

    /// A checkpoint was written. Those of its step and of later ones are of a branch that was given up.
    pub fn add(&mut self, order: OrderId, lineage: Lineage) {
        self.checkpoints.retain(|(_, older)| older.step < lineage.step);
        if self.checkpoints.len() == CHECKPOINTS_MAX {
            self.checkpoints.pop_front();
        }
        self.checkpoints.push_back((order, lineage));
    }

    /// The checkpoint of this state cannot be read. Whether there was one.
    pub fn forget(&mut self, state: StateId) -> bool {
        let before = self.checkpoints.len();
        self.checkpoints.retain(|(_, lineage)| lineage.state != state);
        self.checkpoints.len() < before
    }
}
