//! The rollout role: prompts in, completions of the current weights out.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

use cosmos_config::Config;
use cosmos_engine::generate::{FinishReason, GenerateOptions, GenerateRequest, SamplingParams, generate};
use cosmos_engine::model::{Model, WeightFormat};
use cosmos_engine::score::{ScoreOptions, ScoreRequest, score};
use cosmos_plugin::ChatMessage;
use serde::{Deserialize, Serialize};

use crate::error::{Result, Role};
use crate::mixture::Mixture;
use crate::shards;
use crate::task::{Item, Text};

/// A completion on its way through the run. Serializable, because those in flight are part of a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Completion {
    /// Prompt ordinal · n_generation + index among its siblings.
    pub sample: u64,
    /// Weights that generated it.
    pub version: u64,
    /// Which weights wrote which tokens, as runs: version and number of tokens. Empty: all of them by `version`, which is the
    /// newest otherwise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub versions: Vec<(u64, u32)>,
    /// Which of the run's teachers it is compared with; empty: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub teachers: Vec<u32>,
    /// Rendered prompt.
    pub prompt: String,
    /// Prompt ids.
    pub prompt_ids: Vec<u32>,
    /// Completion ids, with the stop id if it stopped by one. In a conversation all turns, with what others said.
    pub tokens: Vec<u32>,
    /// Which of `tokens` the model sampled itself; empty: all of them. Only those are trained on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub own: Vec<bool>,
    /// Completion text, without special tokens. In a conversation the model's last message.
    pub text: String,
    /// A conversation's messages after the prompt.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conversation: Vec<ChatMessage>,
    /// Whether it ended by itself rather than by a limit.
    pub stopped: bool,
    /// Log-prob of each own token under the rollout's weights and the training temperature, where they were recorded. `[t]`
    #[serde(with = "bits")]
    pub logprobs: Vec<f32>,
    /// Candidate ids of each own position where the objective wants the student's support. `[t · k]`
    pub candidate_ids: Vec<u32>,
    /// Reward, where one was computed.
    #[serde(default, with = "maybe_double")]
    pub reward: Option<f64>,
    /// The rewards' own values and further numbers, by the name they are logged under.
    #[serde(default, with = "named_doubles")]
    pub reward_metrics: Vec<(String, f64)>,
    /// Plugins whose rewards failed on it.
    #[serde(default)]
    pub reward_failed: Vec<String>,
    /// Group-normalised reward.
    #[serde(with = "bit")]
    pub advantage: f32,
    /// What the rewards compared it with, as JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
}

/// One float as its bits, so that a checkpoint gives back exactly what it was given.
pub(crate) mod bit {
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

/// A double as its bits in hexadecimal; a number, as earlier versions wrote it, is read too.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Double {
    Bits(String),
    Number(f64),
}

impl Double {
    fn new(value: f64) -> Self {
        Self::Bits(format!("{:016x}", value.to_bits()))
    }

    fn value<E: serde::de::Error>(self) -> std::result::Result<f64, E> {
        match self {
            Self::Bits(text) => u64::from_str_radix(&text, 16).map(f64::from_bits).map_err(E::custom),
            Self::Number(value) => Ok(value),
        }
    }
}

/// A double, bit for bit.
pub(crate) mod bits_of_double {
    use super::Double;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
        Double::new(*value).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
        Double::deserialize(from)?.value()
    }
}

/// A double or none, bit for bit.
pub(crate) mod maybe_double {
    use super::Double;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(value: &Option<f64>, to: S) -> Result<S::Ok, S::Error> {
        value.map(Double::new).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
        Option::<Double>::deserialize(from)?.map(Double::value).transpose()
    }
}

/// Doubles with names, bit for bit.
pub(crate) mod named_doubles {
    use super::Double;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(values: &[(String, f64)], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(values.iter().map(|(name, value)| (name, Double::new(*value))))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<(String, f64)>, D::Error> {
        let pairs = Vec::<(String, Double)>::deserialize(from)?;
        pairs.into_iter().map(|(name, value)| Ok((name, value.value()?))).collect()
    }
}

impl Completion {
    /// Prompt and completion ids.
    pub fn ids(&self) -> Vec<u32> {
        [self.prompt_ids.as_slice(), &self.tokens].concat()
    }

    /// How many tokens the model sampled itself.
    pub fn own_len(&self) -> usize {
        if self.own.is_empty() { self.tokens.len() } else { self.own.iter().filter(|own| **own).count() }
    }

    /// Version and number of tokens of each run of tokens, never empty for a completion with tokens.
    pub fn version_runs(&self) -> Vec<(u64, u32)> {
        if self.versions.is_empty() { vec![(self.version, self.tokens.len() as u32)] } else { self.versions.clone() }
    }

    /// How often the model spoke.
    pub fn turns(&self) -> usize {
        self.conversation.iter().filter(|m| m.role == "assistant").count().max(1)
    }

    /// Of `values`, some for each of `lead` prompt positions and then for each token, those that are not about tokens of
    /// others.
    pub fn keep_own<T: Copy>(&self, values: Vec<T>, lead: usize) -> Vec<T> {
        let rows = lead + self.own.len();
        // A wrong length is left as it is: the objective names it.
        if self.own.is_empty() || !values.len().is_multiple_of(rows) || values.is_empty() {
            return values;
        }
        let width = values.len() / rows;
        let kept = std::iter::repeat_n(&true, lead).chain(&self.own);
        values.chunks(width).zip(kept).filter(|(_, own)| **own).flat_map(|(row, _)| row).copied().collect()
    }

    /// The opposite of [`Completion::keep_own`] without prompt positions: `fill` stands at the tokens of others.
    pub fn spread<T: Copy>(&self, values: &[T], fill: T) -> Vec<T> {
        let width = values.len() / self.own_len().max(1);
        if self.own.is_empty() || width == 0 {
            return values.to_vec();
        }
        let mut rows = values.chunks(width);
        let mut spread = Vec::with_capacity(self.own.len() * width);
        for own in &self.own {
            match own.then(|| rows.next()).flatten() {
                Some(row) => spread.extend_from_slice(row),
                None => spread.extend(std::iter::repeat_n(fill, width)),
            }
        }
        spread
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
    /// Bytes of keys and values that they may hold; further ones wait.
    pub kv_bytes_max: Option<usize>,
    /// Top-k candidates recorded of each step; 0: none.
    pub candidates: usize,
    /// Whether the log-probs of the sampled tokens are recorded.
    pub logprobs: bool,
    /// Temperature of those log-probs: the trainer's, so that they can stand for the old policy.
    pub logprob_temperature: f32,
}

impl Sampling {
    /// The engine's options.
    pub(crate) fn options(&self) -> GenerateOptions {
        GenerateOptions {
            slots: self.slots,
            stop_ids: self.stop_ids.clone(),
            context_limit: self.context_tokens_max,
            candidates: self.candidates,
            logprobs: self.logprobs,
            logprob_temperature: self.logprob_temperature,
            kv_bytes_max: self.kv_bytes_max,
        }
    }
}

/// Numbers of one generation phase.
#[derive(Debug, Clone, Copy, Default)]
pub struct RolloutStats {
    /// Tokens generated.
    pub tokens: u64,
    /// Seconds spent generating.
    pub seconds: f64,
    /// Prompts, or conversations, that failed.
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
pub fn fetch(dataset: &mut Mixture, text: &Text, indices: &[(u64, u64)], failed: &mut u64) -> Result<Vec<Job>> {
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

/// Generates the completions of `jobs`, in the order of their ordinals. `finished` sees each as soon as it is there.
/// `stop` is asked between completions; a true answer abandons the whole phase (`None`).
pub fn roll_out(
    model: &mut dyn Model,
    text: &Text,
    jobs: &[Job],
    sampling: &Sampling,
    version: u64,
    finished: &mut dyn FnMut(&Completion) -> Result<()>,
    stop: &dyn Fn() -> bool,
) -> Result<Option<(Vec<Completion>, RolloutStats)>> {
    let started = Instant::now();
    let (requests, mut stats) = requests(jobs, sampling);
    let options = sampling.options();
    let by_ordinal: HashMap<u64, &Job> = jobs.iter().map(|j| (j.ordinal, j)).collect();
    let mut completions = Vec::with_capacity(requests.len() * sampling.n);
    let mut abandoned = false;
    let mut failed = None;
    let mut take = |generated: cosmos_engine::generate::Generated| -> Result<()> {
        let Some(job) = by_ordinal.get(&generated.id) else { return Ok(()) };
        let completion = Completion {
            sample: generated.id * sampling.n as u64 + generated.index as u64,
            version,
            versions: vec![(version, generated.tokens.len() as u32)],
            teachers: Vec::new(),
            prompt: job.item.prompt.clone(),
            prompt_ids: job.item.prompt_ids.clone(),
            own: Vec::new(),
            text: text.decode(&generated.tokens)?,
            conversation: Vec::new(),
            stopped: generated.finish == FinishReason::Stop,
            logprobs: generated.logprobs,
            candidate_ids: generated.candidate_ids,
            tokens: generated.tokens,
            reward: None,
            reward_metrics: Vec::new(),
            reward_failed: Vec::new(),
            advantage: 0.0,
            reference: job.item.reference.clone(),
        };
        finished(&completion)?;
        completions.push(completion);
        Ok(())
    };
    generate(model, &requests, &sampling.params, &options, &mut |generated| {
        failed = take(generated).err();
        abandoned = stop();
        if abandoned || failed.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .role("student")?;
    if let Some(error) = failed {
        return Err(error);
    }
    if abandoned {
        return Ok(None);
    }
    completions.sort_by_key(|c| c.sample);
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
            ..GenerateRequest::default()
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
        completion.candidate_ids = completion.keep_own(scored.top_ids, 0);
    }
    Ok(())
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

/// Completions in their order, those of each prompt together.
pub fn groups(completions: &[Completion], n: u64) -> impl Iterator<Item = &[Completion]> {
    completions.chunk_by(move |a, b| a.sample / n.max(1) == b.sample / n.max(1))
}

/// [`group_advantages`] of completions in their order; a prompt whose completions did not all come is a smaller group.
pub fn advantages(completions: &[Completion], rewards: &[f64], n: u64, unbiased: bool) -> Vec<f32> {
    let mut rest = rewards;
    let mut advantages = Vec::with_capacity(rewards.len());
    for group in groups(completions, n) {
        let (own, others) = rest.split_at(group.len().min(rest.len()));
        advantages.extend(group_advantages(own, own.len(), unbiased));
        rest = others;
    }
    advantages
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
        kv_bytes_max: kv_bytes_max(config),
        candidates,
        logprobs: config.train.train_policy.grpo().is_some_and(|g| {
            g.collect_rollout_logprobs
                || g.use_decoupled_loss
                || g.off_policy_masking_delta.is_some()
                // Whoever samples with other numbers than are trained is told how far they are apart.
                || shards::rollout_format(config) != WeightFormat::F32
        }),
        logprob_temperature: config.train.train_policy.grpo().map_or(1.0, |g| g.temperature as f32),
    }
}

/// What `host.kv_mib_max` allows.
pub(crate) fn kv_bytes_max(config: &Config) -> Option<usize> {
    config.host.kv_mib_max.map(|mib| mib.saturating_mul(1 << 20))
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
        kv_bytes_max: kv_bytes_max(config),
        candidates: 0,
        logprobs: false,
        logprob_temperature: 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewards_in_flight_keep_their_bits() {
        let value = 0.1 + 0.2;
        let completion = Completion {
            sample: 3,
            version: 1,
            versions: vec![(1, 1)],
            teachers: vec![1],
            prompt: "p".into(),
            prompt_ids: vec![1],
            tokens: vec![2],
            own: vec![true],
            text: "t".into(),
            conversation: Vec::new(),
            stopped: true,
            logprobs: Vec::new(),
            candidate_ids: Vec::new(),
            reward: Some(value),
            reward_metrics: vec![("a/b".into(), value / 3.0)],
            reward_failed: vec!["c".into()],
            advantage: 0.5,
            reference: Some("4".into()),
        };
        let text = serde_json::to_string(&completion).unwrap();
        let read: Completion = serde_json::from_str(&text).unwrap();
        assert_eq!(read.reward.unwrap().to_bits(), value.to_bits());
        assert_eq!(read.reward_metrics[0].1.to_bits(), (value / 3.0).to_bits());
        assert_eq!(read.reward_failed, ["c"]);
        let bits = format!("\"{:016x}\"", value.to_bits());
        let mut old: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(text.contains(&bits), "{text}");
        old["reward"] = serde_json::json!(0.5);
        old["reward_metrics"] = serde_json::json!([["x", 1.0]]);
        old.as_object_mut().unwrap().remove("reward_failed");
        let read: Completion = serde_json::from_value(old).unwrap();
        assert_eq!((read.reward, read.reward_metrics), (Some(0.5), vec![("x".to_string(), 1.0)]));
    }

    #[test]
    fn advantages_are_normalised_within_a_group() {
        let a = group_advantages(&[1.0, 0.0, 1.0, 0.0, 3.0, 3.0, 3.0, 3.0], 4, false);
        assert!((a[0] - 1.0).abs() < 1e-4 && (a[1] + 1.0).abs() < 1e-4);
        assert_eq!(&a[4..], [0.0; 4]);
        assert_eq!(group_advantages(&[2.0, 0.0], 2, true), [1.0, -1.0]);
    }
}
