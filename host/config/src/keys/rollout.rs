//! `[rollout]` and `[validation]`: how completions are sampled.

use super::{Dataset, Parallelism, RemoteReward};
use crate::shapes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

table! {
    /// How the student samples completions.
    pub struct Rollout {
        /// Tokens of a completion at most.
        #[schemars(range(min = 1))]
        pub max_response_length: usize = 2048,
        /// Completions per prompt.
        #[schemars(range(min = 1))]
        pub n_generation: usize = 16,
        /// Prompts that a rollout asks for at once.
        #[schemars(range(min = 1))]
        pub batch_size: usize = 1,
        /// Seed of sampling; absent: `train.seed`, else a new one every run.
        pub seed: Option<i64> = None,
        /// Temperature, top-p, top-k and repetition penalty.
        pub sampling_config: Sampling = Sampling::default(),
        /// Several turns with tools.
        pub multi_turn_config: MultiTurn = MultiTurn::default(),
        /// Put each completion of a prompt into its own batch row. No effect here.
        pub n_generation_to_batch: bool = false,
        /// Completions sampled together. No effect here: see `host.decode_slots`.
        pub n_generation_mini_batch: Option<i64> = None,
        /// Inference engine of the original (`vllm`, `vllm_async`, `trtllm`). No effect here: there is one engine, and it gives token ids.
        pub backend: String = "vllm".into(),
        /// Whether sampling is driven step by step. No effect here.
        pub mode: RolloutMode = RolloutMode::Sync,
        /// Settings of asynchronous sampling. No effect here.
        pub async_config: AsyncConfig = AsyncConfig::default(),
        /// When weights are swapped during sampling. No effect here in one process.
        pub async_r2r_sync: R2rSync = R2rSync::Disabled,
        /// Ask for the next prompts while sampling. No effect here.
        pub prefetch_rollout: bool = false,
        /// Batches of prompts held ahead. No effect here.
        #[schemars(range(min = 1))]
        pub prefetch_queue_maxsize: usize = 2,
        /// Send frozen parameters with every weight sync too. No effect here in one process.
        pub broadcast_all_params: bool = false,
        /// Format of the weights that completions are sampled with; those that are trained keep theirs. `int8` holds each matrix of the blocks in bytes, with a scale `s = max |w| / 127` for every 128 inputs of an output, so that no weight moves by more than `s / 2`; norms, biases and the embedding stay in `float32`, the head is rounded to bfloat16. It needs `host.device = "cpu"`. What it costs in agreement is logged as `rollout/logprob_mismatch_mean` and `_max`, the difference of a completion's log-probabilities between sampling and training. By default the loss uses those of the trained weights only, as if these had sampled; `train.train_policy.use_rollout_logprobs_for_loss` takes the rollout's as the old policy's, and `use_decoupled_loss` weighs each token by the ratio of the two. `fp8` and `mxfp4` are refused. Sampling in bfloat16 is `train.transfer_dtype = "bfloat16"`.
        pub quantization: Quantization = Quantization::None,
        /// With `quantization = "int8"`: hold the head in bytes too. Not in the original.
        pub quantize_head: bool = false,
        /// Do not capture decode graphs.
        pub enforce_eager: bool = true,
        /// Keep the stop string in the text.
        pub include_stop_str_in_output: bool = false,
        /// Share of the device's memory for the sampling engine. No effect on the CPU.
        pub gpu_memory_utilization: f64 = 0.8,
        /// Split long prompts. No effect here.
        pub enable_chunked_prefill: bool = false,
        /// FlashInfer attention. No effect here.
        pub vllm_use_flashinfer: bool = false,
        /// How the rollout is spread over devices; for the backends `vllm`, `vllm_async` and `trtllm` only `n_init_replicas`, `tp_size`, `pp_size` and `dp_shard_size` may differ from their defaults.
        pub parallelism: Parallelism = Parallelism::default(),
    }
}

table! {
    /// How a token is drawn.
    pub struct Sampling {
        /// Divides the logits; 0 takes the likeliest token.
        #[schemars(range(min = 0.0))]
        pub temperature: f64 = 1.0,
        /// Draw from the likeliest tokens that together have this probability.
        #[schemars(range(min = 0.0, max = 1.0))]
        pub top_p: f64 = 1.0,
        /// Draw from this many likeliest tokens; -1 or 0: all.
        #[schemars(range(min = -1))]
        pub top_k: i64 = -1,
        /// Above 1: tokens that occurred become less likely.
        #[schemars(range(min = 0.0))]
        pub repetition_penalty: f64 = 1.0,
        /// FlashInfer sampling. No effect here.
        pub use_flashinfer: bool = false,
    }
}

table! {
    /// Several turns with tools, held by a plugin's environment.
    pub struct MultiTurn {
        /// Sample conversations: the environment that `host.environment` names, else the only one of the plugins, answers each of the student's messages until it ends the conversation. `rollout.max_response_length` bounds the tokens of all turns together, with what the student hears.
        pub enable: bool = false,
        /// Show the environment's tools to the student through the chat template's `tools`.
        pub enable_tools: bool = false,
        /// What the chat template gets as `enable_thinking`.
        pub enable_thinking: bool = false,
        /// File of a chat template to use in place of the model's.
        pub custom_chat_template_path: Option<String> = None,
        /// Assistant turns at most.
        #[schemars(range(min = 1))]
        pub max_assistant_turns: usize = 5,
        /// End what is rendered before each of the student's turns with the start of an assistant message.
        pub add_generation_prompt: bool = true,
        /// Let the model continue the last message. A run of conversations with it is refused: the student answers in messages of its own.
        pub continue_final_message: bool = false,
    }
}

table! {
    /// Asynchronous sampling. No effect here.
    pub struct AsyncConfig {
        /// Requests at the same time. No effect here.
        pub max_concurrent_requests: i64 = 10,
    }
}

/// Format of the weights that are sampled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// That of the transfer.
    None,
    /// 8 bits and a scale for each 128 of them. Not in the original.
    Int8,
    /// 8 bits of floating point. Refused.
    Fp8,
    /// 4 bits of floating point. Refused.
    Mxfp4,
}

/// How sampling is driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RolloutMode {
    /// A batch at a time.
    Sync,
    /// Request by request.
    Async,
}

/// When new weights reach the samplers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum R2rSync {
    /// Between batches.
    Disabled,
    /// Between generations.
    Generation,
    /// Between decode steps.
    Inference,
}

table! {
    /// When and how the student is measured on held-out prompts.
    pub struct Validation {
        /// Measure the student during training.
        pub enable: bool = false,
        /// Measure before the first step too.
        pub val_before_train: bool = false,
        /// Steps between measurements; the last step is always measured.
        #[schemars(range(min = 1))]
        pub freq: usize = 20,
        /// Prompts sampled at once; absent: the rollout's.
        #[schemars(range(min = 1))]
        pub batch_size: Option<usize> = None,
        /// Held-out prompts.
        pub dataset: Dataset = Dataset::default(),
        /// Divides the logits; 0 takes the likeliest token.
        #[schemars(range(min = 0.0))]
        pub temperature: f64 = 0.0,
        /// Draw from the likeliest tokens that together have this probability; absent: the rollout's.
        #[schemars(range(min = 0.0, max = 1.0))]
        pub top_p: Option<f64> = None,
        /// Draw from this many likeliest tokens; -1 or 0: all. The default of 1 makes validation greedy whatever the temperature, as in the original.
        #[schemars(range(min = -1))]
        pub top_k: Option<i64> = Some(1),
        /// Above 1: tokens that occurred become less likely.
        #[schemars(range(min = 0.0))]
        pub repetition_penalty: f64 = 1.0,
        /// Completions per prompt.
        #[schemars(range(min = 1))]
        pub n_generation: usize = 1,
        /// Tokens of a completion at most; absent: the rollout's.
        #[schemars(range(min = 1))]
        pub max_response_length: Option<usize> = None,
        /// Rewards of the plugins, written like `train.train_policy.reward_function`. Empty: the only validation reward of the plugins (with several, one must be named), else the training rewards.
        #[serde(deserialize_with = "shapes::reward_weights")]
        #[schemars(with = "shapes::RewardShape")]
        pub reward_function: BTreeMap<String, f64> = BTreeMap::new(),
        /// Ask a remote server for rewards; absent: as in training, and it may not differ from it. No effect here.
        pub use_remote_reward: Option<bool> = None,
        /// The remote reward server; absent: as in training. No effect here.
        pub remote_reward: Option<RemoteReward> = None,
    }
}
