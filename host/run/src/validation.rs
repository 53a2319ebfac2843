//! Validation: accuracy of the student (and once of the teacher) on held-out prompts, and the exact KL between them on
//! the student's own completions.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use cosmos_engine::model::Model;
use cosmos_report::statistics::mean_std_max_min;
use cosmos_report::{SaidRecord, SampleRecord};
use serde::{Deserialize, Serialize};

use crate::compared::Compared;
use crate::conversation::{Conversations, roll_out};
use crate::error::Result;
use crate::records::Throughput;
use crate::rewards::{RewardSet, reward_metrics, wait};
use crate::rollout::{Completion, Job, Sampling};
use crate::task::{Item, Text};
use crate::teachers::Routes;

/// Held-out prompts with the way they are answered and judged.
pub struct Validation {
    /// The prompts; ordinals are dataset indices.
    pub jobs: Vec<Job>,
    /// Judges the answers, where a plugin offers a reward.
    pub rewards: Option<RewardSet>,
    /// Names of the datasets that the prompts come from.
    pub datasets: Vec<String>,
    /// Which teachers each of them is compared with.
    pub routes: Routes,
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

/// One answer to a validation prompt, as far as the numbers of the validation need it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Answered {
    /// Index of the prompt · completions of a prompt + index among its siblings.
    pub sample: u64,
    /// Index of its dataset.
    pub source: usize,
    /// What it is worth, where something judges; a failed reward counts as 0.
    #[serde(with = "crate::rollout::maybe_double")]
    pub value: Option<f64>,
    /// The rewards' own values and further numbers.
    #[serde(with = "crate::rollout::named_doubles")]
    pub metrics: Vec<(String, f64)>,
    /// Plugins whose rewards failed on it.
    pub failed: Vec<String>,
    /// Tokens that the model wrote.
    pub length: u64,
    /// Whether it ended by itself.
    pub stopped: bool,
}

/// What one rollout found on its share of the validation prompts.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Share {
    /// Its answers, in order.
    pub answers: Vec<Answered>,
    /// Whether anything judges them.
    pub judged: bool,
    /// Seconds that nothing was done but waiting for rewards.
    pub wait_seconds: f64,
    /// Seconds that rewards were under way.
    pub seconds: f64,
    /// Prompts that could not be answered.
    pub prompts_failed: u64,
    /// Completions for the record.
    pub samples: Vec<SampleRecord>,
    /// Tokens generated and seconds it took.
    pub throughput: Throughput,
    /// Mean KL(student ‖ teachers) a token, where this share measured it.
    #[serde(default, with = "crate::rollout::maybe_double")]
    pub kl: Option<f64>,
    /// Each teacher's name and its own mean reward on all the prompts, where this share knows them.
    #[serde(default, with = "crate::rollout::named_doubles")]
    pub teachers: Vec<(String, f64)>,
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

impl Validated {
    /// The numbers of a whole validation from its shares. `datasets` are the names of the datasets, `plugins` those whose
    /// rewards judge; at most `samples_max` completions are recorded.
    pub fn of(shares: Vec<Share>, datasets: &[String], plugins: &[String], samples_max: usize) -> Self {
        let mut out = Self::default();
        let judged = shares.iter().any(|share| share.judged);
        let sum = |of: fn(&Share) -> f64| shares.iter().map(of).sum::<f64>();
        let (wait_seconds, seconds) = (sum(|s| s.wait_seconds), sum(|s| s.seconds));
        out.metrics.insert("val/prompts_failed".into(), shares.iter().map(|s| s.prompts_failed).sum::<u64>() as f64);
        let mut answers = Vec::new();
        for share in shares {
            out.throughput.add(share.throughput.tokens, share.throughput.seconds);
            out.samples.extend(share.samples);
            answers.extend(share.answers);
        }
        answers.sort_by_key(|a| a.sample);
        // A share's samples are in order, so with one share nothing moves.
        out.samples.sort_by_key(|s| sample_number(&s.sample));
        out.samples.truncate(samples_max);
        if judged {
            let value = |a: &Answered| a.value.unwrap_or(0.0);
            let summary = mean_std_max_min(answers.iter().map(value));
            out.reward = (!answers.is_empty()).then_some(summary.mean);
            for (name, value) in
                [("avg", summary.mean), ("std", summary.std), ("max", summary.max), ("min", summary.min)]
            {
                out.metrics.insert(format!("val/reward_{name}"), value);
            }
            let failed = answers.iter().filter(|a| !a.failed.is_empty()).count();
            out.metrics.insert("val/reward_failed".into(), failed as f64);
            out.metrics.insert("val/reward/wait_seconds".into(), wait_seconds);
            out.metrics.insert("val/reward/seconds".into(), seconds);
            let verdicts = answers.iter().map(|a| (a.metrics.as_slice(), a.failed.as_slice()));
            let plugins: Vec<&str> = plugins.iter().map(String::as_str).collect();
            reward_metrics("val/", &plugins, verdicts, &mut out.metrics);
            if datasets.len() > 1 {
                for (source, name) in datasets.iter().enumerate() {
                    let own = answers.iter().filter(|a| a.source == source).map(value);
                    out.metrics.insert(format!("val/{name}/reward_avg"), mean_std_max_min(own).mean);
                }
            }
        }
        out.metrics.insert("val/rollout_count".into(), answers.len() as f64);
        let lengths = mean_std_max_min(answers.iter().map(|a| a.length as f64));
        out.metrics.insert("val/completion_length_mean".into(), lengths.mean);
        out.metrics.insert("val/completion_length_max".into(), lengths.max);
        let stopped = answers.iter().filter(|a| a.stopped).count();
        out.metrics.insert("val/stopped_ratio".into(), stopped as f64 / answers.len().max(1) as f64);
        out
    }
}

/// `prompt/index` as a pair that sorts by number.
fn sample_number(name: &str) -> (u64, u64) {
    let mut parts = name.split('/').map(|part| part.parse().unwrap_or(u64::MAX));
    (parts.next().unwrap_or(u64::MAX), parts.next().unwrap_or(u64::MAX))
}

impl Validation {
    /// Names of the plugins whose rewards judge.
    pub fn plugins(&self) -> Vec<String> {
        self.rewards.iter().flat_map(RewardSet::plugins).map(str::to_string).collect()
    }

    /// Answers share `part` of `parts` of the prompts with `model` and judges them. `None`: asked to stop.
    pub fn answer(
        &mut self,
        model: &mut dyn Model,
        conversations: Option<&mut Conversations>,
        text: &Text,
        step: u64,
        (part, parts): (u64, u64),
        samples_max: usize,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<Share>> {
        let n = self.sampling.n;
        let own = self.jobs.iter().enumerate().filter(|(at, _)| *at as u64 % parts.max(1) == part);
        let jobs: Vec<Job> = own.map(|(_, j)| Job { ordinal: j.ordinal, item: Arc::clone(&j.item) }).collect();
        let items: HashMap<u64, Arc<Item>> = jobs.iter().map(|j| (j.ordinal, Arc::clone(&j.item))).collect();
        let mut scoring = self.rewards.as_ref().map(|set| set.scoring(&items, n));
        let mut finished = |c: &Completion| scoring.as_mut().map_or(Ok(()), |scoring| scoring.finished(c));
        let generated = roll_out(conversations, model, text, &jobs, &self.sampling, step, &mut finished, stop)?;
        let Some((completions, stats)) = generated else {
            return Ok(None);
        };
        let mut share = Share { prompts_failed: stats.failed, ..Share::default() };
        share.throughput.add(stats.tokens, stats.seconds);
        let judged = wait(scoring, &completions)?;
        share.judged = judged.is_some();
        let judged = judged.unwrap_or_default();
        (share.wait_seconds, share.seconds) = (judged.wait_seconds, judged.seconds);
        let values: Vec<Option<f64>> = match share.judged {
            true => judged.values(&completions).into_iter().map(Some).collect(),
            false => vec![None; completions.len()],
        };
        let numbers = if share.judged { judged.numbers(&completions) } else { vec![Vec::new(); completions.len()] };
        let mut failed = judged.verdicts.into_iter().map(|verdict| verdict.failed);
        for ((completion, value), metrics) in completions.iter().zip(&values).zip(numbers) {
            share.answers.push(Answered {
                sample: completion.sample,
                source: items.get(&(completion.sample / n as u64)).map_or(0, |item| item.source),
                value: *value,
                metrics,
                failed: failed.next().unwrap_or_default(),
                length: completion.own_len() as u64,
                stopped: completion.stopped,
            });
        }
        let recorded = completions.iter().zip(values).take(samples_max);
        share.samples = recorded.map(|(c, reward)| sample_record(c, "validation", step, n as u64, reward)).collect();
        Ok(Some(share))
    }

    /// Mean KL(student ‖ teacher) a token, in nats, on fresh completions of the student. The same prompts and random
    /// streams each time, so that two validations differ by the weights alone. `None`: asked to stop.
    pub fn kl(
        &mut self,
        student: &mut dyn Model,
        teacher: &mut dyn Compared,
        conversations: Option<&mut Conversations>,
        text: &Text,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<(f64, Throughput)>> {
        let Some(sum) = self.kl_share(student, teacher, conversations, text, (0, 1), stop)? else {
            return Ok(None);
        };
        Ok(Some((sum.mean(), sum.throughput)))
    }

    /// As [`Validation::kl`], on share `part` of `parts` of the prompts.
    pub fn kl_share(
        &mut self,
        student: &mut dyn Model,
        teacher: &mut dyn Compared,
        conversations: Option<&mut Conversations>,
        text: &Text,
        (part, parts): (u64, u64),
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<KlSum>> {
        let started = Instant::now();
        let prompts = &self.jobs[..self.jobs.len().min(self.kl_prompts)];
        let own = prompts.iter().enumerate().filter(|(at, _)| *at as u64 % parts.max(1) == part);
        let jobs: Vec<Job> = own.map(|(_, j)| Job { ordinal: j.ordinal, item: Arc::clone(&j.item) }).collect();
        let sources: HashMap<u64, usize> = jobs.iter().map(|j| (j.ordinal, j.item.source)).collect();
        let rolled = roll_out(conversations, student, text, &jobs, &self.kl_sampling, 0, &mut |_| Ok(()), stop)?;
        let Some((mut completions, _)) = rolled else {
            return Ok(None);
        };
        for completion in &mut completions {
            let source = sources.get(&(completion.sample / self.kl_sampling.n as u64)).copied().unwrap_or_default();
            completion.teachers = self.routes.of(source);
        }
        let kl = teacher.reverse_kl(student, &completions, self.temperature, self.mini_batch)?;
        let mut found = KlSum::default();
        for (kl, completion) in kl.into_iter().zip(&completions) {
            for value in completion.keep_own(kl, 0) {
                found.sum += f64::from(value);
                found.throughput.tokens += 1;
            }
        }
        found.throughput.seconds = started.elapsed().as_secs_f64();
        Ok(Some(found))
    }
}

/// Divergences of a share of the prompts.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct KlSum {
    /// Sum over all tokens, in nats.
    #[serde(with = "crate::rollout::bits_of_double")]
    pub sum: f64,
    /// Tokens, and seconds it took.
    pub throughput: Throughput,
}

impl KlSum {
    /// Both shares together.
    pub fn add(&mut self, other: &Self) {
        self.sum += other.sum;
        self.throughput.add(other.throughput.tokens, other.throughput.seconds);
    }

    /// Mean a token.
    pub fn mean(&self) -> f64 {
        self.sum / self.throughput.tokens.max(1) as f64
    }
}

/// A completion as the samples file shows it.
pub fn sample_record(completion: &Completion, split: &str, step: u64, n: u64, reward: Option<f64>) -> SampleRecord {
    let ordinal = completion.sample / n;
    let reference = completion.reference.as_deref();
    SampleRecord {
        step,
        split: split.into(),
        sample: format!("{ordinal}/{}", completion.sample % n),
        weight_version: completion.version,
        weight_versions: completion.version_runs(),
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
