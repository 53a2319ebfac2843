//! `[train.train_policy]` with `type = "grpo"`: distillation and reinforcement learning.

use super::Dataset;
use crate::shapes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

table! {
    /// Training on the student's own completions: distillation, reinforcement learning, or both.
    pub struct GrpoConfig {
        /// Which trainer runs it. A run with another than `grpo` is refused.
        pub trainer_type: String = "grpo".into(),
        /// The surrogate loss.
        pub variant: Variant = Variant::Grpo,
        /// Prompts to train on.
        pub dataset: Dataset = Dataset::default(),
        /// Draw the prompts of an epoch in random order.
        pub dataloader_shuffle: bool = true,
        /// Seed of the prompts' order.
        pub dataloader_seed: i64 = 0,
        /// Worker processes of the data loader; 0 or less is none. No effect here.
        #[serde(deserialize_with = "shapes::at_least_zero")]
        #[schemars(with = "i64")]
        pub dataloader_num_workers: usize = 0,
        /// Batches that each worker loads ahead; dropped without workers. No effect here.
        pub dataloader_prefetch_factor: Option<i64> = None,
        /// Prompts that the controller reads from the data loader at once; 0 or less means `rollout.batch_size`.
        #[serde(deserialize_with = "shapes::positive_or_none")]
        #[schemars(with = "Option<i64>")]
        pub dataloader_batch_size: Option<usize> = Some(1),
        /// Send each prompt to the rollout rank `index mod ranks`. No effect here with one rollout rank.
        pub data_dispatch_as_rank_in_mesh: bool = false,
        /// Cache processed rows. No effect here: prompts are rendered once.
        pub enable_dataset_cache: bool = false,
        /// Column that holds the prompt, when no dataset plugin is given.
        pub prompt_column_name: String = String::new(),
        /// Column that holds the reference answer, when no dataset plugin is given.
        pub response_column_name: String = String::new(),
        /// Rewards of the plugins, as `plugin/reward`, or only one of the two names where that is unambiguous: a name, a list of names (weight 1.0 each) or a table of weights. The reward of a completion is the sum of weight times value; a weight of 0.0 only logs. The default counts as not given: the only training reward of the plugins is taken then, and with several the run is refused until one is named. The names of rewards built into the original (`direct_math`, `boxed_math`, `single_choice`, `gsm8k`, `format`, `overlong`) that no plugin offers stand for the only training reward of the plugins, with a warning. Used for validation too when neither `validation.reward_function` nor a plugin has a validation reward.
        #[serde(deserialize_with = "shapes::reward_weights")]
        #[schemars(with = "shapes::RewardShape")]
        pub reward_function: BTreeMap<String, f64> = BTreeMap::from([("single_choice".to_string(), 1.0)]),
        /// Rewards of the plugins by which groups are filtered: a name or a list, whose values are added. A group whose completions all have the same value is dropped before training, and more prompts are sampled in its place (dynamic sampling). Empty: no filter, but with `variant = "dapo"` the training reward itself. Needs `rollout.n_generation` above 1; not used while rewards are bypassed.
        #[serde(deserialize_with = "shapes::one_or_many")]
        #[schemars(with = "shapes::OneOrMany<String>")]
        pub filter_reward_metric: Vec<String> = Vec::new(),
        /// Give no reward at all. Distillation switches this on, unless the file says `false`: then reward and distillation advantages are added.
        pub bypass_reward: bool = false,
        /// Ask a remote server for rewards. A run with it is refused: rewards are plugins.
        pub use_remote_reward: bool = false,
        /// The remote reward server. No effect here.
        pub remote_reward: RemoteReward = RemoteReward::default(),
        /// Give the reward all completions of a prompt at once.
        pub group_reward_calculation: bool = false,
        /// Penalty for answers close to the length limit.
        pub overlong_reward: OverlongReward = OverlongReward::default(),
        /// Divides the student's and the teacher's logits in the loss, when above 1e-6 and not 1. It does not control sampling: see `rollout.sampling_config.temperature`.
        pub temperature: f64 = 1.0,
        /// Lower clip of the probability ratio, as a distance from 1; negative: not clipped below.
        pub epsilon_low: f64 = 0.2,
        /// Upper clip of the probability ratio, as a distance from 1; negative: not clipped above.
        pub epsilon_high: f64 = 0.2,
        /// Bound of the loss for negative advantages (dual clip).
        pub lower_bound_ratio: f64 = 3.0,
        /// Lower bound of advantages. No effect here, as in the original.
        pub advantage_low: f64 = -5.0,
        /// Upper bound of advantages. No effect here, as in the original.
        pub advantage_high: f64 = 5.0,
        /// How token losses become one number.
        pub loss_type: LossType = LossType::TokenMean,
        /// Divisor instead of the sample's length, for `loss_type = "seq-mean-token-mean"`.
        #[schemars(range(min = 1))]
        pub unbiased_loss_max_tokens: Option<usize> = None,
        /// Do not divide reward advantages by the group's standard deviation.
        pub unbiased_advantage: bool = false,
        /// Weight of the KL to the reference model (the initial student); 0 loads no reference.
        pub kl_beta: f64 = 0.0,
        /// Weight that KL estimate by the probability ratio.
        pub unbiased_kl_estimate: bool = false,
        /// Drop samples with a negative advantage whose mean log-ratio to the sampling policy is above this.
        pub off_policy_masking_delta: Option<f64> = None,
        /// Cap of the probability ratio in place of the clips (AIPO).
        pub aipo_rho: Option<f64> = None,
        /// Passes over each batch.
        #[schemars(range(min = 1))]
        pub mu_iterations: usize = 1,
        /// Samples per forward and backward pass and data-parallel rank.
        #[schemars(range(min = 1))]
        pub mini_batch: usize = 2,
        /// Samples per optimizer step and data-parallel rank; absent: all of the step's.
        #[schemars(range(min = 1))]
        pub batch_size_per_optimize: Option<usize> = None,
        /// Tokens per forward and backward pass; mini-batches are then cut by tokens instead of by samples.
        #[schemars(range(min = 1))]
        pub max_token_len_per_mini_batch: Option<usize> = None,
        /// Weight of an entropy bonus.
        pub entropy_coeff: f64 = 0.0,
        /// Weight of a likelihood term on samples with a positive reward.
        pub positive_nll_coef: Option<f64> = None,
        /// How many steps old the weights may be that sampled a completion. Raised to `sync_weight_interval - 1` if below.
        pub allowed_outdated_steps: usize = 4,
        /// Sample with the newest weights only: `allowed_outdated_steps` becomes 0 and `sync_weight_interval` must be 1.
        pub on_policy: bool = false,
        /// Rollouts train without the controller in between; only with `variant = "grpo"`. A run with it is refused.
        pub uncentralized_training: bool = false,
        /// Prompts still handed out while sampling is throttled; the dapo variant turns 0 or less into 128.
        pub outdated_rollout_fetch_batch_size: i64 = 0,
        /// Steps of samples in flight at most. Raised to `allowed_outdated_steps + 1` if below.
        pub max_inflight_steps: Option<usize> = None,
        /// Mask the common prefix of a group's completions when it has more than this many tokens. Not applied while rewards are bypassed.
        pub min_filter_prefix_tokens: Option<i64> = None,
        /// Batches that an on-policy step may draw before the run fails; 0 or less: no limit.
        pub max_retry_for_on_policy: i64 = -1,
        /// Steps after which the reference model becomes the current student; needs `kl_beta`.
        pub reference_reset_interval: Option<i64> = None,
        /// Forget the optimizer's state when the reference is reset.
        pub reset_optimizer_with_reference: bool = true,
        /// Weight ranks by their number of tokens, for `loss_type = "token-mean"`.
        pub balance_dp_token: bool = false,
        /// Weight the loss by the ratio of the training policy to the sampling policy; switches on `rollout_as_token_ids` and `collect_rollout_logprobs`.
        pub use_decoupled_loss: bool = false,
        /// Tokens whose weight in the decoupled loss is above this are dropped.
        pub behav_imp_weight_cap: Option<f64> = None,
        /// Completions travel as token ids. Distillation switches this on.
        pub rollout_as_token_ids: bool = false,
        /// Keep the log-probabilities that sampling gave; `train/behaviour_ratio_*` then tell how far the trained weights are from those that wrote. (`train/ratio_*` are to the policy before the update, so 1 at the first one.)
        pub collect_rollout_logprobs: bool = false,
        /// Use those log-probabilities as the old policy's; switches on `collect_rollout_logprobs`, excludes `use_decoupled_loss`.
        pub use_rollout_logprobs_for_loss: bool = false,
        /// How rewards become advantages. A run with another than `grpo` is refused.
        pub algo: String = "grpo".into(),
    }
}

table! {
    /// Penalty for answers close to the length limit.
    pub struct OverlongReward {
        /// Apply the penalty.
        pub enable_overlong_penalty: bool = false,
        /// The penalty starts this many tokens before the limit.
        pub buffer_length: i64 = 4096,
        /// Penalty at the limit.
        pub penalty_factor: f64 = 1.0,
    }
}

table! {
    /// A remote reward server. No effect here.
    pub struct RemoteReward {
        /// Scale of the whole reward. No effect here.
        pub scale: f64 = 1.0,
        /// Rewards to ask for. No effect here.
        pub reward_fns: Vec<RemoteRewardFn> = vec![RemoteRewardFn::default()],
        /// Lower bound of the sum. No effect here.
        pub reward_clip_min: f64 = -5.0,
        /// Upper bound of the sum. No effect here.
        pub reward_clip_max: f64 = 5.0,
        /// Completions per request. No effect here.
        pub batch_size: i64 = 1,
    }
}

table! {
    /// One reward of a remote server. No effect here.
    pub struct RemoteRewardFn {
        /// Name on the server. No effect here.
        pub name: String = "dance_grpo".into(),
        /// Weight in the sum. No effect here.
        pub weight: f64 = 1.0,
        /// Field of the answer. No effect here.
        pub score_key: String = "overall_reward".into(),
        /// Lower bound. No effect here.
        pub clip_min: f64 = -5.0,
        /// Upper bound. No effect here.
        pub clip_max: f64 = 5.0,
    }
}

/// Surrogate losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// Token-wise probability ratio.
    Grpo,
    /// Sequence-wise probability ratio.
    Gspo,
    /// As grpo, with prompts still handed out while sampling is ahead of training; groups whose completions all have the same reward are dropped (see `filter_reward_metric`).
    Dapo,
}

/// How token losses become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LossType {
    /// Mean over all scored tokens.
    TokenMean,
    /// Mean over samples of the sum over tokens.
    SeqMeanTokenSum,
    /// Mean over samples of the mean over tokens.
    SeqMeanTokenMean,
    /// Sum over all scored tokens.
    TokenSum,
}
