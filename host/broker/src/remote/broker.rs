//! The broker between processes: a stream with a consumer group, and a record of every sample under way.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::RedisLink;
use super::scripts::{GROUP, RECLAIMED, Scripts};
use crate::broker::{REQUEST_QUEUE, RESULT_STORE, Scored};
use crate::wire::frame::FrameLimits;
use crate::wire::native::{self, WireFloats};
use crate::{
    Broker, BrokerError, BrokerLimits, BrokerStats, Completion, Delivery, Fetched, Result, SampleId, TeacherRequest,
    TeacherResult,
};

/// How long the keys of a run that nobody touches stay in the server.
const KEEP_MS: u64 = 24 * 3600 * 1000;
/// Longest wait for an entry without a look at what else has happened.
const BLOCK_MS_MAX: u64 = 250;
/// A result of so few bytes is stored even when the server is full: its request makes room for it.
const SMALL_BYTES: usize = 64 << 10;
/// Rejected messages that are kept for inspection, and how much of each.
const REJECTED_MAX: usize = 100;
const REJECTED_BYTES_MAX: usize = 4096;
/// Samples of one command.
const SAMPLES_AT_ONCE: usize = 512;
/// Results that are fetched with one command: they lie in memory together.
const RESULTS_AT_ONCE: usize = 32;

/// Which queue of which run, and how much it takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueOptions {
    /// The run: all its keys begin with it.
    pub prefix: String,
    /// The queue: the name of the teacher that reads it.
    pub queue: String,
    /// How much it takes.
    pub limits: BrokerLimits,
    /// The format of the results' floats, for those who write them.
    pub floats: WireFloats,
    /// The largest message.
    pub frame: FrameLimits,
}

impl QueueOptions {
    /// The queue of a teacher with the usual limits.
    pub fn new(prefix: &str, queue: &str) -> QueueOptions {
        QueueOptions {
            prefix: prefix.into(),
            queue: queue.into(),
            limits: BrokerLimits::default(),
            floats: WireFloats::default(),
            frame: FrameLimits::default(),
        }
    }
}

/// A message that could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// Why.
    pub reason: String,
    /// Its first bytes.
    pub bytes: Vec<u8>,
}

/// [`Broker`] in Redis, for any number of processes.
///
/// A request leaves the stream in the same step that stores its result. Publishing again what is missing is always safe: it
/// changes nothing while the request is under way, and heals what a server that was restarted empty has lost.
/// A fetched result is deleted after it has arrived, so one that was read by a process that died can be fetched again.
pub struct RedisBroker {
    link: Arc<RedisLink>,
    options: QueueOptions,
    base: String,
    scripts: Scripts,
    deliveries: AtomicU64,
}

/// An entry of the stream: its id, how often it was handed out, field names and values in turn.
type Entry = (String, u32, Vec<Vec<u8>>);

/// Growing pauses to a deadline.
pub(super) struct Pace {
    begun: Instant,
    max: Duration,
    pause: Duration,
}

impl Pace {
    pub(super) fn new(wait_ms_max: u64) -> Pace {
        Pace { begun: Instant::now(), max: Duration::from_millis(wait_ms_max), pause: Duration::from_millis(5) }
    }

    pub(super) fn left(&self) -> Duration {
        self.max.saturating_sub(self.begun.elapsed())
    }

    pub(super) fn waited_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Sleeps a while; false when the deadline has passed.
    pub(super) fn sleep(&mut self) -> bool {
        let left = self.left();
        if left.is_zero() {
            return false;
        }
        std::thread::sleep(self.pause.min(left));
        self.pause = (self.pause * 2).min(Duration::from_millis(100));
        true
    }
}

/// Each of them once, in their order.
pub(super) fn unique(ids: &[SampleId]) -> Vec<SampleId> {
    let mut seen = HashSet::with_capacity(ids.len());
    ids.iter().copied().filter(|id| seen.insert(*id)).collect()
}

/// The answer of a fetch that has read `found` of `ids`, and lets go of that.
pub(super) fn arrived(broker: &dyn Broker, ids: &[SampleId], mut found: HashMap<SampleId, Scored>) -> Fetched {
    let taken: Vec<SampleId> = ids.iter().copied().filter(|id| found.contains_key(id)).collect();
    // They are here; whether the server hears that they may go is its own affair, they expire.
    if let Err(error) = broker.forget(&taken) {
        tracing::warn!("fetched results could not be deleted and stay until they expire: {error}");
    }
    Fetched::of(ids, |id| found.remove(id))
}

impl RedisBroker {
    /// The broker on a queue.
    pub fn new(link: Arc<RedisLink>, options: QueueOptions) -> RedisBroker {
        let base = format!("{}:teacher:{}", options.prefix, options.queue);
        RedisBroker { link, options, base, scripts: Scripts::new(), deliveries: AtomicU64::new(0) }
    }

    fn key(&self, name: &str) -> String {
        format!("{}:{name}", self.base)
    }

    fn sample_key(&self, sample: SampleId) -> String {
        format!("{}:s:{}", self.base, sample.to_uuid())
    }

    /// The last messages that could not be read, oldest first, to a hundred.
    ///
    /// # Errors
    /// Those of the transport.
    pub fn rejected(&self) -> Result<Vec<Rejected>> {
        let flat: Vec<Vec<u8>> = self.link.run("reading rejected messages", |c| {
            redis::cmd("LRANGE").arg(self.key("rejected")).arg(0).arg(-1).query(c)
        })?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(flat.chunks_exact(2).map(|pair| Rejected { reason: text(&pair[0]), bytes: pair[1].clone() }).collect())
    }

    /// Moves a message that cannot be read out of the way: logged, counted, its beginning kept.
    fn reject(&self, entry: &str, bytes: &[u8], reason: &str) -> Result<()> {
        tracing::warn!("redis `{}`, queue `{}`: message dropped: {reason}", self.link.address(), self.options.queue);
        let head = &bytes[..bytes.len().min(REJECTED_BYTES_MAX)];
        self.link.run("rejecting a message", |c| {
            self.scripts
                .reject
                .key(self.key("requests"))
                .key(self.key("rejected"))
                .key(self.key("counters"))
                .arg(GROUP)
                .arg(entry)
                .arg(head)
                .arg(reason)
                .arg(REJECTED_MAX)
                .arg(KEEP_MS)
                .invoke::<i64>(c)
        })?;
        Ok(())
    }

    /// The requests of entries. What is no request of this run is rejected; its sample, if it has one, is forgotten, so that
    /// publishing it again heals it.
    fn deliveries(&self, entries: Vec<Entry>) -> Result<Vec<Delivery>> {
        let mut read = Vec::with_capacity(entries.len());
        for (ticket, attempt, fields) in entries {
            let field =
                |name: &[u8]| fields.chunks_exact(2).find(|pair| pair[0] == name).map(|pair| pair[1].as_slice());
            let sample = field(b"s").and_then(|s| SampleId::from_uuid(std::str::from_utf8(s).ok()?));
            let frame = field(b"f").unwrap_or_default();
            let request = match (sample, native::decode_request(frame, &self.options.frame)) {
                (Some(sample), Ok(request)) if request.sample == sample => Ok(request),
                (Some(sample), Ok(request)) => {
                    Err(format!("entry `{ticket}` of sample `{sample}` holds sample `{}`", request.sample))
                }
                (Some(sample), Err(error)) => Err(format!("entry `{ticket}` of sample `{sample}`: {error}")),
                (None, _) => Err(format!("entry `{ticket}` is foreign: it has no field `s` with a UUID")),
            };
            read.push((ticket, attempt, sample, fields, request));
        }
        let holders: Vec<Option<String>> = if read.is_empty() {
            Vec::new()
        } else {
            self.link.run("looking up samples", |c| {
                let mut pipe = redis::pipe();
                for (_, _, sample, _, _) in &read {
                    pipe.cmd("HGET").arg(self.sample_key(sample.unwrap_or_default())).arg("e");
                }
                pipe.query(c)
            })?
        };
        let mut deliveries = Vec::with_capacity(read.len());
        for ((ticket, attempt, sample, fields, request), holder) in read.into_iter().zip(holders) {
            let known = holder.as_deref() == Some(ticket.as_str());
            match request {
                Ok(request) if known => {
                    let id = self.deliveries.fetch_add(1, Ordering::Relaxed) + 1;
                    deliveries.push(Delivery { id, attempt, request: Arc::new(request), ticket });
                }
                Ok(request) => {
                    let reason = format!("entry `{ticket}` is a copy, or nobody waits for sample `{}`", request.sample);
                    self.reject(&ticket, &fields.concat(), &reason)?;
                }
                Err(reason) => {
                    self.reject(&ticket, &fields.concat(), &reason)?;
                    if let Some(sample) = sample.filter(|_| known) {
                        self.forget(&[sample])?;
                    }
                }
            }
        }
        Ok(deliveries)
    }

    /// Waits for an entry that nobody has had yet.
    fn wait_for_entry(&self, consumer: &str, max: usize, wait: Duration) -> Result<Vec<Entry>> {
        type Streams = Option<Vec<(String, Vec<(String, Vec<Vec<u8>>)>)>>;
        let block_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).clamp(1, BLOCK_MS_MAX);
        let streams: Streams = self.link.run("waiting for requests", |c| {
            let mut command = redis::cmd("XREADGROUP");
            command.arg("GROUP").arg(GROUP).arg(consumer).arg("COUNT").arg(max).arg("BLOCK").arg(block_ms);
            match command.arg("STREAMS").arg(self.key("requests")).arg(">").query(c) {
                // The stream has gone with the whole server's memory, or by hand: `take` makes it again.
                Err(error) if matches!(error.code(), Some("NOGROUP" | "UNBLOCKED")) => Ok(None),
                other => other,
            }
        })?;
        let entries = streams.unwrap_or_default().into_iter().flat_map(|(_, entries)| entries);
        Ok(entries.map(|(id, fields)| (id, 1, fields)).collect())
    }

    fn settle(&self, sample: SampleId, entry: &str, field: &str, frame: &[u8]) -> Result<Completion> {
        let limits = &self.options.limits;
        let (answer, held): (String, usize) = self.link.run("storing a result", |c| {
            self.scripts
                .settle
                .key(self.key("requests"))
                .key(self.sample_key(sample))
                .key(self.key("counters"))
                .key(self.key("results"))
                .arg(GROUP)
                .arg(entry)
                .arg(field)
                .arg(frame)
                .arg(limits.result_ms_max.clamp(1, KEEP_MS))
                .arg(limits.results_max)
                .arg(sample.to_uuid())
                .arg(KEEP_MS)
                .arg(u8::from(frame.len() <= SMALL_BYTES))
                .invoke(c)
        })?;
        match answer.as_str() {
            "stored" => Ok(Completion::Stored),
            "duplicate" => Ok(Completion::Duplicate),
            _ => Err(BrokerError::QueueFull { queue: RESULT_STORE, held, max: limits.results_max, waited_ms: 0 }),
        }
    }

    fn checked(&self, sample: SampleId, frame: Vec<u8>) -> Result<Vec<u8>> {
        if frame.len() <= self.options.frame.bytes_max {
            return Ok(frame);
        }
        let key = format!("sample {sample}");
        Err(BrokerError::TooLarge { key, bytes: frame.len() as u64, max: self.options.frame.bytes_max as u64 })
    }

    /// Which of `ids` have an outcome.
    fn ready(&self, ids: &[SampleId]) -> Result<Vec<SampleId>> {
        let mut ready = Vec::new();
        for some in ids.chunks(SAMPLES_AT_ONCE) {
            let scores: Vec<Option<f64>> = self.link.run("looking for results", |c| {
                let mut command = redis::cmd("ZMSCORE");
                command.arg(self.key("results"));
                some.iter().for_each(|id| {
                    command.arg(id.to_uuid());
                });
                command.query(c)
            })?;
            ready.extend(some.iter().zip(scores).filter(|(_, score)| score.is_some()).map(|(id, _)| *id));
        }
        Ok(ready)
    }

    /// Reads the outcomes of `ids` into `found`. A damaged one is rejected and forgotten.
    fn read(&self, ids: &[SampleId], found: &mut HashMap<SampleId, Scored>) -> Result<()> {
        type Outcome = (Option<Vec<u8>>, Option<Vec<u8>>, Option<u64>);
        for some in ids.chunks(RESULTS_AT_ONCE) {
            let outcomes: Vec<Outcome> = self.link.run("fetching results", |c| {
                let mut pipe = redis::pipe();
                for id in some {
                    pipe.cmd("HMGET").arg(self.sample_key(*id)).arg("r").arg("x").arg("v");
                }
                pipe.query(c)
            })?;
            for (id, (result, failure, version)) in some.iter().zip(outcomes) {
                let frame = &self.options.frame;
                let (bytes, outcome) = match (result, failure) {
                    (Some(bytes), _) => {
                        let outcome =
                            native::decode_result(&bytes, frame).map(|r| (r.sample, Some(r.weight_version), Ok(r)));
                        (bytes, outcome)
                    }
                    (None, Some(bytes)) => {
                        let outcome =
                            native::decode_failure(&bytes, frame).map(|(s, reason)| (s, version, Err(reason)));
                        (bytes, outcome)
                    }
                    // It expired between the two questions.
                    (None, None) => continue,
                };
                let reason = match outcome {
                    Ok((sample, v, outcome)) if sample == *id && v == version => {
                        found.insert(*id, outcome);
                        continue;
                    }
                    Ok((sample, _, _)) => {
                        format!("the result of sample `{id}` is one of sample `{sample}` or of other weights")
                    }
                    Err(error) => format!("the result of sample `{id}`: {error}"),
                };
                self.reject("", &bytes, &reason)?;
                self.forget(&[*id])?;
            }
        }
        Ok(())
    }

    /// Whether the queue is closed and none of `ids` is under way.
    fn over(&self, ids: &[SampleId]) -> Result<bool> {
        let closed: bool = self
            .link
            .run("asking whether the queue is closed", |c| redis::cmd("EXISTS").arg(self.key("closed")).query(c))?;
        if !closed {
            return Ok(false);
        }
        let under_way: Vec<bool> = self.link.run("looking for requests", |c| {
            let mut pipe = redis::pipe();
            for id in ids {
                pipe.cmd("HEXISTS").arg(self.sample_key(*id)).arg("e");
            }
            pipe.query(c)
        })?;
        Ok(!under_way.contains(&true))
    }

    /// Puts back what has been held for `idle_ms`, by `consumer` or, if that is empty, by anybody.
    fn put_back(&self, idle_ms: u64, consumer: &str) -> Result<usize> {
        let (back, given_up): (usize, Vec<Entry>) = self.link.run("reclaiming requests", |c| {
            self.scripts
                .reclaim
                .key(self.key("requests"))
                .key(self.key("counters"))
                .arg(GROUP)
                .arg(idle_ms.min(KEEP_MS))
                .arg(self.options.limits.deliveries_max)
                .arg(RECLAIMED)
                .arg(consumer)
                .invoke(c)
        })?;
        for (entry, attempts, fields) in given_up {
            let uuid = fields.chunks_exact(2).find(|pair| pair[0] == b"s").map(|pair| pair[1].as_slice());
            let sample = uuid.and_then(|s| SampleId::from_uuid(std::str::from_utf8(s).ok()?));
            match sample {
                Some(sample) => {
                    let reason = format!("given up: {attempts} teachers took it and none answered");
                    self.settle(sample, &entry, "x", &native::encode_failure(sample, &reason))?;
                }
                None => self.reject(&entry, &fields.concat(), &format!("entry `{entry}` is foreign"))?,
            }
        }
        Ok(back)
    }
}

impl Broker for RedisBroker {
    fn publish(&self, request: TeacherRequest, wait_ms_max: u64) -> Result<()> {
        request.check()?;
        let sample = request.sample;
        let frame = self.checked(sample, native::encode_request(&request))?;
        let digest = format!("{:08x}-{:x}", crc32c::crc32c(&frame), frame.len());
        let max = self.options.limits.requests_max;
        let mut pace = Pace::new(wait_ms_max);
        loop {
            let left_ms = u64::try_from(pace.left().as_millis()).unwrap_or(u64::MAX);
            let (answer, number): (String, u64) = self.link.run_for("publishing a request", left_ms, |c| {
                self.scripts
                    .publish
                    .key(self.key("requests"))
                    .key(self.sample_key(sample))
                    .key(self.key("counters"))
                    .key(self.key("closed"))
                    .arg(&frame)
                    .arg(request.weight_version)
                    .arg(&digest)
                    .arg(sample.to_uuid())
                    .arg(max)
                    .arg(KEEP_MS)
                    .invoke(c)
            })?;
            match answer.as_str() {
                "queued" | "known" => return Ok(()),
                "closed" => return Err(BrokerError::Closed { queue: REQUEST_QUEUE }),
                "in use" => {
                    let new_version = request.weight_version;
                    return Err(BrokerError::SampleInUse { sample, held_version: number, new_version });
                }
                _ => {}
            }
            if !pace.sleep() {
                let held = usize::try_from(number).unwrap_or(usize::MAX);
                return Err(BrokerError::QueueFull { queue: REQUEST_QUEUE, held, max, waited_ms: pace.waited_ms() });
            }
        }
    }

    fn take(&self, consumer: &str, max: usize, wait_ms_max: u64) -> Result<Vec<Delivery>> {
        let pace = Pace::new(wait_ms_max);
        loop {
            let (closed, entries): (bool, Vec<Entry>) = self.link.run("taking requests", |c| {
                self.scripts
                    .take
                    .key(self.key("requests"))
                    .key(self.key("closed"))
                    .arg(GROUP)
                    .arg(consumer)
                    .arg(max)
                    .arg(RECLAIMED)
                    .invoke(c)
            })?;
            let none = entries.is_empty();
            let deliveries = self.deliveries(entries)?;
            if !deliveries.is_empty() || max == 0 {
                return Ok(deliveries);
            }
            if closed && none {
                return Err(BrokerError::Closed { queue: REQUEST_QUEUE });
            }
            let left = pace.left();
            if left.is_zero() {
                return Ok(deliveries);
            }
            let entries = self.wait_for_entry(consumer, max, left)?;
            let deliveries = self.deliveries(entries)?;
            if !deliveries.is_empty() {
                return Ok(deliveries);
            }
        }
    }

    fn complete(&self, delivery: &Delivery, result: TeacherResult) -> Result<Completion> {
        result.check(&delivery.request)?;
        let frame = self.checked(result.sample, native::encode_result(&result, self.options.floats))?;
        self.settle(delivery.request.sample, &delivery.ticket, "r", &frame)
    }

    fn fail(&self, delivery: &Delivery, reason: &str) -> Result<Completion> {
        let sample = delivery.request.sample;
        self.settle(sample, &delivery.ticket, "x", &native::encode_failure(sample, reason))
    }

    fn reclaim(&self, idle_ms: u64) -> Result<usize> {
        self.put_back(idle_ms, "")
    }

    fn reclaim_from(&self, consumer: &str) -> Result<usize> {
        self.put_back(0, consumer)
    }

    fn fetch(&self, ids: &[SampleId], wait_ms_max: u64) -> Result<Fetched> {
        let ids = unique(ids);
        let mut pace = Pace::new(wait_ms_max);
        let mut found = HashMap::with_capacity(ids.len());
        loop {
            let missing: Vec<SampleId> = ids.iter().copied().filter(|id| !found.contains_key(id)).collect();
            let ready = self.ready(&missing)?;
            self.read(&ready, &mut found)?;
            if found.len() == ids.len() {
                break;
            }
            if !ready.is_empty() {
                continue;
            }
            if self.over(&missing)? || !pace.sleep() {
                break;
            }
        }
        Ok(arrived(self, &ids, found))
    }

    fn forget(&self, ids: &[SampleId]) -> Result<()> {
        for some in ids.chunks(SAMPLES_AT_ONCE) {
            self.link.run("forgetting samples", |c| {
                let mut call = self.scripts.forget.key(self.key("requests"));
                call.key(self.key("results")).arg(GROUP);
                for id in some {
                    call.key(self.sample_key(*id)).arg(id.to_uuid());
                }
                call.invoke::<i64>(c)
            })?;
        }
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.link.run("closing the queue", |c| {
            redis::cmd("SET").arg(self.key("closed")).arg(1).arg("PX").arg(KEEP_MS).exec(c)
        })
    }

    fn worked(&self, tokens: u64, ms: u64) -> Result<()> {
        let key = self.key("counters");
        self.link.run("counting", |c| {
            redis::pipe().hincr(&key, "scored_tokens", tokens).ignore().hincr(&key, "scored_ms", ms).ignore().exec(c)
        })
    }

    fn stats(&self) -> Result<BrokerStats> {
        let (length, delivered, _back, oldest_waiting_ms, results): (usize, usize, usize, u64, usize) =
            self.link.run("counting", |c| {
                self.scripts
                    .stats
                    .key(self.key("requests"))
                    .key(self.key("results"))
                    .key(self.key("counters"))
                    .arg(GROUP)
                    .arg(RECLAIMED)
                    .invoke(c)
            })?;
        let counters: HashMap<String, u64> =
            self.link.run("counting", |c| redis::cmd("HGETALL").arg(self.key("counters")).query(c))?;
        Ok(BrokerStats {
            waiting: length.saturating_sub(delivered),
            delivered,
            results,
            oldest_waiting_ms,
            ..counted(&counters)
        })
    }
}

/// What brokers in Redis count, by the fields of their hash; a field that is not there counts nothing.
pub(super) fn counted(counters: &HashMap<String, u64>) -> BrokerStats {
    let counter = |name: &str| counters.get(name).copied().unwrap_or(0);
    BrokerStats {
        published: counter("published"),
        completed: counter("completed"),
        duplicates: counter("duplicates"),
        reclaimed: counter("reclaimed"),
        failed: counter("failed"),
        expired: counter("expired"),
        rejected: counter("rejected"),
        latency_ms_sum: counter("latency_ms_sum"),
        latency_ms_max: counter("latency_ms_max"),
        scored_tokens: counter("scored_tokens"),
        scored_ms: counter("scored_ms"),
        ..BrokerStats::default()
    }
}
