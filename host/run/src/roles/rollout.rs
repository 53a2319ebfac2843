//! A rollout as a process: orders of prompts in, completions into the depot, questions to the teacher.

use std::sync::atomic::{AtomicBool, Ordering};

use cosmos_control::Beating;
use cosmos_controller::{Order, OrderId, Outcome, Role};
use cosmos_engine::head::Head;
use cosmos_engine::model::{self, Model};

use crate::compared::DistantTeachers;
use crate::error::{Result, Role as _, RunError};
use crate::prepare::{self, Base, Prompts};
use crate::roles::depot::Depot;
use crate::roles::foreign::{self, Foreign};
use crate::roles::seat::{self, Seat, Worker};
use crate::roles::shelves::Shelves;
use crate::roles::{RoleOptions, RoleOutcome, writer};
use crate::shards;
use crate::teacher::Wanted;
use crate::teachers;
use crate::validation::Validated;
use crate::weights::WeightReader;

/// How long to look for published weights. They are there before the order that names them, unless they were lost.
const WEIGHTS_MS_MAX: u64 = 30_000;

/// File of the teachers' own rewards, beside what the teachers leave.
const REWARDS: &str = "rewards.json";
/// Size of that.
const REWARDS_BYTES_MAX: u64 = 1 << 20;

struct Rollout {
    base: Base,
    prompts: Prompts,
    model: Box<dyn Model>,
    weights: WeightReader,
    depot: Depot,
    wanted: Option<Wanted>,
    /// The teachers' heads, once a validation has needed them.
    heads: Option<Vec<Box<dyn Head>>>,
    shelves: Shelves,
    seat: Seat,
}

/// Runs one rollout until the run is over.
pub fn run(options: RoleOptions) -> Result<RoleOutcome> {
    let base = Base::new(options.resolved.clone())?;
    super::check_processes(&base)?;
    let prompts = prepare::prompts(&base, &options.plugins)?;
    let format = shards::rollout_format(base.config());
    let model = model::load_frozen(&base.student_folder, &base.config().host.device, format).role("student")?;
    let wanted = prepare::wanted(base.config())?.filter(|_| base.config().distillation.enable);
    let mut seat = Seat::take(&base, &options, Role::Rollout, None)?;
    let foreign = foreign::is_spoken(base.config()).then(|| Foreign::publisher(prompts.schedule.clone()));
    let depot = seat.depot(&base, foreign)?;
    let shelves = Shelves::open(&base, &options, &seat, &depot.store)?;
    let weights = WeightReader::new(shelves.weights()?, "the policy");
    seat::serve(Rollout { base, prompts, model, weights, depot, wanted, heads: None, shelves, seat })
}

/// A head that goes on being this process's.
struct Lent<'a>(&'a mut dyn Head);

impl Head for Lent<'_> {
    fn vocab(&self) -> usize {
        self.0.vocab()
    }

    fn hidden(&self) -> usize {
        self.0.hidden()
    }

    fn chunk_rows(&self) -> usize {
        self.0.chunk_rows()
    }

    fn logits_rv(&mut self, hidden_rh: &[f32], out: &mut Vec<f32>) -> cosmos_engine::Result<()> {
        self.0.logits_rv(hidden_rh, out)
    }
}

impl Worker for Rollout {
    fn seat(&mut self) -> &mut Seat {
        &mut self.seat
    }

    fn perform(&mut self, id: OrderId, order: Order, beating: &Beating) -> Result<()> {
        let withdrawn = beating.flag();
        match order {
            Order::Generate { prompts, only, version } => self.generate(id, &prompts, &only, version, &withdrawn),
            Order::Validate { step, part, parts } => self.validate(id, step, (part, parts), &withdrawn),
            other => self.seat.refuse(id, &other),
        }
    }
}

impl Rollout {
    /// Brings the model to `version`; between orders only, so that no sequence mixes two versions. False: the weights are
    /// not there, which is reported.
    fn load(&mut self, id: OrderId, version: u64) -> Result<bool> {
        self.seat.client.progress(format!("loading weights {version}"));
        match self.weights.load(version, self.model.as_mut(), WEIGHTS_MS_MAX) {
            Ok(_) => Ok(true),
            Err(error @ RunError::Shared { .. }) => {
                tracing::warn!("{error}");
                self.seat.done(id, Outcome::WeightsGone, &())?;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn generate(
        &mut self,
        id: OrderId,
        ordinals: &[u64],
        only: &[u64],
        version: u64,
        withdrawn: &AtomicBool,
    ) -> Result<()> {
        if !self.load(id, version)? {
            return Ok(());
        }
        self.seat.client.progress(format!("writing {} prompts with weights {version}", ordinals.len()));
        let config = self.base.config();
        let wait_ms_max = config.host.teacher_wait_ms_max;
        // Candidates of a second pass are known only when all is written.
        let later = config.distillation.rollout_top_k_recompute && config.distillation.top_k > 0;
        let (depot, stop) = (&self.depot, &self.seat.stop);
        let mut asked = Vec::new();
        let mut finished = |completion: &crate::rollout::Completion| match &self.wanted {
            Some(wanted) if !later && (only.is_empty() || only.contains(&completion.sample)) => {
                asked.push(completion.sample);
                depot.ask(id, completion, wanted, wait_ms_max)
            }
            _ => Ok(()),
        };
        let asked_to_stop = || withdrawn.load(Ordering::Relaxed) || stop.is_set();
        let written = writer::write(
            &self.base,
            &mut self.prompts,
            self.model.as_mut(),
            ordinals,
            only,
            version,
            &mut finished,
            &asked_to_stop,
        )?;
        let sample_ref = |sample: u64| cosmos_controller::SampleRef { sample, order: id, version };
        let Some(written) = written else {
            let samples: Vec<_> = asked.into_iter().map(sample_ref).collect();
            self.depot.forget(&samples)?;
            return self.abandoned(id, withdrawn);
        };
        for completion in &written.completions {
            self.depot.put(id, completion)?;
            if let Some(wanted) = self.wanted.as_ref().filter(|_| later) {
                self.depot.ask(id, completion, wanted, wait_ms_max)?;
            }
        }
        let samples: Vec<u64> = written.completions.iter().map(|c| c.sample).collect();
        let in_vain: Vec<_> = asked.into_iter().filter(|s| !samples.contains(s)).map(sample_ref).collect();
        if !in_vain.is_empty() {
            self.depot.forget(&in_vain)?;
        }
        if !self.seat.done(id, Outcome::Generated { samples: samples.clone() }, &written.notes)? {
            // Somebody else has the prompts by now.
            self.depot.forget(&samples.into_iter().map(sample_ref).collect::<Vec<_>>())?;
        }
        Ok(())
    }

    fn validate(&mut self, id: OrderId, step: u64, share: (u64, u64), withdrawn: &AtomicBool) -> Result<()> {
        if !self.load(id, step)? {
            return Ok(());
        }
        self.seat.client.progress(format!("validating step {step}, part {} of {}", share.0 + 1, share.1));
        let stop = self.seat.stop.clone();
        let asked = || withdrawn.load(Ordering::Relaxed) || stop.is_set();
        let found = writer::validate(&self.base, &mut self.prompts, self.model.as_mut(), step, share, &asked)?;
        let Some(mut found) = found else {
            return self.abandoned(id, withdrawn);
        };
        // The original's messages have no place for whole distributions.
        if share.0 == 0 && self.wanted.is_some() && !foreign::is_spoken(self.base.config()) {
            match self.kl(id, &asked)? {
                Some(kl) => found.kl = Some(kl),
                None => return self.abandoned(id, withdrawn),
            }
        }
        if share.0 == 0 && self.wanted.is_some() && self.base.config().host.validate_teacher {
            match self.teachers_rewards(step, &asked)? {
                Some(rewards) => found.teachers = rewards,
                None => return self.abandoned(id, withdrawn),
            }
        }
        self.seat.done(id, Outcome::Validated, &found).map(drop)
    }

    /// What the teachers' own answers to the validation prompts are worth; none when asked to stop. Measured once in a run,
    /// with the teacher's model in this process for that time; then it lies where all rollouts find it.
    fn teachers_rewards(&mut self, step: u64, asked: &dyn Fn() -> bool) -> Result<Option<Vec<(String, f64)>>> {
        let shelf = self.shelves.teachers()?;
        let written = shelf.get(REWARDS, REWARDS_BYTES_MAX)?;
        if let Some(rewards) = written.and_then(|text| serde_json::from_slice(&text).ok()) {
            return Ok(Some(rewards));
        }
        let mut rewards = Vec::new();
        for spec in teachers::specs(&self.base)? {
            let Some(validation) = &mut self.prompts.validation else { break };
            self.seat.client.progress(format!("teacher `{}` answers the validation prompts", spec.name));
            let mut teacher = spec.load(self.base.config())?;
            let (text, conversations) = (&self.base.text, self.prompts.conversations.as_mut());
            let model = teacher.model.as_mut();
            let Some(share) = validation.answer(model, conversations, text, step, (0, 1), 0, asked)? else {
                return Ok(None);
            };
            rewards.extend(Validated::of(vec![share], &[], &[], 0).reward.map(|reward| (spec.name, reward)));
        }
        let text = serde_json::to_vec(&rewards)
            .map_err(|e| RunError::shared(REWARDS, format!("it cannot be written: {e}"), ""))?;
        shelf.put(REWARDS, &text)?;
        Ok(Some(rewards))
    }

    /// The KL to the teachers; none when asked to stop. The first share measures it for the whole validation.
    fn kl(&mut self, id: OrderId, asked: &dyn Fn() -> bool) -> Result<Option<f64>> {
        let Some(validation) = &mut self.prompts.validation else { return Ok(None) };
        if self.heads.is_none() {
            self.heads = Some(self.shelves.heads(&self.base)?);
        }
        let config = self.base.config();
        let teachers = config.distillation.each_teacher();
        let order = self.depot.id(0, id).epoch;
        let heads = self.heads.iter_mut().flatten();
        let mut distant = DistantTeachers {
            queues: self.depot.queues.iter().map(|queue| queue.as_ref()).collect(),
            heads: heads.map(|head| Box::new(Lent(head.as_mut())) as Box<dyn Head + '_>).collect(),
            names: teachers.iter().map(|t| t.name.clone()).collect(),
            weights: teachers.iter().map(|t| t.weight).collect(),
            order,
            wait_ms_max: config.host.teacher_wait_ms_max,
        };
        let (text, conversations) = (&self.base.text, self.prompts.conversations.as_mut());
        let kl = validation.kl(self.model.as_mut(), &mut distant, conversations, text, asked)?;
        Ok(kl.map(|(mean, _)| mean))
    }

    fn abandoned(&self, id: OrderId, withdrawn: &AtomicBool) -> Result<()> {
        if !withdrawn.load(Ordering::Relaxed) {
            let reason = RunError::shared(self.seat.name(), "it was asked to leave", "");
            self.seat.failed(id, &reason)?;
        }
        Ok(())
    }
}
