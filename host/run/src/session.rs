//! One process: carries out the controller's orders one after the other. It is a run with one policy and one rollout,
//! which share the student, so that weights need no publishing.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use cosmos_broker::{Broker, BrokerLimits, MemoryBroker};
use cosmos_controller::{Controller, Dispatch, Event, Memory, Order, Outcome as Did, Role, SampleRef};
use cosmos_engine::head::{Head, ModelHead};
use cosmos_report::{Progress, ProgressKind, RunFolder};
use serde::{Deserialize, Serialize};

use crate::Outcome;
use crate::checkpoint::{self, Snapshot, Writer};
use crate::compared::OwnTeachers;
use crate::error::{Result, Role as _, RunError};
use crate::prepare::{Base, Prepared, Prompts};
use crate::records::{History, Records};
use crate::resume::Resumed;
use crate::rewards::Tally;
use crate::roles::books::{Books, TeacherView, write_description};
use crate::roles::trainer::{TrainNotes, Trainer};
use crate::roles::writer;
use crate::rollout::Completion;
use crate::shards;
use crate::signals::StopFlag;
use crate::student::Student;
use crate::task::Item;
use crate::teacher::{TeacherRole, TeacherStats};
use crate::teachers;

/// What `state.json` of a checkpoint holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunState {
    /// What the controller has to remember.
    pub controller: Memory,
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

/// The names of the two replicas.
const POLICY: &str = "policy-0";
const ROLLOUT: &str = "rollout-0";

/// Which of several orders comes first: a checkpoint holds the validation of its step, and nothing that comes after it.
fn urgency(order: &Order) -> u8 {
    match order {
        Order::Validate { .. } => 0,
        Order::Load { .. } | Order::Save { .. } => 1,
        Order::Train { .. } => 2,
        Order::Generate { .. } => 3,
        Order::Leave | Order::Finish => 4,
    }
}

/// A running session.
pub struct Session {
    base: Base,
    prompts: Prompts,
    trainer: Trainer,
    teachers: Vec<TeacherRole>,
    controller: Controller,
    /// Completions waiting to be trained on, by sample.
    waiting: HashMap<u64, Completion>,
    /// Examples waiting to be imitated, by sample.
    items: HashMap<u64, Arc<Item>>,
    /// The queue of each teacher.
    queues: Vec<MemoryBroker>,
    books: Books,
    writer: Writer,
    stop: StopFlag,
}

impl Session {
    /// Opens the run folder and loads the student; `resumed` continues an earlier part of the run.
    pub fn open(prepared: Prepared, resumed: Option<Resumed>, plan_lines: &[String]) -> Result<Self> {
        let Prepared { base, prompts, training, teachers, plan } = prepared;
        let config = base.config();
        let stop = StopFlag::listen(&config.train.signal_to_handle)?;
        let total = plan.total_steps();
        let mut student = Student::load(config, &base.student_folder, total)?;
        student.model.decode_in(shards::rollout_format(config)).role("student")?;
        let progress_kind = ProgressKind::detect();
        let (folder, controller, waiting, history, tally, step) = match resumed {
            Some(resumed) => {
                let Resumed { run_folder, checkpoint, snapshot, state } = resumed;
                student.restore(&checkpoint, &snapshot, state.optimizer_steps)?;
                crate::roles::retire(&run_folder)?;
                let waiting: HashMap<u64, Completion> = state.completions.into_iter().map(|c| (c.sample, c)).collect();
                let memory = match prompts.sampling {
                    // Examples in flight are no part of a checkpoint: they are fetched again.
                    None => state.controller,
                    Some(_) => {
                        let is_there = |name: &SampleRef| {
                            waiting.get(&name.sample).is_some_and(|completion| completion.version == name.version)
                        };
                        state.controller.keeping(is_there, &plan)
                    }
                };
                let controller = Controller::resume(plan.clone(), memory);
                let step = controller.step();
                (RunFolder::open_existing(&run_folder)?, controller, waiting, state.history, state.tally, Some(step))
            }
            None => {
                let folder = RunFolder::create(Path::new(&config.train.output_dir))?;
                (folder, Controller::new(plan.clone()), HashMap::new(), History::default(), Tally::default(), None)
            }
        };
        write_description(&folder, &base, &prompts.plugins, &prompts.uses)?;
        let progress = Progress::new(progress_kind, total);
        progress.note(&format!("run folder {}", folder.root().display()));
        plan_lines.iter().for_each(|line| progress.note(line));
        if let Some(step) = step {
            progress.start_at(step);
            progress.note(&format!("resumed at step {step}"));
        }
        let ckpt = &config.train.ckpt;
        let in_background = ckpt.save_mode == cosmos_config::SaveMode::Async;
        let writer = Writer::new(folder.checkpoints(), base.student_folder.clone(), ckpt.max_keep, in_background);
        let records = Records::open(folder, progress, history, step)?;
        let limits = BrokerLimits {
            requests_max: config.host.queue_samples_max,
            results_max: config.host.queue_samples_max,
            ..BrokerLimits::default()
        };
        let queues = teachers.iter().map(|_| MemoryBroker::new(limits)).collect();
        let books = Books::new(&base, &prompts, records, tally, total);
        Ok(Self {
            base,
            prompts,
            trainer: Trainer { student, training },
            teachers,
            controller,
            waiting,
            items: HashMap::new(),
            queues,
            books,
            writer,
            stop,
        })
    }

    /// Runs to the end, or until asked to leave.
    pub fn run(mut self) -> Result<Outcome> {
        let mut open = Vec::new();
        let step = self.controller.step();
        open.extend(self.tell(Event::Joined {
            replica: POLICY.into(),
            role: Role::Policy,
            holds: Some(step),
            address: None,
        })?);
        open.extend(self.tell(Event::Joined {
            replica: ROLLOUT.into(),
            role: Role::Rollout,
            holds: None,
            address: None,
        })?);
        let mut asked = false;
        loop {
            if self.stop.is_set() && !asked {
                asked = true;
                open.extend(self.tell(Event::StopRequested)?);
            }
            let next = (0..open.len()).min_by_key(|index| urgency(&open[*index].order));
            let Some(Dispatch { replica, id, order }) = next.map(|index| open.remove(index)) else {
                return Err(RunError::shared("controller", "it gives no orders although the run is not over", ""));
            };
            let step = self.controller.step();
            let done = match order {
                Order::Generate { prompts, only, version } => self.generate(&prompts, &only, version),
                Order::Train { step, share, outdated, .. } => {
                    let samples: Vec<u64> = share.iter().map(|s| s.sample).collect();
                    let outdated: Vec<u64> = outdated.iter().map(|s| s.sample).collect();
                    self.train(step, &samples, &outdated)
                }
                Order::Validate { step, .. } => self.validate(step),
                Order::Save { step, last, .. } => self.save(step, last),
                // Rollout and policy share the weights.
                Order::Load { .. } => Ok(Some(Did::Loaded)),
                Order::Leave => return self.leave(),
                Order::Finish => return self.finish(),
            };
            let event = match done.map_err(|source| source.during(step))? {
                Some(outcome) => Event::Done { replica, order: id, outcome },
                None => {
                    if !asked {
                        asked = true;
                        open.extend(self.tell(Event::StopRequested)?);
                    }
                    Event::Failed { replica, order: id, reason: "asked to leave".into() }
                }
            };
            open.extend(self.tell(event)?);
        }
    }

    fn tell(&mut self, event: Event) -> Result<Vec<Dispatch>> {
        let refused = |e| RunError::shared("controller", format!("it refuses what this process says: {e}"), "");
        self.controller.apply(event).map_err(refused)
    }

    fn is_sft(&self) -> bool {
        self.prompts.sampling.is_none()
    }

    fn generate(&mut self, ordinals: &[u64], only: &[u64], version: u64) -> Result<Option<Did>> {
        if self.is_sft() {
            let jobs = writer::items(&self.base, &mut self.prompts, ordinals)?;
            let samples = jobs.iter().map(|j| j.ordinal).collect();
            self.items.extend(jobs.into_iter().map(|j| (j.ordinal, j.item)));
            return Ok(Some(Did::Generated { samples }));
        }
        self.books.records.progress.phase("rollout");
        let stop = self.stop.clone();
        let model = self.trainer.student.model.as_mut();
        let written =
            writer::write(&self.base, &mut self.prompts, model, ordinals, only, version, &mut |_| Ok(()), &|| {
                stop.is_set()
            })?;
        let Some(written) = written else {
            return Ok(None);
        };
        self.books.written(&written.notes);
        let samples = written.completions.iter().map(|c| c.sample).collect();
        self.waiting.extend(written.completions.into_iter().map(|c| (c.sample, c)));
        Ok(Some(Did::Generated { samples }))
    }

    fn train(&mut self, step: u64, samples: &[u64], outdated: &[u64]) -> Result<Option<Did>> {
        let started = Instant::now();
        outdated.iter().for_each(|sample| drop(self.waiting.remove(sample)));
        let made = if self.is_sft() { self.imitate(step, samples).map(Some)? } else { self.distil(step, samples)? };
        let Some(mut notes) = made else {
            return Ok(None);
        };
        notes.seconds = started.elapsed().as_secs_f64();
        self.books.trained(step, vec![notes], samples, outdated.len())?;
        for sample in samples {
            self.waiting.remove(sample);
            self.items.remove(sample);
        }
        Ok(Some(Did::Trained))
    }

    fn imitate(&mut self, step: u64, samples: &[u64]) -> Result<TrainNotes> {
        self.books.records.progress.phase("train");
        // Those that were in flight when a checkpoint was written are not part of it.
        let lacking: Vec<u64> = samples.iter().copied().filter(|s| !self.items.contains_key(s)).collect();
        for job in writer::items(&self.base, &mut self.prompts, &lacking)? {
            self.items.insert(job.ordinal, job.item);
        }
        let items: Vec<(u64, &Item)> =
            samples.iter().filter_map(|s| self.items.get(s).map(|item| (*s, item.as_ref()))).collect();
        self.trainer.imitate(&self.base, &items, step)
    }

    fn distil(&mut self, step: u64, samples: &[u64]) -> Result<Option<TrainNotes>> {
        let completions: Vec<Completion> = samples.iter().filter_map(|s| self.waiting.get(s).cloned()).collect();
        let config = self.base.config();
        let n = self.base.n_generation();
        let mut answers = HashMap::new();
        let mut done: Vec<(String, TeacherStats)> = Vec::new();
        let mut scoring = crate::records::Throughput::default();
        if let Some(wanted) = self.teachers.first().map(|teacher| *teacher.wanted()) {
            self.books.records.progress.phase("teacher");
            let wait_ms_max = config.host.teacher_wait_ms_max;
            let weights: Vec<f64> = config.distillation.each_teacher().iter().map(|t| t.weight).collect();
            let queues: Vec<&dyn Broker> = self.queues.iter().map(|q| q as &dyn Broker).collect();
            for part in completions.chunks(config.host.queue_samples_max) {
                teachers::request(&queues, part, n, &wanted, wait_ms_max)?;
                done.clear();
                for (teacher, queue) in self.teachers.iter_mut().zip(&queues) {
                    let stats = teacher.drain(*queue, "teacher-0", &|| self.stop.is_set())?;
                    scoring.add(stats.tokens, stats.seconds);
                    done.push((teacher.name.clone(), stats));
                }
                if self.stop.is_set() {
                    let samples: Vec<u64> = part.iter().map(|c| c.sample).collect();
                    teachers::forget(&queues, &samples, n)?;
                    return Ok(None);
                }
                answers.extend(teachers::collect(&queues, part, n, &weights, wait_ms_max)?);
            }
        }
        self.books.records.progress.phase("train");
        let mut heads: Vec<Box<dyn Head + '_>> =
            self.teachers.iter_mut().map(|t| Box::new(ModelHead(t.model.as_mut())) as Box<dyn Head + '_>).collect();
        let mut notes = self.trainer.train(&self.base, &mut heads, &completions, answers, step)?;
        if !done.is_empty() {
            notes.metrics.extend(teachers::work_metrics(&done));
        }
        notes.scoring = scoring;
        Ok(Some(notes))
    }

    fn validate(&mut self, step: u64) -> Result<Option<Did>> {
        if self.prompts.validation.is_none() {
            return Ok(Some(Did::Validated));
        }
        self.books.records.progress.phase("validation");
        let stop = self.stop.clone();
        let asked = || stop.is_set();
        let student = self.trainer.student.model.as_mut();
        let Some(share) = writer::validate(&self.base, &mut self.prompts, student, step, (0, 1), &asked)? else {
            return Ok(None);
        };
        let mut found = self.books.merged(vec![share]);
        let mut seen = TeacherView::default();
        let config = self.base.config();
        if let (false, Some(validation)) = (self.teachers.is_empty(), &mut self.prompts.validation) {
            let (text, conversations) = (&self.base.text, &mut self.prompts.conversations);
            let several = self.teachers.len() > 1;
            let ask = config.host.validate_teacher && self.books.records.history.teacher.is_none();
            for teacher in self.teachers.iter_mut().filter(|_| ask) {
                let model = teacher.model.as_mut();
                let share = validation.answer(model, conversations.as_mut(), text, step, (0, 1), 0, &asked)?;
                let Some(share) = share else {
                    return Ok(None);
                };
                let reward = self.books.merged(vec![share]).reward;
                if let (true, Some(reward)) = (several, reward) {
                    found.metrics.insert(format!("val/teacher/{}/reward_avg", teacher.name), reward);
                }
                // Of several, the best is what the student is held against.
                seen.reward = seen.reward.into_iter().chain(reward).reduce(f64::max);
            }
            let student = self.trainer.student.model.as_mut();
            let mut teachers = OwnTeachers { teachers: &mut self.teachers, config };
            let Some((mean, _)) = validation.kl(student, &mut teachers, conversations.as_mut(), text, &asked)? else {
                return Ok(None);
            };
            seen.kl = Some(mean);
        }
        self.books.validated(step, found, seen)?;
        Ok(Some(Did::Validated))
    }

    fn snapshot(&self) -> Result<Snapshot> {
        let mut history = self.books.records.history.clone();
        history.seconds = self.books.records.seconds();
        let mut completions: Vec<Completion> = self.waiting.values().cloned().collect();
        completions.sort_by_key(|c| c.sample);
        let student = &self.trainer.student;
        let optimizer_steps = student.optimizer_steps();
        let controller = self.controller.memory();
        let state = RunState { controller, completions, history, optimizer_steps, tally: self.books.tally };
        Ok(Snapshot {
            step: self.controller.step(),
            model: student.weights(true)?,
            optimizer: student.optimizer_state(true)?,
            state: serde_json::to_value(state)
                .map_err(|e| RunError::config("", format!("the run's state cannot be written: {e}"), ""))?,
        })
    }

    fn save(&mut self, step: u64, last: bool) -> Result<Option<Did>> {
        self.books.records.progress.phase("checkpoint");
        let snapshot = self.snapshot()?;
        self.writer.save(snapshot)?;
        if last || self.base.config().train.ckpt.export_safetensors {
            self.export(step)?;
        }
        Ok(Some(Did::Saved))
    }

    /// A Hugging Face folder of the current weights under `safetensors/step_N`, in `train.param_dtype`.
    fn export(&mut self, step: u64) -> Result<PathBuf> {
        let root = self.books.records.folder.root().join("safetensors");
        let target = root.join(checkpoint::folder_name(step));
        let train = &self.base.config().train;
        let dtype = crate::export::dtype(train.param_dtype);
        let student = &self.trainer.student;
        crate::export::model_folder(student.model.as_ref(), &student.folder, &target, dtype)?;
        crate::export::prune(&root, train.ckpt.max_keep)?;
        Ok(target)
    }

    /// Leaves with exit code 75, after the checkpoint that the controller has ordered. Before anything was done there is none.
    fn leave(mut self) -> Result<Outcome> {
        let step = self.controller.step();
        let folder = self.writer.wait()?;
        self.books.records.progress.finish();
        let checkpoint = folder.unwrap_or_else(|| self.books.records.folder.checkpoints());
        Ok(Outcome::Saved { step, checkpoint })
    }

    fn finish(mut self) -> Result<Outcome> {
        if self.controller.gave_up() {
            return Err(self.books.nothing_to_train_on(self.controller.empty_rounds()));
        }
        let step = self.controller.step();
        let exported = self.export(step)?;
        let checkpoint = self.writer.wait()?.or(Some(exported));
        let summary = self.books.finish(step, self.controller.memory().trained(), checkpoint)?;
        Ok(Outcome::Done { summary: Box::new(summary) })
    }
}
