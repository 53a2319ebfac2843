//! The one thread that owns controller and ledger: it takes requests one after the other, writes what they change, applies
//! it, and answers.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cosmos_controller::{Event, Order, OrderId, Outcome, Role};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::clock::unix_ms;
use crate::desk::Desk;
use crate::endpoint::Deadlines;
use crate::identity::Identity;
use crate::ledger::{Ledger, Record};
use crate::machine::{Ending, Machine};
use crate::need::Need;
use crate::wire::{self, Refusal};

const TICK: Duration = Duration::from_millis(50);
/// Reports of failure by replicas of one role, without one of success, before the run is given up.
const FAILURES_MAX: u32 = 50;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// All steps are made and all roles have left.
    Done,
    /// Saved, to be resumed; all roles have left.
    Saved,
    /// It cannot go on.
    Failed(String),
}

/// An order that was carried out, for the run's records. Every order is reported once, unless its result no longer counts; after a controller was killed, the
/// last ones that it had not [recorded](crate::Endpoint::recorded) come again with the same `seq`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Position in the ledger; ascending.
    pub seq: u64,
    /// Who.
    pub replica: String,
    /// Its number.
    pub id: OrderId,
    /// What was to be done.
    pub order: Order,
    /// With what result.
    pub outcome: Outcome,
    /// What the role sent along: metrics, samples for the record.
    pub payload: Value,
}

pub(crate) type Answer = Result<Value, Refusal>;
pub(crate) type Reply = oneshot::Sender<Answer>;

/// What the thread is asked.
pub(crate) enum Ask {
    Join(wire::Join, Reply),
    Next(wire::Next, Reply),
    Beat(wire::Beat, Reply),
    Done(wire::Done, Reply),
    Failed(wire::Failed, Reply),
    Leave(wire::Leave, Reply),
    Status(Reply),
    Snapshot(Reply),
    Inject(Event, Reply),
    Recorded(u64),
    Compact(Reply),
    Fail(String),
    Stop,
}

/// What the run's owner waits for.
#[derive(Default)]
pub(crate) struct Fate {
    end: Mutex<Option<End>>,
    changed: Condvar,
}

impl Fate {
    pub fn get(&self) -> Option<End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn wait(&self, timeout: Duration) -> Option<End> {
        let guard = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        let (end, _) = self
            .changed
            .wait_timeout_while(guard, timeout, |end| end.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        end.clone()
    }

    fn set(&self, end: End) {
        let mut guard = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        if guard.is_none() {
            *guard = Some(end);
            self.changed.notify_all();
        }
    }
}

/// What only this process knows of a replica: gone with it, and not needed to decide anything but deadlines.
struct Contact {
    seen: Instant,
    lost_since: Option<Instant>,
    nonce: Option<u64>,
    progress: String,
    order_since: Option<(OrderId, Instant)>,
    waiting: Option<(Reply, Instant)>,
}

impl Contact {
    fn new() -> Self {
        Self {
            seen: Instant::now(),
            lost_since: None,
            nonce: None,
            progress: String::new(),
            order_since: None,
            waiting: None,
        }
    }
}

/// What the ledger gives back.
pub(crate) struct Restored<M> {
    pub desk: Desk<M>,
    pub ledger: Ledger,
    /// Reports that the owner has not recorded.
    pub unrecorded: VecDeque<Report>,
}

pub(crate) struct Supervisor<M> {
    pub desk: Desk<M>,
    pub ledger: Option<Ledger>,
    pub identity: Identity,
    pub info: Value,
    pub needs: Vec<Need>,
    pub deadlines: Deadlines,
    pub reports: mpsc::Sender<Report>,
    /// Reports that the owner has not recorded.
    pub unrecorded: VecDeque<Report>,
    pub fate: Arc<Fate>,
    contacts: BTreeMap<String, Contact>,
    /// By the need's position.
    absent_since: BTreeMap<usize, Instant>,
    missing_since: Option<Instant>,
    failures: BTreeMap<Role, u32>,
    ending_since: Option<Instant>,
    started: Instant,
    #[cfg(test)]
    pub after_append: Option<Box<dyn Fn(u64) + Send>>,
}

impl<M: Machine> Supervisor<M> {
    pub fn new(
        restored: Restored<M>,
        identity: Identity,
        info: Value,
        needs: Vec<Need>,
        deadlines: Deadlines,
        reports: mpsc::Sender<Report>,
        fate: Arc<Fate>,
    ) -> Self {
        let Restored { desk, ledger, unrecorded } = restored;
        // A restarted controller gives everybody the full time to be heard from.
        let contacts = desk.seats.iter().map(|(name, seat)| {
            let lost_since = seat.lost.then(Instant::now);
            (name.clone(), Contact { lost_since, ..Contact::new() })
        });
        Self {
            contacts: contacts.collect(),
            desk,
            ledger: Some(ledger),
            identity,
            info,
            needs,
            deadlines,
            reports,
            unrecorded,
            fate,
            absent_since: BTreeMap::new(),
            missing_since: None,
            failures: BTreeMap::new(),
            ending_since: None,
            started: Instant::now(),
            #[cfg(test)]
            after_append: None,
        }
    }

    /// Serves until it is told to stop.
    pub fn run(mut self, asks: mpsc::Receiver<Ask>) {
        // What was not recorded before the controller died is reported again.
        for report in &self.unrecorded {
            let _ = self.reports.send(report.clone());
        }
        let mut ticked = Instant::now();
        loop {
            match asks.recv_timeout(TICK) {
                Ok(Ask::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Ok(ask) => self.take(ask),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                self.tick();
            }
        }
        for contact in self.contacts.values_mut() {
            if let Some((reply, _)) = contact.waiting.take() {
                let _ = reply.send(Err(Refusal::new(503, "stopping", "the controller is stopping")));
            }
        }
    }

    fn take(&mut self, ask: Ask) {
        match ask {
            Ask::Join(join, reply) => drop(reply.send(self.join(join))),
            Ask::Next(next, reply) => self.next(next, reply),
            Ask::Beat(beat, reply) => drop(reply.send(self.beat(beat))),
            Ask::Done(done, reply) => drop(reply.send(self.done(done))),
            Ask::Failed(failed, reply) => drop(reply.send(self.failed(failed))),
            Ask::Leave(leave, reply) => drop(reply.send(self.leave(leave))),
            Ask::Status(reply) => drop(reply.send(Ok(self.status()))),
            Ask::Snapshot(reply) => drop(reply.send(Ok(self.desk.machine.snapshot().unwrap_or_default()))),
            Ask::Inject(event, reply) => drop(reply.send(self.commit(event, Value::Null).map(|()| Value::Null))),
            Ask::Recorded(seq) => self.recorded(seq),
            Ask::Compact(reply) => drop(reply.send(self.compact())),
            Ask::Fail(reason) => self.fail(reason),
            Ask::Stop => {}
        }
    }

    /// Writes an event, applies it, wakes who got an order by it. On an error nothing has changed.
    fn commit(&mut self, event: Event, payload: Value) -> Result<(), Refusal> {
        let seq = self.desk.seq + 1;
        let ledger = self.ledger.as_mut().ok_or_else(|| Refusal::new(507, "ledger", "the ledger is lost"))?;
        let record = Record::Event { seq, at_ms: unix_ms(), event, payload };
        ledger.append(&record).map_err(|e| {
            tracing::error!("{e}; {}", e.hint().unwrap_or_default());
            Refusal::new(507, "ledger", e.to_string())
        })?;
        #[cfg(test)]
        if let Some(hook) = &self.after_append {
            hook(seq);
        }
        let Record::Event { event, payload, .. } = record else { return Ok(()) };
        // A refused event stays in the ledger, where it is refused again: it changes nothing there either.
        let (report, woken) = self.desk.apply(seq, event, payload).map_err(Refusal::request)?;
        if let Some(report) = report {
            self.unrecorded.push_back(report.clone());
            let _ = self.reports.send(report);
        }
        for replica in woken {
            self.wake(&replica);
        }
        Ok(())
    }

    fn join(&mut self, join: wire::Join) -> Answer {
        join.check()?;
        if let Some(differs) = self.identity.difference(&join.identity) {
            return Err(Refusal::new(409, "identity", format!("it was started differently from the run: {differs}")));
        }
        let incarnation = match self.desk.seats.get(&join.replica) {
            Some(seat) if seat.role != join.role => {
                let other = format!("the name `{}` is that of another role ({})", join.replica, seat.role);
                return Err(Refusal::new(409, "name", other));
            }
            Some(seat) if !seat.lost && self.contacts.get(&join.replica).and_then(|c| c.nonce) == Some(join.nonce) => {
                seat.incarnation
            }
            None if self.desk.seats.len() >= self.deadlines.replicas_max => {
                let full = format!("the run has {} replicas already", self.desk.seats.len());
                return Err(Refusal::new(429, "full", full));
            }
            _ => self.admit(&join)?,
        };
        self.seen(&join.replica);
        let joined = wire::Joined { incarnation, beat_ms: self.deadlines.beat_ms(), info: self.info.clone() };
        as_json(&joined)
    }

    fn admit(&mut self, join: &wire::Join) -> Result<u64, Refusal> {
        let event = Event::Joined {
            replica: join.replica.clone(),
            role: join.role,
            holds: join.holds,
            address: join.address.clone(),
        };
        self.commit(event, Value::Null)?;
        // The one that had the name before is told by its next request.
        let old = self.contacts.insert(join.replica.clone(), Contact { nonce: Some(join.nonce), ..Contact::new() });
        if let Some((reply, _)) = old.and_then(|c| c.waiting) {
            let _ = reply.send(Err(replaced(&join.replica)));
        }
        tracing::info!("`{}` joined as {}", join.replica, join.role);
        Ok(self.desk.seq)
    }

    /// Whether this process is the one that holds the name.
    fn check(&mut self, who: &wire::Who) -> Result<(), Refusal> {
        if let Some(End::Failed(reason)) = self.fate.get() {
            return Err(Refusal::new(410, "run_failed", reason));
        }
        match self.desk.seats.get(&who.replica) {
            Some(seat) if seat.incarnation > who.incarnation => return Err(replaced(&who.replica)),
            Some(seat) if seat.incarnation == who.incarnation && !seat.lost => {}
            _ => {
                return Err(Refusal::new(
                    410,
                    "rejoin",
                    "it was counted as lost, or is not known; it has to join again",
                ));
            }
        }
        self.seen(&who.replica);
        Ok(())
    }

    fn seen(&mut self, replica: &str) {
        if let Some(contact) = self.contacts.get_mut(replica) {
            contact.seen = Instant::now();
        }
    }

    fn next(&mut self, next: wire::Next, reply: Reply) {
        if let Err(refusal) = self.check(&next.who) {
            return drop(reply.send(Err(refusal)));
        }
        let wait = Duration::from_millis(next.wait_ms.min(self.deadlines.poll_ms_max()));
        let Some(contact) = self.contacts.get_mut(&next.who.replica) else { return };
        if let Some((older, _)) = contact.waiting.replace((reply, Instant::now() + wait)) {
            let _ = older.send(as_json(&wire::NextAnswer { order: None }));
        }
        self.wake(&next.who.replica);
        self.expire();
    }

    /// Answers the replica's waiting question if there is an order for it.
    fn wake(&mut self, replica: &str) {
        let Some(order) = self.desk.machine.order_of(replica) else { return };
        let Some(contact) = self.contacts.get_mut(replica) else { return };
        if contact.order_since.is_none_or(|(id, _)| id != order.0) {
            contact.order_since = Some((order.0, Instant::now()));
            contact.progress.clear();
        }
        if let Some((reply, _)) = contact.waiting.take() {
            contact.seen = Instant::now();
            let _ = reply.send(as_json(&wire::NextAnswer { order: Some(order) }));
        }
    }

    /// Answers questions whose time is up.
    fn expire(&mut self) {
        let now = Instant::now();
        for contact in self.contacts.values_mut() {
            if contact.waiting.as_ref().is_some_and(|(reply, until)| *until <= now || reply.is_closed())
                && let Some((reply, _)) = contact.waiting.take()
            {
                if !reply.is_closed() {
                    contact.seen = now;
                }
                let _ = reply.send(as_json(&wire::NextAnswer { order: None }));
            }
        }
    }

    fn beat(&mut self, beat: wire::Beat) -> Answer {
        self.check(&beat.who)?;
        let wanted = self.is_under_way(&beat.who.replica, beat.order);
        if let Some(contact) = self.contacts.get_mut(&beat.who.replica) {
            contact.progress = wire::short(&beat.progress, wire::PROGRESS_BYTES_MAX);
        }
        let deserted = self.is_deserted(&beat.who.replica);
        as_json(&wire::BeatAnswer { wanted, deserted })
    }

    /// Whether some member of the step that `replica` works on does not work on it (any more).
    fn is_deserted(&self, replica: &str) -> bool {
        let Some((_, Order::Train { members, attempt, .. })) = self.desk.machine.order_of(replica) else {
            return false;
        };
        let works = |member: &str| {
            let order = self.desk.machine.order_of(member);
            matches!(order, Some((_, Order::Train { attempt: own, .. })) if own == attempt)
        };
        members.iter().any(|(member, _)| !works(member))
    }

    fn is_under_way(&self, replica: &str, order: OrderId) -> bool {
        self.desk.machine.order_of(replica).is_some_and(|(id, _)| id == order)
    }

    fn role_of(&self, replica: &str) -> Option<Role> {
        self.desk.seats.get(replica).map(|seat| seat.role)
    }

    fn done(&mut self, done: wire::Done) -> Answer {
        self.check(&done.who)?;
        let accepted = self.is_under_way(&done.who.replica, done.order);
        if accepted {
            if let Some(role) = self.role_of(&done.who.replica) {
                self.failures.remove(&role);
            }
            let event = Event::Done { replica: done.who.replica, order: done.order, outcome: done.outcome };
            self.commit(event, done.payload)?;
        }
        as_json(&wire::Reported { accepted })
    }

    fn failed(&mut self, failed: wire::Failed) -> Answer {
        self.check(&failed.who)?;
        let replica = failed.who.replica;
        let accepted = self.is_under_way(&replica, failed.order);
        if accepted {
            let reason = wire::short_reason(&failed.reason);
            tracing::warn!("`{replica}` could not carry out order {}: {reason}", failed.order.0);
            let role = self.role_of(&replica);
            let event = Event::Failed { replica, order: failed.order, reason: reason.clone() };
            self.commit(event, Value::Null)?;
            if let Some(role) = role {
                let count = self.failures.entry(role).or_default();
                *count += 1;
                if *count >= FAILURES_MAX {
                    self.fail(format!(
                        "{FAILURES_MAX} orders in a row failed at the role `{role}`, the last with: {reason}"
                    ));
                }
            }
        }
        as_json(&wire::Reported { accepted })
    }

    fn leave(&mut self, wire::Leave { who, asked }: wire::Leave) -> Answer {
        if asked && let Some(need) = self.only_it_meets(&who) {
            let last = need.called.clone();
            if !self.desk.machine.is_stopping() {
                tracing::warn!("`{}` was asked to leave and is the last {last}: the run is saved", who.replica);
                self.commit(Event::StopRequested, Value::Null)?;
            }
            self.seen(&who.replica);
            return as_json(&wire::LeaveAnswer { stay: true });
        }
        // Whoever is not there any more has left: asking twice is no error.
        if self.desk.seats.get(&who.replica).is_some_and(|seat| seat.incarnation == who.incarnation) {
            tracing::info!("`{}` left", who.replica);
            self.commit(Event::Removed { replica: who.replica.clone() }, Value::Null)?;
            self.contacts.remove(&who.replica);
        }
        as_json(&wire::LeaveAnswer::default())
    }

    /// What a run that is going on would lack without it: the policy's state would be lost, or others would wait in vain for
    /// what it was to bring.
    fn only_it_meets(&self, who: &wire::Who) -> Option<&Need> {
        let seat = self.desk.seats.get(&who.replica)?;
        if seat.incarnation != who.incarnation || seat.lost || self.desk.machine.ending().is_some() {
            return None;
        }
        let alone = |need: &&Need| {
            let mut others = self.desk.seats.iter().filter(|(name, other)| **name != who.replica && !other.lost);
            !others.any(|(name, other)| need.is_met_by(other.role, name))
        };
        self.needs.iter().filter(|need| need.is_met_by(seat.role, &who.replica)).find(alone)
    }

    fn recorded(&mut self, seq: u64) {
        self.unrecorded.retain(|report| report.seq > seq);
        // If this is lost, the owner is told the last ones again.
        if let Some(Err(error)) = self.ledger.as_mut().map(|ledger| ledger.append(&Record::Recorded { seq })) {
            tracing::warn!("{error}");
        }
    }

    fn compact(&mut self) -> Answer {
        let failed = |error: crate::ControlError| Refusal::new(507, "ledger", error.to_string());
        let Some(state) = self.desk.snapshot() else { return Ok(json!({"compacted": false})) };
        let mut records = vec![Record::Snapshot { seq: self.desk.seq, state }];
        records.extend(self.unrecorded.iter().map(|r| Record::Report { report: Box::new(r.clone()) }));
        let Some(ledger) = &self.ledger else { return Ok(json!({"compacted": false})) };
        let before = ledger.bytes();
        let new = ledger.again().and_then(|ledger| ledger.replaced(&records)).map_err(failed)?;
        tracing::debug!("ledger {}: {before} bytes are now {}", new.path().display(), new.bytes());
        self.ledger = Some(new);
        Ok(json!({"compacted": true}))
    }

    fn fail(&mut self, reason: String) {
        tracing::error!("the run fails: {reason}");
        self.fate.set(End::Failed(reason.clone()));
        for contact in self.contacts.values_mut() {
            if let Some((reply, _)) = contact.waiting.take() {
                let _ = reply.send(Err(Refusal::new(410, "run_failed", reason.clone())));
            }
        }
    }

    fn tick(&mut self) {
        self.expire();
        if self.fate.get().is_some() {
            return;
        }
        self.look_for_silence();
        self.look_for_the_end();
        if self.fate.get().is_none() && self.ending_since.is_none() {
            self.look_for_absence();
        }
    }

    fn look_for_silence(&mut self) {
        let now = Instant::now();
        let ms = |since: Instant| now.duration_since(since).as_millis() as u64;
        let mut events = Vec::new();
        for (replica, seat) in &self.desk.seats {
            let Some(contact) = self.contacts.get(replica) else { continue };
            let may_go = seat.role != Role::Policy || self.deadlines.policies_may_leave || self.ending_since.is_some();
            match contact.lost_since {
                // A long poll that is being held is no silence.
                None if contact.waiting.is_some() => {}
                None if ms(contact.seen) >= self.deadlines.silent_ms_max => {
                    tracing::warn!("`{replica}` has been silent for {} ms and is counted as lost", ms(contact.seen));
                    events.push(Event::Lost { replica: replica.clone() });
                }
                Some(since) if may_go && ms(since) >= self.deadlines.gone_ms_max => {
                    tracing::warn!("`{replica}` has been lost for {} ms: the run goes on without it", ms(since));
                    events.push(Event::Removed { replica: replica.clone() });
                }
                Some(since) if !may_go && ms(since) >= self.deadlines.absent_ms_max => {
                    let reason = format!(
                        "policy `{replica}` has been lost for {} ms, and the run may not go on without it \
                         (`host.policies_may_leave`)",
                        ms(since)
                    );
                    return self.fail(reason);
                }
                _ => {}
            }
        }
        for event in events {
            let (replica, removed) = match &event {
                Event::Removed { replica } => (replica.clone(), true),
                Event::Lost { replica } => (replica.clone(), false),
                _ => continue,
            };
            // If it cannot be written now, the next tick tries again.
            if self.commit(event, Value::Null).is_err() {
                return;
            }
            if removed {
                self.contacts.remove(&replica);
            } else if let Some(contact) = self.contacts.get_mut(&replica) {
                contact.lost_since = Some(now);
            }
        }
    }

    fn look_for_the_end(&mut self) {
        let Some(ending) = self.desk.machine.ending() else { return };
        let since = *self.ending_since.get_or_insert_with(Instant::now);
        let everybody_left = self.desk.seats.values().all(|seat| seat.lost);
        let late = since.elapsed().as_millis() as u64 >= self.deadlines.silent_ms_max + self.deadlines.gone_ms_max;
        if everybody_left || late {
            self.fate.set(match ending {
                Ending::Done => End::Done,
                Ending::Saved => End::Saved,
                Ending::GaveUp => End::Failed(format!("the controller gave up: {}", self.desk.machine.summary())),
            });
        }
    }

    fn look_for_absence(&mut self) {
        for (index, need) in self.needs.iter().enumerate() {
            if self.desk.seats.iter().any(|(name, seat)| !seat.lost && need.is_met_by(seat.role, name)) {
                self.absent_since.remove(&index);
                continue;
            }
            let since = *self.absent_since.entry(index).or_insert_with(Instant::now);
            let waited_ms = since.elapsed().as_millis() as u64;
            if waited_ms >= self.deadlines.absent_ms_max {
                let reason = format!("no {} has been there for {waited_ms} ms (`host.absent_ms_max`)", need.called);
                return self.fail(reason);
            }
        }
        self.look_for_missing_policies();
    }

    /// Policies that were planned and have never come, while others are there: after the same time the run goes on without
    /// them, or fails, as with one that was lost.
    fn look_for_missing_policies(&mut self) {
        let missing = self.desk.machine.policies_missing();
        if missing == 0 || !self.desk.seats.values().any(|seat| seat.role == Role::Policy) {
            self.missing_since = None;
            return;
        }
        let waited_ms = self.missing_since.get_or_insert_with(Instant::now).elapsed().as_millis() as u64;
        if waited_ms < self.deadlines.absent_ms_max {
            return;
        }
        if !self.deadlines.policies_may_leave {
            return self.fail(format!(
                "{missing} policies of those planned have not come for {waited_ms} ms (`host.absent_ms_max`), and the run \
                 may not go on without them (`host.policies_may_leave`)"
            ));
        }
        tracing::warn!("{missing} policies of those planned have not come for {waited_ms} ms: the run goes on without");
        // If it cannot be written now, the next tick tries again.
        if self.commit(Event::GoOnWithout { policies: missing }, Value::Null).is_ok() {
            self.missing_since = None;
        }
    }

    fn status(&self) -> Value {
        let replicas: Vec<Value> = self
            .desk
            .seats
            .iter()
            .map(|(name, seat)| {
                let contact = self.contacts.get(name);
                let order = self.desk.machine.order_of(name);
                let (kind, details) = order.as_ref().map(|(_, order)| describe(order)).unwrap_or_default();
                json!({
                    "name": name,
                    "role": seat.role.name(),
                    "state": if seat.lost { "lost" } else if order.is_some() { "busy" } else { "free" },
                    "order": order.as_ref().map(|(id, _)| id.0),
                    "doing": kind,
                    "details": details,
                    "for_ms": contact.and_then(|c| c.order_since).filter(|_| order.is_some())
                        .map(|(_, since)| since.elapsed().as_millis() as u64),
                    "progress": contact.map(|c| c.progress.as_str()).unwrap_or_default(),
                    "seen_ms_ago": contact.map(|c| if c.waiting.is_some() { 0 } else { c.seen.elapsed().as_millis() as u64 }),
                    "address": seat.address,
                })
            })
            .collect();
        json!({
            "state": match (self.fate.get(), self.desk.machine.ending()) {
                (Some(End::Failed(_)), _) => "failed",
                (Some(_), _) => "ended",
                (None, Some(_)) => "ending",
                (None, None) => "running",
            },
            "reason": match self.fate.get() { Some(End::Failed(reason)) => Some(reason), _ => None },
            "up_ms": self.started.elapsed().as_millis() as u64,
            "events": self.desk.seq,
            "ledger_bytes": self.ledger.as_ref().map(Ledger::bytes),
            "unrecorded_reports": self.unrecorded.len(),
            "version": self.identity.version,
            "run": self.desk.machine.summary(),
            "replicas": replicas,
        })
    }
}

fn as_json(value: &impl Serialize) -> Answer {
    serde_json::to_value(value).map_err(|e| Refusal::new(500, "internal", e.to_string()))
}

fn replaced(replica: &str) -> Refusal {
    Refusal::new(409, "replaced", format!("another process has joined as `{replica}` since"))
}

/// An order in a word and a few.
fn describe(order: &Order) -> (&'static str, String) {
    match order {
        Order::Generate { prompts, version, .. } => {
            ("generate", format!("{} prompts, weights {version}", prompts.len()))
        }
        Order::Train { step, share, members, .. } => {
            ("train", format!("step {step}, {} samples, {} members", share.len(), members.len()))
        }
        Order::Load { step, .. } => ("load", format!("step {step}")),
        Order::Save { step, hand_over, .. } => {
            ("save", format!("step {step}{}", if *hand_over { ", hand-over" } else { "" }))
        }
        Order::Validate { step, part, parts } => ("validate", format!("step {step}, part {} of {parts}", part + 1)),
        Order::Leave => ("leave", String::new()),
        Order::Finish => ("finish", String::new()),
    }
}
