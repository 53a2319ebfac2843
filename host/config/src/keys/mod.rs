//! Every key of the configuration: its type, its default and what it means. The doc comment of a field is what
//! `config explain` shows and what the reference page prints, so it is written for the user of the key.
//!
//! Two sentences mark keys that are not like the others: "Not in the original" for the keys that only this program
//! has, "No effect here" for keys that are accepted so that upstream's files load unchanged.

use crate::shapes;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One configuration table: fields with their documentation, type and default in one line.
macro_rules! table {
    ($(#[$about:meta])* pub struct $name:ident { $( $(#[$doc:meta])* pub $key:ident : $kind:ty = $default:expr ),* $(,)? }) => {
        $(#[$about])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(default)]
        pub struct $name { $( $(#[$doc])* pub $key: $kind ),* }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $key: $default ),* }
            }
        }
    };
}

mod distillation;
mod grpo;
mod host;
mod policy;
mod records;
mod rollout;
mod sft;
mod train;
mod unused;

pub use distillation::{Distillation, MassRule, ObjectiveKind, SupportRule, TeacherEntry, Wire, WireDtype};
pub use grpo::{GrpoConfig, LossType, OverlongReward, RemoteReward, RemoteRewardFn, Variant};
pub use host::{Host, Plugin, UpdateInBackward, WeightsTransport};
pub use policy::{Lora, Parallelism, PipelineSchedule, Policy};
pub use records::{Logging, Profiler, SubProfiler};
pub use rollout::{AsyncConfig, MultiTurn, Quantization, R2rSync, Rollout, RolloutMode, Sampling, Validation};
pub use sft::SftConfig;
pub use train::{Checkpoint, DecayType, Fp4, Fp8, OptimizerImpl, OptimizerName, Reshard, SaveMode, Train, TrainPolicy};
pub use unused::{Diffusers, DiffusersSample, DiffusersTokenizer, Vla};

use std::collections::BTreeMap;

table! {
    /// A whole run: what is trained, from which teacher, on which data, and how it is recorded.
    pub struct Config {
        /// Training: optimizer, batches, precision, checkpoints and the training method.
        pub train: Train = Train::default(),
        /// The student: model, context length, trainable part, parallelism.
        pub policy: Policy = Policy::default(),
        /// How the student samples completions.
        pub rollout: Rollout = Rollout::default(),
        /// The teacher and the distillation objective.
        pub distillation: Distillation = Distillation::default(),
        /// When and how the student is measured on held-out prompts.
        pub validation: Validation = Validation::default(),
        /// Where metrics go.
        pub logging: Logging = Logging::default(),
        /// Profiling of the training steps. No effect here.
        pub profiler: Profiler = Profiler::default(),
        /// What only this program has: device, limits and how much is recorded. Not in the original.
        pub host: Host = Host::default(),
        /// Grants, limits and settings of each plugin, by the plugin's name. Not in the original.
        pub plugin: BTreeMap<String, Plugin> = BTreeMap::new(),
        /// Free-form values for the user's own plugins, one table for each: `[custom.countdown]`. Every plugin gets them as JSON, checked against the schema that it declares; the host itself reads none of them.
        pub custom: serde_json::Map<String, serde_json::Value> = serde_json::Map::new(),
        /// The Redis server between processes: a port of this machine as a string, where a server is joined or started, or `redis://user:password@host:port/db`, with TLS `rediss://` (`?ca=FILE` names a private authority). A run in one process needs no server.
        pub redis: String = String::new(),
        /// Addresses of the controller, `ip1;ip2`. Filled by the original's controller. No effect here.
        pub eth_ips: String = String::new(),
        /// How the roles are placed on processes. No effect here: the command decides whether the roles share one process.
        pub mode: Mode = Mode::Disaggregated,
        /// Settings of vision-language-action models, which this program does not train. No effect here.
        pub vla: Vla = Vla::default(),
    }
}

table! {
    /// A Hugging Face dataset: on the hub or on disk.
    pub struct Dataset {
        /// Hub id (`openai/gsm8k`), a `save_to_disk` folder, or a parquet, Arrow or JSONL file or folder.
        pub name: String = String::new(),
        /// Configuration of the dataset (its "subset" on the hub); empty for the only or default one.
        pub subset: String = String::new(),
        /// Branch, tag or commit of a hub dataset; empty for the default branch.
        pub revision: String = String::new(),
        /// Split or list of splits, concatenated in this order. One name is turned into a list of one.
        #[serde(deserialize_with = "shapes::one_or_many")]
        #[schemars(with = "shapes::OneOrMany<String>")]
        pub split: Vec<String> = vec![String::new()],
        /// How much of the data validation takes: an integer is a number of rows, a float a share of them.
        pub test_size: Option<shapes::Amount> = None,
        /// Local folder that holds the dataset instead of the hub cache; empty for none.
        pub local_dir: String = String::new(),
    }
}

/// How the original places its roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Each role in its own processes.
    Disaggregated,
    /// Policy and rollout in the same process.
    Colocated,
    /// Policy and rollout on the same devices in separate processes.
    ColocatedSeparated,
}

/// A floating-point format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32 bits.
    Float32,
    /// 16 bits with 8 bits of exponent.
    Bfloat16,
    /// 16 bits with 5 bits of exponent.
    Float16,
}
