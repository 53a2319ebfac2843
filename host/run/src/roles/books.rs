//! What a run records, wherever its roles run: metrics, samples, throughput, the learning curve, the summary.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use cosmos_report::{LearningCurve, RunFolder, StepLine, Summary, TokensPerSecond};

use crate::error::{Result, RunError};
use crate::plan::Use;
use crate::plugins::Plugins;
use crate::prepare::{Base, Prompts};
use crate::records::{Records, Throughput, ValidationPoint};
use crate::rewards::{RewardSet, Tally};
use crate::roles::trainer::{TrainNotes, row_metrics};
use crate::roles::writer::WrittenNotes;
use crate::validation::{Share, Validated};

/// The records of a run and the numbers on their way into them.
pub struct Books {
    /// Writers, display, history.
    pub records: Records,
    /// Numbers of the rewards since the last step.
    pub tally: Tally,
    /// Tokens and seconds of generation since the last step.
    pub generated: Throughput,
    total_steps: u64,
    bad_steps_max: u64,
    samples_logged: usize,
    reward_plugins: Vec<String>,
    validation_plugins: Vec<String>,
    validation_datasets: Vec<String>,
    sft: bool,
    subtitle: String,
    kind: &'static str,
}

/// What a validation knows of the teacher.
#[derive(Debug, Clone, Copy, Default)]
pub struct TeacherView {
    /// Its own mean reward on the validation prompts, where it was measured.
    pub reward: Option<f64>,
    /// Mean reverse KL to it, where it was measured.
    pub kl: Option<f64>,
}

impl Books {
    /// Books into `records`.
    pub fn new(base: &Base, prompts: &Prompts, records: Records, tally: Tally, total_steps: u64) -> Self {
        let config = base.config();
        let validation = prompts.validation.as_ref();
        Self {
            records,
            tally,
            generated: Throughput::default(),
            total_steps,
            bad_steps_max: config.host.bad_steps_max as u64,
            samples_logged: config.host.samples_logged,
            reward_plugins: prompts.rewards.iter().flat_map(RewardSet::plugins).map(str::to_string).collect(),
            validation_plugins: validation.map(|v| v.plugins()).unwrap_or_default(),
            validation_datasets: validation.map(|v| v.datasets.clone()).unwrap_or_default(),
            sft: base.kind() == "sft",
            subtitle: format!("{} from {}", config.policy.model_name_or_path, config.distillation.model_name_or_path),
            kind: base.kind(),
        }
    }

    /// Completions were written.
    pub fn written(&mut self, notes: &WrittenNotes) {
        let Throughput { tokens, seconds } = notes.throughput;
        self.records.history.rollout.add(tokens, seconds);
        self.generated.add(tokens, seconds);
        self.tally.add(&notes.tally);
    }

    /// A step was made by policies with these notes, the first member's first. `samples` were trained on, `outdated`
    /// dropped since the last one.
    pub fn trained(&mut self, step: u64, notes: Vec<TrainNotes>, samples: &[u64], outdated: usize) -> Result<()> {
        let mut metrics: BTreeMap<String, f64> = BTreeMap::new();
        let (mut rows, mut records, mut evidence) = (Vec::new(), Vec::new(), Vec::new());
        let (mut tokens, mut seconds) = (0, 0.0f64);
        let (mut bad, mut non_finite_rows, mut grad_norm) = (false, 0, 0.0f64);
        let mut told: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for note in notes {
            note.metrics.into_iter().for_each(|(name, value)| told.entry(name).or_default().push(value));
            rows.extend(note.rows);
            records.extend(note.samples);
            evidence.extend(note.evidence.and_then(|e| e.as_array().cloned()).unwrap_or_default());
            tokens += note.training.tokens;
            seconds = seconds.max(note.seconds);
            self.records.history.training.add(note.training.tokens, note.training.seconds);
            self.records.history.scoring.add(note.scoring.tokens, note.scoring.seconds);
            bad |= note.bad;
            non_finite_rows += note.non_finite_rows;
            grad_norm = if note.grad_norm.is_finite() { grad_norm.max(note.grad_norm) } else { note.grad_norm };
        }
        metrics.extend(told.into_iter().map(|(name, values)| {
            let value = of_members(&name, &values);
            (name, value)
        }));
        if self.sft {
            metrics.remove("train/tokens_per_second");
        } else {
            row_metrics(&rows, &self.reward_plugins, &mut metrics);
        }
        let generated = std::mem::take(&mut self.generated);
        if generated.seconds > 0.0 {
            metrics.insert("rollout/tokens_per_second".into(), generated.per_second());
        }
        let tally = std::mem::take(&mut self.tally);
        tally.metrics(&mut metrics);
        let seconds = seconds + generated.seconds + tally.wait_seconds;
        metrics.insert("train/iteration_time".into(), seconds);
        metrics.insert("train/total_steps".into(), self.total_steps as f64);
        metrics.insert("rollout/outdated_ratio".into(), outdated as f64 / (samples.len() + outdated).max(1) as f64);
        for record in records.iter().take(self.samples_logged) {
            self.records.sample(record)?;
        }
        self.count_bad_steps(bad, &mut metrics);
        let given_up = self.given_up(step, samples, &metrics, evidence)?;
        if bad {
            tracing::warn!(
                "step {step} skipped: gradient norm {grad_norm}, {non_finite_rows} rows of logits or losses not finite"
            );
        }
        if let Some(error) = given_up {
            return Err(error);
        }
        self.records.log(step, &metrics)?;
        self.show(step, &metrics, tokens as f64 / seconds.max(1e-9));
        Ok(())
    }

    fn count_bad_steps(&mut self, bad: bool, metrics: &mut BTreeMap<String, f64>) {
        let history = &mut self.records.history;
        history.skipped_steps += u64::from(bad);
        history.skipped_in_a_row = if bad { history.skipped_in_a_row + 1 } else { 0 };
        metrics.insert("train/skipped_steps".into(), history.skipped_steps as f64);
    }

    /// The end of a run whose steps keep going wrong, with the evidence beside its records.
    fn given_up(
        &self,
        step: u64,
        samples: &[u64],
        metrics: &BTreeMap<String, f64>,
        completions: Vec<serde_json::Value>,
    ) -> Result<Option<RunError>> {
        let max = self.bad_steps_max;
        if self.records.history.skipped_in_a_row < max {
            return Ok(None);
        }
        let evidence = self.records.folder.root().join(format!("bad_step_{step:08}.json"));
        let text = serde_json::json!({
            "step": step,
            "samples": samples,
            "metrics": metrics,
            "completions": completions,
        });
        cosmos_report::replace_file(&evidence, text.to_string().as_bytes())?;
        Ok(Some(RunError::Diverged {
            message: format!(
                "{max} steps in a row had a loss or gradient that is not finite; the last was step {step}"
            ),
            hint: format!(
                "its samples are in {}; lower `train.optm_lr`, set `train.optm_grad_norm_clip` or `distillation.kl_clip`, and resume from the last checkpoint",
                evidence.display()
            ),
        }))
    }

    fn show(&self, step: u64, metrics: &BTreeMap<String, f64>, tokens_per_second: f64) {
        let wanted = [
            "train/loss_avg",
            "train/teacher_kl_reversed",
            "train/teacher_kl_jsd_full",
            "train/reward_mean",
            "train/grad_norm",
            "rollout/completion_length_mean",
            "rollout/logprob_mismatch_mean",
            "rollout/logprob_mismatch_max",
        ];
        let mut line: Vec<(&str, f64)> = wanted
            .iter()
            .filter_map(|name| metrics.get(*name).map(|value| (name.rsplit('/').next().unwrap_or(name), *value)))
            .collect();
        if let Some((name, value)) = metrics
            .iter()
            .find(|(name, _)| name.starts_with("train/teacher_kl_jsd_top") && name.matches('_').count() == 3)
        {
            line.insert(1, (name.trim_start_matches("train/"), *value));
        }
        self.records.progress.step(&StepLine { step, metrics: &line, tokens_per_second: Some(tokens_per_second) });
    }

    /// The numbers of a validation from its shares.
    pub fn merged(&self, shares: Vec<Share>) -> Validated {
        Validated::of(shares, &self.validation_datasets, &self.validation_plugins, self.samples_logged)
    }

    /// A validation is over.
    pub fn validated(&mut self, step: u64, found: Validated, teacher: TeacherView) -> Result<()> {
        let Validated { reward, mut metrics, samples, throughput } = found;
        self.records.history.validation.add(throughput.tokens, throughput.seconds);
        if teacher.reward.is_some() {
            self.records.history.teacher = teacher.reward;
        }
        if let Some(kl) = teacher.kl {
            metrics.insert("val/teacher_kl".into(), kl);
        }
        if let Some(teacher) = self.records.history.teacher {
            metrics.insert("val/teacher_reward_avg".into(), teacher);
        }
        metrics.insert("val/step".into(), step as f64);
        self.records.log(step, &metrics)?;
        for sample in &samples {
            self.records.sample(sample)?;
        }
        self.records.history.validations.push(ValidationPoint { step, reward, kl: teacher.kl });
        let shown: Vec<String> = [("reward", reward), ("teacher", self.records.history.teacher), ("kl", teacher.kl)]
            .iter()
            .filter_map(|(name, value)| value.map(|v| format!("{name} {v:.4}")))
            .collect();
        self.records.progress.note(&format!("validation at step {step}: {}", shown.join(", ")));
        self.draw_curve()?;
        Ok(())
    }

    fn draw_curve(&self) -> Result<bool> {
        let history = &self.records.history;
        if history.validations.len() < 2 {
            return Ok(false);
        }
        let series = |f: fn(&ValidationPoint) -> Option<f64>| -> Vec<(u64, f64)> {
            history.validations.iter().filter_map(|v| f(v).map(|y| (v.step, y))).collect()
        };
        let student = series(|v| v.reward);
        let curve = LearningCurve {
            title: "Held-out accuracy and distance to the teacher".into(),
            subtitle: self.subtitle.clone(),
            validation_name: "mean validation reward".into(),
            student_start: student.first().map(|(_, y)| *y),
            student,
            teacher: history.teacher,
            kl: series(|v| v.kl),
        };
        curve.write(&self.records.folder.learning_curve_svg())?;
        Ok(true)
    }

    /// Writes and prints the summary of a run that made `steps` steps on `samples` completions.
    pub fn finish(&mut self, steps: u64, samples: u64, checkpoint: Option<PathBuf>) -> Result<Summary> {
        self.records.progress.finish();
        let curve = self.draw_curve()?;
        let history = &self.records.history;
        let first = history.validations.first().filter(|v| v.step == 0);
        let last = history.validations.last().filter(|v| v.step == steps);
        let speed = |t: &Throughput| (t.tokens > 0).then(|| t.per_second());
        let summary = Summary {
            kind: self.kind.into(),
            student_before: first.and_then(|v| v.reward),
            student_after: last.and_then(|v| v.reward),
            teacher: history.teacher,
            kl_before: first.and_then(|v| v.kl),
            kl_after: last.and_then(|v| v.kl),
            seconds: self.records.seconds(),
            // Processes side by side work longer than the clock says; their sum would mislead.
            train_seconds: Some(history.rollout.seconds + history.scoring.seconds + history.training.seconds)
                .filter(|worked| *worked <= self.records.seconds()),
            steps,
            skipped_steps: history.skipped_steps,
            samples,
            tokens_per_second: TokensPerSecond {
                rollout: speed(&history.rollout),
                teacher: speed(&history.scoring),
                train: speed(&history.training),
                validation: speed(&history.validation),
            },
            checkpoint,
            learning_curve: curve.then(|| self.records.folder.learning_curve_svg()),
            run_folder: self.records.folder.root().to_path_buf(),
        };
        summary.write(&self.records.folder)?;
        // Nobody may be there to read it.
        let _ = writeln!(std::io::stdout(), "{}", summary.render(None).trim_end());
        Ok(summary)
    }

    /// Why generation never filled a batch; `rounds` generations in a row brought nothing.
    pub fn nothing_to_train_on(&self, rounds: u64) -> RunError {
        if self.tally.dropped > 0 {
            let (dropped, judged) = (self.tally.dropped, self.tally.judged);
            return RunError::Diverged {
                message: format!(
                    "the filter left nothing to train on: {dropped} of the last {judged} completions were dropped, and the last {rounds} generations brought none, because all completions of a prompt had the same value"
                ),
                hint: "raise `rollout.n_generation`, take easier or harder prompts, or remove `train.train_policy.filter_reward_metric` (with `variant = \"dapo\"` the reward itself is the filter)".into(),
            };
        }
        let message = match rounds {
            0 => "the prompts ran out before there were completions for a single step".into(),
            rounds => format!("the last {rounds} generations brought no completion"),
        };
        RunError::Diverged { message, hint: "the warnings above name the prompts and why they were left out".into() }
    }
}

/// One number out of those of the members of a step: counts are added, largest values compared, all others averaged, as the
/// members' losses are. (So a percentile is the mean of the members' percentiles.)
fn of_members(name: &str, values: &[f64]) -> f64 {
    const COUNTS: [&str; 7] = [
        "train/tokens",
        "train/non_finite_rows",
        "train/ratio_clipped_tokens",
        "train/masked_sequences",
        "train/teacher_missing_samples",
        "train/teacher_missing_tokens",
        "train/tokens_per_second",
    ];
    match values {
        [only] => *only,
        _ if COUNTS.contains(&name) || (name.starts_with("teacher/") && name.ends_with("/completions")) => {
            values.iter().sum()
        }
        _ if name.ends_with("_max") => values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        _ => values.iter().sum::<f64>() / values.len().max(1) as f64,
    }
}

/// The resolved configuration and the plugins, so that a run can be told apart and repeated.
pub fn write_description(folder: &RunFolder, base: &Base, plugins: &Plugins, uses: &[Use]) -> Result<()> {
    let plugins: Vec<_> = plugins
        .iter()
        .map(|loaded| {
            let info = loaded.plugin.info();
            let uses: Vec<_> = uses.iter().filter(|u| u.plugin == info.name).collect();
            serde_json::json!({
                "name": info.name,
                "version": info.version,
                "sha256": info.sha256,
                "file": loaded.path.display().to_string(),
                "grants": loaded.grants,
                "uses": uses,
            })
        })
        .collect();
    let plugins = serde_json::json!({"host_version": env!("CARGO_PKG_VERSION"), "plugins": plugins});
    let pretty = |value: &serde_json::Value| format!("{value:#}\n");
    let replace = |path: &Path, text: String| cosmos_report::replace_file(path, text.as_bytes());
    replace(&folder.plugins_json(), pretty(&plugins))?;
    let toml = base
        .resolved
        .to_toml()
        .map_err(|e| RunError::config("", format!("the resolved configuration cannot be written: {e}"), ""))?;
    replace(&folder.config_toml(), toml)?;
    replace(&folder.config_json(), pretty(&base.resolved.to_json()))?;
    Ok(())
}
