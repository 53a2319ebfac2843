//! What the configuration fixes for a whole run.

use serde::{Deserialize, Serialize};

/// What the configuration fixes for a whole run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Prompts in one pass over the dataset.
    pub dataset_len: u64,
    /// Passes over it.
    pub epochs: u64,
    /// Completions of one prompt.
    pub n_generation: u64,
    /// Completions that one policy replica trains on in one step.
    pub train_batch: u64,
    /// Policy replicas that a step waits for until some are removed.
    pub policy_replicas: u64,
    /// Upper bound of the steps, if any.
    pub steps_max: Option<u64>,
    /// How many versions older than the trained one a completion may be.
    pub allowed_outdated_steps: u64,
    /// How many steps the rollouts may work ahead of the trainer; at most `allowed_outdated_steps`. 0: they wait for the
    /// weights of every step.
    pub steps_ahead_max: u64,
    /// Steps between two versions that rollouts get.
    pub sync_weight_interval: u64,
    /// Prompts of one order to a rollout.
    pub prompts_per_order_max: u64,
    /// Steps between validations; 0: none.
    pub validation_freq: u64,
    /// Validate before the first step.
    pub validate_before: bool,
    /// Steps between checkpoints; 0: none.
    pub save_freq: u64,
    /// Save after the last step too.
    pub save_last: bool,
}

impl Plan {
    /// Completions of the whole run, if every prompt brings all of its own.
    pub fn samples_total(&self) -> u64 {
        self.prompts_total().saturating_mul(self.n())
    }

    /// Prompts of the whole run.
    pub fn prompts_total(&self) -> u64 {
        self.dataset_len.saturating_mul(self.epochs)
    }

    /// Steps of the whole run with the planned number of policies: `len · n_generation · epochs / (train_batch · replicas)`,
    /// rounded down, at most `steps_max`.
    pub fn total_steps(&self) -> u64 {
        let step = self.batch().saturating_mul(self.policy_replicas.max(1));
        let by_data = self.samples_total() / step;
        self.steps_max.map_or(by_data, |max| by_data.min(max))
    }

    pub(crate) fn n(&self) -> u64 {
        self.n_generation.max(1)
    }

    pub(crate) fn batch(&self) -> u64 {
        self.train_batch.max(1)
    }

    /// Whether the weights of step `step` go to the rollouts, when `published` is the newest version they have. More often
    /// than `sync_weight_interval` asks for where they would be too old for the next step otherwise.
    pub(crate) fn publishes(&self, step: u64, published: u64) -> bool {
        step.is_multiple_of(self.sync_weight_interval.max(1))
            || step.saturating_sub(published) > self.allowed_outdated_steps
            || (self.validation_freq > 0 && step.is_multiple_of(self.validation_freq))
    }

    /// Steps of samples that may be under way at a time.
    pub(crate) fn window_steps(&self) -> u64 {
        self.steps_ahead_max.saturating_add(1)
    }
}
