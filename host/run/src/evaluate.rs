//! The plugins' datasets and rewards over a model folder.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use cosmos_config::Resolved;
use cosmos_engine::generate::SamplingParams;
use cosmos_engine::model::{self, GenerationConfig};
use cosmos_report::SampleRecord;
use serde::Serialize;

use crate::choose;
use crate::conversation::{Conversations, roll_out};
use crate::error::{Result, Role, RunError};
use crate::mixture::{Mixture, Part};
use crate::offers::OfferRole;
use crate::plugins::Plugins;
use crate::rewards::{RewardSet, reward_metrics, wait};
use crate::rollout::{Completion, Sampling, fetch};
use crate::validation::sample_record;

/// What to evaluate.
pub struct EvalOptions {
    /// Grants, plugin settings and dataset tables, and the names of the datasets and rewards as in a run's validation.
    pub config: Resolved,
    /// Model folder.
    pub model: PathBuf,
    /// Plugin components.
    pub plugins: Vec<PathBuf>,
    /// At most this many prompts.
    pub prompts_max: Option<usize>,
    /// Where the model computes.
    pub device: String,
    /// Sampling; temperature 0 is greedy.
    pub params: SamplingParams,
    /// Completions of each prompt.
    pub n: usize,
    /// Longest completion in tokens.
    pub response_tokens_max: usize,
}

/// What came out.
#[derive(Debug, Serialize)]
pub struct EvalReport {
    /// Prompts answered.
    pub prompts: usize,
    /// Completions judged.
    pub completions: usize,
    /// Mean reward; a failed one counts as 0.
    pub reward_avg: f64,
    /// Means of the rewards' own values and further numbers, and their failures, as `plugin/name`.
    pub rewards: BTreeMap<String, f64>,
    /// Completions that a reward failed on.
    pub reward_failed: u64,
    /// Prompts that could not be used.
    pub prompts_failed: u64,
    /// Mean length in tokens.
    pub completion_length_mean: f64,
    /// Tokens a second.
    pub tokens_per_second: f64,
    /// Every completion.
    pub samples: Vec<SampleRecord>,
}

/// Answers a dataset's prompts with a model and judges them.
pub fn evaluate(options: &EvalOptions) -> Result<EvalReport> {
    let resolved = &options.config;
    let config = &resolved.config;
    let text = crate::prepare::text(config, &options.model)?;
    let plugins = Plugins::load(&options.plugins, resolved, Some(&text))?;
    let mut conversations = Conversations::open(resolved, &plugins)?;
    let missing = |what: &str| {
        let files: Vec<String> = options.plugins.iter().map(|p| p.display().to_string()).collect();
        RunError::config(
            "",
            format!("{}: no {what} for validation is offered", files.join(", ")),
            format!("`plugin inspect` lists what is offered; name one with `--{what}`"),
        )
    };
    let role = OfferRole::Validation;
    let chosen = choose::datasets(resolved, &plugins, role)?.ok_or_else(|| missing("dataset"))?;
    let common = choose::validation_rewards(resolved, &plugins)?;
    let parts = chosen.into_iter().map(|(offered, weight)| {
        let dataset = plugins.open_dataset(resolved, &offered, role)?;
        Ok(Part { name: offered.full(), offered: Some(offered), weight, dataset })
    });
    let mut dataset = Mixture::new(parts.collect::<Result<Vec<_>>>()?);
    let routes = choose::routes(resolved, &plugins, dataset.parts(), common, role)?;
    let rewards = RewardSet::open(resolved, &plugins, role, &routes, None)?;
    // A conversation has its environment's reward.
    if rewards.is_none() && conversations.is_none() {
        return Err(missing("reward"));
    }
    let mut model = model::load(&options.model, &options.device).role("model")?;
    let generation = GenerationConfig::from_folder(&options.model, model.config()).role("model")?;
    let count = dataset.len().min(options.prompts_max.map_or(u64::MAX, |n| n as u64));
    let indices: Vec<(u64, u64)> = (0..count).map(|i| (i, i)).collect();
    let mut prompts_failed = 0;
    let jobs = fetch(&mut dataset, &text, &indices, &mut prompts_failed)?;
    let sampling = Sampling {
        params: options.params.clone(),
        n: options.n,
        response_tokens_max: options.response_tokens_max,
        context_tokens_max: model.config().max_position_embeddings,
        stop_ids: generation.eos_token_ids,
        slots: config.host.decode_slots,
        kv_bytes_max: crate::rollout::kv_bytes_max(config),
        candidates: 0,
        logprobs: false,
        logprob_temperature: 1.0,
    };
    let items: HashMap<u64, Arc<_>> = jobs.iter().map(|j| (j.ordinal, Arc::clone(&j.item))).collect();
    let mut scoring = rewards.as_ref().map(|set| set.scoring(&items, options.n));
    let mut finished = |c: &Completion| scoring.as_mut().map_or(Ok(()), |scoring| scoring.finished(c));
    let talks = conversations.as_mut();
    let generated = roll_out(talks, model.as_mut(), &text, &jobs, &sampling, 0, &mut finished, &|| false)?;
    let Some((completions, stats)) = generated else {
        return Err(RunError::config("", "the evaluation was interrupted", ""));
    };
    let n = options.n as u64;
    let judged = wait(scoring, &completions)?.unwrap_or_default();
    let (values, numbers) = (judged.values(&completions), judged.numbers(&completions));
    let reward_failed = judged.verdicts.iter().filter(|v| !v.failed.is_empty()).count() as u64;
    let mut named = BTreeMap::new();
    let verdicts = numbers.iter().zip(&judged.verdicts).map(|(n, v)| (n.as_slice(), v.failed.as_slice()));
    reward_metrics("", &rewards.as_ref().map(RewardSet::plugins).unwrap_or_default(), verdicts, &mut named);
    let named = named.into_iter().map(|(name, value)| (name.trim_start_matches("reward/").to_string(), value));
    let mean = |sum: f64, count: usize| if count > 0 { sum / count as f64 } else { 0.0 };
    Ok(EvalReport {
        prompts: jobs.len(),
        completions: completions.len(),
        reward_avg: mean(values.iter().sum(), values.len()),
        rewards: named.collect(),
        reward_failed,
        prompts_failed: prompts_failed + stats.failed,
        completion_length_mean: mean(stats.tokens as f64, completions.len()),
        tokens_per_second: if stats.seconds > 0.0 { stats.tokens as f64 / stats.seconds } else { 0.0 },
        samples: completions.iter().zip(values).map(|(c, r)| sample_record(c, "eval", 0, n, Some(r))).collect(),
    })
}
