//! `[host]` and `[plugin.<name>]`: what only this program has.

use super::Dataset;
use crate::shapes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

table! {
    /// What only this program has: device, limits and how much is recorded. Not in the original.
    pub struct Host {
        /// Engine and device: `cpu` is the native engine, `burn:flex` the reference it is checked against. Not in the original.
        pub device: String = "cpu".into(),
        /// Sequences that the rollout decodes at the same time. Not in the original.
        #[schemars(range(min = 1, max = 65536))]
        pub decode_slots: usize = 64,
        /// MiB that the keys and values of the sequences being decoded may take; further ones wait until others end. Absent: half of the memory that was free at the start. Not in the original.
        #[schemars(range(min = 1, max = 16777216))]
        pub kv_mib_max: Option<usize> = None,
        /// Steps in a row that may be skipped for a loss or gradient that is not finite before the run stops. Not in the original.
        #[schemars(range(min = 1))]
        pub bad_steps_max: usize = 3,
        /// When a parameter is updated. Within the backward, as soon as its gradient is complete, the gradients are never there all at once, which spares a quarter of training's memory; weights and losses are the same, bit for bit. It needs an update that is made of one micro-batch on one rank of one policy, without clipping (`train.optm_grad_norm_clip = 0`, since a norm is known only when all gradients are). A gradient that turns out not to be finite after other parameters were updated ends the run, where a later update leaves such a step out. Not in the original.
        pub update_in_backward: UpdateInBackward = UpdateInBackward::Auto,
        /// Who talks with the student with `rollout.multi_turn_config.enable`, as `plugin/environment`; absent: the only one that the plugins offer. Not in the original.
        pub environment: Option<String> = None,
        /// Completions recorded per step, with rewards and per-token KL. Not in the original.
        pub samples_logged: usize = 4,
        /// Answer the validation prompts with the teacher too, once, for comparison. Not in the original.
        pub validate_teacher: bool = false,
        /// Start the student from random weights of its `config.json`, seeded by `train.seed`, instead of reading safetensors. Not in the original.
        pub random_init: bool = false,
        /// Milliseconds to wait for one teacher result before the sample is masked. Not in the original.
        #[schemars(range(min = 1))]
        pub teacher_wait_ms_max: u64 = 1_800_000,
        /// Samples held by a queue between two roles before its producer waits. Not in the original.
        #[schemars(range(min = 1))]
        pub queue_samples_max: usize = 8192,
        /// How trained weights reach rollouts in other processes. Not in the original.
        pub weights_transport: WeightsTransport = WeightsTransport::Auto,
        /// Versions of the weights that are kept for rollouts in other processes: at least two more than `allowed_outdated_steps`; absent: so many where that is more. Not in the original.
        #[schemars(range(min = 2))]
        pub weights_keep: usize = 6,
        /// Milliseconds to wait for a version of the weights, or for a teacher's output head, before the role gives up. Not in the original.
        #[schemars(range(min = 1))]
        pub weights_wait_ms_max: u64 = 600_000,
        /// Milliseconds that a process waits for a Redis that is away, or whose memory is full, before what it is doing fails. Not in the original.
        #[schemars(range(min = 1))]
        pub broker_wait_ms_max: u64 = 120_000,
        /// Score training completions although rewards are bypassed, as with distillation: the rewards appear in the metrics and change nothing else. Not in the original.
        pub score_bypassed: bool = false,
        /// The datasets to train on, out of those that the plugins offer, as `plugin/dataset`, or only one of the two names where that is unambiguous. A name or a list: their rows are joined, and an epoch takes each row once. A table of weights (`{ "gsm8k/train" = 0.7, "countdown/train" = 0.3 }`): prompts are mixed in these proportions, in an order that depends on `dataloader_seed` alone; an epoch ends when the first of the datasets is used up, and the others go on in the next epoch where they stopped. `columns` alone: the columns of `train.train_policy.dataset`, though a plugin offers a dataset too. Absent: the only training dataset of the plugins, else those columns. Not in the original.
        pub train_dataset: Option<shapes::DatasetNames> = None,
        /// The held-out datasets, named like those of `host.train_dataset`: a name or a list, whose rows are joined. With several, the reward of each is logged as `val/<plugin>/<dataset>/reward_avg` too. Absent: the only validation dataset of the plugins, else the columns of `validation.dataset`. Not in the original.
        pub validation_dataset: Option<shapes::OneOrMany<String>> = None,
        /// Rewards by dataset: completions of a dataset named here (`[host.rewards] "gsm8k/train" = "gsm8k"`) are scored by these rewards and not by `reward_function`. Each is a name, a list or a table of weights. Not in the original.
        pub rewards: BTreeMap<String, shapes::RewardWeights> = BTreeMap::new(),
        /// Address on which the controller of a run in several processes listens; port 0 takes any free one. Other machines need an address that they can reach; it is spoken to with the run's token, but not encrypted. Not in the original.
        pub control_address: String = "127.0.0.1:0".into(),
        /// Milliseconds after which a process that the controller has not heard from counts as lost: what it was doing is given to others, and it has to join again. Not in the original.
        #[schemars(range(min = 100))]
        pub silent_ms_max: u64 = 60_000,
        /// Milliseconds after which the run goes on without a lost rollout or teacher, and without a lost policy if `host.policies_may_leave`. Not in the original.
        #[schemars(range(min = 100))]
        pub gone_ms_max: u64 = 300_000,
        /// Milliseconds that a run may be without any policy, any rollout or any teacher, or without one of its policies, before it fails. Not in the original.
        #[schemars(range(min = 100))]
        pub absent_ms_max: u64 = 1_800_000,
        /// Let a run go on with fewer policies than it began with when one is gone; later steps are then made of fewer samples. Not in the original.
        pub policies_may_leave: bool = false,
        /// Milliseconds that a process waits for a controller that does not answer, such as one that is being restarted. Not in the original.
        #[schemars(range(min = 100))]
        pub control_wait_ms_max: u64 = 600_000,
        /// Restarts of one process by `launch local` within `host.restart_window_ms` before the run fails. Not in the original.
        pub restarts_max: usize = 5,
        /// The window in which `host.restarts_max` counts, in milliseconds. Not in the original.
        #[schemars(range(min = 1))]
        pub restart_window_ms: u64 = 600_000,
        /// Milliseconds that the processes of `launch local` may take to save and leave before they are killed. Not in the original.
        #[schemars(range(min = 1))]
        pub stop_ms_max: u64 = 300_000,
        /// Megabytes of one log file of `launch local` before it is put aside; three such files are kept of each process. Not in the original.
        #[schemars(range(min = 1, max = 65536))]
        pub log_mb_max: u64 = 64,
    }
}

table! {
    /// Grants, limits and settings of one plugin. Not in the original.
    pub struct Plugin {
        /// What the plugin may use: `log`, `table` (the dataset reader), `chat-template` (the student's template), `dir:PATH:ro` (a read-only directory). Nothing is allowed by default. Not in the original.
        pub allow: Vec<String> = Vec::new(),
        /// Memory of one instance in megabytes; absent: 64 for Rust and C, 512 for Python and JavaScript. Not in the original.
        #[schemars(range(min = 1, max = 4096))]
        pub memory_mb_max: Option<u64> = None,
        /// Milliseconds of one call; absent: the plugin host's default. Not in the original.
        #[schemars(range(min = 1))]
        pub call_ms_max: Option<u64> = None,
        /// Size of the component file in megabytes; absent: the plugin host's default. Not in the original.
        #[schemars(range(min = 1, max = 4096))]
        pub component_mb_max: Option<u64> = None,
        /// Instances of the plugin that score at the same time; absent: one for every core. Not in the original.
        #[schemars(range(min = 1, max = 1024))]
        pub workers: Option<usize> = None,
        /// Settings for this plugin alone, laid over `[custom]`: `[plugin.countdown.settings.countdown] max = 15` is what `[custom.countdown] max = 15` would be for all plugins. Checked against the schema that the plugin declares. Not in the original.
        pub settings: serde_json::Map<String, serde_json::Value> = serde_json::Map::new(),
        /// What this plugin's training datasets and rewards get in place of `train.train_policy.dataset`, for runs with several plugins that read datasets. Not in the original.
        pub train_dataset: Option<Dataset> = None,
        /// What this plugin's validation datasets and rewards get in place of `validation.dataset`. Not in the original.
        pub validation_dataset: Option<Dataset> = None,
    }
}

/// When a parameter is updated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UpdateInBackward {
    /// Within the backward where that changes no bit of the weights.
    Auto,
    /// Within the backward; a run where that cannot be is refused.
    Always,
    /// After the backward.
    Never,
}

/// How trained weights reach rollouts in other processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WeightsTransport {
    /// Files in the run folder. A role that does not see it is refused and told to use `store`.
    Auto,
    /// Files in the run folder, which all roles must see. The same as `auto` until weights can travel between GPUs.
    Folder,
    /// The broker's store, for machines without a shared folder.
    Store,
    /// Between GPUs. Not supported yet.
    Nccl,
}
