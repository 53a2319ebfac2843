//! A plugin's dataset and reward over a model folder.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use cosmos_config::Config;
use cosmos_engine::generate::SamplingParams;
use cosmos_engine::model::{self, GenerationConfig};
use cosmos_report::SampleRecord;
use serde::Serialize;
use serde_json::Value;

use crate::error::{Result, Role, RunError};
use crate::rollout::{Sampling, fetch, roll_out, score_completions};
use crate::task::{OfferRole, Plugins, Text};
use crate::validation::sample_record;

/// What to evaluate.
pub struct EvalOptions {
    /// Grants, plugin settings and dataset tables; defaults when there is none.
    pub config: Option<Config>,
    /// Model folder.
    pub model: PathBuf,
    /// Plugin component.
    pub plugin: PathBuf,
    /// Dataset by name; else the first validation dataset.
    pub dataset: Option<String>,
    /// Reward by name; else the first validation reward.
    pub reward: Option<String>,
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
    /// Rewards that failed.
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
    let default = Config::default();
    let config = options.config.as_ref().unwrap_or(&default);
    let text = Text::load(&options.model)?;
    let plugins = Plugins::load(std::slice::from_ref(&options.plugin), config, Some(&text))?;
    let table = serde_json::to_value(&config.validation.dataset).unwrap_or(Value::Null);
    let missing = |what: &str, name: &Option<String>| {
        let which = name.as_ref().map_or("for validation".to_string(), |n| format!("called `{n}`"));
        RunError::config(
            "",
            format!("{}: offers no {what} {which}", options.plugin.display()),
            "`plugin inspect` lists what it offers",
        )
    };
    let mut dataset = plugins
        .dataset(OfferRole::Validation, options.dataset.as_deref(), &table)?
        .ok_or_else(|| missing("dataset", &options.dataset))?;
    let mut scorer = plugins
        .reward(OfferRole::Validation, options.reward.as_deref(), &table)?
        .ok_or_else(|| missing("reward", &options.reward))?;
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
        candidates: 0,
        logprobs: false,
        logprob_temperature: 1.0,
    };
    let Some((completions, stats)) = roll_out(model.as_mut(), &text, &jobs, &sampling, 0, &|| false)? else {
        return Err(RunError::config("", "the evaluation was interrupted", ""));
    };
    let items: HashMap<u64, Arc<_>> = jobs.iter().map(|j| (j.ordinal, Arc::clone(&j.item))).collect();
    let n = options.n as u64;
    let (scores, reward_failed) = score_completions(&mut scorer, &completions, &items, n)?;
    let rewards: Vec<f64> = scores.iter().map(|s| s.as_ref().map_or(0.0, |s| s.value)).collect();
    let mean = |sum: f64, count: usize| if count > 0 { sum / count as f64 } else { 0.0 };
    Ok(EvalReport {
        prompts: jobs.len(),
        completions: completions.len(),
        reward_avg: mean(rewards.iter().sum(), rewards.len()),
        reward_failed,
        prompts_failed: prompts_failed + stats.failed,
        completion_length_mean: mean(stats.tokens as f64, completions.len()),
        tokens_per_second: if stats.seconds > 0.0 { stats.tokens as f64 / stats.seconds } else { 0.0 },
        samples: completions
            .iter()
            .zip(rewards)
            .map(|(c, r)| sample_record(c, "eval", 0, n, Some(r), &items))
            .collect(),
    })
}
