//! `[train]`: optimizer, batches, precision, checkpoints.

use super::{Dataset, Dtype, GrpoConfig, SftConfig};
use crate::shapes::{Amount, FlagOrText, LearningRate, OneOrMany};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

table! {
    /// Training: optimizer, batches, precision, checkpoints and the training method.
    pub struct Train {
        /// The training method with its data: `type = "grpo"` samples from the student (distillation and reinforcement learning), `type = "sft"` trains on given answers. Without `type`, the presence of `temperature`, `epsilon_low`, `epsilon_high`, `kl_beta` or `use_remote_reward` means grpo, else sft.
        pub train_policy: TrainPolicy = TrainPolicy::Grpo(Box::default()),
        /// Continue from a checkpoint: `true` for the newest complete one among the runs beside `output_dir`, or the path of one.
        pub resume: FlagOrText = FlagOrText::Flag(false),
        /// Passes over the dataset.
        #[schemars(range(min = 1))]
        pub epoch: usize = 1,
        /// Stop after this many steps, even if the dataset is not used up.
        #[schemars(range(min = 1))]
        pub max_num_steps: Option<usize> = None,
        /// Folder of the run. Without `timestamp`, a folder named after the start time is made in it.
        pub output_dir: String = "./outputs".into(),
        /// Name of the run as `YYYYMMDDhhmmss`. Empty: the start time, which is then appended to `output_dir`. Given: `output_dir` is used as it is.
        pub timestamp: String = String::new(),
        /// Completions (not prompts) per step and policy replica.
        #[schemars(range(min = 1))]
        pub train_batch_per_replica: usize = 8,
        /// Steps between two syncs of the weights to the rollout. In one process the rollout reads the trained weights directly; the interval still decides which version it samples from.
        #[schemars(range(min = 1))]
        pub sync_weight_interval: usize = 1,
        /// Skip intermediate weight versions when a newer one is ready. Switched off unless training is off-policy and `allowed_outdated_steps` is positive.
        pub coalesce_weight_sync: bool = false,
        /// Optimizer. A run with one of the 8-bit ones is refused.
        pub optm_name: OptimizerName = OptimizerName::AdamW,
        /// Learning rate: one number, a list (one per optimizer), or a table by module name with the key `global`.
        pub optm_lr: LearningRate = LearningRate::One(1e-6),
        /// How PyTorch runs the optimizer. No effect here.
        pub optm_impl: OneOrMany<OptimizerImpl> = OneOrMany::One(OptimizerImpl::Fused),
        /// Decoupled weight decay.
        pub optm_weight_decay: f64 = 0.01,
        /// Decay of the running means of the gradient and of its square.
        pub optm_betas: [f64; 2] = [0.9, 0.999],
        /// Added to the root of the second moment so that it is never zero (the optimizer's eps).
        #[schemars(range(min = 0.0))]
        pub epsilon: f64 = 1e-6,
        /// Warm-up of the learning rate: an integer is a number of steps, a float up to 1.0 a share of all steps.
        pub optm_warmup_steps: Amount = Amount::Count(20),
        /// Factor of the learning rate at the first warm-up step.
        pub optm_warmup_start_factor: f64 = 0.0,
        /// Share of all steps over which the learning rate decays at the end. Absent: everything after the warm-up; 0.0: no decay.
        #[schemars(range(min = 0.0, max = 1.0))]
        pub optm_decay_ratio: Option<f64> = None,
        /// Shape of the decay; absent or `none` keeps the rate constant.
        pub optm_decay_type: Option<DecayType> = None,
        /// Factor of the learning rate at the end of the decay.
        pub optm_min_lr_factor: f64 = 0.0,
        /// Gradients are scaled down to this norm; 0 or less measures the norm and does not clip.
        pub optm_grad_norm_clip: f64 = 1.0,
        /// Keep a moving average of the weights. No effect here for language models, as in the original.
        pub ema_enable: bool = false,
        /// Decay of the moving average. No effect here.
        pub ema_decay: f64 = 0.9999,
        /// Steps between updates of the moving average. No effect here.
        pub ema_update_step_interval: i64 = 0,
        /// Format in which weights and optimizer state are kept.
        pub master_dtype: Dtype = Dtype::Float32,
        /// Format of forward and backward on devices that gain from it, and of exported weights.
        pub param_dtype: Dtype = Dtype::Bfloat16,
        /// Format in which weights travel to the rollout. Absent: `master_dtype`. With `bfloat16` the native engine also samples with weights in that format, in one process too: half the memory, and nearly twice the speed where memory is the limit.
        pub transfer_dtype: Option<Dtype> = None,
        /// Format in which logits are turned into log-probabilities.
        pub logprob_dtype: Dtype = Dtype::Float32,
        /// Format in which gradients are summed over ranks.
        pub fsdp_reduce_dtype: Dtype = Dtype::Float32,
        /// Keep parameters, gradients and optimizer state in host memory.
        pub fsdp_offload: bool = false,
        /// Whether a block's gathered weights are freed after its forward pass.
        pub fsdp_reshard_after_forward: Reshard = Reshard::Default,
        /// Overlap tensor-parallel communication with computation; needs `compile = true`. No effect here.
        pub async_tp_enabled: bool = false,
        /// Compile the model's blocks (kernel fusion, captured decode graphs) where the device can. On the CPU it does nothing.
        pub compile: bool = true,
        /// Repeatable kernels and seeds; without `seed` the seed is 42.
        pub deterministic: bool = false,
        /// Seed of everything random in training. A negative one becomes 42; absent, runs differ unless `deterministic`.
        #[serde(deserialize_with = "crate::shapes::seed_or_42")]
        pub seed: Option<i64> = None,
        /// Move saved activations to host memory. No effect here: only the input of each block is kept.
        pub activation_offload: bool = false,
        /// FlashAttention version. No effect here.
        pub fa_version: Option<i64> = None,
        /// Every role loads the dataset itself and prompts travel as indices.
        pub local_dataset: bool = true,
        /// Use the Hugging Face model code. No effect here.
        pub force_use_hf: bool = false,
        /// Inputs or outputs that are not text. A run with it is refused: only text models are trained.
        pub non_text: bool = false,
        /// Pack several samples into one row of the training batch.
        pub sequence_packing: bool = false,
        /// Save a checkpoint when the run ends.
        pub save_ckpt_at_exit: bool = true,
        /// Signals that save a checkpoint at the next step.
        pub signal_to_handle: Vec<String> = vec!["SIGUSR1".into()],
        /// Checkpoints and exported weights.
        pub ckpt: Checkpoint = Checkpoint::default(),
        /// 8-bit training. No effect here.
        pub fp8: Fp8 = Fp8::default(),
        /// 4-bit training. No effect here.
        pub fp4: Fp4 = Fp4::default(),
    }
}

table! {
    /// Checkpoints and exported weights.
    pub struct Checkpoint {
        /// Save checkpoints; the last step is then always saved.
        pub enable_checkpoint: bool = false,
        /// Steps between checkpoints.
        pub save_freq: i64 = 20,
        /// Epochs between checkpoints; a positive number replaces `save_freq`.
        pub save_freq_in_epoch: i64 = 0,
        /// Whether training waits for the files.
        pub save_mode: SaveMode = SaveMode::Async,
        /// Checkpoints kept, the oldest is deleted first; -1 keeps all.
        #[schemars(range(min = -1))]
        pub max_keep: i64 = 5,
        /// Export a Hugging Face folder with every checkpoint; the final one always has it.
        pub export_safetensors: bool = true,
        /// Upload exported weights to the Hugging Face hub. No effect here.
        pub upload_hf: bool = false,
        /// Repository for `upload_hf`. No effect here.
        pub hf_repo_name: String = "Comos-Reason1".into(),
        /// Upload to S3: `false`, `"final"` or `"all"`; needs `s3_bucket`. No effect here.
        pub upload_s3: FlagOrText = FlagOrText::Flag(false),
        /// Bucket for `upload_s3`. No effect here.
        pub s3_bucket: Option<String> = None,
        /// Prefix for `upload_s3`. No effect here.
        pub s3_prefix: String = "outputs".into(),
    }
}

table! {
    /// 8-bit training. No effect here.
    pub struct Fp8 {
        /// Train in 8 bits. No effect here.
        pub enable_fp8: bool = false,
        /// How scales are chosen. No effect here.
        pub fp8_recipe: String = "dynamic_scaling".into(),
        /// What shares a scale. No effect here.
        pub quant_recipe: String = "rowwise".into(),
    }
}

table! {
    /// 4-bit training. No effect here.
    pub struct Fp4 {
        /// Train in 4 bits. No effect here.
        pub enable_fp4: bool = false,
        /// How scales are chosen. No effect here.
        pub fp4_recipe: String = "dynamic_scaling".into(),
        /// What shares a scale. No effect here.
        pub quant_recipe: String = "rowwise".into(),
    }
}

/// The training method, by the key `type`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TrainPolicy {
    /// Completions are sampled from the student and scored by a teacher, a reward or both.
    Grpo(Box<GrpoConfig>),
    /// The answers are given.
    Sft(Box<SftConfig>),
}

impl TrainPolicy {
    /// The settings of `type = "grpo"`, if it is that.
    pub fn grpo(&self) -> Option<&GrpoConfig> {
        match self {
            Self::Grpo(grpo) => Some(grpo),
            Self::Sft(_) => None,
        }
    }

    /// The settings of `type = "sft"`, if it is that.
    pub fn sft(&self) -> Option<&SftConfig> {
        match self {
            Self::Grpo(_) => None,
            Self::Sft(sft) => Some(sft),
        }
    }

    /// The training data.
    pub fn dataset(&self) -> &Dataset {
        match self {
            Self::Grpo(grpo) => &grpo.dataset,
            Self::Sft(sft) => &sft.dataset,
        }
    }

    /// Samples per forward and backward pass and data-parallel rank.
    pub fn mini_batch(&self) -> usize {
        match self {
            Self::Grpo(grpo) => grpo.mini_batch,
            Self::Sft(sft) => sft.mini_batch,
        }
    }

    /// Samples of an update out of `batch` of a step, and how many of them go at a time; none where their lengths decide.
    pub fn samples_of_update(&self, batch: usize) -> Option<(usize, usize)> {
        let grpo = self.grpo();
        if grpo.is_some_and(|grpo| grpo.max_token_len_per_mini_batch.is_some()) {
            return None;
        }
        let each = grpo.and_then(|grpo| grpo.batch_size_per_optimize).unwrap_or(usize::MAX);
        Some((batch.min(each), self.mini_batch().max(1)))
    }
}

/// Optimizers that upstream's files may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OptimizerName {
    /// Adam with weight decay added to the gradient.
    Adam,
    /// Adam with decoupled weight decay.
    AdamW,
    /// Adam with 8-bit state; not supported.
    Adam8bit,
    /// AdamW with 8-bit state; not supported.
    AdamW8bit,
}

/// PyTorch's ways to run an optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OptimizerImpl {
    /// One kernel for everything.
    Fused,
    /// One kernel per operation over all parameters.
    Foreach,
    /// Parameter by parameter.
    ForLoop,
}

/// Shapes of the learning rate's decay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DecayType {
    /// One minus the root of the progress.
    Sqrt,
    /// Half a cosine.
    Cosine,
    /// A straight line.
    Linear,
    /// Constant.
    None,
}

/// What happens to a block's gathered weights after its forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Reshard {
    /// Freed after every block.
    Always,
    /// Kept.
    Never,
    /// Freed after every block but the last; kept with pipeline stages.
    Default,
}

/// Whether training waits for a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SaveMode {
    /// Files are written while training goes on.
    Async,
    /// Training waits.
    Sync,
}
