//! `[host]` and `[plugin.<name>]`: what only this program has.

use super::Dataset;
use crate::shapes;
use std::collections::BTreeMap;

table! {
    /// What only this program has: device, limits and how much is recorded. Not in the original.
    pub struct Host {
        /// Engine and device: `cpu` is the native engine, `burn:flex` the reference it is checked against. Not in the original.
        pub device: String = "cpu".into(),
        /// Sequences that the rollout decodes at the same time. Not in the original.
        #[schemars(range(min = 1, max = 65536))]
        pub decode_slots: usize = 64,
        /// Steps in a row that may be skipped for a loss or gradient that is not finite before the run stops. Not in the original.
        #[schemars(range(min = 1))]
        pub bad_steps_max: usize = 3,
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
        /// Score training completions although rewards are bypassed, as with distillation: the rewards appear in the metrics and change nothing else. Not in the original.
        pub score_bypassed: bool = false,
        /// The datasets to train on, out of those that the plugins offer, as `plugin/dataset`, or only one of the two names where that is unambiguous. A name or a list: their rows are joined, and an epoch takes each row once. A table of weights (`{ "gsm8k/train" = 0.7, "countdown/train" = 0.3 }`): prompts are mixed in these proportions, in an order that depends on `dataloader_seed` alone; an epoch ends when the first of the datasets is used up, and the others go on in the next epoch where they stopped. Absent: the only training dataset of the plugins, else the columns of `train.train_policy.dataset`. Not in the original.
        pub train_dataset: Option<shapes::DatasetNames> = None,
        /// The held-out datasets, named like those of `host.train_dataset`: a name or a list, whose rows are joined. With several, the reward of each is logged as `val/<plugin>/<dataset>/reward_avg` too. Absent: the only validation dataset of the plugins, else the columns of `validation.dataset`. Not in the original.
        pub validation_dataset: Option<shapes::OneOrMany<String>> = None,
        /// Rewards by dataset: completions of a dataset named here (`[host.rewards] "gsm8k/train" = "gsm8k"`) are scored by these rewards and not by `reward_function`. Each is a name, a list or a table of weights. Not in the original.
        pub rewards: BTreeMap<String, shapes::RewardWeights> = BTreeMap::new(),
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
