//! The teacher role: takes completions from the broker, scores every token of them, stores the answers.
//!
//! It holds no optimizer state and no gradients. Requests are acknowledged only after their results are stored, so a
//! teacher that dies costs time, not samples.

use std::collections::HashMap;
use std::time::Instant;

use cosmos_broker::{Broker, HiddenStates, Rows, SampleId, TeacherRequest, TeacherResult};
use cosmos_config::{Config, SupportRule};
use cosmos_engine::model::Model;
use cosmos_engine::objective::ObjectiveSpec;
use cosmos_engine::score::{ABSENT, ScoreOptions, ScoreRequest, Scored, score};

use crate::error::{Result, Role, RunError};
use crate::rollout::Completion;

/// What the teacher says about one completion; every vector follows the scored tokens.
#[derive(Debug, Clone, Default)]
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
    /// Hidden states `[tokens, hidden]` for full-vocabulary objectives.
    pub hidden_rh: Option<Vec<f32>>,
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
            hidden_rh: self.hidden_rh.map(|hidden_rh| completion.keep_own(hidden_rh, lead)),
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

/// The teacher of a run.
pub struct TeacherRole {
    /// The frozen model.
    pub model: Box<dyn Model>,
    wanted: Wanted,
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
    pub fn new(model: Box<dyn Model>, wanted: Wanted) -> Self {
        Self { model, wanted }
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
                broker.complete(delivery, result(&delivery.request, answer))?;
            }
        }
        stats.seconds = started.elapsed().as_secs_f64();
        stats.latency_ms_max = broker.stats()?.latency_ms_max;
        Ok(stats)
    }

    fn answer(&mut self, requests: &[&TeacherRequest]) -> Result<Vec<Answer>> {
        let wanted = self.wanted;
        let ids: Vec<Vec<u32>> =
            requests.iter().map(|r| [r.prompt_ids.as_slice(), &r.completion_ids].concat()).collect();
        let own_top = match wanted.support {
            SupportRule::Student => 0,
            SupportRule::Teacher | SupportRule::Union => wanted.top_k,
        };
        let candidates: Vec<Option<Vec<u32>>> =
            requests.iter().map(|r| r.candidate_ids.as_ref().map(|rows| rows.values().to_vec())).collect();
        let scored_from = |r: &TeacherRequest| if wanted.include_prompt { 1 } else { r.prompt_ids.len() };
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
            keep_hidden: wanted.full_vocabulary,
            head: !wanted.full_vocabulary,
        };
        let scored = score(self.model.as_mut(), &score_requests, &options).role("teacher")?;
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
        Answer {
            logprobs: scored.logprobs,
            entropy: scored.entropy,
            top1: scored.top1,
            candidate_ids,
            candidate_logprobs,
            hidden_rh: scored.hidden_rh,
        }
    }
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

fn result(request: &TeacherRequest, answer: Answer) -> TeacherResult {
    let positions = request.scored_positions();
    let rows_u32 = |values: Vec<u32>| Rows::of_width(values.len() / positions.max(1), values);
    let rows_f32 = |values: Vec<f32>| Rows::of_width(values.len() / positions.max(1), values);
    TeacherResult {
        sample: request.sample,
        weight_version: request.weight_version,
        token_logprobs_s: answer.logprobs,
        entropies_s: answer.entropy,
        top1_ids_s: answer.top1,
        candidate_ids: rows_u32(answer.candidate_ids),
        candidate_logprobs: rows_f32(answer.candidate_logprobs),
        hidden: answer.hidden_rh.map(|values_sh| HiddenStates { width: values_sh.len() / positions.max(1), values_sh }),
        ..TeacherResult::default()
    }
}

/// The broker's name of a sample: its prompt ordinal and its index among the siblings.
fn sample_id(sample: u64, n_generation: u64) -> SampleId {
    SampleId { epoch: 0, prompt: sample / n_generation, generation: (sample % n_generation) as u32 }
}

/// Asks the teacher about completions.
pub fn request(
    broker: &dyn Broker,
    completions: &[Completion],
    n_generation: u64,
    wanted: &Wanted,
    wait_ms_max: u64,
) -> Result<()> {
    let k = wanted.student_candidates();
    for c in completions {
        let request = TeacherRequest {
            sample: sample_id(c.sample, n_generation),
            weight_version: c.version,
            prompt_ids: c.prompt_ids.clone(),
            completion_ids: c.tokens.clone(),
            include_prompt: wanted.include_prompt,
            top_k: wanted.top_k as i32,
            candidate_ids: wanted.candidate_rows(c, k),
        };
        broker.publish(request, wait_ms_max)?;
    }
    Ok(())
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
    let values = |rows: Option<Rows<f32>>| rows.map(|r| r.values().to_vec()).unwrap_or_default();
    let answers = fetched.results.into_iter().map(|r| {
        let sample = r.sample.prompt * n_generation + u64::from(r.sample.generation);
        let answer = Answer {
            logprobs: r.token_logprobs_s,
            entropy: r.entropies_s,
            top1: r.top1_ids_s,
            candidate_ids: r.candidate_ids.map(|rows| rows.values().to_vec()).unwrap_or_default(),
            candidate_logprobs: values(r.candidate_logprobs),
            hidden_rh: r.hidden.map(|h| h.values_sh),
        };
        (sample, answer)
    });
    Ok(answers.collect())
}

/// Lets go of requests whose step was abandoned.
pub fn forget(broker: &dyn Broker, samples: &[u64], n_generation: u64) -> Result<()> {
    let ids: Vec<SampleId> = samples.iter().map(|s| sample_id(*s, n_generation)).collect();
    Ok(broker.forget(&ids)?)
}

/// Refuses a teacher whose answers could not be used.
pub fn check_widths(student_vocab: usize, teacher_vocab: usize, wanted: &Wanted, place: String) -> Result<()> {
    if wanted.full_vocabulary && teacher_vocab < student_vocab {
        return Err(RunError::config(
            place,
            format!(
                "`distillation.top_k = -1` compares whole vocabularies, but the teacher's head has {teacher_vocab} rows and the student's {student_vocab}"
            ),
            "use `top_k = 0` or a positive `top_k`",
        ));
    }
    Ok(())
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
