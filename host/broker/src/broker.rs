//! What every broker does, in one process or between many.

use std::collections::HashSet;
use std::sync::Arc;

use crate::{Result, SampleId, TeacherRequest, TeacherResult};

pub(crate) const REQUEST_QUEUE: &str = "teacher requests";
pub(crate) const RESULT_STORE: &str = "teacher results";

/// A request in the hands of a consumer.
#[derive(Debug, Clone, PartialEq)]
pub struct Delivery {
    /// Which delivery it is; a request that is handed out again is another delivery.
    pub id: u64,
    /// How often the request was handed out, this time included.
    pub attempt: u32,
    /// The request.
    pub request: Arc<TeacherRequest>,
    /// What the broker itself knows it by.
    pub(crate) ticket: String,
}

/// What became of a completed delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// The result is there to be fetched.
    Stored,
    /// Somebody else was faster, or the sample was forgotten: the result was dropped.
    Duplicate,
}

/// What came of a sample: its result, or why there will be none.
pub(crate) type Scored = std::result::Result<TeacherResult, String>;

/// The answer to [`Broker::fetch`]: every id asked for is in exactly one of the lists.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fetched {
    /// Results, in the order asked for. The broker has let go of them.
    pub results: Vec<TeacherResult>,
    /// Samples that will have no result, with the reason. The broker has let go of them.
    pub failed: Vec<(SampleId, String)>,
    /// Samples without a result so far; they can be asked for again.
    pub missing: Vec<SampleId>,
}

impl Fetched {
    /// What `take` has of `ids`, each of which is asked for once.
    pub(crate) fn of(ids: &[SampleId], mut take: impl FnMut(&SampleId) -> Option<Scored>) -> Fetched {
        let mut fetched = Fetched::default();
        let mut seen = HashSet::with_capacity(ids.len());
        for id in ids.iter().filter(|id| seen.insert(**id)) {
            match take(id) {
                Some(Ok(result)) => fetched.results.push(result),
                Some(Err(reason)) => fetched.failed.push((*id, reason)),
                None => fetched.missing.push(*id),
            }
        }
        fetched
    }
}

/// How much a broker holds, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BrokerLimits {
    /// Requests waiting or in the hands of a consumer.
    pub requests_max: usize,
    /// Results that nobody has fetched.
    pub results_max: usize,
    /// How long a result is kept.
    pub result_ms_max: u64,
    /// How often a request is handed out before it is given up: one that kills its teacher must not kill them all.
    pub deliveries_max: u32,
}

impl Default for BrokerLimits {
    fn default() -> BrokerLimits {
        BrokerLimits { requests_max: 65_536, results_max: 262_144, result_ms_max: 2 * 3600 * 1000, deliveries_max: 5 }
    }
}

/// Numbers for the metrics. The counters only rise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BrokerStats {
    /// Requests that wait for a consumer.
    pub waiting: usize,
    /// Requests in the hands of a consumer.
    pub delivered: usize,
    /// Results (and failures) that nobody has fetched.
    pub results: usize,
    /// Age of the oldest request that waits.
    pub oldest_waiting_ms: u64,
    /// Requests taken in.
    pub published: u64,
    /// Results stored.
    pub completed: u64,
    /// Results dropped because another came first.
    pub duplicates: u64,
    /// Requests handed out again after their consumer went silent.
    pub reclaimed: u64,
    /// Requests that a teacher refused or that were given up.
    pub failed: u64,
    /// Results dropped because nobody fetched them in time.
    pub expired: u64,
    /// Messages that were damaged, foreign or of another version: dropped, logged, and kept for inspection.
    pub rejected: u64,
    /// Milliseconds from publishing to storing the result, summed over [`BrokerStats::completed`].
    pub latency_ms_sum: u64,
    /// The longest of them.
    pub latency_ms_max: u64,
    /// Tokens that consumers say went through their models ([`Broker::worked`]).
    pub scored_tokens: u64,
    /// Milliseconds that took, summed over the consumers.
    pub scored_ms: u64,
}

/// The teacher's queue and results: delivery at least once, every result available exactly once.
///
/// Every wait has a deadline (`wait_ms_max`, 0 to return at once).
pub trait Broker: Send + Sync {
    /// Queues a request. Waits while the queue is full. A second copy of a request that is under way changes nothing.
    ///
    /// # Errors
    /// `QueueFull` at the deadline, `Closed`, `BadMessage`, `SampleInUse` for another request of a sample that is under way.
    fn publish(&self, request: TeacherRequest, wait_ms_max: u64) -> Result<()>;

    /// Hands out up to `max` requests, oldest first. Waits for the first one only; none at the deadline.
    ///
    /// # Errors
    /// `Closed` when the broker is closed and nothing waits.
    fn take(&self, consumer: &str, max: usize, wait_ms_max: u64) -> Result<Vec<Delivery>>;

    /// Stores the result of a delivery under its sample and then lets go of the request. A late or second result is dropped.
    ///
    /// # Errors
    /// `BadMessage` when the result does not answer the request, `QueueFull` when too many results are unfetched; the
    /// request is then still under way.
    fn complete(&self, delivery: &Delivery, result: TeacherResult) -> Result<Completion>;

    /// Says that a request cannot be scored, so that it is not handed out again and nobody waits for it.
    ///
    /// # Errors
    /// As [`Broker::complete`].
    fn fail(&self, delivery: &Delivery, reason: &str) -> Result<Completion>;

    /// Puts back requests that their consumers have held for `idle_ms` or longer; returns how many. One that was handed out
    /// too often fails instead.
    ///
    /// # Errors
    /// Those of the transport.
    fn reclaim(&self, idle_ms: u64) -> Result<usize>;

    /// Puts back what `consumer` holds, however short a time: for a process that begins under the name of one that has died.
    /// A broker whose requests do not outlive its consumers has nothing to put back.
    ///
    /// # Errors
    /// Those of the transport.
    fn reclaim_from(&self, _consumer: &str) -> Result<usize> {
        Ok(0)
    }

    /// Takes the results of `ids` out of the broker. Waits until all are there or have failed, or the deadline passes.
    ///
    /// # Errors
    /// Those of the transport; a missing result is none.
    fn fetch(&self, ids: &[SampleId], wait_ms_max: u64) -> Result<Fetched>;

    /// Lets go of samples that nobody will fetch (discarded as outdated): requests and results.
    ///
    /// # Errors
    /// Those of the transport.
    fn forget(&self, ids: &[SampleId]) -> Result<()>;

    /// Takes in no more requests. Those that wait are still handed out; waits end.
    ///
    /// # Errors
    /// Those of the transport.
    fn close(&self) -> Result<()>;

    /// A consumer says what a batch cost it, for the metrics of whoever reads [`Broker::stats`]. A queue within one process
    /// need not keep it: both ends are there.
    ///
    /// # Errors
    /// Those of the transport.
    fn worked(&self, _tokens: u64, _ms: u64) -> Result<()> {
        Ok(())
    }

    /// How full the queues are and what has passed through.
    ///
    /// # Errors
    /// Those of the transport.
    fn stats(&self) -> Result<BrokerStats>;
}
