//! The student: model, optimizer and schedule, and their way into and out of checkpoints.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cosmos_config::shapes::{Amount, LearningRate};
use cosmos_config::{Config, DecayType as Decay, OptimizerName, UpdateInBackward};
use cosmos_engine::batch::{Position, TokenBatch};
use cosmos_engine::model::{HeadLoss, Model, ModelConfig};
use cosmos_engine::optim::{Adam, AdamConfig, DecayType, Moments, Schedule, StepStats, Warmup};
use cosmos_engine::sharded;
use cosmos_parallel::{Axis, Collective, RankGroups};

use crate::checkpoint::{HostTensor, Snapshot};
use crate::error::{Result, Role, RunError};
use crate::shards;

/// The model being trained with its optimizer.
pub struct Student {
    /// The weights; rollout and validation read them too.
    pub model: Box<dyn Model>,
    /// Folder it was loaded from.
    pub folder: PathBuf,
    adam: Adam,
    schedule: Schedule,
    lr: f64,
    clip_norm_max: Option<f64>,
    update_in_backward: UpdateInBackward,
    /// The replicas that make this step together; none when it is one.
    members: Option<Members>,
    /// Where this rank is among those of its replica.
    pub place: Place,
}

/// Where a rank is among those of its replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Ranks of the replica.
    pub world: usize,
    /// This rank's part of the samples, and how many parts there are.
    pub part: (usize, usize),
    /// Whether it is the one of its part that sees the loss and says so.
    pub reports: bool,
}

impl Place {
    /// Of a rank.
    pub fn of(groups: &RankGroups) -> Self {
        let (at, mesh) = (groups.coordinates(), groups.mesh());
        let shards = mesh.size(Axis::DpShard);
        Self {
            world: mesh.world(),
            part: (at.dp_replicate * shards + at.dp_shard, mesh.size(Axis::DpReplicate) * shards),
            reports: at.tp == 0 && at.cp == 0 && at.pp + 1 == mesh.size(Axis::Pp),
        }
    }
}

/// The replicas of a step, seen from one rank of one of them.
#[derive(Clone)]
pub struct Members {
    /// One process a rank.
    pub group: Arc<dyn Collective>,
    /// The ranks of this process, which take turns, so that the processes' collectives meet in one order.
    pub turns: Arc<dyn Collective>,
}

impl Student {
    /// Loads the student of `config`; `total_steps` shapes the learning-rate schedule.
    pub fn load(config: &Config, folder: &Path, total_steps: u64) -> Result<Self> {
        Self::load_rank(config, folder, total_steps, &RankGroups::single())
    }

    /// As [`Student::load`], one rank of a student that is cut over several.
    pub fn load_rank(config: &Config, folder: &Path, total_steps: u64, groups: &RankGroups) -> Result<Self> {
        let train = &config.train;
        let options = shards::policy_options(train);
        let model = if config.host.random_init {
            let shape = ModelConfig::from_folder(folder).role("student")?;
            let seed = config.train.seed.unwrap_or(0) as u64;
            sharded::random(&shape, &config.host.device, seed, groups, &options).role("student")?
        } else {
            sharded::load(folder, &config.host.device, groups, &options).role("student")?
        };
        let adam_config = AdamConfig {
            decoupled_weight_decay: matches!(train.optm_name, OptimizerName::AdamW | OptimizerName::AdamW8bit),
            beta1: train.optm_betas[0],
            beta2: train.optm_betas[1],
            eps: train.epsilon,
            weight_decay: train.optm_weight_decay,
        };
        let adam = Adam::new(adam_config, model.params());
        Ok(Self {
            model,
            folder: folder.to_path_buf(),
            adam,
            schedule: schedule(config, total_steps)?,
            lr: global_lr(&train.optm_lr)?,
            clip_norm_max: (train.optm_grad_norm_clip > 0.0).then_some(train.optm_grad_norm_clip),
            update_in_backward: config.host.update_in_backward,
            members: None,
            place: Place::of(groups),
        })
    }

    /// Learning rate of step `step`, counted from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        self.lr * self.schedule.factor(step)
    }

    /// One optimizer step from the accumulated gradients, which are zero afterwards. Not finite: nothing changed.
    pub fn optimizer_step(&mut self, step: u64) -> Result<StepStats> {
        self.average_gradients()?;
        let lr = self.learning_rate(step);
        let stats = self.adam.step(self.model.as_mut(), lr, self.clip_norm_max).role("student")?;
        self.model.zero_grads();
        Ok(stats)
    }

    /// Whether an update made of `micro_batches` goes on within their backward ([`Student::backward_step`]), where nothing
    /// is needed of all gradients together.
    ///
    /// # Errors
    /// `host.update_in_backward = "always"` where that cannot be.
    pub fn updates_in_backward(&self, micro_batches: usize) -> Result<bool> {
        let policies = self.members.as_ref().map_or(1, |members| members.group.world());
        let obstacle = if let Some(max) = self.clip_norm_max {
            Some((format!("gradients are clipped to a norm of {max}"), "set `train.optm_grad_norm_clip = 0`"))
        } else if self.place.world > 1 || policies > 1 {
            let message = format!("gradients are sums over {policies} policies of {} ranks", self.place.world);
            Some((message, "set it to \"auto\""))
        } else if micro_batches > 1 {
            let message = format!("an update is made of {micro_batches} micro-batches");
            Some((message, "raise `mini_batch` or `max_token_len_per_mini_batch`, or set it to \"auto\""))
        } else if !self.model.updates_in_backward() {
            Some(("this device does not do it".to_string(), "set it to \"auto\""))
        } else {
            None
        };
        match (self.update_in_backward, obstacle) {
            (UpdateInBackward::Never, _) => Ok(false),
            (_, None) => Ok(true),
            (UpdateInBackward::Auto, Some(_)) => Ok(false),
            (UpdateInBackward::Always, Some((message, hint))) => {
                Err(RunError::config("", format!("`host.update_in_backward = \"always\"`, but {message}"), hint))
            }
        }
    }

    /// Forward, backward and the optimizer step in one. Not finite: nothing changed.
    pub fn backward_step(
        &mut self,
        step: u64,
        batch: &TokenBatch,
        positions: &[Position],
        loss: &mut dyn HeadLoss,
    ) -> Result<StepStats> {
        let lr = self.learning_rate(step);
        self.adam.step_in_backward(self.model.as_mut(), lr, batch, positions, loss).role("student")
    }

    /// Names the replicas that make the next steps together with this one.
    pub fn with_members(&mut self, members: Option<Members>) {
        self.members = members;
    }

    /// The gradients become the mean of those of all members, as each member's loss is a mean over its own share.
    fn average_gradients(&mut self) -> Result<()> {
        let Some(members) = self.members.clone().filter(|members| members.group.world() > 1) else {
            return Ok(());
        };
        let mut all = Vec::new();
        self.model.visit_grads(&mut |_, gradient| all.extend_from_slice(gradient));
        for rank in 0..members.turns.world() {
            if rank == members.turns.rank() {
                members.group.all_reduce_sum(&mut all)?;
            }
            members.turns.barrier()?;
        }
        let scale = 1.0 / members.group.world() as f32;
        let mut rest = all.as_slice();
        self.model
            .update_params(&mut |_, _, gradient| {
                let (own, others) = rest.split_at(gradient.len().min(rest.len()));
                gradient.iter_mut().zip(own).for_each(|(to, sum)| *to = sum * scale);
                rest = others;
            })
            .role("student")
    }

    /// Forgets the optimizer's moments.
    pub fn reset_optimizer(&mut self) {
        self.adam = Adam::new(self.adam.config().clone(), self.model.params());
    }

    /// Copies of the weights by name. Of a sharded student every rank must ask, and those that do not `keep` them get none.
    pub fn weights(&self, keep: bool) -> Result<Vec<HostTensor>> {
        gathered(self.model.as_ref(), keep)
    }

    /// Copies of the optimizer's moments, named `<parameter>.exp_avg` and `<parameter>.exp_avg_sq` as in PyTorch; `keep` as
    /// for [`Student::weights`].
    pub fn optimizer_state(&self, keep: bool) -> Result<Vec<HostTensor>> {
        let specs = self.model.whole_params().to_vec();
        let mut state = Vec::new();
        for (index, ((name, moments), spec)) in self.adam.state().zip(specs).enumerate() {
            for (kind, values) in [("exp_avg", moments.m), ("exp_avg_sq", moments.v)] {
                let values = self.model.gather(index, values).role("student")?;
                if keep {
                    state.push(HostTensor { name: format!("{name}.{kind}"), shape: spec.shape.clone(), values });
                }
            }
        }
        Ok(state)
    }

    /// Optimizer updates done so far.
    pub fn optimizer_steps(&self) -> u64 {
        self.adam.steps()
    }

    /// Puts weights and optimizer state of a checkpoint back; every rank of a sharded student takes its own pieces.
    pub fn restore(&mut self, folder: &Path, snapshot: &Snapshot, optimizer_steps: u64) -> Result<()> {
        write_weights(self.model.as_mut(), &snapshot.model, folder)?;
        let state: HashMap<&str, &[f32]> =
            snapshot.optimizer.iter().map(|t| (t.name.as_str(), t.values.as_slice())).collect();
        let model = self.model.as_ref();
        let specs = model.whole_params();
        let places: HashMap<&str, usize> = specs.iter().enumerate().map(|(i, s)| (s.name.as_str(), i)).collect();
        self.adam
            .load_state(optimizer_steps, &mut |name| {
                let index = *places.get(name)?;
                let own = |kind: &str| -> Option<Vec<f32>> {
                    let whole = *state.get(format!("{name}.{kind}").as_str())?;
                    (whole.len() == specs[index].len()).then(|| model.cut(index, whole).ok()).flatten()
                };
                Some(Moments { m: own("exp_avg")?, v: own("exp_avg_sq")? })
            })
            .map_err(|e| RunError::Checkpoint {
                path: folder.to_path_buf(),
                message: e.to_string(),
                hint: "resume with the configuration that wrote it".into(),
            })
    }
}

/// Copies of a model's weights by name.
pub fn weights_of(model: &dyn Model) -> Result<Vec<HostTensor>> {
    gathered(model, true)
}

fn gathered(model: &dyn Model, keep: bool) -> Result<Vec<HostTensor>> {
    let mut weights = Vec::new();
    for (index, spec) in model.whole_params().to_vec().into_iter().enumerate() {
        let values = model.gather(index, &model.read_param(index)).role("student")?;
        if keep {
            weights.push(HostTensor { name: spec.name, shape: spec.shape, values });
        }
    }
    Ok(weights)
}

/// Writes weights of a checkpoint into a model of the same shapes.
pub fn write_weights(model: &mut dyn Model, weights: &[HostTensor], folder: &Path) -> Result<()> {
    let mismatch = |message: String| RunError::Checkpoint {
        path: folder.to_path_buf(),
        message,
        hint: "the checkpoint belongs to another student: check `policy.model_name_or_path`".into(),
    };
    let by_name: HashMap<&str, &HostTensor> = weights.iter().map(|t| (t.name.as_str(), t)).collect();
    for (index, spec) in model.whole_params().to_vec().into_iter().enumerate() {
        let tensor =
            *by_name.get(spec.name.as_str()).ok_or_else(|| mismatch(format!("it has no tensor `{}`", spec.name)))?;
        if tensor.shape != spec.shape {
            return Err(mismatch(format!(
                "`{}` has shape {:?}, the student's has {:?}",
                spec.name, tensor.shape, spec.shape
            )));
        }
        let own = model.cut(index, &tensor.values).role("student")?;
        model.write_param(index, &own).role("student")?;
    }
    Ok(())
}

fn global_lr(lr: &LearningRate) -> Result<f64> {
    let several = match lr {
        LearningRate::One(_) => false,
        LearningRate::Each(rates) => rates.len() > 1,
        LearningRate::ByModule(rates) => rates.len() > 1,
    };
    if several {
        return Err(RunError::config(
            "",
            "`train.optm_lr` gives several learning rates; only one for the whole model is there yet",
            "write a single number",
        ));
    }
    Ok(lr.global())
}

fn schedule(config: &Config, total_steps: u64) -> Result<Schedule> {
    let train = &config.train;
    let schedule = Schedule {
        total_steps,
        warmup: match train.optm_warmup_steps {
            Amount::Count(steps) => Warmup::Steps(steps.max(0) as u64),
            Amount::Ratio(ratio) => Warmup::Ratio(ratio),
        },
        decay_ratio: train.optm_decay_ratio,
        decay_type: match train.optm_decay_type {
            Some(Decay::Sqrt) => DecayType::Sqrt,
            Some(Decay::Cosine) => DecayType::Cosine,
            Some(Decay::Linear) => DecayType::Linear,
            Some(Decay::None) | None => DecayType::None,
        },
        min_lr_factor: train.optm_min_lr_factor,
        warmup_start_factor: train.optm_warmup_start_factor,
    };
    schedule.check().role("student")?;
    Ok(schedule)
}

#[cfg(test)]
#[path = "student_tests.rs"]
mod tests;
