//! The controller's state, and what events do to it.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::lineage::{Kept, Lineage};
use crate::refused::{ADDRESS_BYTES_MAX, NAME_BYTES_MAX, REPLICAS_MAX, Refused};
use crate::roster::{Held, Job, Roster, StateId};
use crate::{Event, Order, OrderId, Outcome, Plan, Role, SampleRef};

/// An order given out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dispatch {
    /// To whom.
    pub replica: String,
    /// Its number.
    pub id: OrderId,
    /// What to do.
    pub order: Order,
}

/// What a checkpoint of the run remembers of the controller, see [`Controller::memory`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    pub(crate) lineage: Lineage,
    pub(crate) orders: u64,
    pub(crate) attempts: u64,
}

impl Memory {
    /// Steps made.
    pub fn step(&self) -> u64 {
        self.lineage.step
    }

    /// Samples trained on.
    pub fn trained(&self) -> u64 {
        self.lineage.trained
    }

    /// The last order that was given out.
    pub fn last_order(&self) -> OrderId {
        OrderId(self.orders)
    }

    /// Completions in flight, in order.
    pub fn buffered(&self) -> impl Iterator<Item = &SampleRef> {
        self.lineage.buffer.values()
    }

    /// The same for whoever has only the `kept` ones of the completions in flight: the others are to be written again.
    pub fn keeping(mut self, kept: impl Fn(&SampleRef) -> bool, plan: &Plan) -> Self {
        let lost: Vec<u64> = self.buffered().filter(|sample| !kept(sample)).map(|sample| sample.sample).collect();
        self.lineage.buffer.retain(|_, sample| kept(sample));
        self.lineage.write_again(lost.into_iter(), plan);
        self
    }
}

/// How far a member is with a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Progress {
    Working,
    Trained,
    /// It was lost before it could say.
    Unknown,
    /// It did not make the step.
    Not,
}

/// A step under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attempt {
    pub made: Held,
    pub members: Vec<(String, Progress)>,
    pub samples: Vec<SampleRef>,
    /// Samples that some member could not find.
    pub gone: BTreeSet<u64>,
    pub publish: bool,
    /// The first member has reported, so the weights are published.
    pub published: bool,
}

/// A validation under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Validation {
    pub parts: u64,
    /// Shares that nobody works on.
    pub waiting: BTreeSet<u64>,
    /// Shares that are done.
    pub done: BTreeSet<u64>,
}

/// The controller's state. Two that were given the same events are equal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Controller {
    pub(crate) plan: Plan,
    pub(crate) lineage: Lineage,
    /// The lineages as of the start and of the checkpoints that may still be read.
    pub(crate) kept: Kept,
    /// The lineage before the last step, for as long as a policy may still hold the state of then.
    pub(crate) before: Option<Box<Lineage>>,
    pub(crate) roster: Roster,
    pub(crate) attempt: Option<Attempt>,
    pub(crate) validation: Option<Validation>,
    /// The newest version that the rollouts can get.
    pub(crate) published: Option<u64>,
    /// The weights of the current step are to be published before anything is generated.
    pub(crate) owed: bool,
    /// The state that a hand-over was written for, and the order that it was written for.
    pub(crate) handed: Option<(StateId, OrderId)>,
    /// A state whose checkpoint could not be read.
    pub(crate) unreadable: Option<StateId>,
    /// The state that this controller began with.
    pub(crate) origin: StateId,
    pub(crate) orders: u64,
    pub(crate) attempts: u64,
    /// Policies that were removed and have not come back; as many as are planned at most.
    pub(crate) policies_removed: BTreeSet<String>,
    /// Planned policies that are not waited for although they have never joined.
    pub(crate) policies_given_up: u64,
    /// Counts what is worth a checkpoint.
    pub(crate) changes: u64,
    pub(crate) changes_saved: u64,
    pub(crate) stop: bool,
    /// Checkpoints that failed since somebody asked to leave.
    pub(crate) saves_failed: u64,
    pub(crate) rollbacks: u64,
    pub(crate) left: bool,
    pub(crate) finished: bool,
    /// It finished with nothing to show; kept, because what is too little for a step depends on who is there.
    pub(crate) finished_dry: bool,
}

impl Controller {
    /// A run that has not started.
    pub fn new(plan: Plan) -> Self {
        let lineage = Lineage::new();
        Self {
            plan,
            kept: Kept::new(lineage.clone()),
            before: None,
            origin: lineage.state,
            lineage,
            roster: Roster::default(),
            attempt: None,
            validation: None,
            published: None,
            owed: true,
            handed: None,
            unreadable: None,
            orders: 0,
            attempts: 0,
            policies_removed: BTreeSet::new(),
            policies_given_up: 0,
            changes: 0,
            changes_saved: 0,
            stop: false,
            saves_failed: 0,
            rollbacks: 0,
            left: false,
            finished: false,
            finished_dry: false,
        }
    }

    /// Continues a run from a checkpoint, under a configuration that may have another length or other frequencies. The
    /// replicas have to join anew; a policy that has read the checkpoint itself says that it holds this step.
    pub fn resume(plan: Plan, memory: Memory) -> Self {
        let Memory { mut lineage, orders, attempts } = memory;
        lineage.saved_at = Some(lineage.step);
        lineage.drop_outdated(&plan);
        // Orders that were given out after this checkpoint was written must not be used again: what was written for them
        // may still lie in the broker.
        let orders = orders.saturating_add(ORDERS_SKIPPED_ON_RESUME);
        let attempts = attempts.saturating_add(ORDERS_SKIPPED_ON_RESUME);
        let kept = Kept::new(lineage.clone());
        Self { kept, origin: lineage.state, lineage, orders, attempts, ..Self::new(plan) }
    }

    /// What a checkpoint of the run that is written now has to remember.
    pub fn memory(&self) -> Memory {
        let mut lineage = self.lineage.idle();
        if let Some(attempt) = &self.attempt {
            lineage.buffer.extend(attempt.samples.iter().map(|s| (s.sample, *s)));
        }
        Memory { lineage, orders: self.orders, attempts: self.attempts }
    }

    /// Takes in what happened and says what is to be done because of it. Each of these orders stays with its replica, and
    /// [`Self::order_of`] repeats it, until it is reported done or failed, or the replica is lost.
    ///
    /// # Errors
    /// A report that cannot be true; it changes nothing. Late and doubled reports are no error and change nothing either.
    pub fn apply(&mut self, event: Event) -> Result<Vec<Dispatch>, Refused> {
        match event {
            Event::Joined { replica, role, holds, address } => self.joined(&replica, role, holds, address)?,
            Event::Lost { replica } => self.lost(&replica),
            Event::Removed { replica } => self.removed(&replica),
            Event::Done { replica, order, outcome } => self.done(&replica, order, outcome)?,
            Event::Failed { replica, order, reason } => self.failed(&replica, order, &reason)?,
            Event::GoOnWithout { policies } => {
                let more = policies.min(self.policies_missing());
                self.policies_given_up = self.policies_given_up.saturating_add(more);
            }
            Event::StopRequested => self.stop = true,
            Event::Resumed => self.resumed(),
        }
        Ok(self.decide())
    }

    /// The processes that join from now on are new. What was written for a step and not trained on may still be in the
    /// broker; the weights that the rollouts had may be gone.
    fn resumed(&mut self) {
        if self.finished {
            return;
        }
        let names: Vec<String> = self.roster.iter().map(|(name, _)| name.clone()).collect();
        names.iter().for_each(|name| self.drop_job(name));
        if let Some(attempt) = &mut self.attempt {
            for (_, progress) in attempt.members.iter_mut().filter(|(_, p)| *p != Progress::Trained) {
                *progress = Progress::Not;
            }
        }
        self.settle_attempt();
        self.roster = Roster::default();
        self.lineage = self.lineage.idle();
        (self.stop, self.left, self.saves_failed) = (false, false, 0);
        (self.policies_removed, self.policies_given_up) = (BTreeSet::new(), 0);
        (self.validation, self.unreadable) = (None, None);
        (self.published, self.owed) = (None, true);
    }

    /// Whether somebody has asked to save and leave.
    pub fn is_stopping(&self) -> bool {
        self.stop
    }

    fn joined(&mut self, name: &str, role: Role, holds: Option<u64>, address: Option<String>) -> Result<(), Refused> {
        let address = address.unwrap_or_default();
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(Refused::Name { bytes: name.len() });
        }
        if address.len() > ADDRESS_BYTES_MAX {
            return Err(Refused::Address { replica: name.to_string(), bytes: address.len() });
        }
        match self.roster.get(name) {
            Some(known) if known.role != role => {
                return Err(Refused::OtherRole { replica: name.to_string(), known: known.role, claimed: role });
            }
            None if self.roster.len() >= REPLICAS_MAX => return Err(Refused::TooMany { replica: name.to_string() }),
            _ => {}
        }
        self.drop_job(name);
        let known = self.roster.get(name).is_some();
        self.roster.join(name, role, address);
        if role == Role::Policy {
            // One that leaves and comes back does not shrink the run.
            self.policies_removed.remove(name);
            self.believe(name, holds, known);
        }
        Ok(())
    }

    /// Settles which state a policy holds that says it has made `holds` steps.
    fn believe(&mut self, name: &str, holds: Option<u64>, known: bool) {
        let replica = self.roster.get(name);
        let claimed = |held: &Held| Some(held.step) == holds;
        let sure = replica.and_then(|r| r.held).filter(claimed);
        let maybe = replica.and_then(|r| r.maybe).filter(claimed);
        let held = match (sure, maybe) {
            (Some(sure), Some(maybe)) if sure != maybe => None,
            (Some(held), _) | (None, Some(held)) => Some(held),
            // A replica that nobody has seen yet can only bring the state that the run itself starts from.
            (None, None) => (!known && holds == Some(self.lineage.step) && self.lineage.state == self.origin)
                .then_some(Held { step: self.lineage.step, state: self.origin }),
        };
        self.roster.set_held(name, held, None);
        if held.is_some() && self.published.is_none() && self.lineage.state == self.origin && self.rollbacks == 0 {
            (self.published, self.owed) = (Some(self.lineage.step), false);
        }
        let Some(attempt) = &mut self.attempt else { return };
        let made = attempt.made;
        if let Some((_, progress)) = attempt.members.iter_mut().find(|(member, _)| member == name) {
            *progress = if held == Some(made) { Progress::Trained } else { Progress::Not };
        }
    }

    fn lost(&mut self, name: &str) {
        self.drop_job(name);
        self.roster.lose(name);
    }

    fn removed(&mut self, name: &str) {
        let job = self.roster.get(name).and_then(|replica| replica.job.as_ref());
        self.finished |= job.is_some_and(|job| job.order == Order::Finish);
        self.drop_job(name);
        if let Some(attempt) = &mut self.attempt
            && let Some((_, progress)) = attempt.members.iter_mut().find(|(member, _)| member == name)
            && *progress == Progress::Unknown
        {
            *progress = Progress::Not;
        }
        let is_policy = self.roster.get(name).is_some_and(|r| r.role == Role::Policy);
        if is_policy && (self.policies_removed.len() as u64) < self.plan.policy_replicas {
            self.policies_removed.insert(name.to_string());
        }
        self.roster.remove(name);
    }

    /// Whoever was working on it is gone.
    fn drop_job(&mut self, name: &str) {
        if let Some(job) = self.roster.take_job(name) {
            self.abandon(name, &job, Progress::Unknown);
        }
    }

    /// What an order was to bring has to come from somebody else.
    fn abandon(&mut self, name: &str, job: &Job, progress: Progress) {
        if job.void {
            return;
        }
        match &job.order {
            Order::Generate { prompts, .. } => self.lineage.put_back(prompts, job.id),
            Order::Validate { part, .. } => {
                if let Some(validation) = &mut self.validation {
                    validation.waiting.insert(*part);
                }
            }
            Order::Train { .. } => self.set_progress(name, progress),
            _ => {}
        }
    }

    fn set_progress(&mut self, name: &str, to: Progress) {
        let members = self.attempt.iter_mut().flat_map(|attempt| attempt.members.iter_mut());
        members.filter(|(member, _)| member == name).for_each(|(_, progress)| *progress = to.clone());
    }

    /// The order that `name` is reporting on, if it is still its own.
    fn reported(&self, name: &str, order: OrderId) -> Result<Option<&Job>, Refused> {
        if order.0 == 0 || order.0 > self.orders {
            return Err(Refused::NoSuchOrder { replica: name.to_string(), order });
        }
        Ok(self.roster.get(name).and_then(|r| r.job.as_ref()).filter(|job| job.id == order))
    }

    fn done(&mut self, name: &str, id: OrderId, outcome: Outcome) -> Result<(), Refused> {
        let Some(job) = self.reported(name, id)? else { return Ok(()) };
        self.check(name, job, &outcome)?;
        let Some(job) = self.roster.take_job(name) else { return Ok(()) };
        match outcome {
            Outcome::WeightsGone => {
                self.abandon(name, &job, Progress::Not);
                if !job.void {
                    self.owed = true;
                }
                return Ok(());
            }
            Outcome::StateGone => {
                self.state_gone(name, &job);
                return Ok(());
            }
            Outcome::SamplesGone { samples } => {
                self.settle_held(name, false);
                self.abandon(name, &job, Progress::Not);
                self.attempt.iter_mut().for_each(|attempt| attempt.gone.extend(samples.iter().copied()));
                return Ok(());
            }
            _ => self.roster.note_success(name),
        }
        match (&job.order, outcome) {
            (Order::Generate { prompts, version, .. }, Outcome::Generated { samples }) if !job.void => {
                self.generated(id, prompts, *version, &samples);
            }
            (Order::Train { .. }, outcome) => {
                self.settle_held(name, true);
                self.set_progress(name, Progress::Trained);
                if let Some(attempt) = self.attempt.as_mut().filter(|_| outcome == Outcome::Trained) {
                    attempt.published |= attempt.members.first().is_some_and(|(first, _)| first == name);
                }
            }
            (Order::Load { step, publish, .. }, _) => {
                self.settle_held(name, true);
                // Always of the current state: who publishes it, or saves it, holds it, and the run leaves no state that
                // somebody who is there holds, but by a step, for which all have to be free.
                if *publish && job.state == self.lineage.state {
                    (self.published, self.owed) = (Some(*step), false);
                }
            }
            (Order::Save { hand_over: true, .. }, _) => self.handed = Some((job.state, id)),
            (Order::Save { hand_over: false, .. }, _) if job.state == self.lineage.state => {
                self.lineage.saved_at = Some(self.lineage.step);
                self.kept.add(id, self.lineage.clone());
                self.changes_saved = job.changes;
                self.unreadable = None;
            }
            (Order::Validate { part, .. }, _) if !job.void => self.validated(*part),
            _ => {}
        }
        Ok(())
    }

    /// Whether `outcome` can be the answer to `job`.
    fn check(&self, name: &str, job: &Job, outcome: &Outcome) -> Result<(), Refused> {
        let samples = |reported: &[u64], asked: &[u64]| {
            let mut next = asked.iter();
            match reported.iter().find(|&&sample| !next.any(|&asked| asked == sample)) {
                Some(&sample) => Err(Refused::Samples { replica: name.to_string(), order: job.id, sample }),
                None => Ok(()),
            }
        };
        match (&job.order, outcome) {
            (Order::Generate { prompts, only, .. }, Outcome::Generated { samples: reported }) => {
                let n = self.plan.n();
                match only.is_empty() {
                    true => {
                        let all =
                            prompts.iter().flat_map(|prompt| prompt.saturating_mul(n)..(prompt + 1).saturating_mul(n));
                        samples(reported, &all.collect::<Vec<_>>())
                    }
                    false => samples(reported, only),
                }
            }
            (Order::Train { share, .. }, Outcome::SamplesGone { samples: reported }) => {
                samples(reported, &share.iter().map(|s| s.sample).collect::<Vec<_>>())
            }
            (Order::Train { .. }, Outcome::Trained | Outcome::Unpublished)
            | (Order::Load { .. }, Outcome::Loaded)
            | (Order::Save { .. }, Outcome::Saved)
            | (Order::Validate { .. }, Outcome::Validated)
            | (Order::Generate { .. } | Order::Validate { .. }, Outcome::WeightsGone) => Ok(()),
            // The start needs no checkpoint, and who publishes reads none.
            (Order::Load { step: 1.., publish: false, .. }, Outcome::StateGone) => Ok(()),
            _ => Err(Refused::OtherOutcome { replica: name.to_string(), order: job.id }),
        }
    }

    fn failed(&mut self, name: &str, id: OrderId, reason: &str) -> Result<(), Refused> {
        if self.reported(name, id)?.is_none_or(|job| matches!(job.order, Order::Leave | Order::Finish)) {
            return Ok(());
        }
        let Some(job) = self.roster.take_job(name) else { return Ok(()) };
        self.roster.note_failure(name, reason);
        match job.order {
            Order::Load { .. } if self.is_reading(name) => self.cannot_read(name, job.state),
            Order::Save { hand_over: false, .. } if self.stop => self.saves_failed += 1,
            _ => self.settle_held(name, false),
        }
        self.abandon(name, &job, Progress::Not);
        Ok(())
    }

    /// A policy could not read a state; which of the two states it holds now nobody knows.
    fn cannot_read(&mut self, name: &str, state: StateId) {
        self.roster.set_held(name, None, None);
        self.handed = self.handed.filter(|(handed, _)| *handed != state);
        self.unreadable = Some(state);
    }

    /// Nothing whole is left of a state on disk. Whoever still holds it may save it once more; if nobody does, the run goes
    /// back to an older one.
    fn state_gone(&mut self, name: &str, job: &Job) {
        self.cannot_read(name, job.state);
        if !self.kept.forget(job.state) {
            return;
        }
        let before = self.before.as_deref_mut();
        for lineage in std::iter::once(&mut self.lineage).chain(before).filter(|lineage| lineage.state == job.state) {
            lineage.saved_at = None;
        }
        self.changes += 1;
    }

    /// Whether its order brings a policy another state than it holds.
    fn is_reading(&self, name: &str) -> bool {
        self.roster.get(name).is_some_and(|r| r.held != r.maybe)
    }

    /// A policy has said whether it has reached the state that its order was about.
    fn settle_held(&mut self, name: &str, reached: bool) {
        let Some(replica) = self.roster.get(name).filter(|r| r.role == Role::Policy) else { return };
        let held = if reached { replica.maybe.or(replica.held) } else { replica.held };
        self.roster.set_held(name, held, None);
    }

    fn generated(&mut self, id: OrderId, prompts: &[u64], version: u64, samples: &[u64]) {
        let n = self.plan.n();
        let mut rest = samples;
        for prompt in prompts {
            let (own, others) = rest.split_at(rest.partition_point(|sample| sample / n <= *prompt));
            rest = others;
            self.lineage.answered(*prompt, id, version, own, &self.plan);
        }
        let group = self.group();
        self.lineage.advance(&self.plan, group);
        self.changes += 1;
    }

    fn validated(&mut self, part: u64) {
        let Some(validation) = &mut self.validation else { return };
        validation.done.insert(part);
        if validation.done.len() as u64 == validation.parts {
            self.validation = None;
            self.lineage.validated_at = Some(self.lineage.step);
            self.changes += 1;
        }
    }

    /// Policies that a step waits for: those that are known, and those that are planned and were not given up.
    pub(crate) fn policies_wanted(&self) -> u64 {
        self.roster.policies_known().max(self.policies_expected()).max(1)
    }

    /// Policies that were planned, have not joined (or have left) and are still waited for.
    pub fn policies_missing(&self) -> u64 {
        self.policies_expected().saturating_sub(self.roster.policies_known())
    }

    /// Policies that are planned, without those that the run has gone on without.
    fn policies_expected(&self) -> u64 {
        self.plan
            .policy_replicas
            .saturating_sub(self.policies_removed.len() as u64)
            .saturating_sub(self.policies_given_up)
    }

    /// Completions of one step.
    pub(crate) fn group(&self) -> u64 {
        self.plan.batch().saturating_mul(self.policies_wanted())
    }

    pub(crate) fn starved(&self) -> bool {
        self.attempt.is_none() && self.lineage.starved(&self.plan, self.group())
    }

    /// The order that a replica is working on.
    pub fn order_of(&self, replica: &str) -> Option<(OrderId, &Order)> {
        self.roster.get(replica)?.job.as_ref().map(|job| (job.id, &job.order))
    }

    /// Whether the result of the order that a replica is working on still counts: not where the run has gone back meanwhile.
    pub fn is_wanted(&self, replica: &str) -> bool {
        self.roster.get(replica).and_then(|r| r.job.as_ref()).is_some_and(|job| !job.void)
    }

    /// Whether this replica is known and not lost. One that is not has to join before it gets orders.
    pub fn is_live(&self, replica: &str) -> bool {
        self.roster.get(replica).is_some_and(|r| r.live)
    }

    /// Steps made.
    pub fn step(&self) -> u64 {
        self.lineage.step
    }

    /// Steps of the whole run with as many policies as there are now.
    pub fn total_steps(&self) -> u64 {
        let rest = self.plan.samples_total().saturating_sub(self.lineage.trained) / self.group();
        let by_data = self.lineage.step.saturating_add(rest);
        self.plan.steps_max.map_or(by_data, |max| by_data.min(max))
    }

    /// Next prompt ordinal.
    pub fn cursor(&self) -> u64 {
        self.lineage.cursor
    }

    /// What the configuration fixes.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Completions waiting for a step, in order; without those of a step under way.
    pub fn buffered(&self) -> impl Iterator<Item = &SampleRef> {
        self.lineage.buffer.values()
    }

    /// Completions dropped since the last step because they were too old; the next step names them.
    pub fn outdated(&self) -> &[SampleRef] {
        &self.lineage.outdated
    }

    /// Completions that are being written, wait for a rollout or for a step, or are trained on; at most
    /// `(steps_ahead_max + 1) · train_batch · policies`, rounded up to whole prompts.
    pub fn under_way(&self) -> u64 {
        let training = self.attempt.as_ref().map_or(0, |attempt| attempt.samples.len() as u64);
        training + self.lineage.buffer.len() as u64 + self.lineage.awaited(&self.plan)
    }

    /// Generations in a row without a completion.
    pub fn empty_rounds(&self) -> u64 {
        self.lineage.empty_rounds()
    }

    /// Whether the run is decided: everybody who is there has been told to leave or to finish, or is told so when free. A run
    /// that ends well is decided when the policy that was told to finish first has left (`Removed`): if it is lost before,
    /// the last weights may be lost with it.
    pub fn is_over(&self) -> bool {
        self.finished || self.left
    }

    /// Whether the run is over because somebody asked to save and leave.
    pub fn was_stopped(&self) -> bool {
        self.left
    }

    /// Whether the run is over and nobody is there any more.
    pub fn is_deserted(&self) -> bool {
        self.is_over() && self.roster.iter().all(|(_, replica)| !replica.live)
    }

    /// Whether the run ends because generation kept failing, or brought too little for even one step.
    pub fn gave_up(&self) -> bool {
        if self.is_over() {
            return self.finished_dry;
        }
        self.lineage.keeps_failing() || (self.lineage.step == 0 && self.starved())
    }
}

/// How far the order numbers jump on a resume: more than a run gives out between two checkpoints.
const ORDERS_SKIPPED_ON_RESUME: u64 = 1 << 32;
