//! `[policy]`: the student's model, and the parallelism tables.

use super::Diffusers;
use crate::shapes::{FlagOrText, OneOrMany};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

table! {
    /// The student: model, context length, trainable part, parallelism.
    pub struct Policy {
        /// Hub id or folder of the student.
        pub model_name_or_path: String = "Qwen/Qwen2.5-VL-7B-Instruct".into(),
        /// Folder or file of safetensors to load in place of the model's own.
        pub model_safetensor_path: Option<String> = None,
        /// Branch, tag or commit of a hub model.
        pub model_revision: Option<String> = None,
        /// Context: prompt and completion together have at most this many tokens.
        #[schemars(range(min = 1))]
        pub model_max_length: usize = 4096,
        /// Recompute activations in the backward pass. No effect here: only the input of each block is ever kept.
        pub model_gradient_checkpointing: bool = true,
        /// Low-rank adapters. A run with them is refused: not supported yet.
        pub lora: Option<Lora> = None,
        /// Which parameters or modules are trained, by their exact names.
        pub trainable_map: Option<BTreeMap<String, bool>> = None,
        /// Regular expressions of parameters that are not trained; excludes `trainable_pattern`.
        pub freeze_pattern: Option<Vec<String>> = None,
        /// Regular expressions of the only parameters that are trained; excludes `freeze_pattern`.
        pub trainable_pattern: Option<Vec<String>> = None,
        /// Liger kernels. No effect here.
        pub enable_liger_kernel: bool = false,
        /// Liger's cross-entropy. No effect here.
        pub enable_liger_cross_entropy: bool = false,
        /// Liger's fused cross-entropy. No effect here.
        pub enable_liger_fused_cross_entropy: bool = false,
        /// Weight of the router's auxiliary loss of mixture-of-experts models. No effect here.
        pub aux_loss_coeff: f64 = 0.0,
        /// Whether the model is a diffusion model. A run with one is refused.
        pub is_diffusers: bool = false,
        /// Settings of diffusion models, which this program does not train. No effect here.
        pub diffusers: Diffusers = Diffusers::default(),
        /// How the student is spread over devices.
        pub parallelism: Parallelism = Parallelism::default(),
    }
}

table! {
    /// How a role is spread over devices. A run in one process uses one device and needs none of it.
    pub struct Parallelism {
        /// Copies of the role at the start.
        #[schemars(range(min = 0))]
        pub n_init_replicas: usize = 1,
        /// Devices that share every matrix (tensor parallelism). The default is 2, as in the original.
        #[schemars(range(min = 1))]
        pub tp_size: usize = 2,
        /// Devices that share a sequence (context parallelism).
        #[schemars(range(min = 1))]
        pub cp_size: usize = 1,
        /// Devices that share the experts (expert parallelism).
        #[schemars(range(min = 1))]
        pub ep_size: usize = 1,
        /// Devices that share the weights and split the batch (sharded data parallelism); -1 uses the devices that are left.
        #[schemars(range(min = -1))]
        pub dp_shard_size: i64 = 1,
        /// Stages of blocks (pipeline parallelism).
        #[schemars(range(min = 1))]
        pub pp_size: usize = 1,
        /// Lengths may differ between pipeline micro-batches.
        pub pp_dynamic_shape: bool = false,
        /// Samples per pipeline micro-batch.
        pub pp_micro_batch_size: i64 = 1,
        /// Copies of the weights inside one replica; must be 1 for everything but sft.
        #[schemars(range(min = 1))]
        pub dp_replicate_size: usize = 1,
        /// Order of forward and backward over the pipeline.
        pub pp_schedule: PipelineSchedule = PipelineSchedule::Interleaved1F1B,
        /// Blocks per stage of an interleaved schedule.
        #[schemars(range(min = 1))]
        pub pp_layers_per_stage: usize = 2,
    }
}

table! {
    /// Low-rank adapters.
    pub struct Lora {
        /// Rank.
        #[schemars(range(min = 1))]
        pub r: usize = 8,
        /// Scale before it is divided by the rank.
        pub lora_alpha: f64 = 8.0,
        /// Share of the adapter's inputs that is dropped.
        pub lora_dropout: f64 = 0.0,
        /// Modules that get an adapter: a list of names, or `all-linear`.
        pub target_modules: Option<OneOrMany<String>> = None,
        /// Divide the scale by the root of the rank.
        pub use_rslora: bool = false,
        /// Modules trained in full.
        pub modules_to_save: Option<Vec<String>> = None,
        /// Scale by regular expression of the module's name.
        pub alpha_pattern: Option<BTreeMap<String, f64>> = None,
        /// Rank by regular expression of the module's name.
        pub r_pattern: Option<BTreeMap<String, i64>> = None,
        /// How adapters start: `true` for a no-op, `false` for random, or the name of a method.
        pub init_lora_weights: FlagOrText = FlagOrText::Flag(true),
    }
}

/// Order of forward and backward over pipeline stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PipelineSchedule {
    /// Several stages per rank, one forward then one backward.
    Interleaved1F1B,
    /// One stage per rank, one forward then one backward.
    #[serde(rename = "1F1B")]
    OneForwardOneBackward,
    /// All forwards, then all backwards.
    GPipe,
}
