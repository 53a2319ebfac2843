//! The broker inside one process: a mutex and a condition.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use crate::broker::{REQUEST_QUEUE, RESULT_STORE};
use crate::{
    Broker, BrokerError, BrokerLimits, BrokerStats, Clock, Completion, Delivery, Fetched, Result, SampleId,
    SystemClock, TeacherRequest, TeacherResult,
};

/// Longest sleep between two looks at the clock.
const SLEEP_MS_MAX: u64 = 1000;
/// How often results are looked through for expired ones.
const EXPIRE_EVERY_MS: u64 = 1000;

/// The broker inside one process. Share it in an `Arc`.
pub struct MemoryBroker {
    limits: BrokerLimits,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Samples that wait, oldest first. Each has an entry in `work` without a holder.
    waiting: VecDeque<SampleId>,
    /// Every request under way.
    work: HashMap<SampleId, Work>,
    outcomes: HashMap<SampleId, Outcome>,
    closed: bool,
    deliveries: u64,
    expire_at_ms: u64,
    counters: BrokerStats,
}

struct Work {
    request: Arc<TeacherRequest>,
    published_ms: u64,
    attempts: u32,
    held_since_ms: Option<u64>,
}

struct Outcome {
    since_ms: u64,
    weight_version: u64,
    result: std::result::Result<TeacherResult, String>,
}

impl Default for MemoryBroker {
    fn default() -> MemoryBroker {
        MemoryBroker::new(BrokerLimits::default())
    }
}

impl MemoryBroker {
    /// An empty broker on the machine's clock.
    pub fn new(limits: BrokerLimits) -> MemoryBroker {
        MemoryBroker::with_clock(limits, Arc::new(SystemClock::default()))
    }

    /// An empty broker on another clock.
    pub fn with_clock(limits: BrokerLimits, clock: Arc<dyn Clock>) -> MemoryBroker {
        MemoryBroker { limits, clock, state: Mutex::default(), changed: Condvar::new() }
    }

    /// The state, with expired results dropped.
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change below is complete before anything can panic, so a poisoned lock holds a sound state.
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let now = self.clock.now_ms();
        if now >= state.expire_at_ms {
            state.expire_at_ms = now.saturating_add(EXPIRE_EVERY_MS.min(self.limits.result_ms_max));
            state.expire(now, self.limits.result_ms_max);
        }
        state
    }

    /// Sleeps until something changes; none when the deadline has passed.
    fn sleep<'a>(&self, state: MutexGuard<'a, State>, deadline_ms: u64) -> Option<MutexGuard<'a, State>> {
        let left_ms = deadline_ms.saturating_sub(self.clock.now_ms()).min(SLEEP_MS_MAX);
        if left_ms == 0 {
            return None;
        }
        let woken = self.changed.wait_timeout(state, Duration::from_millis(left_ms));
        Some(woken.unwrap_or_else(|poisoned| poisoned.into_inner()).0)
    }

    fn finish(&self, delivery: &Delivery, result: std::result::Result<TeacherResult, String>) -> Result<Completion> {
        let now = self.clock.now_ms();
        let sample = delivery.request.sample;
        let mut state = self.state();
        // The sample may have been forgotten and published anew: then this answers the wrong request.
        if !state.work.get(&sample).is_some_and(|work| Arc::ptr_eq(&work.request, &delivery.request)) {
            state.counters.duplicates += 1;
            return Ok(Completion::Duplicate);
        }
        if state.outcomes.len() >= self.limits.results_max {
            let (held, max) = (state.outcomes.len(), self.limits.results_max);
            return Err(BrokerError::QueueFull { queue: RESULT_STORE, held, max, waited_ms: 0 });
        }
        state.settle(sample, now, result);
        drop(state);
        self.changed.notify_all();
        Ok(Completion::Stored)
    }
}

impl State {
    /// Lets go of the request and keeps what became of it.
    fn settle(&mut self, sample: SampleId, now: u64, result: std::result::Result<TeacherResult, String>) {
        let Some(work) = self.work.remove(&sample) else { return };
        if work.held_since_ms.is_none() {
            self.waiting.retain(|id| *id != sample);
        }
        match &result {
            Ok(_) => {
                let latency = now.saturating_sub(work.published_ms);
                self.counters.completed += 1;
                self.counters.latency_ms_sum += latency;
                self.counters.latency_ms_max = self.counters.latency_ms_max.max(latency);
            }
            Err(_) => self.counters.failed += 1,
        }
        let outcome = Outcome { since_ms: now, weight_version: work.request.weight_version, result };
        self.outcomes.insert(sample, outcome);
    }

    fn expire(&mut self, now: u64, keep_ms: u64) {
        let before = self.outcomes.len();
        self.outcomes.retain(|_, outcome| now.saturating_sub(outcome.since_ms) < keep_ms);
        self.counters.expired += (before - self.outcomes.len()) as u64;
    }

    /// The weight version of a sample that the broker knows, and whether `request` is a mere copy of what it holds.
    fn known(&self, request: &TeacherRequest) -> Option<(u64, bool)> {
        if let Some(work) = self.work.get(&request.sample) {
            return Some((work.request.weight_version, *work.request == *request));
        }
        let outcome = self.outcomes.get(&request.sample)?;
        Some((outcome.weight_version, outcome.weight_version == request.weight_version))
    }
}

impl Broker for MemoryBroker {
    fn publish(&self, request: TeacherRequest, wait_ms_max: u64) -> Result<()> {
        request.check()?;
        let begun_ms = self.clock.now_ms();
        let mut state = self.state();
        loop {
            if state.closed {
                return Err(BrokerError::Closed { queue: REQUEST_QUEUE });
            }
            match state.known(&request) {
                Some((_, true)) => return Ok(()),
                Some((held_version, false)) => {
                    let (sample, new_version) = (request.sample, request.weight_version);
                    return Err(BrokerError::SampleInUse { sample, held_version, new_version });
                }
                None => {}
            }
            if state.work.len() < self.limits.requests_max {
                break;
            }
            let held = state.work.len();
            state = self.sleep(state, begun_ms.saturating_add(wait_ms_max)).ok_or_else(|| BrokerError::QueueFull {
                queue: REQUEST_QUEUE,
                held,
                max: self.limits.requests_max,
                waited_ms: self.clock.now_ms().saturating_sub(begun_ms),
            })?;
        }
        let sample = request.sample;
        let published_ms = self.clock.now_ms();
        let work = Work { request: Arc::new(request), published_ms, attempts: 0, held_since_ms: None };
        state.work.insert(sample, work);
        state.waiting.push_back(sample);
        state.counters.published += 1;
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn take(&self, _consumer: &str, max: usize, wait_ms_max: u64) -> Result<Vec<Delivery>> {
        let deadline_ms = self.clock.now_ms().saturating_add(wait_ms_max);
        let mut state = self.state();
        while state.waiting.is_empty() {
            if state.closed {
                return Err(BrokerError::Closed { queue: REQUEST_QUEUE });
            }
            match self.sleep(state, deadline_ms) {
                Some(woken) => state = woken,
                None => return Ok(Vec::new()),
            }
        }
        let now = self.clock.now_ms();
        let state = &mut *state;
        let mut taken = Vec::new();
        while taken.len() < max
            && let Some(sample) = state.waiting.pop_front()
        {
            // Every sample that waits has its work.
            let Some(work) = state.work.get_mut(&sample) else { continue };
            work.attempts += 1;
            work.held_since_ms = Some(now);
            state.deliveries += 1;
            taken.push(Delivery {
                id: state.deliveries,
                attempt: work.attempts,
                request: work.request.clone(),
                ticket: String::new(),
            });
        }
        Ok(taken)
    }

    fn complete(&self, delivery: &Delivery, result: TeacherResult) -> Result<Completion> {
        result.check(&delivery.request)?;
        self.finish(delivery, Ok(result))
    }

    fn fail(&self, delivery: &Delivery, reason: &str) -> Result<Completion> {
        self.finish(delivery, Err(reason.to_owned()))
    }

    fn reclaim(&self, idle_ms: u64) -> Result<usize> {
        let now = self.clock.now_ms();
        let mut state = self.state();
        let idle = |work: &Work| work.held_since_ms.is_some_and(|since| now.saturating_sub(since) >= idle_ms);
        let mut silent: Vec<(u64, SampleId)> =
            state.work.iter().filter(|(_, w)| idle(w)).map(|(id, w)| (w.published_ms, *id)).collect();
        // Newest first, each to the front: the oldest is handed out first again.
        silent.sort_by(|a, b| b.cmp(a));
        let mut back = 0;
        for (_, sample) in silent {
            let Some(work) = state.work.get_mut(&sample) else { continue };
            if work.attempts >= self.limits.deliveries_max {
                let reason = format!("given up: {} teachers took it and none answered", work.attempts);
                state.settle(sample, now, Err(reason));
            } else {
                work.held_since_ms = None;
                state.waiting.push_front(sample);
                state.counters.reclaimed += 1;
                back += 1;
            }
        }
        drop(state);
        self.changed.notify_all();
        Ok(back)
    }

    fn fetch(&self, ids: &[SampleId], wait_ms_max: u64) -> Result<Fetched> {
        let deadline_ms = self.clock.now_ms().saturating_add(wait_ms_max);
        let mut state = self.state();
        while !ids.iter().all(|id| state.outcomes.contains_key(id)) {
            // A closed broker still waits for what consumers hold, and for nothing else.
            if state.closed && ids.iter().all(|id| !state.work.contains_key(id)) {
                break;
            }
            match self.sleep(state, deadline_ms) {
                Some(woken) => state = woken,
                None => {
                    state = self.state();
                    break;
                }
            }
        }
        Ok(Fetched::of(ids, |id| state.outcomes.remove(id).map(|outcome| outcome.result)))
    }

    fn forget(&self, ids: &[SampleId]) -> Result<()> {
        let mut state = self.state();
        let gone: HashSet<&SampleId> = ids.iter().collect();
        state.work.retain(|id, _| !gone.contains(id));
        state.outcomes.retain(|id, _| !gone.contains(id));
        state.waiting.retain(|id| !gone.contains(id));
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.state().closed = true;
        self.changed.notify_all();
        Ok(())
    }

    fn stats(&self) -> Result<BrokerStats> {
        let state = self.state();
        let now = self.clock.now_ms();
        let oldest = state.waiting.front().and_then(|id| state.work.get(id));
        Ok(BrokerStats {
            waiting: state.waiting.len(),
            delivered: state.work.len() - state.waiting.len(),
            results: state.outcomes.len(),
            oldest_waiting_ms: oldest.map_or(0, |work| now.saturating_sub(work.published_ms)),
            ..state.counters
        })
    }
}

#[cfg(test)]
mod tests;
