//! The policy's work, wherever it runs: completions and the teacher's answers in, other weights and notes out.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use cosmos_engine::head::Head;
use cosmos_engine::model::Model;
use cosmos_report::SampleRecord;
use serde::{Deserialize, Serialize};

use crate::error::{Result, RunError};
use crate::policy::StepOutcome;
use crate::prepare::{Base, Training};
use crate::records::Throughput;
use crate::rollout::Completion;
use crate::sft;
use crate::student::{Student, weights_of, write_weights};
use crate::task::{Item, Text};
use crate::teacher::Answer;
use crate::teachers;
use crate::validation::sample_record;

/// What a step's metrics need of one completion.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Row {
    /// Tokens that the model wrote.
    pub length: u64,
    /// Turns and tokens heard, of a conversation.
    pub talk: Option<(u64, u64)>,
    /// Whether it ended by itself.
    pub stopped: bool,
    /// Steps between its weights and those that were trained.
    pub staleness: u64,
    /// Reward, where one was computed.
    #[serde(with = "crate::rollout::maybe_double")]
    pub reward: Option<f64>,
    /// Group-normalised reward.
    #[serde(with = "crate::rollout::bit")]
    pub advantage: f32,
    /// The rewards' own values and further numbers.
    #[serde(with = "crate::rollout::named_doubles")]
    pub metrics: Vec<(String, f64)>,
    /// Plugins whose rewards failed on it.
    pub failed: Vec<String>,
}

/// What a policy tells the controller of a step.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct TrainNotes {
    /// Metrics of the objective and the optimizer, over this member's share.
    #[serde(with = "crate::rollout::named_doubles")]
    pub metrics: Vec<(String, f64)>,
    /// The completions that were trained on.
    pub rows: Vec<Row>,
    /// Completions for the record.
    pub samples: Vec<SampleRecord>,
    /// Tokens that went through forward and backward, and seconds it took.
    pub training: Throughput,
    /// Tokens that the teacher scored, and seconds it took, where this process knows them.
    pub scoring: Throughput,
    /// Seconds of the whole step, waiting included.
    pub seconds: f64,
    /// Whether a loss or gradient was not finite.
    pub bad: bool,
    /// Rows of logits or losses that were not finite.
    pub non_finite_rows: u64,
    /// Gradient norm.
    #[serde(with = "crate::rollout::bits_of_double")]
    pub grad_norm: f64,
    /// The completions of a bad step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<serde_json::Value>,
}

/// The student with what trains it.
pub struct Trainer {
    /// Model, optimizer, schedule.
    pub student: Student,
    /// How it is trained.
    pub training: Training,
}

impl Trainer {
    /// Makes step `step`, counted from 1. `heads` are the teachers' for objectives over the whole vocabulary, in the order
    /// of the run's teachers.
    pub fn train(
        &mut self,
        base: &Base,
        heads: &mut [Box<dyn Head + '_>],
        completions: &[Completion],
        answers: HashMap<u64, Answer>,
        step: u64,
    ) -> Result<TrainNotes> {
        let started = Instant::now();
        let outcome = self.outcome(base, heads, completions, answers, step)?;
        Ok(notes_of(base, &outcome, completions, step, started.elapsed().as_secs_f64()))
    }

    /// Makes the step on one rank; what it has seen of it.
    pub fn outcome(
        &mut self,
        base: &Base,
        heads: &mut [Box<dyn Head + '_>],
        completions: &[Completion],
        answers: HashMap<u64, Answer>,
        step: u64,
    ) -> Result<StepOutcome> {
        let Training::Policy { role, reference } = &mut self.training else {
            return Err(RunError::config("", "supervised fine-tuning has no completions", ""));
        };
        let reference = reference.as_mut().map(|m| &mut **m as &mut (dyn Model + '_));
        let outcome = role.step(&mut self.student, heads, reference, completions, answers, step - 1)?;
        self.reset_reference(base, step)?;
        Ok(outcome)
    }

    /// `reference_reset_interval`: the reference becomes the current student.
    fn reset_reference(&mut self, base: &Base, step: u64) -> Result<()> {
        let Some(grpo) = base.config().train.train_policy.grpo() else {
            return Ok(());
        };
        let due = grpo.reference_reset_interval.is_some_and(|every| every > 0 && step.is_multiple_of(every as u64));
        let Training::Policy { reference: Some(reference), .. } = &mut self.training else {
            return Ok(());
        };
        if due {
            write_weights(reference.as_mut(), &weights_of(self.student.model.as_ref())?, &self.student.folder)?;
            if grpo.reset_optimizer_with_reference {
                self.student.reset_optimizer();
            }
        }
        Ok(())
    }

    /// Makes step `step` on given responses.
    pub fn imitate(&mut self, base: &Base, items: &[(u64, &Item)], step: u64) -> Result<TrainNotes> {
        let Training::Sft { mini_batch, end_id } = self.training else {
            return Err(RunError::config("", "only supervised fine-tuning imitates given responses", ""));
        };
        let started = Instant::now();
        let context = base.config().policy.model_max_length;
        let mut examples = Vec::with_capacity(items.len());
        for (sample, item) in items {
            match sft_example(item, &base.text, end_id)? {
                Some(example) if example.ids.len() <= context => examples.push(example),
                Some(example) => tracing::warn!(
                    "sample {sample} left out: {} tokens are beyond `policy.model_max_length` = {context}",
                    example.ids.len()
                ),
                None => {
                    return Err(RunError::config(
                        "",
                        format!("sample {sample} has no response to imitate"),
                        "supervised fine-tuning needs a dataset that gives `response`",
                    ));
                }
            }
        }
        let outcome = sft::step(&mut self.student, &examples, mini_batch, step - 1)?;
        let mut notes = notes(base, &outcome, &[], step, started.elapsed().as_secs_f64());
        notes.metrics = sft::metrics(&outcome).into_iter().collect();
        Ok(notes)
    }
}

/// What is told of a step that took `seconds`.
pub fn notes_of(base: &Base, outcome: &StepOutcome, completions: &[Completion], step: u64, seconds: f64) -> TrainNotes {
    let mut notes = notes(base, outcome, completions, step, seconds);
    notes.metrics.extend(outcome.metrics(base.config()));
    notes.metrics.extend(teachers::metrics(base.config(), completions, &outcome.kl_of));
    notes
}

fn notes(base: &Base, outcome: &StepOutcome, completions: &[Completion], step: u64, seconds: f64) -> TrainNotes {
    let bad = outcome.skipped > 0 || outcome.report.non_finite_rows > 0;
    let mut notes = TrainNotes {
        rows: completions.iter().map(|c| row(c, step)).collect(),
        bad,
        non_finite_rows: outcome.report.non_finite_rows as u64,
        grad_norm: outcome.grad_norm,
        evidence: bad.then(|| serde_json::to_value(completions).unwrap_or_default()),
        metrics: vec![("train/tokens_per_second".into(), outcome.tokens as f64 / seconds.max(1e-9))],
        ..TrainNotes::default()
    };
    notes.training.add(outcome.tokens, seconds);
    for completion in completions.iter().take(base.config().host.samples_logged) {
        let mut record = sample_record(completion, "train", step, base.n_generation(), completion.reward);
        if let Some(kl) = outcome.kl_of.get(&completion.sample) {
            record = record.with_kl(&completion.spread(kl, f32::NAN));
        }
        notes.samples.push(record);
    }
    notes
}

fn row(completion: &Completion, step: u64) -> Row {
    let own = completion.own_len() as u64;
    Row {
        length: own,
        talk: (!completion.own.is_empty()).then(|| (completion.turns() as u64, completion.tokens.len() as u64 - own)),
        stopped: completion.stopped,
        staleness: (step - 1).saturating_sub(completion.version),
        reward: completion.reward,
        advantage: completion.advantage,
        metrics: completion.reward_metrics.clone(),
        failed: completion.reward_failed.clone(),
    }
}

/// Token ids and mask of one supervised example; none when the item has nothing to imitate.
fn sft_example(item: &Item, text: &Text, end_id: Option<u32>) -> Result<Option<cosmos_engine::objective::SftSample>> {
    if item.conversation.is_some() {
        return Ok(Some(sft::example(item, Vec::new(), None)));
    }
    let Some(response) = &item.response else {
        return Ok(None);
    };
    let ids = text.tokenizer.encode(response, false)?;
    Ok(Some(sft::example(item, ids, end_id)))
}

/// Lengths, rewards and advantages of a step's completions, under the original's names.
pub fn row_metrics(rows: &[Row], plugins: &[String], metrics: &mut BTreeMap<String, f64>) {
    use cosmos_report::statistics::mean_std_max_min;
    let mut put = |name: &str, values: Vec<f64>| {
        if !values.is_empty() {
            metrics.extend(mean_std_max_min(values).named(name));
        }
    };
    put("rollout/completion_length", rows.iter().map(|r| r.length as f64).collect());
    put("rollout/turns", rows.iter().filter_map(|r| r.talk).map(|(turns, _)| turns as f64).collect());
    put("rollout/heard_length", rows.iter().filter_map(|r| r.talk).map(|(_, heard)| heard as f64).collect());
    put("train/reward", rows.iter().filter_map(|r| r.reward).collect());
    put("rollout/advantage", rows.iter().filter(|r| r.reward.is_some()).map(|r| f64::from(r.advantage)).collect());
    let stopped = rows.iter().filter(|r| r.stopped).count();
    metrics.insert("rollout/stopped_ratio".into(), stopped as f64 / rows.len().max(1) as f64);
    let plugins: Vec<&str> = plugins.iter().map(String::as_str).collect();
    let verdicts = rows.iter().map(|r| (r.metrics.as_slice(), r.failed.as_slice()));
    crate::rewards::reward_metrics("", &plugins, verdicts, metrics);
    let staleness = mean_std_max_min(rows.iter().map(|r| r.staleness as f64));
    metrics.insert("rollout/weight_staleness_max".into(), staleness.max);
}
