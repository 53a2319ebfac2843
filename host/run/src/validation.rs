//! Validation: accuracy of the student (and once of the teacher) on held-out prompts, and the exact KL between them on
//! the student's own completions.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use cosmos_engine::divergence::{Scored, reverse_kl};
use cosmos_engine::model::Model;
use cosmos_report::statistics::mean_std_max_min;
use cosmos_report::{SaidRecord, SampleRecord};

use crate::conversation::{Conversations, roll_out};
use crate::error::{Result, Role};
use crate::records::Throughput;
use crate::rewards::{RewardSet, reward_metrics, wait};
use crate::rollout::{Completion, Job, Sampling};
use crate::task::{Item, Text};

/// Held-out prompts with the way they are answered and judged.
pub struct Validation {
    /// The prompts; ordinals are dataset indices.
    pub jobs: Vec<Job>,
    /// Judges the answers, where a plugin offers a reward.
    pub rewards: Option<RewardSet>,
    /// Names of the datasets that the prompts come from.
    pub datasets: Vec<String>,
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
        conversations: Option<&mut Conversations>,
        text: &Text,
        step: u64,
        samples_max: usize,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<Validated>> {
        let n = self.sampling.n;
        let items: HashMap<u64, Arc<Item>> = self.jobs.iter().map(|j| (j.ordinal, Arc::clone(&j.item))).collect();
        let mut scoring = self.rewards.as_ref().map(|set| set.scoring(&items, n));
        let mut finished = |c: &Completion| scoring.as_mut().map_or(Ok(()), |scoring| scoring.finished(c));
        let generated = roll_out(conversations, model, text, &self.jobs, &self.sampling, step, &mut finished, stop)?;
        let Some((completions, stats)) = generated else {
            return Ok(None);
        };
        let mut out = Validated::default();
        out.throughput.add(stats.tokens, stats.seconds);
        let mut rewards = vec![None; completions.len()];
        if let Some(judged) = wait(scoring, &completions)? {
            let values = judged.values(&completions);
            let summary = mean_std_max_min(values.iter().copied());
            out.reward = (!values.is_empty()).then_some(summary.mean);
            for (name, value) in
                [("avg", summary.mean), ("std", summary.std), ("max", summary.max), ("min", summary.min)]
            {
                out.metrics.insert(format!("val/reward_{name}"), value);
            }
            let failed = judged.verdicts.iter().filter(|v| !v.failed.is_empty()).count();
            out.metrics.insert("val/reward_failed".into(), failed as f64);
            out.metrics.insert("val/reward/wait_seconds".into(), judged.wait_seconds);
            out.metrics.insert("val/reward/seconds".into(), judged.seconds);
            let numbers = judged.numbers(&completions);
            let verdicts = numbers.iter().zip(&judged.verdicts).map(|(n, v)| (n.as_slice(), v.failed.as_slice()));
            let plugins = self.rewards.as_ref().map(RewardSet::plugins).unwrap_or_default();
            reward_metrics("val/", &plugins, verdicts, &mut out.metrics);
            self.by_dataset(&completions, &values, &items, &mut out.metrics);
            rewards = values.into_iter().map(Some).collect();
        }
        out.metrics.insert("val/rollout_count".into(), completions.len() as f64);
        out.metrics.insert("val/prompts_failed".into(), stats.failed as f64);
        let lengths = mean_std_max_min(completions.iter().map(|c| c.own_len() as f64));
        out.metrics.insert("val/completion_length_mean".into(), lengths.mean);
        out.metrics.insert("val/completion_length_max".into(), lengths.max);
        let stopped = completions.iter().filter(|c| c.stopped).count();
        out.metrics.insert("val/stopped_ratio".into(), stopped as f64 / completions.len().max(1) as f64);
        out.samples = completions
            .iter()
            .zip(rewards)
            .take(samples_max)
            .map(|(c, reward)| sample_record(c, "validation", step, n as u64, reward, &items))
            .collect();
        Ok(Some(out))
    }

    /// The mean reward of each dataset, when there are several.
    fn by_dataset(
        &self,
        completions: &[Completion],
        values: &[f64],
        items: &HashMap<u64, Arc<Item>>,
        metrics: &mut BTreeMap<String, f64>,
    ) {
        if self.datasets.len() < 2 {
            return;
        }
        let n = self.sampling.n as u64;
        for (source, name) in self.datasets.iter().enumerate() {
            let own = |c: &Completion| items.get(&(c.sample / n)).is_some_and(|item| item.source == source);
            let own = completions.iter().zip(values).filter(|(c, _)| own(c)).map(|(_, value)| *value);
            metrics.insert(format!("val/{name}/reward_avg"), mean_std_max_min(own).mean);
        }
    }

    /// Mean KL(student ‖ teacher) a token, in nats, on fresh completions of the student. The same prompts and random
    /// streams each time, so that two validations differ by the weights alone.
    pub fn kl(
        &mut self,
        student: &mut dyn Model,
        teacher: &mut dyn Model,
        conversations: Option<&mut Conversations>,
        text: &Text,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<(f64, Throughput)>> {
        let started = Instant::now();
        let jobs = &self.jobs[..self.jobs.len().min(self.kl_prompts)];
        let rolled = roll_out(conversations, student, text, jobs, &self.kl_sampling, 0, &mut |_| Ok(()), stop)?;
        let Some((completions, _)) = rolled else {
            return Ok(None);
        };
        let ids: Vec<Vec<u32>> = completions.iter().map(Completion::ids).collect();
        let sequences: Vec<Scored<'_>> =
            ids.iter().zip(&completions).map(|(ids, c)| Scored { ids, first: c.prompt_ids.len() }).collect();
        let kl = reverse_kl(student, teacher, &sequences, self.temperature, self.mini_batch).role("teacher")?;
        let kl: Vec<Vec<f32>> = kl.into_iter().zip(&completions).map(|(kl, c)| c.keep_own(kl, 0)).collect();
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
        conversation: completion
            .conversation
            .iter()
            .map(|m| SaidRecord { role: m.role.clone(), content: m.content.clone() })
            .collect(),
        reference: reference.map(|r| serde_json::from_str(r).unwrap_or_else(|_| r.into())),
        reward,
        finish: Some(if completion.stopped { "stop" } else { "length" }.into()),
        token_ids: completion.tokens.clone(),
        ..SampleRecord::default()
    }
}
