//! One process: performs the controller's actions and feeds the results back.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use cosmos_broker::{BrokerLimits, MemoryBroker};
use cosmos_engine::model::Model;
use cosmos_engine::objective::SftSample;
use cosmos_report::statistics::mean_std_max_min;
use cosmos_report::{LearningCurve, Progress, ProgressKind, RunFolder, StepLine, Summary, TokensPerSecond};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, Snapshot, Writer};
use crate::controller::{Action, Controller, Event, Pending};
use crate::error::{Result, RunError};
use crate::policy::StepOutcome;
use crate::prepare::{Kind, Prepared};
use crate::records::{History, Records, ValidationPoint};
use crate::resume::Resumed;
use crate::rewards::{Tally, judge, reward_metrics, wait};
use crate::rollout::{self, Completion};
use crate::signals::StopFlag;
use crate::student::{Student, weights_of, write_weights};
use crate::task::Item;
use crate::validation::{Validated, sample_record};
use crate::{Outcome, conversation, sft, teacher};

/// What `state.json` of a checkpoint holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunState {
    /// The controller.
    pub controller: Controller,
    /// Completions in flight.
    pub completions: Vec<Completion>,
    /// Records so far.
    pub history: History,
    /// Optimizer updates so far.
    pub optimizer_steps: u64,
    /// Numbers of the rewards since the last step.
    #[serde(default)]
    pub tally: Tally,
}

/// A running session.
pub struct Session {
    prepared: Prepared,
    student: Student,
    controller: Controller,
    /// Completions waiting to be trained on, by sample.
    waiting: HashMap<u64, Completion>,
    /// Prompts of recent ordinals, for rewards and records.
    items: HashMap<u64, Arc<Item>>,
    /// Numbers of the rewards since the last step.
    tally: Tally,
    broker: MemoryBroker,
    records: Records,
    writer: Writer,
    stop: StopFlag,
    generation_seconds: f64,
    generated_tokens: u64,
}

impl Session {
    /// Opens the run folder and loads the student; `resumed` continues an earlier part of the run.
    pub fn open(prepared: Prepared, resumed: Option<Resumed>, plan_lines: &[String]) -> Result<Self> {
        let config = &prepared.resolved.config;
        let stop = StopFlag::listen(&config.train.signal_to_handle)?;
        let total = prepared.policy.total_steps();
        let mut student = Student::load(config, &prepared.student_folder, total)?;
        let progress_kind = ProgressKind::detect();
        let (folder, controller, waiting, history, tally, step) = match resumed {
            Some(resumed) => {
                let Resumed { run_folder, checkpoint, snapshot, state } = resumed;
                student.restore(&checkpoint, snapshot, state.optimizer_steps)?;
                let waiting = state.completions.into_iter().map(|c| (c.sample, c)).collect();
                let controller = state.controller.with_policy(prepared.policy);
                let step = controller.step();
                (RunFolder::open_existing(&run_folder)?, controller, waiting, state.history, state.tally, Some(step))
            }
            None => {
                let folder = RunFolder::create(Path::new(&config.train.output_dir))?;
                (folder, Controller::new(prepared.policy), HashMap::new(), History::default(), Tally::default(), None)
            }
        };
        write_description(&folder, &prepared)?;
        let progress = Progress::new(progress_kind, total);
        progress.note(&format!("run folder {}", folder.root().display()));
        plan_lines.iter().for_each(|line| progress.note(line));
        if let Some(step) = step {
            progress.start_at(step);
            progress.note(&format!("resumed at step {step}"));
        }
        let ckpt = &config.train.ckpt;
        let in_background = ckpt.save_mode == cosmos_config::SaveMode::Async;
        let writer = Writer::new(folder.checkpoints(), prepared.student_folder.clone(), ckpt.max_keep, in_background);
        let records = Records::open(folder, progress, history, step)?;
        let broker = MemoryBroker::new(BrokerLimits {
            requests_max: config.host.queue_samples_max,
            results_max: config.host.queue_samples_max,
            ..BrokerLimits::default()
        });
        Ok(Self {
            prepared,
            student,
            controller,
            waiting,
            items: HashMap::new(),
            tally,
            broker,
            records,
            writer,
            stop,
            generation_seconds: 0.0,
            generated_tokens: 0,
        })
    }

    /// Runs to the end, or until asked to leave.
    pub fn run(mut self) -> Result<Outcome> {
        loop {
            // An abandoned phase must not leave its mark: this is what a checkpoint of "now" would hold.
            let before = self.controller.clone();
            if self.stop.is_set() {
                self.controller.apply(Event::StopRequested);
            }
            let performed = match self.controller.next_action() {
                Action::Generate { first, count, version } => self.generate(first, count, version),
                Action::Train { step, samples, outdated } => self.train(step, &samples, &outdated),
                Action::Validate { step } => self.validate(step),
                Action::Save { step, last } => self.save(step, last),
                Action::Leave => return self.leave(),
                Action::Finish => return self.finish(),
            };
            let step = before.step();
            match performed.map_err(|source| source.during(step))? {
                Some(event) => self.controller.apply(event),
                None => {
                    self.controller = before;
                    self.controller.apply(Event::StopRequested);
                }
            }
        }
    }

    fn generate(&mut self, first: u64, count: u64, version: u64) -> Result<Option<Event>> {
        let schedule = &mut self.prepared.schedule;
        let indices: Vec<(u64, u64)> = (first..first + count).map(|o| (o, schedule.index(o))).collect();
        let stop = self.stop.clone();
        let mut failed = 0;
        let jobs = rollout::fetch(&mut self.prepared.dataset, &self.prepared.text, &indices, &mut failed)?;
        self.items.extend(jobs.iter().map(|j| (j.ordinal, Arc::clone(&j.item))));
        let Kind::Policy { sampling, rewards, teacher, .. } = &mut self.prepared.kind else {
            let samples = jobs.iter().map(|j| Pending { sample: j.ordinal, version }).collect();
            return Ok(Some(Event::Generated { samples }));
        };
        self.records.progress.phase("rollout");
        let model = self.student.model.as_mut();
        let mut scoring = rewards.as_ref().map(|set| set.scoring(&self.items, sampling.n));
        let mut finished = |c: &Completion| scoring.as_mut().map_or(Ok(()), |scoring| scoring.finished(c));
        let (text, conversations) = (&self.prepared.text, self.prepared.conversations.as_mut());
        let asked = || stop.is_set();
        let generated =
            conversation::roll_out(conversations, model, text, &jobs, sampling, version, &mut finished, &asked)?;
        let Some((mut completions, stats)) = generated else {
            return Ok(None);
        };
        let config = &self.prepared.resolved.config;
        if let (Some(_), true, true) =
            (&teacher, config.distillation.rollout_top_k_recompute, config.distillation.top_k > 0)
        {
            rollout::recompute_candidates(
                model,
                &mut completions,
                config.distillation.top_k as usize,
                config.distillation.mini_batch,
            )?;
        }
        if let (Some(judged), Some(grpo)) = (wait(scoring, &completions)?, config.train.train_policy.grpo()) {
            judge(&mut completions, judged, sampling.n, grpo, &mut self.tally);
        }
        self.records.history.rollout.add(stats.tokens, stats.seconds);
        self.generation_seconds += stats.seconds;
        self.generated_tokens += stats.tokens;
        let samples = completions.iter().map(|c| Pending { sample: c.sample, version }).collect();
        self.waiting.extend(completions.into_iter().map(|c| (c.sample, c)));
        Ok(Some(Event::Generated { samples }))
    }

    fn train(&mut self, step: u64, samples: &[u64], outdated: &[u64]) -> Result<Option<Event>> {
        let started = Instant::now();
        outdated.iter().for_each(|sample| drop(self.waiting.remove(sample)));
        let is_sft = matches!(self.prepared.kind, Kind::Sft { .. });
        let made = if is_sft { self.train_sft(step, samples)? } else { self.train_policy(step, samples)? };
        let Some((outcome, mut metrics)) = made else {
            return Ok(None);
        };
        let generation_seconds = std::mem::take(&mut self.generation_seconds);
        let generated = std::mem::take(&mut self.generated_tokens);
        if generation_seconds > 0.0 {
            metrics.insert("rollout/tokens_per_second".into(), generated as f64 / generation_seconds);
        }
        let tally = std::mem::take(&mut self.tally);
        tally.metrics(&mut metrics);
        let seconds = started.elapsed().as_secs_f64() + generation_seconds + tally.wait_seconds;
        metrics.insert("train/iteration_time".into(), seconds);
        metrics.insert("train/total_steps".into(), self.prepared.policy.total_steps() as f64);
        metrics
            .insert("rollout/outdated_ratio".into(), outdated.len() as f64 / (samples.len() + outdated.len()) as f64);
        self.count_bad_steps(step, &outcome, samples, &mut metrics)?;
        self.records.log(step, &metrics)?;
        self.show(step, &metrics, outcome.tokens as f64 / seconds);
        self.forget_items(samples);
        Ok(Some(Event::Trained))
    }

    fn train_sft(&mut self, step: u64, samples: &[u64]) -> Result<Option<(StepOutcome, BTreeMap<String, f64>)>> {
        let Kind::Sft { mini_batch, end_id } = self.prepared.kind else {
            return Ok(None);
        };
        self.records.progress.phase("train");
        let started = Instant::now();
        let mut examples = Vec::with_capacity(samples.len());
        let context = self.prepared.resolved.config.policy.model_max_length;
        for sample in samples {
            let Some(item) = self.items.get(sample) else { continue };
            let example = sft_example(item, &self.prepared.text, end_id)?;
            match example {
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
        self.records.history.training.add(outcome.tokens, started.elapsed().as_secs_f64());
        let metrics = sft::metrics(&outcome);
        Ok(Some((outcome, metrics)))
    }

    fn train_policy(&mut self, step: u64, samples: &[u64]) -> Result<Option<(StepOutcome, BTreeMap<String, f64>)>> {
        let Kind::Policy { role, teacher, reference, sampling, rewards, .. } = &mut self.prepared.kind else {
            return Ok(None);
        };
        let config = &self.prepared.resolved.config;
        let stop = self.stop.clone();
        let completions: Vec<Completion> = samples.iter().filter_map(|s| self.waiting.get(s).cloned()).collect();
        let mut answers = HashMap::new();
        let mut metrics = BTreeMap::new();
        if let Some(teacher) = teacher.as_mut() {
            self.records.progress.phase("teacher");
            let wait_ms_max = config.host.teacher_wait_ms_max;
            let n = sampling.n as u64;
            for part in completions.chunks(config.host.queue_samples_max) {
                teacher::request(&self.broker, part, n, teacher.wanted(), wait_ms_max)?;
                let stats = teacher.drain(&self.broker, "teacher-0", &|| stop.is_set())?;
                let wanted: Vec<u64> = part.iter().map(|c| c.sample).collect();
                if stop.is_set() {
                    teacher::forget(&self.broker, &wanted, n)?;
                    return Ok(None);
                }
                self.records.history.scoring.add(stats.tokens, stats.seconds);
                metrics.insert("teacher/queue_depth_max".to_string(), stats.depth_max as f64);
                metrics.insert("teacher/seconds".to_string(), stats.seconds);
                metrics.insert("teacher/tokens_per_second".to_string(), stats.tokens as f64 / stats.seconds.max(1e-9));
                metrics.insert("teacher/latency_max_seconds".to_string(), stats.latency_ms_max as f64 / 1e3);
                answers.extend(teacher::collect(&self.broker, &wanted, n, wait_ms_max)?);
            }
        }
        self.records.progress.phase("train");
        let started = Instant::now();
        let teacher_model = teacher.as_mut().map(|t| &mut *t.model as &mut (dyn Model + '_));
        let reference_model = reference.as_mut().map(|m| &mut **m as &mut (dyn Model + '_));
        let outcome = role.step(&mut self.student, teacher_model, reference_model, &completions, answers, step - 1)?;
        let seconds = started.elapsed().as_secs_f64();
        self.records.history.training.add(outcome.tokens, seconds);
        metrics.insert("train/tokens_per_second".into(), outcome.tokens as f64 / seconds.max(1e-9));
        metrics.extend(outcome.metrics(config));
        completion_metrics(&completions, &mut metrics);
        let plugins = rewards.as_ref().map(|set| set.plugins()).unwrap_or_default();
        let verdicts = completions.iter().map(|c| (c.reward_metrics.as_slice(), c.reward_failed.as_slice()));
        reward_metrics("", &plugins, verdicts, &mut metrics);
        let staleness = mean_std_max_min(completions.iter().map(|c| (step - 1 - c.version) as f64));
        metrics.insert("rollout/weight_staleness_max".into(), staleness.max);
        let n = sampling.n as u64;
        for completion in completions.iter().take(config.host.samples_logged) {
            let mut record = sample_record(completion, "train", step, n, completion.reward, &self.items);
            if let Some(kl) = outcome.kl_of.get(&completion.sample) {
                record = record.with_kl(&completion.spread(kl, f32::NAN));
            }
            self.records.sample(&record)?;
        }
        samples.iter().for_each(|sample| drop(self.waiting.remove(sample)));
        self.reset_reference(step)?;
        Ok(Some((outcome, metrics)))
    }

    /// `reference_reset_interval`: the reference becomes the current student.
    fn reset_reference(&mut self, step: u64) -> Result<()> {
        let Some(grpo) = self.prepared.resolved.config.train.train_policy.grpo() else {
            return Ok(());
        };
        let due = grpo.reference_reset_interval.is_some_and(|every| every > 0 && step.is_multiple_of(every as u64));
        let Kind::Policy { reference: Some(reference), .. } = &mut self.prepared.kind else {
            return Ok(());
        };
        if due {
            write_weights(reference.as_mut(), &weights_of(self.student.model.as_ref()), &self.student.folder)?;
            if grpo.reset_optimizer_with_reference {
                self.student.reset_optimizer();
            }
        }
        Ok(())
    }

    fn count_bad_steps(
        &mut self,
        step: u64,
        outcome: &StepOutcome,
        samples: &[u64],
        metrics: &mut BTreeMap<String, f64>,
    ) -> Result<()> {
        let history = &mut self.records.history;
        let bad = outcome.skipped > 0 || outcome.report.non_finite_rows > 0;
        history.skipped_steps += u64::from(bad);
        history.skipped_in_a_row = if bad { history.skipped_in_a_row + 1 } else { 0 };
        metrics.insert("train/skipped_steps".into(), history.skipped_steps as f64);
        if !bad {
            return Ok(());
        }
        tracing::warn!(
            "step {step} skipped: gradient norm {}, {} rows of logits or losses not finite",
            outcome.grad_norm,
            outcome.report.non_finite_rows
        );
        let max = self.prepared.resolved.config.host.bad_steps_max as u64;
        if history.skipped_in_a_row < max {
            return Ok(());
        }
        let evidence = self.records.folder.root().join(format!("bad_step_{step:08}.json"));
        let text = serde_json::json!({
            "step": step,
            "samples": samples,
            "metrics": metrics,
            "completions": samples.iter().filter_map(|s| self.waiting.get(s)).collect::<Vec<_>>(),
        });
        cosmos_report::replace_file(&evidence, text.to_string().as_bytes())?;
        Err(RunError::Diverged {
            message: format!(
                "{max} steps in a row had a loss or gradient that is not finite; the last was step {step}"
            ),
            hint: format!(
                "its samples are in {}; lower `train.optm_lr`, set `train.optm_grad_norm_clip` or `distillation.kl_clip`, and resume from the last checkpoint",
                evidence.display()
            ),
        })
    }

    fn show(&self, step: u64, metrics: &BTreeMap<String, f64>, tokens_per_second: f64) {
        let wanted = [
            "train/loss_avg",
            "train/teacher_kl_reversed",
            "train/teacher_kl_jsd_full",
            "train/reward_mean",
            "train/grad_norm",
            "rollout/completion_length_mean",
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

    fn forget_items(&mut self, samples: &[u64]) {
        let n = self.prepared.policy.n_generation;
        let Some(oldest) = samples.iter().map(|s| s / n).max() else { return };
        self.items.retain(|ordinal, _| *ordinal >= oldest);
    }

    fn validate(&mut self, step: u64) -> Result<Option<Event>> {
        let Some(validation) = &mut self.prepared.validation else {
            return Ok(Some(Event::Validated));
        };
        self.records.progress.phase("validation");
        let stop = self.stop.clone();
        let asked = || stop.is_set();
        let config = &self.prepared.resolved.config;
        let (text, samples_max) = (&self.prepared.text, config.host.samples_logged);
        let conversations = &mut self.prepared.conversations;
        let student = self.student.model.as_mut();
        let found = validation.accuracy(student, conversations.as_mut(), text, step, samples_max, &asked)?;
        let Some(found) = found else {
            return Ok(None);
        };
        let Validated { reward, mut metrics, samples, throughput } = found;
        self.records.history.validation.add(throughput.tokens, throughput.seconds);
        let mut kl = None;
        if let Kind::Policy { teacher: Some(teacher), .. } = &mut self.prepared.kind {
            if config.host.validate_teacher && self.records.history.teacher.is_none() {
                let model = teacher.model.as_mut();
                let found = validation.accuracy(model, conversations.as_mut(), text, step, 0, &asked)?;
                let Some(found) = found else {
                    return Ok(None);
                };
                self.records.history.teacher = found.reward;
            }
            let (student, teacher) = (self.student.model.as_mut(), teacher.model.as_mut());
            let Some((mean, _)) = validation.kl(student, teacher, conversations.as_mut(), text, &asked)? else {
                return Ok(None);
            };
            metrics.insert("val/teacher_kl".into(), mean);
            kl = Some(mean);
        }
        if let Some(teacher) = self.records.history.teacher {
            metrics.insert("val/teacher_reward_avg".into(), teacher);
        }
        metrics.insert("val/step".into(), step as f64);
        self.records.log(step, &metrics)?;
        for sample in &samples {
            self.records.sample(sample)?;
        }
        self.records.history.validations.push(ValidationPoint { step, reward, kl });
        let shown: Vec<String> = [("reward", reward), ("teacher", self.records.history.teacher), ("kl", kl)]
            .iter()
            .filter_map(|(name, value)| value.map(|v| format!("{name} {v:.4}")))
            .collect();
        self.records.progress.note(&format!("validation at step {step}: {}", shown.join(", ")));
        self.draw_curve()?;
        Ok(Some(Event::Validated))
    }

    fn snapshot(&mut self, controller: Controller) -> Result<Snapshot> {
        let mut history = self.records.history.clone();
        history.seconds = self.records.seconds();
        let mut completions: Vec<Completion> = self.waiting.values().cloned().collect();
        completions.sort_by_key(|c| c.sample);
        let step = controller.step();
        let optimizer_steps = self.student.optimizer_steps();
        let state = RunState { controller, completions, history, optimizer_steps, tally: self.tally };
        Ok(Snapshot {
            step,
            model: self.student.weights(),
            optimizer: self.student.optimizer_state(),
            state: serde_json::to_value(state)
                .map_err(|e| RunError::config("", format!("the run's state cannot be written: {e}"), ""))?,
        })
    }

    fn save(&mut self, step: u64, last: bool) -> Result<Option<Event>> {
        self.records.progress.phase("checkpoint");
        let snapshot = self.snapshot(self.controller.clone())?;
        self.writer.save(snapshot)?;
        if last || self.prepared.resolved.config.train.ckpt.export_safetensors {
            self.export(step)?;
        }
        Ok(Some(Event::Saved))
    }

    /// A Hugging Face folder of the current weights under `safetensors/step_N`, in `train.param_dtype`.
    fn export(&mut self, step: u64) -> Result<PathBuf> {
        let root = self.records.folder.root().join("safetensors");
        let target = root.join(checkpoint::folder_name(step));
        let dtype = crate::export::dtype(self.prepared.resolved.config.train.param_dtype);
        crate::export::model_folder(self.student.model.as_ref(), &self.student.folder, &target, dtype)?;
        crate::export::prune(&root, self.prepared.resolved.config.train.ckpt.max_keep)?;
        Ok(target)
    }

    /// Saves and leaves with exit code 75. Before the first step there is nothing to save.
    fn leave(mut self) -> Result<Outcome> {
        let step = self.controller.step();
        let snapshot = self.snapshot(self.controller.clone())?;
        self.writer.save(snapshot)?;
        let folder = self.writer.wait()?;
        self.records.progress.finish();
        let checkpoint = folder.unwrap_or_else(|| self.records.folder.checkpoints());
        Ok(Outcome::Saved { step, checkpoint })
    }

    fn finish(mut self) -> Result<Outcome> {
        if self.controller.gave_up() {
            return Err(self.nothing_to_train_on());
        }
        let exported = self.export(self.controller.step())?;
        let checkpoint = self.writer.wait()?.or(Some(exported));
        self.records.progress.finish();
        let curve = self.draw_curve()?;
        let history = &self.records.history;
        let first = history.validations.first().filter(|v| v.step == 0);
        let last = history.validations.last().filter(|v| v.step == self.controller.step());
        let speed = |t: &crate::records::Throughput| (t.tokens > 0).then(|| t.per_second());
        let summary = Summary {
            kind: self.prepared.kind.name().into(),
            student_before: first.and_then(|v| v.reward),
            student_after: last.and_then(|v| v.reward),
            teacher: history.teacher,
            kl_before: first.and_then(|v| v.kl),
            kl_after: last.and_then(|v| v.kl),
            seconds: self.records.seconds(),
            train_seconds: Some(history.rollout.seconds + history.scoring.seconds + history.training.seconds),
            steps: self.controller.step(),
            skipped_steps: history.skipped_steps,
            samples: self.controller.step() * self.prepared.policy.train_batch,
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
        println!("{}", summary.render(None).trim_end());
        Ok(Outcome::Done { summary: Box::new(summary) })
    }

    /// Why generation never filled a batch.
    fn nothing_to_train_on(&self) -> RunError {
        let rounds = self.controller.empty_rounds();
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

    fn draw_curve(&self) -> Result<bool> {
        let history = &self.records.history;
        if history.validations.len() < 2 {
            return Ok(false);
        }
        let series = |f: fn(&ValidationPoint) -> Option<f64>| -> Vec<(u64, f64)> {
            history.validations.iter().filter_map(|v| f(v).map(|y| (v.step, y))).collect()
        };
        let config = &self.prepared.resolved.config;
        let student = series(|v| v.reward);
        let curve = LearningCurve {
            title: "Held-out accuracy and distance to the teacher".into(),
            subtitle: format!("{} from {}", config.policy.model_name_or_path, config.distillation.model_name_or_path),
            validation_name: "mean validation reward".into(),
            student_start: student.first().map(|(_, y)| *y),
            student,
            teacher: history.teacher,
            kl: series(|v| v.kl),
        };
        curve.write(&self.records.folder.learning_curve_svg())?;
        Ok(true)
    }
}

/// Token ids and mask of one supervised example; none when the item has nothing to imitate.
fn sft_example(item: &Item, text: &crate::task::Text, end_id: Option<u32>) -> Result<Option<SftSample>> {
    if item.conversation.is_some() {
        return Ok(Some(sft::example(item, Vec::new(), None)));
    }
    let Some(response) = &item.response else {
        return Ok(None);
    };
    let ids = text.tokenizer.encode(response, false)?;
    Ok(Some(sft::example(item, ids, end_id)))
}

/// The resolved configuration and the plugins, so that a run can be told apart and repeated.
fn write_description(folder: &RunFolder, prepared: &Prepared) -> Result<()> {
    let plugins: Vec<_> = prepared
        .plugins
        .iter()
        .map(|loaded| {
            let info = loaded.plugin.info();
            let uses: Vec<_> = prepared.uses.iter().filter(|u| u.plugin == info.name).collect();
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
    cosmos_report::replace_file(&folder.plugins_json(), pretty(&plugins).as_bytes())?;
    let toml = prepared
        .resolved
        .to_toml()
        .map_err(|e| RunError::config("", format!("the resolved configuration cannot be written: {e}"), ""))?;
    cosmos_report::replace_file(&folder.config_toml(), toml.as_bytes())?;
    cosmos_report::replace_file(&folder.config_json(), pretty(&prepared.resolved.to_json()).as_bytes())?;
    Ok(())
}

/// Lengths, rewards and advantages of a step's completions, under the original's names.
fn completion_metrics(completions: &[Completion], metrics: &mut BTreeMap<String, f64>) {
    let mut put = |name: &str, values: Vec<f64>| {
        if !values.is_empty() {
            metrics.extend(mean_std_max_min(values).named(name));
        }
    };
    put("rollout/completion_length", completions.iter().map(|c| c.own_len() as f64).collect());
    let talks: Vec<&Completion> = completions.iter().filter(|c| !c.own.is_empty()).collect();
    put("rollout/turns", talks.iter().map(|c| c.turns() as f64).collect());
    put("rollout/heard_length", talks.iter().map(|c| (c.tokens.len() - c.own_len()) as f64).collect());
    put("train/reward", completions.iter().filter_map(|c| c.reward).collect());
    put(
        "rollout/advantage",
        completions.iter().filter(|c| c.reward.is_some()).map(|c| f64::from(c.advantage)).collect(),
    );
    let stopped = completions.iter().filter(|c| c.stopped).count();
    metrics.insert("rollout/stopped_ratio".into(), stopped as f64 / completions.len().max(1) as f64);
}
