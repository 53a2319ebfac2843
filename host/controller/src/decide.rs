//! What to do next: orders for whoever is free.

use crate::controller::{Attempt, Controller, Dispatch, Progress, Validation};
use crate::lineage::{Lineage, Open};
use crate::roster::{Held, Job};
use crate::{Order, OrderId, SampleRef};

/// What the run is at, between two steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Validate,
    Save,
    Finish,
    Go,
}

/// Checkpoints that may fail, once somebody has asked to leave, before the run is left without.
const SAVES_FAILED_MAX: u64 = 3;

impl Controller {
    pub(crate) fn decide(&mut self) -> Vec<Dispatch> {
        let mut out = Vec::new();
        self.settle_attempt();
        if self.attempt.is_none() {
            // Before any checkpoint too: a rollback writes again what a checkpoint remembers, but not what was dropped.
            self.lineage.drop_outdated(&self.plan);
        }
        if !self.is_over() {
            match self.stop {
                true => self.wind_down(&mut out),
                false => self.go_on(&mut out),
            }
        }
        if self.is_over() {
            let order = if self.left { Order::Leave } else { Order::Finish };
            self.roster.idle().iter().for_each(|name| self.give(name, order.clone(), &mut out));
        }
        out
    }

    fn give(&mut self, name: &str, order: Order, out: &mut Vec<Dispatch>) {
        self.orders += 1;
        let id = OrderId(self.orders);
        let job = Job { id, order: order.clone(), state: self.lineage.state, changes: self.changes, void: false };
        self.roster.give(name, job);
        out.push(Dispatch { replica: name.to_string(), id, order });
    }

    /// Counts the step under way, or takes it back, once no member works on it any more.
    pub(crate) fn settle_attempt(&mut self) {
        let Some(attempt) = &self.attempt else { return };
        let any = |wanted: Progress| attempt.members.iter().any(|(_, progress)| *progress == wanted);
        let trained = any(Progress::Trained);
        // Somebody who was lost may have made the step; as long as it may come back to say so, the step is neither made nor
        // not made.
        if any(Progress::Working) || (!trained && any(Progress::Unknown) && !self.stop) {
            return;
        }
        let Some(attempt) = self.attempt.take() else { return };
        let lineage = &mut self.lineage;
        if !trained {
            let (gone, there): (Vec<SampleRef>, Vec<SampleRef>) =
                attempt.samples.iter().partition(|sample| attempt.gone.contains(&sample.sample));
            lineage.buffer.extend(there.into_iter().map(|sample| (sample.sample, sample)));
            lineage.write_again(gone.into_iter().map(|sample| sample.sample), &self.plan);
            return;
        }
        let mut before = lineage.idle();
        before.buffer.extend(attempt.samples.iter().map(|sample| (sample.sample, *sample)));
        self.before = Some(Box::new(before));
        (lineage.step, lineage.state) = (attempt.made.step, attempt.made.state);
        lineage.trained += attempt.samples.len() as u64;
        lineage.outdated.clear();
        self.changes += 1;
        if attempt.publish && attempt.published {
            self.published = Some(lineage.step);
        }
        self.owed |= attempt.publish && !attempt.published;
    }

    /// The normal course.
    fn go_on(&mut self, out: &mut Vec<Dispatch>) {
        if self.attempt.is_none() {
            self.roll_back_if_lost();
        }
        let done = self.attempt.is_none() && (self.lineage.step >= self.total_steps() || self.starved());
        let phase = match self.attempt {
            Some(_) => Phase::Go,
            None if self.lineage.validation_due(&self.plan, done) => Phase::Validate,
            None if self.lineage.save_due(&self.plan, done) => Phase::Save,
            None if done => Phase::Finish,
            None => Phase::Go,
        };
        if phase == Phase::Validate && self.published != Some(self.lineage.step) {
            self.owed = true;
        }
        if self.attempt.is_none() {
            self.tend_policies(out);
        }
        match phase {
            Phase::Validate => self.validate(out),
            Phase::Save => self.save(done, out),
            Phase::Finish => self.finish(out),
            Phase::Go => {}
        }
        if !done && (phase == Phase::Go || self.plan.steps_ahead_max > 0) {
            self.generate(out);
        }
        if phase == Phase::Go && self.attempt.is_none() {
            self.train(out);
        }
    }

    /// Somebody asked to save and leave: what is under way ends, then a checkpoint, then everybody goes.
    fn wind_down(&mut self, out: &mut Vec<Dispatch>) {
        if self.roster.busy() || self.is_finishing() {
            return;
        }
        let unsaved = self.changes != self.changes_saved && self.saves_failed < SAVES_FAILED_MAX;
        let someone = self.holders().next().cloned();
        match someone {
            Some(name) if unsaved => self.give_save(&name, false, false, out),
            _ => self.left = true,
        }
    }

    /// Has one policy finish that holds the last weights. The others stay until it has left, for its place may have to be
    /// taken.
    fn finish(&mut self, out: &mut Vec<Dispatch>) {
        if self.gave_up() {
            (self.finished_dry, self.finished) = (true, true);
        } else if !self.is_finishing() {
            let is_free = |name: &&String| self.roster.get(name).is_some_and(|r| r.job.is_none());
            let free = self.holders().find(is_free).cloned();
            if let Some(name) = free {
                self.give(&name, Order::Finish, out);
            }
        }
    }

    fn is_finishing(&self) -> bool {
        self.roster.policies_live().any(|(_, r)| r.job.as_ref().is_some_and(|job| job.order == Order::Finish))
    }

    /// Policies that are there and hold the current state, by name.
    fn holders(&self) -> impl Iterator<Item = &String> {
        let current = self.current();
        self.roster.policies_live().filter(move |(_, r)| r.held == Some(current)).map(|(name, _)| name)
    }

    fn current(&self) -> Held {
        Held { step: self.lineage.step, state: self.lineage.state }
    }

    /// Whether the current state can be read from a checkpoint or a hand-over.
    fn is_readable(&self) -> bool {
        let state = self.lineage.state;
        let checkpoint = self.kept.written_for(state).is_some();
        self.handed.is_some_and(|(handed, _)| handed == state)
            || (checkpoint && (self.unreadable != Some(state) || self.holders().next().is_none()))
    }

    /// Goes back when nobody holds the current state and nobody may come back with it: by one step if somebody holds the
    /// state before it (who alone has made the last step is gone), else to the last checkpoint. Either way the lineage goes
    /// back to what it was when the state to go on from was the current one, so what this state was trained on, and nothing
    /// else, counts as trained on; all else is written again under new orders, and states made since have other numbers,
    /// so nobody who comes back with one is taken for a holder.
    fn roll_back_if_lost(&mut self) {
        let live = self.roster.policies_live().count() as u64;
        if live < self.policies_wanted() || self.is_readable() || self.holders().next().is_some() {
            return;
        }
        let is_held = |lineage: &Lineage| {
            let state = Held { step: lineage.step, state: lineage.state };
            self.roster.policies_live().any(|(_, r)| r.held == Some(state))
        };
        let nearest = self.before.take().filter(|before| is_held(before));
        self.lineage = nearest.as_deref().unwrap_or(self.kept.newest()).taken_up_again(&self.plan);
        self.roster.void_rollouts();
        self.validation = None;
        (self.published, self.owed) = (None, true);
        self.rollbacks += 1;
        self.changes += 1;
    }

    /// Brings the current state to the policies that do not hold it, and the weights to the rollouts.
    fn tend_policies(&mut self, out: &mut Vec<Dispatch>) {
        let current = self.current();
        let idle = |needy: bool| {
            let wanted = self.roster.policies_live().filter(|(_, r)| r.job.is_none());
            wanted.filter(|(_, r)| (r.held != Some(current)) == needy).map(|(name, _)| name.clone()).collect::<Vec<_>>()
        };
        let (mut holders, mut needy) = (idle(false).into_iter(), idle(true).into_iter());
        let under_way = |wanted: fn(&Order) -> bool| {
            let jobs = self.roster.policies_live().filter_map(|(_, r)| r.job.as_ref());
            jobs.filter(|job| job.state == current.state).any(|job| wanted(&job.order))
        };
        let publishing = under_way(|order| matches!(order, Order::Load { publish: true, .. }));
        let handing_over = under_way(|order| matches!(order, Order::Save { hand_over: true, .. }));
        let readable = self.is_readable();
        // Only who holds the state is asked to publish: whether a replica has to read first must not depend on its guess.
        if self.owed
            && !publishing
            && let Some(name) = holders.next()
        {
            self.give_load(&name, true, out);
        }
        if readable {
            needy.for_each(|name| self.give_load(&name, false, out));
        } else if needy.next().is_some()
            && !handing_over
            && let Some(name) = holders.next()
        {
            self.give_save(&name, true, false, out);
        }
    }

    fn give_load(&mut self, name: &str, publish: bool, out: &mut Vec<Dispatch>) {
        let current = self.current();
        let held = self.roster.get(name).and_then(|replica| replica.held);
        self.roster.set_held(name, held, Some(current));
        let handed = self.handed.filter(|(state, _)| *state == current.state).map(|(_, order)| order);
        let since = self.kept.written_for(current.state).into_iter().chain(handed).min().unwrap_or(OrderId(0));
        self.give(name, Order::Load { step: current.step, since, publish }, out);
    }

    fn give_save(&mut self, name: &str, hand_over: bool, last: bool, out: &mut Vec<Dispatch>) {
        let buffered = if hand_over { Vec::new() } else { self.lineage.buffer.values().copied().collect() };
        self.give(name, Order::Save { step: self.lineage.step, hand_over, last, buffered }, out);
    }

    fn save(&mut self, last: bool, out: &mut Vec<Dispatch>) {
        let state = self.lineage.state;
        let is_save = |job: &Job| job.state == state && matches!(job.order, Order::Save { hand_over: false, .. });
        let jobs = self.roster.policies_live().filter_map(|(_, r)| r.job.as_ref());
        if jobs.into_iter().any(is_save) {
            return;
        }
        let free = self.holders().find(|name| self.roster.get(name).is_some_and(|r| r.job.is_none())).cloned();
        if let Some(name) = free {
            self.give_save(&name, false, last, out);
        }
    }

    /// Shares the validation out among the rollouts. Those that are busy get their share when they are free.
    fn validate(&mut self, out: &mut Vec<Dispatch>) {
        let step = self.lineage.step;
        if self.owed || self.published != Some(step) {
            return;
        }
        if self.validation.is_none() {
            let parts = self.roster.rollouts_live();
            if parts == 0 {
                return;
            }
            self.validation = Some(Validation { parts, waiting: (0..parts).collect(), done: Default::default() });
        }
        while let Some(name) = self.roster.idle_rollout().cloned() {
            let Some(validation) = &mut self.validation else { return };
            let parts = validation.parts;
            let Some(part) = validation.waiting.pop_first() else { return };
            self.give(&name, Order::Validate { step, part, parts }, out);
        }
    }

    /// Gives prompts to the rollouts that are free: first those that come back, then new ones, ascending.
    fn generate(&mut self, out: &mut Vec<Dispatch>) {
        let Some(version) = self.published.filter(|_| !self.owed) else { return };
        let mut idle = self.roster.idle_rollouts();
        if idle == 0 {
            return;
        }
        let waiting: Vec<u64> = self.lineage.open.iter().filter(|(_, o)| o.order.is_none()).map(|(p, _)| *p).collect();
        let first = self.lineage.cursor;
        let mut left = waiting.len() as u64 + self.new_prompts(version);
        let mut prompts = waiting.into_iter().chain(first..);
        while left > 0
            && idle > 0
            && let Some(name) = self.roster.idle_rollout().cloned()
        {
            let count = left.div_ceil(idle).min(self.plan.prompts_per_order_max.max(1));
            let share: Vec<u64> = prompts.by_ref().take(count as usize).collect();
            left -= count;
            idle -= 1;
            self.give_prompts(&name, share, version, out);
        }
    }

    /// How many prompts may be handed out for the first time.
    fn new_prompts(&self, version: u64) -> u64 {
        let (plan, group, step) = (&self.plan, self.group(), self.lineage.step);
        let window = plan.window_steps().min(self.total_steps().saturating_sub(step));
        // What is handed out now is trained on after all that is under way, with weights that must not be too new by then.
        let fresh = version.saturating_add(plan.allowed_outdated_steps).saturating_add(1).saturating_sub(step);
        let room = window.min(fresh).saturating_mul(group).saturating_sub(self.under_way());
        room.div_ceil(plan.n()).min(self.lineage.prompts_left(plan))
    }

    fn give_prompts(&mut self, name: &str, prompts: Vec<u64>, version: u64, out: &mut Vec<Dispatch>) {
        let id = OrderId(self.orders + 1);
        let lineage = &mut self.lineage;
        for &prompt in &prompts {
            lineage.open.entry(prompt).or_insert(Open { order: None, only: Vec::new() }).order = Some(id);
            lineage.cursor = lineage.cursor.max(prompt + 1);
        }
        let parts = || prompts.iter().filter_map(|prompt| Some((*prompt, lineage.open.get(prompt)?)));
        let only = match parts().any(|(_, open)| !open.only.is_empty()) {
            true => parts().flat_map(|(prompt, open)| Lineage::wanted(open, prompt, &self.plan)).collect(),
            false => Vec::new(),
        };
        self.give(name, Order::Generate { prompts, only, version }, out);
    }

    /// Starts a step when all its members and all its samples are there.
    fn train(&mut self, out: &mut Vec<Dispatch>) {
        let wanted = self.policies_wanted();
        let current = self.current();
        let free = self.roster.policies_live().filter(|(_, r)| r.held == Some(current) && r.job.is_none());
        let members: Vec<(String, String)> = free.map(|(name, r)| (name.clone(), r.address.clone())).collect();
        if (members.len() as u64) < wanted {
            return;
        }
        let Some(samples) = self.lineage.ready(self.group(), &self.plan) else { return };
        for sample in &samples {
            self.lineage.buffer.remove(&sample.sample);
        }
        self.attempts += 1;
        let step = self.lineage.step + 1;
        let made = Held { step, state: crate::roster::StateId(self.attempts) };
        let is_last = step >= self.total_steps();
        let publish = is_last || self.plan.publishes(step, self.published.unwrap_or(0));
        let outdated = self.lineage.outdated.clone();
        let names = members.iter().map(|(name, _)| (name.clone(), Progress::Working)).collect();
        let attempt = self.attempts;
        for ((name, _), share) in members.iter().zip(samples.chunks(self.plan.batch() as usize)) {
            self.roster.set_held(name, Some(current), Some(made));
            let (members, share, outdated) = (members.clone(), share.to_vec(), outdated.clone());
            self.give(name, Order::Train { step, members, attempt, share, outdated, publish }, out);
        }
        self.attempt =
            Some(Attempt { made, members: names, samples, gone: Default::default(), publish, published: false });
    }
}
