//! The original's streams, keys and messages, so that its processes and ours can share a server.
//!
//! Its teachers read the stream `teacher_request_stream` as the group `teacher_request_group` and store each result under the
//! UUID of its completion; its trainers take it from there. Beyond the original we acknowledge an entry only when all its
//! results are stored, hand out those of a silent teacher again, let results expire, and store each result once
//! (`cosmos-host:done:UUID`). What the original has no message for is left out: a request that cannot be scored gets no
//! result, and its trainer gives it up after its own half an hour.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use redis::Script;

use super::RedisLink;
use super::broker::{Pace, arrived, counted, unique};
use super::scripts::{RECLAIMED, Scripts};
use crate::broker::{REQUEST_QUEUE, Scored};
use crate::wire::cosmos_rl::{self as wire, Request, Scores, WireLimits};
use crate::{
    Broker, BrokerError, BrokerLimits, BrokerStats, Completion, Delivery, Fetched, Result, Rows, SampleId,
    TeacherRequest, TeacherResult,
};

const STREAM: &str = "teacher_request_stream";
const GROUP: &str = "teacher_request_group";
const COUNTERS: &str = "cosmos-host:counters";
const REJECTED: &str = "cosmos-host:rejected";
/// Keys that the shared scripts name and that stay empty here.
const CLOSED: &str = "cosmos-host:closed";
const RESULTS: &str = "cosmos-host:results";
const KEEP_MS: u64 = 24 * 3600 * 1000;
const REJECTED_MAX: usize = 100;
const REJECTED_BYTES_MAX: usize = 4096;
const AT_ONCE: usize = 32;

/// KEYS stream, sample, counters. ARGV requests_max, message, timestamp, keep_ms, version, then fields of the sample.
const PUBLISH: &str = "
local held = redis.call('HGET', KEYS[2], 'v')
if held then
  if held == ARGV[5] then return {'known', 0} end
  return {'in use', held}
end
local length = redis.call('XLEN', KEYS[1])
if length >= tonumber(ARGV[1]) then return {'full', length} end
local id = redis.call('XADD', KEYS[1], '*', 'teacher_request', ARGV[2], 'timestamp', ARGV[3])
redis.call('HSET', KEYS[2], 'v', ARGV[5], 'q', ARGV[2], 'p', ARGV[6], 'i', ARGV[7], 'e', id)
redis.call('PEXPIRE', KEYS[2], ARGV[4])
redis.call('HINCRBY', KEYS[3], 'published', 1)
return {'queued', 0}
";

/// KEYS stream, mark, result, counters. ARGV group, entry, ends the entry, value (or nothing), result_ms.
const SETTLE: &str = "
local first = redis.call('SET', KEYS[2], 1, 'NX', 'PX', ARGV[5])
if first and ARGV[4] ~= '' then redis.call('SET', KEYS[3], ARGV[4], 'PX', ARGV[5]) end
if ARGV[3] == '1' then
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
  redis.call('XDEL', KEYS[1], ARGV[2])
end
local counter = not first and 'duplicates' or (ARGV[4] ~= '' and 'completed' or 'failed')
redis.call('HINCRBY', KEYS[4], counter, 1)
return first and 1 or 0
";

/// The prompt's tokens of a row of the dataset, or why there are none.
pub type PromptOf = Arc<dyn Fn(i64) -> std::result::Result<Vec<u32>, String> + Send + Sync>;
/// The row of the dataset that a sample's prompt is.
pub type RowOf = Arc<dyn Fn(SampleId) -> i64 + Send + Sync>;

/// What our side knows and the original's messages leave out.
#[derive(Clone)]
pub struct CosmosRlOptions {
    /// Our name in messages.
    pub name: String,
    /// How much is taken; `results_max` has no effect.
    pub limits: BrokerLimits,
    /// The largest message.
    pub wire: WireLimits,
    /// `distillation.top_k` of both sides, 0 or more.
    pub top_k: i32,
    /// `distillation.trainer_token_ids_from_teacher`: results carry the tokens back.
    pub token_ids_back: bool,
    /// For a teacher: the original's requests name a row of the dataset, not the prompt's tokens.
    pub prompt_of: PromptOf,
    /// For a publisher.
    pub row_of: RowOf,
    /// Whether the original's end marker closes the queue; else it is taken away and nothing more.
    pub heeds_end: bool,
    /// For a publisher: keeps the names of its samples apart from those of other runs on the server, where nothing else
    /// does. Zero for a teacher, which gives names back as they came.
    pub salt: SampleId,
}

/// [`Broker`] in the original's keys.
pub struct CosmosRlBroker {
    link: Arc<RedisLink>,
    options: CosmosRlOptions,
    scripts: Scripts,
    publish: Script,
    settle: Script,
    deliveries: AtomicU64,
    /// The end marker was read, or [`Broker::close`] was called.
    ended: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Completions of entries that were read and not handed out yet.
    ready: VecDeque<Delivery>,
    /// Entries in our hands.
    open: HashMap<String, Open>,
}

struct Open {
    request: Request,
    left: HashSet<SampleId>,
}

type Entry = (String, u32, Vec<Vec<u8>>);

impl CosmosRlBroker {
    /// The broker on a server of the original.
    ///
    /// # Errors
    /// `Foreign` for the whole vocabulary, which the original does not have.
    pub fn new(link: Arc<RedisLink>, options: CosmosRlOptions) -> Result<CosmosRlBroker> {
        if options.top_k < 0 {
            let reason = "its messages have no hidden states, `distillation.top_k` must be 0 or more".into();
            return Err(BrokerError::Foreign { reason });
        }
        Ok(CosmosRlBroker {
            link,
            options,
            scripts: Scripts::new(),
            publish: Script::new(PUBLISH),
            settle: Script::new(SETTLE),
            deliveries: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A sample's name on the server.
    fn uuid(&self, sample: SampleId) -> String {
        let salt = self.options.salt;
        let salted = SampleId {
            epoch: sample.epoch ^ salt.epoch,
            prompt: sample.prompt ^ salt.prompt,
            generation: sample.generation ^ salt.generation,
        };
        salted.to_uuid()
    }

    fn sample_key(&self, sample: SampleId) -> String {
        format!("cosmos-host:sample:{}", self.uuid(sample))
    }

    fn reject(&self, entry: &str, bytes: &[u8], reason: &str) -> Result<()> {
        tracing::warn!("redis `{}`, `{STREAM}`: message dropped: {reason}", self.link.address());
        self.link.run("rejecting a message", |c| {
            let mut call = self.scripts.reject.key(STREAM);
            call.key(REJECTED).key(COUNTERS).arg(GROUP).arg(entry).arg(&bytes[..bytes.len().min(REJECTED_BYTES_MAX)]);
            call.arg(reason).arg(REJECTED_MAX).arg(KEEP_MS).invoke::<i64>(c)
        })?;
        Ok(())
    }

    /// Cuts an entry into its completions.
    fn open_entry(&self, (entry, attempt, fields): Entry) -> Result<()> {
        let message = fields.chunks_exact(2).find(|pair| pair[0] == b"teacher_request").map(|pair| pair[1].as_slice());
        let Some(message) = message else {
            return self.reject(&entry, &fields.concat(), &format!("entry `{entry}` has no field `teacher_request`"));
        };
        let request = match wire::decode_request(message, &self.options.wire) {
            Ok(request) => request,
            Err(error) => return self.reject(&entry, message, &format!("entry `{entry}`: {error}")),
        };
        if request.is_end {
            self.ended.fetch_or(self.options.heeds_end, Ordering::SeqCst);
            return self.link.run("acknowledging the end", |c| {
                let mut pipe = redis::pipe();
                pipe.atomic().cmd("XACK").arg(STREAM).arg(GROUP).arg(&entry).cmd("XDEL").arg(STREAM).arg(&entry).exec(c)
            });
        }
        match self.samples(&request) {
            Ok(requests) => {
                let mut state = self.state();
                let left = requests.iter().map(|request| request.sample).collect();
                for request in requests {
                    let id = self.deliveries.fetch_add(1, Ordering::Relaxed) + 1;
                    let (request, ticket) = (Arc::new(request), entry.clone());
                    state.ready.push_back(Delivery { id, attempt, request, ticket });
                }
                state.open.insert(entry, Open { request, left });
                Ok(())
            }
            Err(reason) => self.reject(&entry, message, &format!("entry `{entry}`: {reason}")),
        }
    }

    /// Our requests for the completions of one of theirs.
    fn samples(&self, request: &Request) -> std::result::Result<Vec<TeacherRequest>, String> {
        if request.completion_token_ids.is_empty() {
            return Err("it has no completion".into());
        }
        let mut prompt_ids = (self.options.prompt_of)(request.prompt_idx)
            .map_err(|reason| format!("prompt {}: {reason}", request.prompt_idx))?;
        let given = request.prompt_token_ids.as_ref().filter(|rows| !rows.is_empty());
        if let Some(rows) = given {
            // What the student has read counts, so that every row of the result stands beside its token.
            let first = *prompt_ids.first().ok_or("the prompt has no token")?;
            let theirs = firsts(rows).ok_or("a position of the prompt without a token")?;
            if theirs != prompt_ids[1..] {
                tracing::warn!("prompt {}: the student read other tokens than ours", request.prompt_idx);
            }
            prompt_ids = std::iter::once(first).chain(theirs).collect();
        }
        let mut samples = Vec::with_capacity(request.completion_token_ids.len());
        for (rows, uuid) in request.completion_token_ids.iter().zip(&request.teacher_result_uuid) {
            let sample = SampleId::from_uuid(uuid).ok_or_else(|| format!("`{}` is no UUID", uuid.escape_debug()))?;
            let completion_ids = firsts(rows).ok_or("a position of a completion without a token")?;
            let candidate_ids = match usize::try_from(self.options.top_k).unwrap_or(0) {
                0 => None,
                k => {
                    // Positions of the prompt without candidates are masked in the trainer; they need k columns all the same.
                    let own = || prompt_ids.iter().skip(1).map(|id| vec![*id; k]).collect::<Vec<_>>();
                    let prompt = given.map_or_else(|| Some(own()), |rows| candidates(rows, k));
                    let completion = candidates(rows, k);
                    let (Some(prompt), Some(completion)) = (prompt, completion) else {
                        return Err(format!("a position without {k} candidates, `distillation.top_k` of this side"));
                    };
                    Some(prompt.into_iter().chain(completion).collect())
                }
            };
            let sample = TeacherRequest {
                sample,
                weight_version: 0,
                prompt_ids: prompt_ids.clone(),
                completion_ids,
                include_prompt: true,
                top_k: self.options.top_k,
                candidate_ids,
            };
            sample.check().map_err(|error| error.to_string())?;
            samples.push(sample);
        }
        Ok(samples)
    }

    fn settle(&self, delivery: &Delivery, value: impl FnOnce(&Request, usize) -> Vec<u8>) -> Result<Completion> {
        let (entry, sample) = (&delivery.ticket, delivery.request.sample);
        let uuid = self.uuid(sample);
        let (value, last) = {
            let state = self.state();
            let Some(open) = state.open.get(entry).filter(|open| open.left.contains(&sample)) else {
                return Ok(Completion::Duplicate);
            };
            let index = open.request.teacher_result_uuid.iter().position(|key| *key == uuid);
            (index.map(|index| value(&open.request, index)).unwrap_or_default(), open.left.len() == 1)
        };
        let first: bool = self.link.run("storing a result", |c| {
            let mut call = self.settle.key(STREAM);
            call.key(format!("cosmos-host:done:{uuid}")).key(&uuid).key(COUNTERS).arg(GROUP).arg(entry);
            call.arg(u8::from(last)).arg(&value).arg(self.options.limits.result_ms_max.clamp(1, KEEP_MS)).invoke(c)
        })?;
        let mut state = self.state();
        if last {
            state.open.remove(entry);
        } else if let Some(open) = state.open.get_mut(entry) {
            open.left.remove(&sample);
        }
        Ok(if first { Completion::Stored } else { Completion::Duplicate })
    }

    /// Their request for one completion of ours.
    fn request(&self, request: &TeacherRequest) -> Result<Request> {
        let foreign =
            |reason: String| Err(BrokerError::Foreign { reason: format!("sample `{}`: {reason}", request.sample) });
        if request.top_k != self.options.top_k {
            return foreign(format!("`top_k` is {}, not {}", request.top_k, self.options.top_k));
        }
        if request.top_k > 0 && request.candidate_ids.is_none() {
            return foreign(
                "its teacher scores the student's candidates, `distillation.top_k_support` must be `\"student\"`"
                    .into(),
            );
        }
        let prompt = if request.include_prompt { request.prompt_ids.len() - 1 } else { 0 };
        let tokens = request.prompt_ids[request.prompt_ids.len() - prompt..].iter().chain(&request.completion_ids);
        let rows: Vec<Vec<u32>> = tokens
            .enumerate()
            .map(|(s, token)| {
                let others = request.candidate_ids.as_ref().and_then(|rows| rows.row(s)).unwrap_or_default();
                std::iter::once(*token).chain(others.iter().copied().filter(|id| id != token)).collect()
            })
            .collect();
        let (prompt_rows, completion_rows) = rows.split_at(prompt);
        let table = |rows: &[Vec<u32>]| rows.iter().cloned().collect::<Rows<u32>>();
        // As the original: an empty list without candidates, no key with them.
        let prompt_token_ids = (request.include_prompt || request.top_k == 0).then(|| table(prompt_rows));
        Ok(Request {
            is_end: false,
            prompt_idx: (self.options.row_of)(request.sample),
            completion_token_ids: vec![table(completion_rows)],
            prompt_token_ids,
            teacher_result_uuid: vec![self.uuid(request.sample)],
            replica_name: self.options.name.clone(),
        })
    }

    /// Our result from theirs. `known` is what [`Broker::publish`] kept of the request, if it was ours.
    fn result(
        &self,
        sample: SampleId,
        scores: &Scores,
        known: Option<&Published>,
    ) -> std::result::Result<TeacherResult, String> {
        let rows = scores.teacher_logprobs.len();
        let sent = known.map(|known| &known.request);
        let completion =
            scores.completion_token_ids.as_ref().or(sent.and_then(|sent| sent.completion_token_ids.first()));
        let prompt = scores.prompt_token_ids.as_ref().or(sent.and_then(|sent| sent.prompt_token_ids.as_ref()));
        let prompt = prompt.filter(|prompt| !prompt.is_empty());
        // Theirs has every position of the prompt; ours those that were asked for.
        let skip = match known {
            Some(known) => {
                let positions = known.request.completion_token_ids.first().map_or(0, Rows::len);
                let expected = known.prompt_positions + positions;
                if rows != expected {
                    return Err(format!(
                        "{rows} rows for {expected} tokens after the first: the teacher read another prompt"
                    ));
                }
                if known.include_prompt { 0 } else { known.prompt_positions }
            }
            None => 0,
        };
        let k = usize::try_from(self.options.top_k).unwrap_or(0);
        let kept = || scores.teacher_logprobs.iter().skip(skip);
        if let Some(row) = kept().position(|row| row.len() != k.max(1)) {
            return Err(format!("row {row} does not have {} log-probs", k.max(1)));
        }
        let weight_version = known.map_or(0, |known| known.version);
        let mut result =
            TeacherResult { sample, weight_version, teacher: scores.replica_name.clone(), ..TeacherResult::default() };
        if k == 0 {
            result.token_logprobs_s = kept().map(|row| row[0] as f32).collect();
            return Ok(result);
        }
        result.candidate_logprobs = Some(kept().map(|row| row.iter().map(|v| *v as f32)).collect());
        let with_prompt = skip == 0;
        let before = if with_prompt { prompt.map(|rows| candidates(rows, k)) } else { Some(Some(Vec::new())) };
        if let (Some(Some(before)), Some(Some(after))) = (before, completion.map(|rows| candidates(rows, k))) {
            let ids: Rows<u32> = before.into_iter().chain(after).collect();
            if ids.len() == rows - skip {
                result.candidate_ids = Some(ids);
            }
        }
        if result.candidate_ids.is_none() && known.is_some() {
            return Err("its token ids do not match its log-probs".into());
        }
        Ok(result)
    }

    fn read(&self, ids: &[SampleId], found: &mut HashMap<SampleId, Scored>) -> Result<usize> {
        type Row = (Option<Vec<u8>>, (Option<u64>, Option<Vec<u8>>, Option<usize>, Option<u8>));
        let mut read = 0;
        for some in ids.chunks(AT_ONCE) {
            let rows: Vec<Row> = self.link.run("fetching results", |c| {
                let mut pipe = redis::pipe();
                for id in some {
                    pipe.cmd("GET").arg(self.uuid(*id));
                    pipe.cmd("HMGET").arg(self.sample_key(*id)).arg("v").arg("q").arg("p").arg("i");
                }
                let flat: Vec<redis::Value> = pipe.query(c)?;
                let pairs = flat.chunks_exact(2).map(|pair| redis::Value::Array(pair.to_vec())).collect();
                Ok(redis::from_redis_value(redis::Value::Array(pairs))?)
            })?;
            for (id, (value, (version, request, prompt_positions, include))) in some.iter().zip(rows) {
                let Some(value) = value else { continue };
                let known =
                    request.and_then(|bytes| wire::decode_request(&bytes, &self.options.wire).ok()).map(|request| {
                        Published {
                            version: version.unwrap_or(0),
                            request,
                            prompt_positions: prompt_positions.unwrap_or(0),
                            include_prompt: include == Some(1),
                        }
                    });
                let result = wire::decode_scores(&value, &self.options.wire)
                    .map_err(|error| error.to_string())
                    .and_then(|scores| self.result(*id, &scores, known.as_ref()));
                match result {
                    Ok(result) => {
                        found.insert(*id, Ok(result));
                        read += 1;
                    }
                    Err(reason) => {
                        self.reject("", &value, &format!("the result of sample `{id}`: {reason}"))?;
                        self.forget(&[*id])?;
                    }
                }
            }
        }
        Ok(read)
    }
}

/// What is kept of a request until its result is fetched.
struct Published {
    version: u64,
    request: Request,
    /// Tokens of the prompt after the first.
    prompt_positions: usize,
    include_prompt: bool,
}

/// The sampled token of every position.
fn firsts(rows: &Rows<u32>) -> Option<Vec<u32>> {
    rows.iter().map(|row| row.first().copied()).collect()
}

/// The k candidates of every position: of k + 1 ids the first is the sampled token, which is none of them.
fn candidates(rows: &Rows<u32>, k: usize) -> Option<Vec<Vec<u32>>> {
    let of_row = |row: &[u32]| match row.len() {
        n if n == k => Some(row.to_vec()),
        n if n == k + 1 => Some(row[1..].to_vec()),
        _ => None,
    };
    rows.iter().map(of_row).collect()
}

/// The time as Python's `datetime.isoformat` has it.
fn timestamp() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days are counted from 1 March of the year 0, so that the leap day is a year's last.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let (year, month) = (year + era * 400 + u64::from(month >= 10), if month < 10 { month + 3 } else { month - 9 });
    let (hour, minute, second, micros) = (second / 3600, second / 60 % 60, second % 60, since.subsec_micros());
    format!("{year:04}-{month:02}-{day_of_month:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}")
}

impl Broker for CosmosRlBroker {
    fn publish(&self, request: TeacherRequest, wait_ms_max: u64) -> Result<()> {
        request.check()?;
        let sample = request.sample;
        let message = wire::encode_request(&self.request(&request)?);
        if message.len() > self.options.wire.bytes_max {
            let (bytes, max) = (message.len() as u64, self.options.wire.bytes_max as u64);
            return Err(BrokerError::TooLarge { key: format!("sample {sample}"), bytes, max });
        }
        let max = self.options.limits.requests_max;
        let mut pace = Pace::new(wait_ms_max);
        loop {
            if self.ended.load(Ordering::SeqCst) {
                return Err(BrokerError::Closed { queue: REQUEST_QUEUE });
            }
            let left_ms = u64::try_from(pace.left().as_millis()).unwrap_or(u64::MAX);
            let (answer, number): (String, u64) = self.link.run_for("publishing a request", left_ms, |c| {
                let mut call = self.publish.key(STREAM);
                call.key(self.sample_key(sample)).key(COUNTERS).arg(max).arg(&message).arg(timestamp()).arg(KEEP_MS);
                call.arg(request.weight_version)
                    .arg(request.prompt_ids.len() - 1)
                    .arg(u8::from(request.include_prompt));
                call.invoke(c)
            })?;
            match answer.as_str() {
                "queued" | "known" => return Ok(()),
                "in use" => {
                    let new_version = request.weight_version;
                    return Err(BrokerError::SampleInUse { sample, held_version: number, new_version });
                }
                _ if !pace.sleep() => {
                    let held = usize::try_from(number).unwrap_or(usize::MAX);
                    return Err(BrokerError::QueueFull {
                        queue: REQUEST_QUEUE,
                        held,
                        max,
                        waited_ms: pace.waited_ms(),
                    });
                }
                _ => {}
            }
        }
    }

    fn take(&self, consumer: &str, max: usize, wait_ms_max: u64) -> Result<Vec<Delivery>> {
        let mut pace = Pace::new(wait_ms_max);
        loop {
            // One entry at a time: it may hold any number of completions.
            while self.state().ready.len() < max && !self.ended.load(Ordering::SeqCst) {
                let (_, mut entries): (bool, Vec<Entry>) = self.link.run("taking requests", |c| {
                    let mut call = self.scripts.take.key(STREAM);
                    call.key(CLOSED).arg(GROUP).arg(consumer).arg(1).arg(RECLAIMED).invoke(c)
                })?;
                let Some(entry) = entries.pop() else { break };
                self.open_entry(entry)?;
            }
            let mut state = self.state();
            let count = state.ready.len().min(max);
            if count > 0 || max == 0 {
                return Ok(state.ready.drain(..count).collect());
            }
            drop(state);
            if self.ended.load(Ordering::SeqCst) {
                return Err(BrokerError::Closed { queue: REQUEST_QUEUE });
            }
            if !pace.sleep() {
                return Ok(Vec::new());
            }
        }
    }

    fn complete(&self, delivery: &Delivery, result: TeacherResult) -> Result<Completion> {
        result.check(&delivery.request)?;
        let sample = delivery.request.sample;
        let bad = |reason: &str| Err(BrokerError::BadMessage { sample, reason: reason.into() });
        let teacher_logprobs: Rows<f64> = if self.options.top_k == 0 {
            if result.token_logprobs_s.is_empty() {
                return bad("the result has no log-probs of the tokens");
            }
            result.token_logprobs_s.iter().map(|v| [f64::from(*v)]).collect()
        } else {
            let Some(rows) = &result.candidate_logprobs else { return bad("the result has no candidates' log-probs") };
            rows.iter().map(|row| row.iter().map(|v| f64::from(*v))).collect()
        };
        self.settle(delivery, |request, index| {
            let back = self.options.token_ids_back;
            wire::encode_scores(&Scores {
                teacher_logprobs,
                completion_token_ids: back.then(|| request.completion_token_ids[index].clone()),
                prompt_token_ids: request.prompt_token_ids.clone().filter(|_| back),
                timestamp: timestamp(),
                replica_name: self.options.name.clone(),
            })
        })
    }

    fn fail(&self, delivery: &Delivery, reason: &str) -> Result<Completion> {
        tracing::warn!("sample `{}` gets no result: {reason}", delivery.request.sample);
        self.settle(delivery, |_, _| Vec::new())
    }

    fn reclaim(&self, idle_ms: u64) -> Result<usize> {
        let (back, given_up): (usize, Vec<Entry>) = self.link.run("reclaiming requests", |c| {
            let mut call = self.scripts.reclaim.key(STREAM);
            call.key(COUNTERS).arg(GROUP).arg(idle_ms.min(KEEP_MS)).arg(self.options.limits.deliveries_max);
            call.arg(RECLAIMED).invoke(c)
        })?;
        for (entry, attempts, fields) in given_up {
            let reason = format!("entry `{entry}` given up: {attempts} teachers took it and none answered");
            self.reject(&entry, &fields.concat(), &reason)?;
        }
        Ok(back)
    }

    fn fetch(&self, ids: &[SampleId], wait_ms_max: u64) -> Result<Fetched> {
        let ids = unique(ids);
        let mut pace = Pace::new(wait_ms_max);
        let mut found = HashMap::with_capacity(ids.len());
        loop {
            let missing: Vec<SampleId> = ids.iter().copied().filter(|id| !found.contains_key(id)).collect();
            let read = self.read(&missing, &mut found)?;
            if found.len() == ids.len() || (read == 0 && !pace.sleep()) {
                break;
            }
        }
        Ok(arrived(self, &ids, found))
    }

    fn forget(&self, ids: &[SampleId]) -> Result<()> {
        for some in ids.chunks(AT_ONCE * 8) {
            let entries: Vec<Option<String>> = self.link.run("forgetting samples", |c| {
                let mut pipe = redis::pipe();
                some.iter().for_each(|id| {
                    pipe.cmd("HGET").arg(self.sample_key(*id)).arg("e");
                });
                pipe.query(c)
            })?;
            self.link.run("forgetting samples", |c| {
                let mut pipe = redis::pipe();
                for (id, entry) in some.iter().zip(&entries) {
                    pipe.cmd("DEL").arg(self.uuid(*id)).arg(self.sample_key(*id));
                    // A request that is forgotten may come again and must be scored then.
                    pipe.cmd("DEL").arg(format!("cosmos-host:done:{}", self.uuid(*id)));
                    if let Some(entry) = entry {
                        pipe.cmd("XDEL").arg(STREAM).arg(entry);
                    }
                }
                pipe.exec(c)
            })?;
        }
        Ok(())
    }

    /// Publishes the end marker, once for each teacher that has ever read from the stream.
    fn close(&self) -> Result<()> {
        if self.ended.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let mark =
            Request { is_end: true, prompt_idx: -1, replica_name: self.options.name.clone(), ..Request::default() };
        let mark = wire::encode_request(&mark);
        self.link.run("publishing the end", |c| {
            let consumers: Vec<HashMap<String, redis::Value>> =
                match redis::cmd("XINFO").arg("CONSUMERS").arg(STREAM).arg(GROUP).query(c) {
                    Ok(consumers) => consumers,
                    // No stream, or no group yet.
                    Err(error) if error.code().is_some() => Vec::new(),
                    Err(error) => return Err(error),
                };
            let ours = |consumer: &HashMap<String, redis::Value>| {
                matches!(consumer.get("name"), Some(redis::Value::BulkString(name)) if name == RECLAIMED.as_bytes())
            };
            let teachers = consumers.iter().filter(|consumer| !ours(consumer)).count().max(1);
            let mut pipe = redis::pipe();
            for _ in 0..teachers {
                pipe.cmd("XADD").arg(STREAM).arg("*").arg("teacher_request").arg(&mark).arg("timestamp").arg(timestamp());
            }
            pipe.exec(c)
        })
    }

    /// Results are not counted: the original's keys have nothing in common.
    fn worked(&self, tokens: u64, ms: u64) -> Result<()> {
        self.link.run("counting", |c| {
            redis::pipe()
                .hincr(COUNTERS, "scored_tokens", tokens)
                .ignore()
                .hincr(COUNTERS, "scored_ms", ms)
                .ignore()
                .exec(c)
        })
    }

    fn stats(&self) -> Result<BrokerStats> {
        let (length, delivered, _back, oldest_waiting_ms, results): (usize, usize, usize, u64, usize) =
            self.link.run("counting", |c| {
                let mut call = self.scripts.stats.key(STREAM);
                call.key(RESULTS).key(COUNTERS).arg(GROUP).arg(RECLAIMED).invoke(c)
            })?;
        let counters: HashMap<String, u64> =
            self.link.run("counting", |c| redis::cmd("HGETALL").arg(COUNTERS).query(c))?;
        Ok(BrokerStats {
            waiting: length.saturating_sub(delivered),
            delivered,
            results,
            oldest_waiting_ms,
            ..counted(&counters)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_iso() {
        let text = timestamp();
        let day =
            std::process::Command::new("date").args(["-u", "+%Y-%m-%d"]).output().map(|o| o.stdout).unwrap_or_default();
        assert_eq!(text.len(), 26, "{text}");
        let day = String::from_utf8_lossy(&day).trim().to_owned();
        // Around midnight the two may be a day apart.
        assert!(day.is_empty() || text.starts_with(&day) || text[11..13] == *"00", "{text} {day}");
    }

    #[test]
    fn candidates_lose_a_sampled_token_that_is_none() {
        let rows: Rows<u32> = [vec![7, 1, 2], vec![1, 2]].into_iter().collect();
        assert_eq!(candidates(&rows, 2), Some(vec![vec![1, 2], vec![1, 2]]));
        assert_eq!(candidates(&rows, 3), None);
    }
}
