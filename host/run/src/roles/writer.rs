//! The rollout's work, wherever it runs: an order of prompts in, judged completions out.

use std::collections::HashMap;
use std::sync::Arc;

use cosmos_engine::model::Model;
use serde::{Deserialize, Serialize};

use crate::conversation;
use crate::error::Result;
use crate::prepare::{Base, Prompts};
use crate::records::Throughput;
use crate::rewards::{Tally, judge, wait};
use crate::rollout::{self, Completion};
use crate::task::Item;
use crate::validation::Share;

/// What is told to the controller beside the samples' numbers.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct WrittenNotes {
    /// Tokens written and seconds it took.
    pub throughput: Throughput,
    /// Numbers of the rewards.
    pub tally: Tally,
}

/// What an order to write brought.
#[derive(Debug)]
pub struct Written {
    /// Completions in the order of their samples; those that failed or were filtered out are missing.
    pub completions: Vec<Completion>,
    /// For the controller.
    pub notes: WrittenNotes,
}

/// Prompts of these ordinals, fetched in the run's order; those that fail are left out.
pub fn items(base: &Base, prompts: &mut Prompts, ordinals: &[u64]) -> Result<Vec<rollout::Job>> {
    let schedule = &mut prompts.schedule;
    let indices: Vec<(u64, u64)> = ordinals.iter().map(|o| (*o, schedule.index(*o))).collect();
    rollout::fetch(&mut prompts.dataset, &base.text, &indices, &mut 0)
}

/// Writes and judges the completions of these prompts with `model`, whose weights are those of `version`. `finished` sees
/// each as soon as it is there, before it is judged. Of the judged ones only `only` are kept, unless it is empty. `None`:
/// asked to stop.
pub fn write(
    base: &Base,
    prompts: &mut Prompts,
    model: &mut dyn Model,
    ordinals: &[u64],
    only: &[u64],
    version: u64,
    finished: &mut dyn FnMut(&Completion) -> Result<()>,
    stop: &dyn Fn() -> bool,
) -> Result<Option<Written>> {
    let config = base.config();
    let jobs = items(base, prompts, ordinals)?;
    let mut notes = WrittenNotes::default();
    let Some(sampling) = prompts.sampling.as_deref() else {
        return Ok(Some(Written { completions: Vec::new(), notes }));
    };
    let of_ordinal: HashMap<u64, Arc<Item>> = jobs.iter().map(|j| (j.ordinal, Arc::clone(&j.item))).collect();
    let mut scoring = prompts.rewards.as_ref().map(|set| set.scoring(&of_ordinal, sampling.n));
    let routes = &prompts.routes;
    let teachers_of =
        |sample: u64| routes.of(of_ordinal.get(&(sample / sampling.n as u64)).map_or(0, |item| item.source));
    let mut seen = |c: &Completion| {
        match teachers_of(c.sample) {
            teachers if teachers.is_empty() => finished(c)?,
            teachers => finished(&Completion { teachers, ..c.clone() })?,
        }
        scoring.as_mut().map_or(Ok(()), |scoring| scoring.finished(c))
    };
    let conversations = prompts.conversations.as_mut();
    let rolled = conversation::roll_out(conversations, model, &base.text, &jobs, sampling, version, &mut seen, stop)?;
    let Some((mut completions, stats)) = rolled else {
        return Ok(None);
    };
    for completion in &mut completions {
        completion.teachers = teachers_of(completion.sample);
    }
    let d = &config.distillation;
    if d.enable && d.rollout_top_k_recompute && d.top_k > 0 {
        rollout::recompute_candidates(model, &mut completions, d.top_k as usize, d.mini_batch)?;
    }
    if let (Some(judged), Some(grpo)) = (wait(scoring, &completions)?, config.train.train_policy.grpo()) {
        judge(&mut completions, judged, sampling.n, grpo, &mut notes.tally);
    }
    if !only.is_empty() {
        completions.retain(|c| only.contains(&c.sample));
    }
    notes.throughput.add(stats.tokens, stats.seconds);
    Ok(Some(Written { completions, notes }))
}

/// Answers share `part` of `parts` of the validation prompts. `None`: asked to stop.
pub fn validate(
    base: &Base,
    prompts: &mut Prompts,
    model: &mut dyn Model,
    step: u64,
    share: (u64, u64),
    stop: &dyn Fn() -> bool,
) -> Result<Option<Share>> {
    let Some(validation) = &mut prompts.validation else {
        return Ok(Some(Share::default()));
    };
    let samples_max = base.config().host.samples_logged;
    validation.answer(model, prompts.conversations.as_mut(), &base.text, step, share, samples_max, stop)
}
