//! `[train.train_policy]` with `type = "sft"`: training on given answers.

use super::Dataset;
use crate::shapes;

table! {
    /// Training on given answers.
    pub struct SftConfig {
        /// Which trainer runs it. A run with another than `sft` is refused.
        pub trainer_type: String = "sft".into(),
        /// Conversations to train on.
        pub dataset: Dataset = Dataset::default(),
        /// Samples per forward and backward pass and data-parallel rank.
        #[schemars(range(min = 1))]
        pub mini_batch: usize = 2,
        /// Draw the samples of an epoch in random order.
        pub dataloader_shuffle: bool = true,
        /// Seed of the samples' order.
        pub dataloader_seed: i64 = 0,
        /// Worker processes of the data loader; 0 or less is none. No effect here.
        #[serde(deserialize_with = "shapes::at_least_zero")]
        #[schemars(with = "i64")]
        pub dataloader_num_workers: usize = 0,
        /// Batches that each worker loads ahead; dropped without workers. No effect here.
        pub dataloader_prefetch_factor: Option<i64> = None,
        /// Rows that the data loader reads at once; 0 or less means as many as a step needs. No effect here.
        #[serde(deserialize_with = "shapes::positive_or_none")]
        #[schemars(with = "Option<i64>")]
        pub dataloader_batch_size: Option<usize> = Some(1),
        /// One rank reads the data and broadcasts it. No effect here.
        pub dataloader_broadcast: bool = false,
        /// Drop the last batch of an epoch when it is not full.
        pub dataloader_drop_last: bool = true,
        /// Send each row to the rank `index mod ranks`. No effect here with one rank.
        pub data_dispatch_as_rank_in_mesh: bool = false,
        /// Cache processed rows. No effect here.
        pub enable_dataset_cache: bool = false,
        /// Column that holds the conversation: a list of messages with `role` and `content`.
        pub conversation_column_name: String = "conversations".into(),
        /// Column that holds the prompt, for datasets of prompt and answer in place of conversations; empty: `conversation_column_name` is used. Not in the original.
        pub prompt_column_name: String = String::new(),
        /// Column that holds the answer to `prompt_column_name`; only the answer is trained on. Not in the original.
        pub response_column_name: String = String::new(),
        /// System message put before every conversation; empty: none.
        pub system_prompt: String = String::new(),
        /// Weight ranks by their number of tokens.
        pub balance_dp_token: bool = true,
        /// Spread samples over ranks by length. No effect here.
        pub enable_dp_load_balancing: bool = false,
        /// Samples to choose from when balancing. No effect here.
        pub load_balanced_pool_size: i64 = 32,
        /// Tokens per balanced batch. No effect here.
        pub load_balanced_max_tokens_for_batch: Option<i64> = None,
        /// How balanced batches are filled. No effect here.
        pub load_balanced_batching_strategy: String = "prefer_closest".into(),
        /// Balanced batches per optimizer step. No effect here.
        pub load_balanced_batches_per_optimizer_step: i64 = 1,
    }
}
