//! The virtual clock, the network, the store and what can go wrong with them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::rc::Rc;

use cosmos_controller::{Controller, Dispatch, Event, Memory, Order, OrderId, Outcome, Plan, Role, SampleRef};

use crate::chance::{Chance, mix};
use crate::process::{Process, Report, State, text};

/// What a seed stands for.
#[derive(Debug, Clone)]
pub struct Setup {
    pub seed: u64,
    pub plan: Plan,
    pub rollouts: u64,
    pub teachers: u64,
    /// One prompt in so many is filtered out; 0: none.
    pub filtered_in: u64,
}

/// What goes wrong while the faults last: each is "one in so many", 0 never.
#[derive(Debug, Clone)]
pub struct Faults {
    pub until: u64,
    pub lose_in: u64,
    pub double_in: u64,
    pub fail_in: u64,
    /// Milliseconds between two larger mishaps, on average.
    pub mishap_every: u64,
    pub membership: bool,
    pub stops: bool,
}

impl Faults {
    pub fn none() -> Self {
        Self { until: 0, lose_in: 0, double_in: 0, fail_in: 0, mishap_every: 0, membership: false, stops: false }
    }

    pub fn some(chance: &mut Chance) -> Self {
        Self {
            until: 500 + chance.below(20_000),
            lose_in: [0, 50, 10, 4][chance.below(4) as usize],
            double_in: [0, 20, 3][chance.below(3) as usize],
            fail_in: [0, 50, 8][chance.below(3) as usize],
            mishap_every: [200, 500, 2000][chance.below(3) as usize],
            membership: chance.one_in(3),
            stops: chance.one_in(4),
        }
    }
}

#[derive(Debug, Clone)]
pub enum Action {
    Wake(usize, u64),
    ToController {
        from: usize,
        life: u64,
        sent: u64,
        poll: bool,
        event: Option<Event>,
    },
    ToProcess {
        to: usize,
        life: u64,
        sent: u64,
        poll: bool,
        answer: Answer,
    },
    WorkEnds(usize, u64, OrderId),
    Commit(u64),
    /// A policy looks for the teachers' answers to its share.
    LooksForAnswers(usize, u64, OrderId),
    TeacherReads(usize, u64),
    Scored(usize, u64, Key),
    GoOnWithout,
    MissedHeartbeats(usize, u64),
    Restart(usize),
    ControllerStarts,
    Mishap,
}

#[derive(Debug, Clone)]
pub enum Answer {
    Taken,
    JoinAgain,
    Order(OrderId, Order),
    Nothing,
}

pub const POLL_MS: u64 = 20;
const ANSWER_MS: u64 = 130;
pub const HEARTBEATS_MS: u64 = 300;
const COLLECTIVE_MS: u64 = 400;
const TEACHERS_MS: u64 = 2_000;
pub const IDLE_MS: u64 = 400;
/// How long it takes at most to find out, after the last fault, who and what is gone, and to get it back.
pub const RECOVERY_MS: u64 = 10_000;
pub const RECOVERY_EVENTS: u64 = 500;
const EVENTS_MAX: u64 = 400_000;

/// Where a completion, the request about it and the answer to it lie.
pub type Key = (OrderId, u64);

pub struct World {
    pub setup: Setup,
    pub faults: Faults,
    pub chance: Chance,
    pub now: u64,
    number: u64,
    agenda: BinaryHeap<Reverse<(u64, u64)>>,
    actions: BTreeMap<u64, Action>,
    pub core: Controller,
    started_from: Option<Memory>,
    pub up: bool,
    ledger: Vec<Event>,
    /// What each replica was given and has not answered, as seen from outside.
    given: BTreeMap<String, OrderId>,
    live: BTreeSet<String>,
    pub known: BTreeSet<String>,
    last_join: BTreeMap<String, (u64, u64)>,
    memories: BTreeMap<OrderId, Memory>,
    saved: Option<Memory>,
    pub processes: Vec<Process>,
    pub store: BTreeMap<Key, u64>,
    /// What teachers were asked and have not acknowledged: the text, and when somebody took it.
    pub requests: BTreeMap<Key, (u64, Option<u64>)>,
    pub answers: BTreeMap<Key, u64>,
    pub hostile: Chance,
    /// Nothing of the store was ever lost.
    pub store_kept: bool,
    /// Events that the controller took in once the faults had stopped.
    pub events_after_faults: u64,
    /// Since when, in milliseconds.
    pub faults_ended: Option<u64>,
    pub published: BTreeMap<u64, (OrderId, u64)>,
    pub files: BTreeMap<u64, (OrderId, Rc<State>)>,
    /// Steps of which a state was on disk that is no longer whole.
    pub torn: BTreeSet<u64>,
    pub ready: BTreeMap<u64, BTreeSet<String>>,
    policies_ever: u64,
    pub stopped_once: bool,
    pub resumed: bool,
    /// Events that the controller has taken in.
    pub events: u64,
    pub finished: Option<Rc<State>>,
    /// Policies were added or removed, so steps may have had other sizes.
    pub group_changed: bool,
    /// Steps and weights at the end.
    pub outcome: Option<(u64, u64)>,
    tracing: bool,
    pub trace: Vec<String>,
}

pub type Checked = Result<(), String>;

impl World {
    pub fn new(setup: Setup, faults: Faults, tracing: bool) -> Self {
        let mut world = Self {
            chance: Chance::new(mix(setup.seed, faults.until)),
            core: Controller::new(setup.plan.clone()),
            setup,
            faults,
            now: 0,
            number: 0,
            agenda: BinaryHeap::new(),
            actions: BTreeMap::new(),
            started_from: None,
            up: true,
            ledger: Vec::new(),
            given: BTreeMap::new(),
            live: BTreeSet::new(),
            known: BTreeSet::new(),
            last_join: BTreeMap::new(),
            memories: BTreeMap::new(),
            saved: None,
            processes: Vec::new(),
            store: BTreeMap::new(),
            requests: BTreeMap::new(),
            answers: BTreeMap::new(),
            hostile: Chance::new(mix(0x0bad, 0)),
            store_kept: true,
            events_after_faults: 0,
            faults_ended: None,
            published: BTreeMap::new(),
            files: BTreeMap::new(),
            torn: BTreeSet::new(),
            ready: BTreeMap::new(),
            policies_ever: 0,
            stopped_once: false,
            resumed: false,
            events: 0,
            finished: None,
            group_changed: false,
            outcome: None,
            tracing,
            trace: Vec::new(),
        };
        for _ in 0..world.setup.plan.policy_replicas {
            world.add(Role::Policy);
        }
        (0..world.setup.rollouts).for_each(|_| world.add(Role::Rollout));
        (0..world.setup.teachers).for_each(|_| world.add(Role::Teacher));
        if world.faults.membership && world.setup.plan.policy_replicas > 1 && world.chance.one_in(3) {
            // The first policy never comes.
            (world.processes[0].alive, world.processes[0].removed, world.group_changed) = (false, true, true);
            let when = world.chance.below(3_000);
            world.after(when, Action::GoOnWithout);
        }
        world.hostile = Chance::new(mix(world.setup.seed, 0x0bad));
        if world.faults.mishap_every > 0 {
            world.after(1, Action::Mishap);
        }
        world
    }

    pub fn note(&mut self, line: impl FnOnce() -> String) {
        if self.tracing {
            let line = format!("{:>7} {}", self.now, line());
            self.trace.push(line);
        }
    }

    pub fn add(&mut self, role: Role) {
        let name = format!("{role}-{}", self.processes.len());
        self.policies_ever += u64::from(role == Role::Policy);
        self.processes.push(Process::new(name, role));
        let delay = self.chance.below(50);
        self.after(delay, Action::Wake(self.processes.len() - 1, 0));
        self.start_reading(self.processes.len() - 1);
    }

    pub fn after(&mut self, delay: u64, action: Action) {
        self.number += 1;
        self.agenda.push(Reverse((self.now + delay, self.number)));
        self.actions.insert(self.number, action);
    }

    pub fn rollbacks(&self) -> u64 {
        self.core.status().rollbacks
    }

    pub fn faulty(&self) -> bool {
        self.now < self.faults.until
    }

    pub fn unlucky(&mut self, one_in: u64) -> bool {
        self.faulty() && self.chance.one_in(one_in)
    }

    fn alive(&self, index: usize, life: u64) -> bool {
        self.processes.get(index).is_some_and(|p| p.alive && p.life == life)
    }

    pub fn run(&mut self) -> Checked {
        for _ in 0..EVENTS_MAX {
            let Some(Reverse((time, number))) = self.agenda.pop() else { break };
            self.now = time;
            let Some(action) = self.actions.remove(&number) else { continue };
            self.perform(action)?;
            if self.core.is_deserted() && self.processes.iter().all(|p| !p.alive) {
                if !self.core.was_stopped() {
                    return self.check_end();
                }
                self.resume();
            }
        }
        Err(format!("the run does not end: {:#?}", self.core.status()))
    }

    fn perform(&mut self, action: Action) -> Checked {
        match action {
            Action::Wake(index, life) if self.alive(index, life) && self.processes[index].wakes_at <= self.now => {
                self.wake(index);
            }
            Action::ToController { from, life, sent, poll, event } => self.hear(from, life, sent, poll, event)?,
            Action::ToProcess { to, life, sent, poll, answer } if self.alive(to, life) => {
                self.answered(to, sent, poll, answer)?;
            }
            Action::WorkEnds(index, life, id)
                if self.alive(index, life)
                    && self.processes[index].work.as_ref().is_some_and(|(own, _)| *own == id) =>
            {
                self.work_ends(index)?;
            }
            Action::Commit(attempt) => self.commit(attempt)?,
            Action::LooksForAnswers(index, life, id) if self.alive(index, life) => self.look_for_answers(index, id)?,
            Action::TeacherReads(index, life) if self.alive(index, life) => self.read_requests(index),
            Action::Scored(index, life, key) if self.alive(index, life) => self.store_answer(key),
            Action::GoOnWithout if self.up => self.apply(Event::GoOnWithout { policies: 1 })?,
            Action::GoOnWithout => self.after(HEARTBEATS_MS, Action::GoOnWithout),
            Action::MissedHeartbeats(index, life) => {
                let process = &self.processes[index];
                // A newer life has joined already, or it is back.
                let gone = !process.alive || process.cut_off_until > self.now;
                if process.life == life && gone && self.up {
                    let replica = process.name.clone();
                    let event = if process.removed { Event::Removed { replica } } else { Event::Lost { replica } };
                    self.apply(event)?;
                } else if process.life == life && gone {
                    self.after(HEARTBEATS_MS, Action::MissedHeartbeats(index, life));
                }
            }
            Action::Restart(index) if !self.processes[index].removed && !self.core.is_over() => {
                self.processes[index].restart();
                let life = self.processes[index].life;
                self.after(5, Action::Wake(index, life));
                self.start_reading(index);
            }
            Action::Restart(index) => {
                let replica = self.processes[index].name.clone();
                self.apply(Event::Lost { replica })?;
            }
            Action::ControllerStarts => self.start_controller()?,
            Action::Mishap => self.mishap()?,
            _ => {}
        }
        Ok(())
    }

    // The network.

    fn send(&mut self, from: usize, poll: bool, event: Option<Event>) {
        let process = &mut self.processes[from];
        process.sent += 1;
        let (life, sent, cut_off) = (process.life, process.sent, process.cut_off_until > self.now);
        let copies = if cut_off || self.unlucky(self.faults.lose_in) { 0 } else { 1 };
        let copies = copies + u64::from(!cut_off && self.unlucky(self.faults.double_in));
        for _ in 0..copies {
            let delay = 1 + self.chance.below(if self.faulty() { 60 } else { 4 });
            self.after(delay, Action::ToController { from, life, sent, poll, event: event.clone() });
        }
    }

    fn hear(&mut self, from: usize, life: u64, sent: u64, poll: bool, event: Option<Event>) -> Checked {
        if !self.up {
            return Ok(());
        }
        let name = self.processes[from].name.clone();
        if let Some(event) = event {
            let last = self.last_join.get(&name).copied().unwrap_or_default();
            let joins = matches!(event, Event::Joined { .. } | Event::Removed { .. });
            if joins && (life, sent) <= last {
                return Ok(());
            }
            // Only who is there can leave: the end of an order counts only with the order.
            if matches!(event, Event::Removed { .. }) && !self.core.is_live(&name) {
                let delay = 1 + self.chance.below(4);
                self.after(delay, Action::ToProcess { to: from, life, sent, poll, answer: Answer::JoinAgain });
                return Ok(());
            }
            if joins {
                self.last_join.insert(name.clone(), (life, sent));
                // The late join of one that is gone is found out by its silence.
                if !self.alive(from, life) {
                    self.after(HEARTBEATS_MS, Action::MissedHeartbeats(from, life));
                }
            }
            self.apply(event)?;
        }
        let answer = match (poll, self.core.is_live(&name), self.core.order_of(&name)) {
            (false, ..) => Answer::Taken,
            (true, false, _) => Answer::JoinAgain,
            (true, true, Some((id, order))) => Answer::Order(id, order.clone()),
            (true, true, None) => Answer::Nothing,
        };
        if !self.unlucky(self.faults.lose_in) && self.processes[from].cut_off_until <= self.now {
            let delay = 1 + self.chance.below(if self.faulty() { 60 } else { 4 });
            self.after(delay, Action::ToProcess { to: from, life, sent, poll, answer });
        }
        Ok(())
    }

    // The controller.

    pub fn apply(&mut self, event: Event) -> Checked {
        self.note(|| format!("{event:?}"));
        self.be_hostile()?;
        self.events += 1;
        if !self.faulty() {
            self.events_after_faults += 1;
            self.faults_ended.get_or_insert(self.now);
        }
        self.ledger.push(event.clone());
        match &event {
            Event::Joined { replica, .. } => {
                self.live.insert(replica.clone());
                self.known.insert(replica.clone());
                self.given.remove(replica);
            }
            Event::Lost { replica } | Event::Removed { replica } => {
                self.live.remove(replica);
                self.given.remove(replica);
            }
            Event::Done { replica, order, .. } | Event::Failed { replica, order, .. } => {
                let own = self.given.get(replica) == Some(order);
                let last = matches!(self.core.order_of(replica), Some((_, Order::Leave | Order::Finish)));
                if own && !last {
                    self.given.remove(replica);
                }
                if own
                    && let (Event::Done { outcome: Outcome::Saved, .. }, Some(memory)) =
                        (&event, self.memories.get(order))
                {
                    self.saved = Some(memory.clone());
                }
            }
            Event::StopRequested | Event::GoOnWithout { .. } | Event::Resumed => {}
        }
        let dispatches = self.core.apply(event).map_err(|refused| format!("refused: {refused}"))?;
        for dispatch in &dispatches {
            self.check_dispatch(dispatch)?;
        }
        let plan = &self.setup.plan;
        let under_way = self.core.under_way();
        let most = (plan.steps_ahead_max + 1) * plan.train_batch * self.policies_ever.max(plan.policy_replicas)
            + plan.n_generation;
        if under_way > most {
            return Err(format!("{under_way} samples are under way, more than {most}"));
        }
        Ok(())
    }

    fn check_dispatch(&mut self, dispatch: &Dispatch) -> Checked {
        self.note(|| format!("  -> {dispatch:?}"));
        let Dispatch { replica, id, order } = dispatch;
        if !self.live.contains(replica) {
            return Err(format!("order {} for `{replica}`, which is not there", id.0));
        }
        if let Some(old) = self.given.insert(replica.clone(), *id) {
            return Err(format!("`{replica}` was given {} while it has {}", id.0, old.0));
        }
        if self.core.order_of(replica) != Some((*id, order)) {
            return Err(format!("`order_of` does not repeat order {}", id.0));
        }
        if let (Order::Generate { version, .. }, 0) = (order, self.faults.mishap_every) {
            let plan = &self.setup.plan;
            let steps = version + plan.allowed_outdated_steps + 1 - self.core.step();
            let most = steps * plan.train_batch * plan.policy_replicas + plan.n_generation;
            if self.core.under_way() > most {
                return Err(format!("{} samples are under way; some will be too old", self.core.under_way()));
            }
        }
        if let Order::Save { hand_over: false, .. } = order {
            self.memories.insert(*id, self.core.memory());
        }
        Ok(())
    }

    fn start_controller(&mut self) -> Checked {
        let mut again = match &self.started_from {
            Some(memory) => Controller::resume(self.setup.plan.clone(), memory.clone()),
            None => Controller::new(self.setup.plan.clone()),
        };
        for event in &self.ledger {
            again.apply(event.clone()).map_err(|refused| format!("replay: {refused}"))?;
        }
        if again != self.core {
            return Err("the ledger gives another controller".into());
        }
        let text = serde_json::to_string(&again).map_err(|e| e.to_string())?;
        self.core = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        if again != self.core {
            return Err("the controller's state does not survive JSON".into());
        }
        self.up = true;
        Ok(())
    }

    /// Another part of a run that was stopped: everything starts anew from the checkpoint.
    fn resume(&mut self) {
        self.note(|| "--- resumed".into());
        self.resumed = true;
        self.started_from = self.saved.clone();
        self.core = match &self.saved {
            Some(memory) => Controller::resume(self.setup.plan.clone(), memory.clone()),
            None => {
                // Another run, whose orders are numbered from 1 again: what the first one left is not its own.
                self.files.clear();
                Controller::new(self.setup.plan.clone())
            }
        };
        self.ledger.clear();
        self.given.clear();
        self.live.clear();
        self.known.clear();
        self.memories.clear();
        self.faults.stops = false;
        self.policies_ever = 0;
        for index in 0..self.processes.len() {
            self.processes[index].restart();
            self.processes[index].removed = false;
            self.policies_ever += u64::from(self.processes[index].role == Role::Policy);
            let life = self.processes[index].life;
            self.after(10, Action::Wake(index, life));
            self.start_reading(index);
        }
    }

    // The processes.

    fn wake(&mut self, index: usize) {
        let process = &self.processes[index];
        let life = process.life;
        match (&process.report, process.joined, &process.work) {
            (Some(report), ..) => {
                let event = process.event(report);
                self.send(index, false, Some(event));
            }
            (None, false, _) => {
                let event = process.join();
                self.send(index, false, Some(event));
            }
            (None, true, None) => self.send(index, true, None),
            _ => {}
        }
        let waits = self.processes[index].work.is_none();
        let delay = if waits { ANSWER_MS } else { POLL_MS + self.chance.below(POLL_MS) };
        self.wake_in(index, life, delay);
    }

    fn wake_in(&mut self, index: usize, life: u64, delay: u64) {
        self.processes[index].wakes_at = self.now + delay;
        self.after(delay, Action::Wake(index, life));
    }

    fn answered(&mut self, index: usize, sent: u64, poll: bool, answer: Answer) -> Checked {
        let life = self.processes[index].life;
        let pause = if matches!(answer, Answer::Nothing) { POLL_MS } else { 1 };
        if sent == self.processes[index].sent {
            self.wake_in(index, life, pause);
        }
        let process = &mut self.processes[index];
        match answer {
            // Of the answers to a repeated message the newest counts; an older one may be about an earlier report.
            Answer::Taken if sent != process.sent => {}
            Answer::Taken => match process.report.take() {
                Some(Report::Leave) => process.alive = false,
                Some(Report::Done(_, Outcome::Trained | Outcome::Unpublished)) => self.forget_samples(index),
                Some(_) => {}
                None => process.joined = true,
            },
            Answer::JoinAgain if matches!(process.report, Some(Report::Leave)) => {
                (process.report, process.joined) = (None, false);
            }
            _ if !poll || process.report.is_some() || process.work.is_some() || sent != process.sent => {}
            Answer::JoinAgain => process.joined = false,
            Answer::Order(id, order) if id.0 > process.newest => {
                process.newest = id.0;
                process.work = Some((id, order));
                self.begin(index)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// A policy removes what it has trained on.
    fn forget_samples(&mut self, index: usize) {
        let trained = self.processes[index].state.as_ref().map(|s| s.trained.clone()).unwrap_or_default();
        self.store.retain(|(_, sample), _| !trained.contains(sample));
        self.requests.retain(|(_, sample), _| !trained.contains(sample));
        self.answers.retain(|(_, sample), _| !trained.contains(sample));
    }

    fn begin(&mut self, index: usize) -> Checked {
        let Some((id, order)) = self.processes[index].work.clone() else { return Ok(()) };
        let life = self.processes[index].life;
        if self.unlucky(self.faults.fail_in) && !matches!(order, Order::Leave | Order::Finish) {
            self.processes[index].give_up("bad luck");
            return Ok(());
        }
        let ms = match &order {
            Order::Generate { prompts, .. } => 10 + prompts.len() as u64 * self.chance.below(30),
            Order::Train { .. } => return self.begin_step(index, id, &order),
            Order::Load { .. } | Order::Save { .. } => 5 + self.chance.below(80),
            Order::Validate { .. } => 5 + self.chance.below(200),
            Order::Leave | Order::Finish => {
                let process = &mut self.processes[index];
                if order == Order::Finish && process.role == Role::Policy {
                    let state = process.state.clone().filter(|s| s.step == self.core.step());
                    self.finished = state.or(self.finished.take());
                }
                process.work = None;
                process.report = Some(Report::Leave);
                return Ok(());
            }
        };
        self.after(ms, Action::WorkEnds(index, life, id));
        Ok(())
    }

    fn begin_step(&mut self, index: usize, id: OrderId, order: &Order) -> Checked {
        let Order::Train { step, members, share, .. } = order else { return Ok(()) };
        let process = &mut self.processes[index];
        if process.state.as_ref().map(|s| s.step + 1) != Some(*step) {
            // The controller is mistaken about what this process holds.
            (process.work, process.joined) = (None, false);
            return Ok(());
        }
        members.iter().position(|(name, _)| *name == process.name).ok_or("not a member")?;
        let missing: Vec<u64> =
            share.iter().filter(|s| !self.store.contains_key(&(s.order, s.sample))).map(|s| s.sample).collect();
        if !missing.is_empty() {
            process.end(Outcome::SamplesGone { samples: missing });
            return Ok(());
        }
        let life = process.life;
        process.fetched =
            share.iter().filter_map(|s| Some((s.sample, *self.store.get(&(s.order, s.sample))?))).collect();
        let patience = if self.setup.teachers > 0 { TEACHERS_MS } else { COLLECTIVE_MS };
        self.after(patience, Action::WorkEnds(index, life, id));
        self.look_for_answers(index, id)
    }

    /// All members have summed their gradients, or none has.
    fn commit(&mut self, attempt: u64) -> Checked {
        let at_it = |p: &Process| matches!(&p.work, Some((_, Order::Train { attempt: own, .. })) if *own == attempt);
        let members: Vec<usize> =
            (0..self.processes.len()).filter(|&i| self.processes[i].alive && at_it(&self.processes[i])).collect();
        let Some((_, order)) = members.first().and_then(|&i| self.processes[i].work.clone()) else { return Ok(()) };
        let Order::Train { step, members: named, outdated, publish, .. } = order else { return Ok(()) };
        if members.len() < named.len() {
            return Ok(());
        }
        let (mut samples, mut texts, mut lens) = (Vec::new(), Vec::new(), Vec::new());
        for (name, _) in &named {
            let member = members.iter().map(|&i| &self.processes[i]).find(|p| p.name == *name).ok_or("no member")?;
            let Some((_, Order::Train { share, .. })) = &member.work else { return Err("no share".into()) };
            samples.extend(share.iter().copied());
            lens.push(share.len());
            for sample in share {
                texts.push(*member.fetched.get(&sample.sample).ok_or("trained on without its completion")?);
            }
        }
        self.check_step(step, &samples, lens)?;
        let mut weights = BTreeSet::new();
        for index in members {
            let old = self.processes[index].state.clone().ok_or("a member without a state")?;
            if let Some(twice) = samples.iter().find(|s| old.trained.contains(&s.sample)) {
                return Err(format!("sample {} is trained on twice, in step {step}", twice.sample));
            }
            if let Some(twice) = outdated.iter().find(|s| old.outdated.contains(&s.sample)) {
                return Err(format!("step {step} names sample {} as dropped, as an earlier one did", twice.sample));
            }
            let mut new = State { step, ..(*old).clone() };
            for (sample, text) in samples.iter().zip(&texts) {
                new.weights = mix(mix(new.weights, step), mix(sample.sample, *text));
                new.trained.insert(sample.sample);
            }
            new.outdated.extend(outdated.iter().map(|s| s.sample));
            weights.insert(new.weights);
            if self.unlucky(12) {
                // It breaks down between the sum and the optimizer.
                if self.chance.one_in(2) {
                    self.kill(index)
                } else {
                    self.processes[index].give_up("broke down")
                }
                continue;
            }
            let first = self.processes[index].name == named[0].0;
            let id = self.processes[index].work.as_ref().map(|(id, _)| *id).ok_or("no work")?;
            self.processes[index].state = Some(Rc::new(new.clone()));
            if self.unlucky(20) {
                self.kill(index);
                continue;
            }
            if first && publish && self.unlucky(10) {
                self.processes[index].end(Outcome::Unpublished);
                continue;
            }
            if first && publish {
                self.publish(step, id, new.weights);
            }
            self.processes[index].end(Outcome::Trained);
        }
        match weights.len() {
            0 | 1 => Ok(()),
            _ => Err(format!("the members of step {step} have different weights")),
        }
    }

    fn publish(&mut self, version: u64, id: OrderId, weights: u64) {
        if self.published.get(&version).is_none_or(|(newest, _)| *newest < id) {
            self.published.insert(version, (id, weights));
        }
    }

    fn check_step(&self, step: u64, samples: &[SampleRef], shares: Vec<usize>) -> Checked {
        let plan = &self.setup.plan;
        if let Some(old) = samples.iter().find(|s| step - 1 - s.version > plan.allowed_outdated_steps) {
            return Err(format!("step {step} trains on sample {} of version {}", old.sample, old.version));
        }
        if shares.iter().any(|len| *len as u64 != plan.train_batch) || !samples.is_sorted_by_key(|s| s.sample) {
            return Err(format!("step {step} is cut wrongly: {shares:?}"));
        }
        Ok(())
    }

    fn work_ends(&mut self, index: usize) -> Checked {
        let Some((id, order)) = self.processes[index].work.clone() else { return Ok(()) };
        let outcome = match order {
            Order::Generate { prompts, only, version } => match self.published.get(&version).copied() {
                None => Outcome::WeightsGone,
                Some((_, weights)) => {
                    let n = self.setup.plan.n_generation;
                    let asked = prompts.iter().flat_map(|p| p * n..p * n + n);
                    let asked = asked.filter(|s| only.is_empty() || only.contains(s));
                    let samples: Vec<u64> = asked.filter(|s| !self.is_filtered(*s)).collect();
                    self.store.extend(samples.iter().map(|s| ((id, *s), text(*s, weights))));
                    if self.setup.teachers > 0 {
                        self.requests.extend(samples.iter().map(|s| ((id, *s), (text(*s, weights), None))));
                    }
                    Outcome::Generated { samples }
                }
            },
            Order::Train { .. } => {
                self.processes[index].give_up("the others did not come");
                return Ok(());
            }
            Order::Load { step, since, publish } => {
                if !publish {
                    let file = self.files.get(&step).filter(|(order, _)| *order >= since);
                    let state = match (step, file) {
                        (0, _) => State::start(),
                        (_, Some((_, state))) => Rc::clone(state),
                        _ if self.torn.contains(&step) => {
                            self.processes[index].end(Outcome::StateGone);
                            return Ok(());
                        }
                        _ => return Err(format!("there is nothing to load for step {step}")),
                    };
                    self.processes[index].state = Some(state);
                }
                let held = self.processes[index].state.clone().filter(|s| s.step == step);
                let Some(held) = held else { return Err(format!("step {step} is to be published by who has it not")) };
                if publish {
                    self.publish(step, id, held.weights);
                }
                Outcome::Loaded
            }
            Order::Save { step, .. } => {
                let held = self.processes[index].state.clone().filter(|s| s.step == step);
                let Some(held) = held else { return Err(format!("step {step} is to be saved by who has it not")) };
                if self.files.get(&step).is_none_or(|(newest, _)| *newest < id) {
                    self.files.insert(step, (id, held));
                }
                Outcome::Saved
            }
            Order::Validate { step, .. } => match self.published.contains_key(&step) {
                true => Outcome::Validated,
                false => Outcome::WeightsGone,
            },
            Order::Leave | Order::Finish => return Ok(()),
        };
        self.processes[index].end(outcome);
        Ok(())
    }

    fn is_filtered(&self, sample: u64) -> bool {
        let of = |what: u64| mix(mix(self.setup.seed, 99), what);
        let every = self.setup.filtered_in;
        // Whole prompts are filtered out, and single samples fail.
        every > 0 && (of(sample / self.setup.plan.n_generation).is_multiple_of(every) || of(!sample).is_multiple_of(17))
    }

    // The end.

    fn check_end(&mut self) -> Checked {
        let status = self.core.status();
        let plan = &self.setup.plan;
        if self.core.gave_up() && status.step == 0 {
            // There was too little for a step; whoever finished has what it began with.
            self.outcome = Some((0, 0));
            return Ok(());
        }
        let Some(state) = self.finished.clone() else {
            return Err("nobody finished with the last weights".into());
        };
        self.outcome = Some((state.step, state.weights));
        if let Some(both) = state.trained.intersection(&state.outdated).next() {
            return Err(format!("sample {both} was dropped and trained on"));
        }
        if plan.steps_max.is_some_and(|max| state.step > max) {
            return Err("more steps than wanted".into());
        }
        let total = plan.dataset_len * plan.epochs * plan.n_generation;
        let dropped: BTreeSet<u64> = self.core.outdated().iter().map(|s| s.sample).collect();
        let lost: Vec<u64> = (0..total)
            .filter(|s| {
                !dropped.contains(s)
                    && !state.trained.contains(s)
                    && !state.outdated.contains(s)
                    && !self.is_filtered(*s)
            })
            .collect();
        let group = plan.train_batch * self.policies_ever.max(plan.policy_replicas);
        let may_end_early = plan.steps_max == Some(state.step) || self.core.gave_up();
        if !may_end_early && lost.len() as u64 >= group {
            return Err(format!("never trained on: {lost:?}"));
        }
        Ok(())
    }
}
