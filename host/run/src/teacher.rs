//! The teacher role: takes completions from the broker, scores every token of them, stores the answers.
//!
//! It holds no optimizer state and no gradients. Requests are acknowledged only after their results are stored, so a
//! teacher that dies costs time, not samples.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use cosmos_broker::{Broker, HiddenStates, Rows, SampleId, TeacherRequest, TeacherResult};
use cosmos_config::{Config, Dtype, SupportRule, WireDtype};
use cosmos_engine::model::{Model, ModelConfig};
use cosmos_engine::objective::ObjectiveSpec;
use cosmos_engine::score::{ABSENT, ScoreOptions, ScoreRequest, Scored, score};
use cosmos_parallel::RankGroups;
use serde::{Deserialize, Serialize};

use crate::error::{Result, Role};
use crate::rollout::Completion;
use crate::student::Place;
use crate::weights::{decode, encode};

/// What the teacher says about one completion; every vector follows the scored tokens.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Answer {
    /// Log-prob of each token.
    pub logprobs: Vec<f32>,
    /// Entropy of each distribution.
    pub entropy: Vec<f32>,
    /// Most likely id at each position.
    pub top1: Vec<u32>,
    /// Candidate ids, `[tokens, k]`.
    pub candidate_ids: Vec<u32>,
    /// The teacher's log-probs of them.
    pub candidate_logprobs: Vec<f32>,
    /// Hidden states for full-vocabulary objectives, of each teacher that was asked.
    pub hidden: Vec<TeacherHidden>,
}

/// The last hidden states of one teacher.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TeacherHidden {
    /// Which of the run's teachers.
    pub teacher: usize,
    /// Its weight in the mixture.
    pub weight: f64,
    /// `[tokens, hidden]`.
    pub values_rh: Vec<f32>,
}

impl TeacherHidden {
    /// Those of the only teacher.
    fn alone(values_rh: Vec<f32>) -> Self {
        Self { teacher: 0, weight: 1.0, values_rh }
    }
}

impl Answer {
    /// Leaves out what it says about tokens that the model did not sample: they are context, never trained on. `lead`
    /// prompt positions were scored too.
    pub fn of_own(self, completion: &Completion, lead: usize) -> Self {
        Self {
            logprobs: completion.keep_own(self.logprobs, lead),
            entropy: completion.keep_own(self.entropy, lead),
            top1: completion.keep_own(self.top1, lead),
            candidate_ids: completion.keep_own(self.candidate_ids, lead),
            candidate_logprobs: completion.keep_own(self.candidate_logprobs, lead),
            hidden: self
                .hidden
                .into_iter()
                .map(|h| TeacherHidden { values_rh: completion.keep_own(h.values_rh, lead), ..h })
                .collect(),
        }
    }
}

/// What is asked of the teacher in this run.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Candidates per token; 0: the sampled token only.
    pub top_k: usize,
    /// Whose candidates.
    pub support: SupportRule,
    /// Hidden states instead of log-probs.
    pub full_vocabulary: bool,
    /// Divides the logits.
    pub temperature: f32,
    /// Sequences per forward pass.
    pub mini_batch: usize,
    /// Completions taken from the queue at a time.
    pub batch: usize,
    /// Prompt tokens are scored too.
    pub include_prompt: bool,
    /// Format of hidden states on their way to the trainer.
    pub hidden_dtype: Dtype,
    /// Format of log-probs and entropies on their way to the trainer.
    pub logprob_dtype: Dtype,
}

impl Wanted {
    /// From the configuration.
    pub fn new(config: &Config, spec: &ObjectiveSpec) -> Self {
        let d = &config.distillation;
        Self {
            top_k: d.top_k.max(0) as usize,
            support: d.top_k_support,
            full_vocabulary: d.top_k < 0,
            temperature: spec.temperature,
            mini_batch: d.mini_batch,
            batch: d.batch_size_per_replica,
            include_prompt: d.include_prompt,
            hidden_dtype: d.hidden_dtype,
            logprob_dtype: match d.wire_logprob_dtype {
                WireDtype::Float32 => Dtype::Float32,
                WireDtype::Float16 => Dtype::Float16,
            },
        }
    }

    /// What a request asks for: `top_k` of [`TeacherRequest`].
    pub(crate) fn asked(&self) -> i32 {
        if self.full_vocabulary { -1 } else { self.top_k as i32 }
    }

    /// Numbers as they arrive at the trainer. They are rounded here and not on the wire, so that the placement of the roles
    /// does not change a run.
    fn rounded(values: Vec<f32>, dtype: Dtype) -> Vec<f32> {
        match dtype {
            Dtype::Float32 => values,
            dtype => decode(&encode(&values, dtype), dtype),
        }
    }

    /// The student's candidates of a completion as the request carries them, none at prompt positions.
    fn candidate_rows(&self, completion: &Completion, k: usize) -> Option<Rows<u32>> {
        if k == 0 {
            return None;
        }
        let prompt_rows = if self.include_prompt { completion.prompt_ids.len() - 1 } else { 0 };
        let mut ids = vec![ABSENT; prompt_rows * k];
        ids.extend(completion.spread(&completion.candidate_ids, ABSENT));
        Rows::of_width(k, ids)
    }

    /// Whether rollouts must record the student's candidates.
    pub fn student_candidates(&self) -> usize {
        match self.support {
            SupportRule::Teacher => 0,
            SupportRule::Student | SupportRule::Union => self.top_k,
        }
    }
}

/// A teacher of a run.
pub struct TeacherRole {
    /// Its name.
    pub name: String,
    /// The frozen model.
    pub model: Box<dyn Model>,
    wanted: Wanted,
    place: Place,
}

/// Tokens scored and seconds it took.
#[derive(Debug, Clone, Copy, Default)]
pub struct TeacherStats {
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Seconds.
    pub seconds: f64,
    /// Longest queue seen.
    pub depth_max: usize,
    /// Longest time from a request to its stored result, in milliseconds, over the whole run.
    pub latency_ms_max: u64,
}

impl TeacherRole {
    /// A teacher that answers as `wanted`.
    pub fn new(name: &str, model: Box<dyn Model>, wanted: Wanted) -> Self {
        Self::rank(name, model, wanted, &RankGroups::single())
    }

    /// As [`TeacherRole::new`], one rank of a teacher that is cut over several.
    pub fn rank(name: &str, model: Box<dyn Model>, wanted: Wanted, groups: &RankGroups) -> Self {
        Self { name: name.to_string(), model, wanted, place: Place::of(groups) }
    }

    /// What is asked of it.
    pub fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// Answers everything in the queue, a batch at a time. `stop` is asked between batches.
    pub fn drain(&mut self, broker: &dyn Broker, consumer: &str, stop: &dyn Fn() -> bool) -> Result<TeacherStats> {
        let mut stats = TeacherStats::default();
        let started = Instant::now();
        loop {
            stats.depth_max = stats.depth_max.max(broker.stats()?.waiting);
            let deliveries = broker.take(consumer, self.wanted.batch, 0)?;
            if deliveries.is_empty() || stop() {
                break;
            }
            let requests: Vec<&TeacherRequest> = deliveries.iter().map(|d| d.request.as_ref()).collect();
            let answers = self.answer(&requests)?;
            for (delivery, answer) in deliveries.iter().zip(answers) {
                stats.tokens += (delivery.request.prompt_ids.len() + delivery.request.completion_ids.len()) as u64;
                broker.complete(delivery, result(&self.name, &delivery.request, answer))?;
            }
        }
        stats.seconds = started.elapsed().as_secs_f64();
        stats.latency_ms_max = broker.stats()?.latency_ms_max;
        Ok(stats)
    }

    /// Answers one batch of requests, as [`serve`].
    pub fn serve(&mut self, broker: &dyn Broker, consumer: &str, wait_ms_max: u64) -> Result<TeacherStats> {
        let (name, batch, shape) = (self.name.clone(), self.wanted.batch, self.model.config().clone());
        let asked = self.wanted.asked();
        let answer = &mut |requests: Vec<Arc<TeacherRequest>>| {
            let requests: Vec<&TeacherRequest> = requests.iter().map(AsRef::as_ref).collect();
            self.answer(&requests)
        };
        serve(broker, consumer, wait_ms_max, &Served { name: &name, batch, asked, shape: &shape }, answer)
    }

    /// Answers requests, in their order. Those for the whole vocabulary (`top_k` -1: training's, or validation's) get hidden
    /// states, the others log-probs. One rank of several must be asked by [`TeacherRole::answer_part`].
    pub fn answer(&mut self, requests: &[&TeacherRequest]) -> Result<Vec<Answer>> {
        let mut answers = vec![Answer::default(); requests.len()];
        for (index, answer) in self.answer_part(requests)? {
            answers[index] = answer;
        }
        Ok(answers)
    }

    /// A rank's part of the answers to requests that all ranks are given, with the requests' indices: those along the
    /// data-parallel axes divide the requests, and of the others one has the answers.
    pub fn answer_part(&mut self, requests: &[&TeacherRequest]) -> Result<Vec<(usize, Answer)>> {
        let mut answers = Vec::new();
        for full_vocabulary in [false, true] {
            let mut alike: Vec<usize> =
                (0..requests.len()).filter(|i| (requests[*i].top_k < 0) == full_vocabulary).collect();
            alike.sort_by_key(|i| std::cmp::Reverse(tokens_of(requests[*i])));
            let (part, parts) = self.place.part;
            let mut own: Vec<usize> = alike.iter().copied().skip(part).step_by(parts).collect();
            let mine = own.len();
            // All ranks go through the model equally often: who has one less than the others takes the shortest again.
            if let Some(shortest) = alike.last().filter(|_| own.len() < alike.len().div_ceil(parts)) {
                own.push(*shortest);
            }
            if own.is_empty() {
                continue;
            }
            let these: Vec<&TeacherRequest> = own.iter().map(|i| requests[*i]).collect();
            answers.extend(own.into_iter().zip(self.answer_alike(&these, full_vocabulary)?).take(mine));
        }
        Ok(answers)
    }

    /// Answers to requests of a kind; none on a rank that leaves them to another.
    fn answer_alike(&mut self, requests: &[&TeacherRequest], full_vocabulary: bool) -> Result<Vec<Answer>> {
        let wanted = self.wanted;
        let ids: Vec<Vec<u32>> =
            requests.iter().map(|r| [r.prompt_ids.as_slice(), &r.completion_ids].concat()).collect();
        let own_top = match wanted.support {
            SupportRule::Student => 0,
            SupportRule::Teacher | SupportRule::Union => wanted.top_k,
        };
        let candidates: Vec<Option<Vec<u32>>> =
            requests.iter().map(|r| r.candidate_ids.as_ref().map(|rows| rows.values().to_vec())).collect();
        let scored_from = |r: &TeacherRequest| if r.include_prompt { 1 } else { r.prompt_ids.len() };
        let score_requests: Vec<ScoreRequest<'_>> = requests
            .iter()
            .zip(&ids)
            .zip(&candidates)
            .map(|((r, ids), c)| ScoreRequest { ids, first: scored_from(r), candidates: c.as_deref() })
            .collect();
        let options = ScoreOptions {
            temperature: wanted.temperature,
            top_k: own_top,
            mini_batch: wanted.mini_batch,
            keep_hidden: full_vocabulary,
            head: !full_vocabulary,
        };
        let scored = score(self.model.as_mut(), &score_requests, &options).role("teacher")?;
        if !self.place.reports {
            return Ok(Vec::new());
        }
        Ok(scored.into_iter().zip(candidates).map(|(s, c)| self.merge(s, c)).collect())
    }

    fn merge(&self, scored: Scored, student: Option<Vec<u32>>) -> Answer {
        let k = self.wanted.top_k;
        let (candidate_ids, candidate_logprobs) = match (self.wanted.support, student) {
            _ if k == 0 => (Vec::new(), Vec::new()),
            (SupportRule::Student, student) => (student.unwrap_or_default(), scored.candidate_logprobs),
            (SupportRule::Teacher, _) => (scored.top_ids, scored.top_logprobs),
            (SupportRule::Union, student) => union(
                &student.unwrap_or_default(),
                &scored.candidate_logprobs,
                &scored.top_ids,
                &scored.top_logprobs,
                k,
            ),
        };
        let logprobs = |values: Vec<f32>| Wanted::rounded(values, self.wanted.logprob_dtype);
        let hidden = |values: Vec<f32>| TeacherHidden::alone(Wanted::rounded(values, self.wanted.hidden_dtype));
        Answer {
            logprobs: logprobs(scored.logprobs),
            entropy: logprobs(scored.entropy),
            top1: scored.top1,
            candidate_ids,
            candidate_logprobs: logprobs(candidate_logprobs),
            hidden: scored.hidden_rh.map(hidden).into_iter().collect(),
        }
    }
}

/// What serving a queue needs to know of a teacher.
pub struct Served<'t> {
    /// Its name.
    pub name: &'t str,
    /// Requests to take at a time.
    pub batch: usize,
    /// What the run's requests ask for, as their `top_k`.
    pub asked: i32,
    /// Its model's shape.
    pub shape: &'t ModelConfig,
}

/// Answers one batch of requests by `answer`, waiting for the first of them for `wait_ms_max`. One that no answer is possible
/// for is refused, so that nobody waits for it.
///
/// # Errors
/// Those of the broker and of `answer`.
pub fn serve(
    broker: &dyn Broker,
    consumer: &str,
    wait_ms_max: u64,
    teacher: &Served<'_>,
    answer: &mut dyn FnMut(Vec<Arc<TeacherRequest>>) -> Result<Vec<Answer>>,
) -> Result<TeacherStats> {
    let mut stats = TeacherStats::default();
    let deliveries = broker.take(consumer, teacher.batch, wait_ms_max)?;
    let started = Instant::now();
    let mut fit = Vec::with_capacity(deliveries.len());
    for delivery in deliveries {
        match objection(teacher, &delivery.request) {
            Some(reason) => drop(broker.fail(&delivery, &reason)?),
            None => fit.push(delivery),
        }
    }
    let requests: Vec<Arc<TeacherRequest>> = fit.iter().map(|d| Arc::clone(&d.request)).collect();
    let answers = if requests.is_empty() { Vec::new() } else { answer(requests)? };
    for (delivery, answer) in fit.iter().zip(answers) {
        stats.tokens += tokens_of(&delivery.request) as u64;
        broker.complete(delivery, result(teacher.name, &delivery.request, answer))?;
    }
    stats.seconds = started.elapsed().as_secs_f64();
    Ok(stats)
}

/// Tokens that go through the model for a request.
fn tokens_of(request: &TeacherRequest) -> usize {
    request.prompt_ids.len() + request.completion_ids.len()
}

/// Why a request cannot be scored by this teacher.
fn objection(teacher: &Served<'_>, request: &TeacherRequest) -> Option<String> {
    let Served { asked, shape, .. } = teacher;
    let length = tokens_of(request);
    if length > shape.max_position_embeddings {
        return Some(format!("{length} tokens are beyond the teacher's {} positions", shape.max_position_embeddings));
    }
    // Whole distributions are for validation, whatever training asks for.
    if request.top_k >= 0 && request.top_k != *asked {
        return Some(format!("`top_k` is {}, this teacher answers {asked}", request.top_k));
    }
    let candidates = request.candidate_ids.iter().flat_map(|rows| rows.values()).filter(|id| **id != ABSENT);
    let ids = request.prompt_ids.iter().chain(&request.completion_ids).chain(candidates);
    let largest = ids.copied().max().unwrap_or(0);
    (largest as usize >= shape.vocab_size)
        .then(|| format!("token {largest} is beyond the teacher's vocabulary of {}", shape.vocab_size))
}

/// Student's and teacher's candidates of each row, each id once, padded to `2k` with [`ABSENT`].
fn union(
    student: &[u32],
    student_logprobs: &[f32],
    teacher: &[u32],
    teacher_logprobs: &[f32],
    k: usize,
) -> (Vec<u32>, Vec<f32>) {
    let rows = teacher.len() / k;
    let (mut ids, mut logprobs) = (vec![ABSENT; rows * 2 * k], vec![f32::NEG_INFINITY; rows * 2 * k]);
    for row in 0..rows {
        let mut next = row * 2 * k;
        let own = row * k..(row + 1) * k;
        let both = student[own.clone()]
            .iter()
            .zip(&student_logprobs[own.clone()])
            .chain(teacher[own.clone()].iter().zip(&teacher_logprobs[own]));
        for (id, logprob) in both {
            if *id != ABSENT && !ids[row * 2 * k..next].contains(id) {
                (ids[next], logprobs[next]) = (*id, *logprob);
                next += 1;
            }
        }
    }
    (ids, logprobs)
}

fn result(teacher: &str, request: &TeacherRequest, mut answer: Answer) -> TeacherResult {
    let positions = request.scored_positions();
    let rows_u32 = |values: Vec<u32>| Rows::of_width(values.len() / positions.max(1), values);
    let rows_f32 = |values: Vec<f32>| Rows::of_width(values.len() / positions.max(1), values);
    TeacherResult {
        sample: request.sample,
        weight_version: request.weight_version,
        teacher: teacher.to_string(),
        token_logprobs_s: answer.logprobs,
        entropies_s: answer.entropy,
        top1_ids_s: answer.top1,
        candidate_ids: rows_u32(answer.candidate_ids),
        candidate_logprobs: rows_f32(answer.candidate_logprobs),
        hidden: answer.hidden.pop().map(|hidden| {
            let values_sh = hidden.values_rh;
            HiddenStates { width: values_sh.len() / positions.max(1), values_sh }
        }),
    }
}

/// The broker's name of a sample: its prompt ordinal and its index among the siblings.
fn sample_id(sample: u64, n_generation: u64) -> SampleId {
    SampleId { epoch: 0, prompt: sample / n_generation, generation: (sample % n_generation) as u32 }
}

/// Asks the teacher about completions.
pub fn request<'c>(
    broker: &dyn Broker,
    completions: impl IntoIterator<Item = &'c Completion>,
    n_generation: u64,
    wanted: &Wanted,
    wait_ms_max: u64,
) -> Result<()> {
    for c in completions {
        broker.publish(request_of(sample_id(c.sample, n_generation), c, wanted), wait_ms_max)?;
    }
    Ok(())
}

/// What the teacher is asked about a completion.
pub fn request_of(sample: SampleId, c: &Completion, wanted: &Wanted) -> TeacherRequest {
    TeacherRequest {
        sample,
        weight_version: c.version,
        prompt_ids: c.prompt_ids.clone(),
        completion_ids: c.tokens.clone(),
        include_prompt: wanted.include_prompt,
        top_k: wanted.asked(),
        candidate_ids: wanted.candidate_rows(c, wanted.student_candidates()),
    }
}

/// What the teacher says.
pub fn answer_of(result: TeacherResult) -> Answer {
    let values = |rows: Option<Rows<f32>>| rows.map(|r| r.values().to_vec()).unwrap_or_default();
    Answer {
        logprobs: result.token_logprobs_s,
        entropy: result.entropies_s,
        top1: result.top1_ids_s,
        candidate_ids: result.candidate_ids.map(|rows| rows.values().to_vec()).unwrap_or_default(),
        candidate_logprobs: values(result.candidate_logprobs),
        hidden: result.hidden.map(|h| TeacherHidden::alone(h.values_sh)).into_iter().collect(),
    }
}

/// The answers for `samples`; one that has not come within the deadline is missing and counted by the objective.
pub fn collect(
    broker: &dyn Broker,
    samples: &[u64],
    n_generation: u64,
    wait_ms_max: u64,
) -> Result<HashMap<u64, Answer>> {
    let ids: Vec<SampleId> = samples.iter().map(|s| sample_id(*s, n_generation)).collect();
    let fetched = broker.fetch(&ids, wait_ms_max)?;
    if !fetched.missing.is_empty() {
        tracing::warn!(
            "{} of {} teacher results did not come within {wait_ms_max} ms; those samples are left out of the loss",
            fetched.missing.len(),
            ids.len()
        );
    }
    for (sample, reason) in &fetched.failed {
        tracing::warn!("the teacher could not score sample {sample}: {reason}");
    }
    let answers = fetched.results.into_iter().map(|result| {
        let sample = result.sample.prompt * n_generation + u64::from(result.sample.generation);
        (sample, answer_of(result))
    });
    Ok(answers.collect())
}

/// Lets go of requests whose step was abandoned.
pub fn forget(broker: &dyn Broker, samples: &[u64], n_generation: u64) -> Result<()> {
    let ids: Vec<SampleId> = samples.iter().map(|s| sample_id(*s, n_generation)).collect();
    Ok(broker.forget(&ids)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_union_holds_each_candidate_once() {
        let (ids, logprobs) = union(&[5, 7], &[-1.0, -2.0], &[7, 9], &[-2.0, -3.0], 2);
        assert_eq!(ids, [5, 7, 9, ABSENT]);
        assert_eq!(&logprobs[..3], [-1.0, -2.0, -3.0]);
    }
}
