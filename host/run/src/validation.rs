//! Validation: accuracy of the student (and once of the teacher) on held-out prompts, and the exact KL between them on
//! the student's own completions.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use cosmos_engine::divergence::{Scored, reverse_kl};
use cosmos_engine::model::Model;
use cosmos_report::SampleRecord;
use cosmos_report::statistics::mean_std_max_min;

use crate::error::{Result, Role};
use crate::records::Throughput;
use crate::rollout::{Completion, Job, Sampling, roll_out, score_completions};
use crate::task::{Item, Scorer, Text};

/// Held-out prompts with the way they are answered and judged.
pub struct Validation {
    /// The prompts; ordinals are dataset indices.
    pub jobs: Vec<Job>,
    /// Judges the answers, where a plugin offers a reward.
    pub scorer: Option<Scorer>,
    /// How answers are sampled.
    pub sampling: Sampling,
    /// How the completions for the KL are sampled: as in training, one a prompt.
    pub kl_sampling: Sampling,
    /// Prompts used for the KL.
    pub kl_prompts: usize,
    /// Sequences scored at a time.
    pub mini_batch: usize,
    /// The training temperature, which divides both models' logits.
    pub temperature: f32,
}

/// What a validation found.
#[derive(Debug, Default)]
pub struct Validated {
    /// Mean reward over all completions; a failed one counts as 0.
    pub reward: Option<f64>,
    /// Metrics under the original's names.
    pub metrics: BTreeMap<String, f64>,
    /// Completions for the record.
    pub samples: Vec<SampleRecord>,
    /// Tokens generated and seconds it took.
    pub throughput: Throughput,
}

impl Validation {
    /// Answers all prompts with `model` and judges them. `None`: asked to stop.
    pub fn accuracy(
        &mut self,
        model: &mut dyn Model,
        text: &Text,
        step: u64,
        samples_max: usize,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<Validated>> {
        let Some((completions, stats)) = roll_out(model, text, &self.jobs, &self.sampling, step, stop)? else {
            return Ok(None);
        };
        let mut out = Validated::default();
        out.throughput.add(stats.tokens, stats.seconds);
        let n = self.sampling.n as u64;
        let items: HashMap<u64, Arc<Item>> = self.jobs.iter().map(|j| (j.ordinal, Arc::clone(&j.item))).collect();
        let mut rewards = vec![None; completions.len()];
        if let Some(scorer) = &mut self.scorer {
            let (scores, failed) = score_completions(scorer, &completions, &items, n)?;
            let values: Vec<f64> = scores.iter().map(|s| s.as_ref().map_or(0.0, |s| s.value)).collect();
            let summary = mean_std_max_min(values.iter().copied());
            out.reward = (!values.is_empty()).then_some(summary.mean);
            for (name, value) in
                [("avg", summary.mean), ("std", summary.std), ("max", summary.max), ("min", summary.min)]
            {
                out.metrics.insert(format!("val/reward_{name}"), value);
            }
            out.metrics.insert("val/reward_failed".into(), failed as f64);
            rewards = values.into_iter().map(Some).collect();
            let mut named: BTreeMap<String, Vec<f64>> = BTreeMap::new();
            for (name, value) in scores.into_iter().flatten().flat_map(|s| s.metrics) {
                named.entry(name).or_default().push(value);
            }
            for (name, values) in named {
                let mean = values.iter().sum::<f64>() / values.len() as f64;
                out.metrics.insert(format!("val/reward/{}/{name}", scorer.plugin()), mean);
            }
        }
        out.metrics.insert("val/rollout_count".into(), completions.len() as f64);
        out.metrics.insert("val/prompts_failed".into(), stats.failed as f64);
        let lengths = mean_std_max_min(completions.iter().map(|c| c.tokens.len() as f64));
        out.metrics.insert("val/completion_length_mean".into(), lengths.mean);
        out.metrics.insert("val/completion_length_max".into(), lengths.max);
        let stopped = completions.iter().filter(|c| c.stopped).count();
        out.metrics.insert("val/stopped_ratio".into(), stopped as f64 / completions.len().max(1) as f64);
        out.samples = completions
            .iter()
            .zip(rewards)
            .take(samples_max)
            .map(|(c, reward)| sample_record(c, "validation", step, n, reward, &items))
            .collect();
        Ok(Some(out))
    }

    /// Mean KL(student ‖ teacher) a token, in nats, on fresh completions of the student. The same prompts and random
    /// streams each time, so that two validations differ by the weights alone.
    pub fn kl(
        &mut self,
        student: &mut dyn Model,
        teacher: &mut dyn Model,
        text: &Text,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<(f64, Throughput)>> {
        let started = Instant::now();
        let jobs = &self.jobs[..self.jobs.len().min(self.kl_prompts)];
        let Some((completions, _)) = roll_out(student, text, jobs, &self.kl_sampling, 0, stop)? else {
            return Ok(None);
        };
        let ids: Vec<Vec<u32>> = completions.iter().map(Completion::ids).collect();
        let sequences: Vec<Scored<'_>> =
            ids.iter().zip(&completions).map(|(ids, c)| Scored { ids, first: c.prompt_ids.len() }).collect();
        let kl = reverse_kl(student, teacher, &sequences, self.temperature, self.mini_batch).role("teacher")?;
        let (sum, count) = kl.iter().flatten().fold((0.0, 0u64), |(s, n), v| (s + f64::from(*v), n + 1));
        let throughput = Throughput { tokens: count, seconds: started.elapsed().as_secs_f64() };
        Ok(Some((sum / count.max(1) as f64, throughput)))
    }
}

/// A completion as the samples file shows it.
pub fn sample_record(
    completion: &Completion,
    split: &str,
    step: u64,
    n: u64,
    reward: Option<f64>,
    items: &HashMap<u64, Arc<Item>>,
) -> SampleRecord {
    let ordinal = completion.sample / n;
    let reference = items.get(&ordinal).and_then(|i| i.reference.as_deref());
    SampleRecord {
        step,
        split: split.into(),
        sample: format!("{ordinal}/{}", completion.sample % n),
        weight_version: completion.version,
        prompt: completion.prompt.clone(),
        completion: completion.text.clone(),
        reference: reference.map(|r| serde_json::from_str(r).unwrap_or_else(|_| r.into())),
        reward,
        finish: Some(if completion.stopped { "stop" } else { "length" }.into()),
        token_ids: completion.tokens.clone(),
        ..SampleRecord::default()
    }
}
