//! The rollout role: prompts in, completions of the current weights out.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use cosmos_config::Config;
use cosmos_engine::generate::{FinishReason, GenerateOptions, GenerateRequest, SamplingParams, generate};
use cosmos_engine::model::Model;
use cosmos_engine::score::{ScoreOptions, ScoreRequest, score};
use cosmos_plugin::RewardSample;
use serde::{Deserialize, Serialize};

use crate::error::{Result, Role};
use crate::task::{Dataset, Item, Scored, Scorer, Text};

/// A completion on its way through the run. Serializable, because those in flight are part of a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Completion {
    /// Prompt ordinal · n_generation + index among its siblings.
    pub sample: u64,
    /// Weights that generated it.
    pub version: u64,
    /// Rendered prompt.
    pub prompt: String,
    /// Prompt ids.
    pub prompt_ids: Vec<u32>,
    /// Completion ids, with the stop id if it stopped by one.
    pub tokens: Vec<u32>,
    /// Completion text, without special tokens.
    pub text: String,
    /// Whether it ended by itself rather than by a limit.
    pub stopped: bool,
    /// Log-prob of each token under the rollout's weights and the training temperature, where they were recorded. `[t]`
    #[serde(with = "bits")]
    pub logprobs: Vec<f32>,
    /// Candidate ids of each position where the objective wants the student's support. `[t · k]`
    pub candidate_ids: Vec<u32>,
    /// Reward, where one was computed.
    pub reward: Option<f64>,
    /// Further named numbers of the reward.
    #[serde(default)]
    pub reward_metrics: Vec<(String, f64)>,
    /// Group-normalised reward.
    #[serde(with = "bit")]
    pub advantage: f32,
}

/// One float as its bits, so that a checkpoint gives back exactly what it was given.
mod bit {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &f32, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u32(value.to_bits())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f32, D::Error> {
        u32::deserialize(from).map(f32::from_bits)
    }
}

/// Floats as their bits.
mod bits {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(values: &[f32], to: S) -> Result<S::Ok, S::Error> {
        values.iter().map(|v| v.to_bits()).collect::<Vec<u32>>().serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<f32>, D::Error> {
        Ok(Vec::<u32>::deserialize(from)?.into_iter().map(f32::from_bits).collect())
    }
}

impl Completion {
    /// Prompt and completion ids.
    pub fn ids(&self) -> Vec<u32> {
        [self.prompt_ids.as_slice(), &self.tokens].concat()
    }
}

/// How a role samples.
#[derive(Debug, Clone)]
pub struct Sampling {
    /// The sampler's settings.
    pub params: SamplingParams,
    /// Completions of each prompt.
    pub n: usize,
    /// Longest completion in tokens.
    pub response_tokens_max: usize,
    /// Longest prompt and completion in tokens.
    pub context_tokens_max: usize,
    /// Ids that end a completion.
    pub stop_ids: Vec<u32>,
    /// Sequences decoded at a time.
    pub slots: usize,
    /// Top-k candidates recorded of each step; 0: none.
    pub candidates: usize,
    /// Whether the log-probs of the sampled tokens are recorded.
    pub logprobs: bool,
    /// Temperature of those log-probs: the trainer's, so that they can stand for the old policy.
    pub logprob_temperature: f32,
}

/// Numbers of one generation phase.
#[derive(Debug, Clone, Copy, Default)]
pub struct RolloutStats {
    /// Tokens generated.
    pub tokens: u64,
    /// Seconds spent generating.
    pub seconds: f64,
    /// Prompts that failed.
    pub failed: u64,
}

/// A prompt with its place in the run.
pub struct Job {
    /// Ordinal within the run; names the random stream.
    pub ordinal: u64,
    /// The prompt.
    pub item: Arc<Item>,
}

/// Fetches prompts by dataset index; failed ones are logged, counted and left out.
pub fn fetch(dataset: &mut Dataset, text: &Text, indices: &[(u64, u64)], failed: &mut u64) -> Result<Vec<Job>> {
    let wanted: Vec<u64> = indices.iter().map(|(_, index)| *index).collect();
    let items = dataset.get(&wanted, text)?;
    let mut jobs = Vec::with_capacity(items.len());
    for ((ordinal, index), item) in indices.iter().zip(items) {
        match item {
            Ok(item) => jobs.push(Job { ordinal: *ordinal, item: Arc::new(item) }),
            Err(reason) => {
                *failed += 1;
                tracing::warn!("prompt {index} left out: {reason}");
            }
        }
    }
    Ok(jobs)
}

/// Generates the completions of `jobs`, in the order of their ordinals. `stop` is asked between completions; a true
/// answer abandons the whole phase (`None`).
pub fn roll_out(
    model: &mut dyn Model,
    text: &Text,
    jobs: &[Job],
    sampling: &Sampling,
    version: u64,
    stop: &dyn Fn() -> bool,
) -> Result<Option<(Vec<Completion>, RolloutStats)>> {
    let started = Instant::now();
    let (requests, mut stats) = requests(jobs, sampling);
    let options = GenerateOptions {
        slots: sampling.slots,
        stop_ids: sampling.stop_ids.clone(),
        context_limit: sampling.context_tokens_max,
        candidates: sampling.candidates,
        logprobs: sampling.logprobs,
        logprob_temperature: sampling.logprob_temperature,
    };
    let by_ordinal: HashMap<u64, &Job> = jobs.iter().map(|j| (j.ordinal, j)).collect();
    let mut completions = Vec::with_capacity(requests.len() * sampling.n);
    let mut abandoned = false;
    generate(model, &requests, &sampling.params, &options, &mut |generated| {
        if let Some(job) = by_ordinal.get(&generated.id) {
            completions.push(Completion {
                sample: generated.id * sampling.n as u64 + generated.index as u64,
                version,
                prompt: job.item.prompt.clone(),
                prompt_ids: job.item.prompt_ids.clone(),
                text: String::new(),
                stopped: generated.finish == FinishReason::Stop,
                logprobs: generated.logprobs,
                candidate_ids: generated.candidate_ids,
                tokens: generated.tokens,
                reward: None,
                reward_metrics: Vec::new(),
                advantage: 0.0,
            });
        }
        abandoned = stop();
        if abandoned { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .role("student")?;
    if abandoned {
        return Ok(None);
    }
    completions.sort_by_key(|c| c.sample);
    for completion in &mut completions {
        completion.text = text.decode(&completion.tokens)?;
    }
    stats.tokens = completions.iter().map(|c| c.tokens.len() as u64).sum();
    stats.seconds = started.elapsed().as_secs_f64();
    Ok(Some((completions, stats)))
}

/// Requests for the prompts that leave room for an answer; the others are counted as failed.
fn requests(jobs: &[Job], sampling: &Sampling) -> (Vec<GenerateRequest>, RolloutStats) {
    let mut stats = RolloutStats::default();
    let mut requests = Vec::with_capacity(jobs.len());
    for job in jobs {
        let length = job.item.prompt_ids.len();
        if length >= sampling.context_tokens_max {
            stats.failed += 1;
            tracing::warn!(
                "prompt {} left out: its {length} tokens leave no room in the context of {} (`policy.model_max_length`)",
                job.ordinal,
                sampling.context_tokens_max
            );
            continue;
        }
        requests.push(GenerateRequest {
            id: job.ordinal,
            prompt: job.item.prompt_ids.clone(),
            n: sampling.n,
            max_new_tokens: sampling.response_tokens_max,
        });
    }
    (requests, stats)
}

/// Replaces each completion's candidates by a second pass over prompt and completion (`rollout_top_k_recompute`).
pub fn recompute_candidates(
    model: &mut dyn Model,
    completions: &mut [Completion],
    k: usize,
    mini_batch: usize,
) -> Result<()> {
    let ids: Vec<Vec<u32>> = completions.iter().map(Completion::ids).collect();
    let requests: Vec<ScoreRequest<'_>> = ids
        .iter()
        .zip(completions.iter())
        .map(|(ids, c)| ScoreRequest { ids, first: c.prompt_ids.len(), candidates: None })
        .collect();
    let options = ScoreOptions { top_k: k, mini_batch, ..ScoreOptions::default() };
    let scored = score(model, &requests, &options).role("student")?;
    for (completion, scored) in completions.iter_mut().zip(scored) {
        completion.candidate_ids = scored.top_ids;
    }
    Ok(())
}

/// Rewards of completions; a failed one counts as 0 and is logged.
pub fn score_completions(
    scorer: &mut Scorer,
    completions: &[Completion],
    items: &HashMap<u64, Arc<Item>>,
    n: u64,
) -> Result<(Vec<Option<Scored>>, u64)> {
    let samples: Vec<RewardSample> = completions
        .iter()
        .map(|c| {
            let item = items.get(&(c.sample / n));
            RewardSample {
                prompt: c.prompt.clone(),
                completion: c.text.clone(),
                reference: item.and_then(|i| i.reference.clone()),
                metadata: item.map(|i| i.metadata.clone()).unwrap_or_default(),
            }
        })
        .collect();
    let mut failed = 0;
    let scores = scorer.score(&samples)?;
    let scores = scores
        .into_iter()
        .zip(completions)
        .map(|(score, completion)| match score {
            Ok(score) => Some(score),
            Err(reason) => {
                failed += 1;
                tracing::warn!("reward of sample {} left out: {reason}", completion.sample);
                None
            }
        })
        .collect();
    Ok((scores, failed))
}

/// Group advantage of rewards: `(r − mean) / (std + 1e-6)` within the completions of one prompt, population std;
/// `unbiased` leaves out the division (Dr. GRPO).
pub fn group_advantages(rewards: &[f64], group: usize, unbiased: bool) -> Vec<f32> {
    rewards
        .chunks(group.max(1))
        .flat_map(|r| {
            let n = r.len() as f64;
            let mean = r.iter().sum::<f64>() / n;
            let std = (r.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt();
            let scale = if unbiased { 1.0 } else { 1.0 / (std + 1e-6) };
            r.iter().map(move |v| ((v - mean) * scale) as f32)
        })
        .collect()
}

/// The training rollout's sampling settings.
pub fn training_sampling(config: &Config, stop_ids: Vec<u32>, candidates: usize, seed: u64) -> Sampling {
    let s = &config.rollout.sampling_config;
    Sampling {
        params: SamplingParams {
            temperature: s.temperature as f32,
            top_p: s.top_p as f32,
            top_k: s.top_k,
            repetition_penalty: s.repetition_penalty as f32,
            seed,
        },
        n: config.rollout.n_generation,
        response_tokens_max: config.rollout.max_response_length,
        context_tokens_max: config.policy.model_max_length,
        stop_ids,
        slots: config.host.decode_slots,
        candidates,
        logprobs: config.train.train_policy.grpo().is_some_and(|g| {
            g.collect_rollout_logprobs || g.use_decoupled_loss || g.off_policy_masking_delta.is_some()
        }),
        logprob_temperature: config.train.train_policy.grpo().map_or(1.0, |g| g.temperature as f32),
    }
}

/// The validation's sampling settings; what `[validation]` leaves open is the rollout's.
pub fn validation_sampling(config: &Config, stop_ids: Vec<u32>, seed: u64) -> Sampling {
    let (v, s) = (&config.validation, &config.rollout.sampling_config);
    Sampling {
        params: SamplingParams {
            temperature: v.temperature as f32,
            top_p: v.top_p.unwrap_or(s.top_p) as f32,
            top_k: v.top_k.unwrap_or(s.top_k),
            repetition_penalty: v.repetition_penalty as f32,
            seed,
        },
        n: v.n_generation,
        response_tokens_max: v.max_response_length.unwrap_or(config.rollout.max_response_length),
        context_tokens_max: config.policy.model_max_length,
        stop_ids,
        slots: config.host.decode_slots,
        candidates: 0,
        logprobs: false,
        logprob_temperature: 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advantages_are_normalised_within_a_group() {
        let a = group_advantages(&[1.0, 0.0, 1.0, 0.0, 3.0, 3.0, 3.0, 3.0], 4, false);
        assert!((a[0] - 1.0).abs() < 1e-4 && (a[1] + 1.0).abs() < 1e-4);
        assert_eq!(&a[4..], [0.0; 4]);
        assert_eq!(group_advantages(&[2.0, 0.0], 2, true), [1.0, -1.0]);
    }
}
