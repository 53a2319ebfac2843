//! `[distillation]`: the teacher and the objective.

use super::{Dtype, Parallelism, Reshard};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

table! {
    /// The teacher and the distillation objective.
    pub struct Distillation {
        /// Distil from a teacher. Needs `train.train_policy.type = "grpo"`.
        pub enable: bool = false,
        /// Hub id or folder of the teacher.
        pub model_name_or_path: String = "Qwen/Qwen2.5-VL-7B-Instruct".into(),
        /// Branch, tag or commit of a hub model.
        pub model_revision: Option<String> = None,
        /// What the student is trained on when `top_k` is not 0. Not in the original.
        pub objective: ObjectiveKind = ObjectiveKind::Gjsd,
        /// 0: reverse KL at the sampled token, as a policy gradient. Positive: a divergence over that many candidate tokens. -1: over the whole vocabulary (not in the original). Without distillation it becomes 0.
        #[schemars(range(min = -1))]
        pub top_k: i64 = 0,
        /// Mixes the divergence: 0 forward KL, 1 reverse KL, between them the generalized Jensen-Shannon divergence.
        #[schemars(range(min = 0.0, max = 1.0))]
        pub jsd_beta: f64 = 0.5,
        /// What is done with the probability outside the candidates, for a positive `top_k`. With `objective = "cosmos_gjsd"` it is always `raw`. Not in the original.
        pub top_k_mass: MassRule = MassRule::Tail,
        /// Whose likeliest tokens are the candidates, for a positive `top_k`. Not in the original, where they are the student's.
        pub top_k_support: SupportRule = SupportRule::Student,
        /// Multiplies the divergence.
        pub kl_penalty_coef: f64 = 1.0,
        /// Discount of later tokens' divergence in the advantage of a token; 0 counts only the token itself.
        #[schemars(range(min = 0.0, max = 1.0))]
        pub kl_discount_factor: f64 = 0.0,
        /// Bound of the absolute divergence per token; absent: no bound. Not in the original.
        #[schemars(range(min = 0.0))]
        pub kl_clip: Option<f64> = None,
        /// Train on the prompt's tokens too.
        pub include_prompt: bool = false,
        /// The trainer takes the candidate ids from the teacher's answer, so that they travel once. Becomes false when `top_k` is 0 or less.
        pub trainer_token_ids_from_teacher: bool = true,
        /// Take the candidates from a second pass over the whole completion, in place of those seen while sampling.
        pub rollout_top_k_recompute: bool = false,
        /// Completions that the teacher takes at once.
        #[schemars(range(min = 1))]
        pub batch_size_per_replica: usize = 8,
        /// Completions per forward pass of the teacher and data-parallel rank.
        #[schemars(range(min = 1))]
        pub mini_batch: usize = 1,
        /// Tokens per forward pass of the teacher; mini-batches are then cut by tokens instead of by samples.
        #[schemars(range(min = 1))]
        pub max_token_len_per_mini_batch: Option<usize> = None,
        /// Pack several samples into one row.
        pub sequence_packing: bool = false,
        /// Seed of the teacher. No effect here: a forward pass has nothing random.
        pub seed: Option<i64> = None,
        /// Compile the teacher's blocks where the device can. On the CPU it does nothing.
        pub compile: bool = true,
        /// Format in which the teacher's weights are kept. With `bfloat16` the native engine holds each of them in 16 bits and nothing beside them, a quarter of what it needs for `float32`.
        pub master_dtype: Dtype = Dtype::Float32,
        /// Format of the forward pass on devices that gain from it.
        pub param_dtype: Dtype = Dtype::Bfloat16,
        /// Format in which logits are turned into log-probabilities.
        pub logprob_dtype: Dtype = Dtype::Float32,
        /// Format of sums over ranks. No effect here: a frozen model has no gradients.
        pub fsdp_reduce_dtype: Dtype = Dtype::Float32,
        /// Keep the teacher's weights in host memory.
        pub fsdp_offload: bool = false,
        /// Whether a block's gathered weights are freed after its forward pass.
        pub fsdp_reshard_after_forward: Reshard = Reshard::Never,
        /// How teacher results travel between processes. Not in the original.
        pub wire: Wire = Wire::Native,
        /// Format of the teacher's log-probabilities on the native wire. `float16` halves them and moves each by at most 1/2048 of its value. Not in the original.
        pub wire_logprob_dtype: WireDtype = WireDtype::Float32,
        /// Format in which the teacher's last hidden states reach the trainer, for `top_k = -1`: `float32` gives the numbers of one process, the others halve the bytes between processes. Not in the original.
        pub hidden_dtype: Dtype = Dtype::Float32,
        /// Several teachers, `[[distillation.teachers]]` for each, in place of `model_name_or_path`. A completion is compared with the mixture of all teachers that answer for its dataset: the mean of their distributions, weighted by `weight`. Not in the original.
        pub teachers: Vec<TeacherEntry> = Vec::new(),
        /// How the teacher is spread over devices; `dp_replicate_size` must be 1.
        pub parallelism: Parallelism = Parallelism::default(),
    }
}

table! {
    /// One of several teachers. Not in the original.
    pub struct TeacherEntry {
        /// Its name in metrics, messages and the run folder: letters, digits, `-` and `_`. Not in the original.
        pub name: String = String::new(),
        /// Hub id or folder of the model. Not in the original.
        pub model_name_or_path: String = String::new(),
        /// Branch, tag or commit of a hub model. Not in the original.
        pub model_revision: Option<String> = None,
        /// Its share in the mixture, before those of a dataset's teachers are scaled to sum to one. Above 0. Not in the original.
        pub weight: f64 = 1.0,
        /// The datasets that it answers for, as `plugin/dataset` like in `host.train_dataset`; absent: all. A validation dataset that no teacher names belongs to the teachers of the same plugin's training datasets. Not in the original.
        pub datasets: Option<Vec<String>> = None,
        /// Completions per forward pass; absent: `distillation.mini_batch`. Not in the original.
        #[schemars(range(min = 1))]
        pub mini_batch: Option<usize> = None,
        /// How it is spread over devices and how many replicas of it there are; absent: `distillation.parallelism`. Not in the original.
        pub parallelism: Option<Parallelism> = None,
    }
}

impl Distillation {
    /// The teachers: those of the list, or the table's own under the name `teacher`.
    pub fn each_teacher(&self) -> Vec<TeacherEntry> {
        if !self.teachers.is_empty() {
            return self.teachers.clone();
        }
        vec![TeacherEntry {
            name: "teacher".into(),
            model_name_or_path: self.model_name_or_path.clone(),
            model_revision: self.model_revision.clone(),
            ..TeacherEntry::default()
        }]
    }
}

/// Distillation objectives for a `top_k` that is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ObjectiveKind {
    /// The divergence itself is the loss.
    Gjsd,
    /// The original's: the negative divergence is an advantage that carries a gradient of its own.
    CosmosGjsd,
}

/// What is done with the probability outside the candidate tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MassRule {
    /// One more bucket holds it, so that the divergence is a true one and never negative.
    Tail,
    /// The candidates are scaled to sum to one.
    Renormalize,
    /// It is left out.
    Raw,
}

/// Whose likeliest tokens are the candidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SupportRule {
    /// The student's.
    Student,
    /// The teacher's.
    Teacher,
    /// Both.
    Union,
}

/// How a number travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WireDtype {
    /// 4 bytes, exact.
    Float32,
    /// 2 bytes, rounded by at most 1/2048 of the value.
    Float16,
}

/// How teacher results travel between processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Wire {
    /// A compact binary frame with a checksum.
    Native,
    /// The original's keys and msgpack, to work with its trainer or teacher.
    CosmosRl,
}
