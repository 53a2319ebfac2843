//! The student: model, optimizer and schedule, and their way into and out of checkpoints.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use cosmos_config::shapes::{Amount, LearningRate};
use cosmos_config::{Config, DecayType as Decay, OptimizerName};
use cosmos_engine::model::{self, Model, ModelConfig};
use cosmos_engine::optim::{Adam, AdamConfig, DecayType, Moments, Schedule, StepStats, Warmup};

use crate::checkpoint::{HostTensor, Snapshot};
use crate::error::{Result, Role, RunError};

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
}

impl Student {
    /// Loads the student of `config`; `total_steps` shapes the learning-rate schedule.
    pub fn load(config: &Config, folder: &Path, total_steps: u64) -> Result<Self> {
        let train = &config.train;
        let model = if config.host.random_init {
            let shape = ModelConfig::from_folder(folder).role("student")?;
            model::random(&shape, &config.host.device, config.train.seed.unwrap_or(0) as u64).role("student")?
        } else {
            model::load(folder, &config.host.device).role("student")?
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
        })
    }

    /// Learning rate of step `step`, counted from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        self.lr * self.schedule.factor(step)
    }

    /// One optimizer step from the accumulated gradients, which are zero afterwards. Not finite: nothing changed.
    pub fn optimizer_step(&mut self, step: u64) -> Result<StepStats> {
        let lr = self.learning_rate(step);
        let stats = self.adam.step(self.model.as_mut(), lr, self.clip_norm_max).role("student")?;
        self.model.zero_grads();
        Ok(stats)
    }

    /// Forgets the optimizer's moments.
    pub fn reset_optimizer(&mut self) {
        self.adam = Adam::new(self.adam.config().clone(), self.model.params());
    }

    /// Copies of the weights by name.
    pub fn weights(&self) -> Vec<HostTensor> {
        weights_of(self.model.as_ref())
    }

    /// Copies of the optimizer's moments, named `<parameter>.exp_avg` and `<parameter>.exp_avg_sq` as in PyTorch.
    pub fn optimizer_state(&self) -> Vec<HostTensor> {
        self.adam
            .state()
            .zip(self.model.params())
            .flat_map(|((name, moments), spec)| {
                [("exp_avg", &moments.m), ("exp_avg_sq", &moments.v)].map(|(kind, values)| HostTensor {
                    name: format!("{name}.{kind}"),
                    shape: spec.shape.clone(),
                    values: values.clone(),
                })
            })
            .collect()
    }

    /// Optimizer updates done so far.
    pub fn optimizer_steps(&self) -> u64 {
        self.adam.steps()
    }

    /// Puts weights and optimizer state of a checkpoint back.
    pub fn restore(&mut self, folder: &Path, snapshot: Snapshot, optimizer_steps: u64) -> Result<()> {
        write_weights(self.model.as_mut(), &snapshot.model, folder)?;
        let mut state: HashMap<String, Vec<f32>> = snapshot.optimizer.into_iter().map(|t| (t.name, t.values)).collect();
        self.adam
            .load_state(optimizer_steps, &mut |name| {
                let m = state.remove(&format!("{name}.exp_avg"))?;
                let v = state.remove(&format!("{name}.exp_avg_sq"))?;
                Some(Moments { m, v })
            })
            .map_err(|e| RunError::Checkpoint {
                path: folder.to_path_buf(),
                message: e.to_string(),
                hint: "resume with the configuration that wrote it".into(),
            })
    }
}

/// Copies of a model's weights by name.
pub fn weights_of(model: &dyn Model) -> Vec<HostTensor> {
    let specs = model.params().to_vec();
    specs
        .into_iter()
        .enumerate()
        .map(|(index, spec)| HostTensor { name: spec.name, shape: spec.shape, values: model.read_param(index) })
        .collect()
}

/// Writes weights of a checkpoint into a model of the same shapes.
pub fn write_weights(model: &mut dyn Model, weights: &[HostTensor], folder: &Path) -> Result<()> {
    let mismatch = |message: String| RunError::Checkpoint {
        path: folder.to_path_buf(),
        message,
        hint: "the checkpoint belongs to another student: check `policy.model_name_or_path`".into(),
    };
    for (index, spec) in model.params().to_vec().into_iter().enumerate() {
        let tensor = weights
            .iter()
            .find(|t| t.name == spec.name)
            .ok_or_else(|| mismatch(format!("it has no tensor `{}`", spec.name)))?;
        if tensor.shape != spec.shape {
            return Err(mismatch(format!(
                "`{}` has shape {:?}, the student's has {:?}",
                spec.name, tensor.shape, spec.shape
            )));
        }
        model.write_param(index, &tensor.values).role("student")?;
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
