//! What a run will do and hold in memory, for `run --dry-run` and the first lines of a run.

use cosmos_broker::wire::frame::FloatFormat;
use cosmos_broker::wire::native::{WireFloats, bytes_per_token};
use cosmos_config::{Config, Dtype, UpdateInBackward, WireDtype};
use cosmos_controller::Plan as RunPlan;
use cosmos_engine::model::ModelConfig;
use cosmos_engine::walker::{KEPT_BYTES_MAX, footprint};
use serde::Serialize;

use crate::choose::Weighted;
use crate::mixture::Mixture;
use crate::offers::{OfferRole, Offered};
use crate::plugins::Plugins;
use crate::shards::{is_native, rollout_format, teacher_format};
use crate::teachers::TeacherSpec;

/// The plan of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// `distillation`, `grpo` or `sft`.
    pub kind: &'static str,
    /// What is minimised.
    pub objective: String,
    /// Prompts in the dataset.
    pub prompts: u64,
    /// Passes over it.
    pub epochs: u64,
    /// Training steps.
    pub steps: u64,
    /// Completions of one step.
    pub completions_per_step: u64,
    /// Held-out prompts; 0: no validation.
    pub validation_prompts: u64,
    /// The teachers, where there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub teachers: Vec<TeacherPlan>,
    /// Memory by role.
    pub memory: Vec<RoleMemory>,
    /// What each scored token weighs when the teacher is another process; none without one.
    pub wire: Option<WirePlan>,
    /// The plugins.
    pub plugins: Vec<PluginPlan>,
    /// What of them is used.
    pub uses: Vec<Use>,
}

/// Bytes of a scored token between processes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct WirePlan {
    /// To the teacher.
    pub request_bytes_per_token: f64,
    /// Back from it.
    pub result_bytes_per_token: f64,
}

impl WirePlan {
    fn new(config: &Config, student: &ModelConfig, teacher: &ModelConfig) -> Self {
        let logprobs = match config.distillation.wire_logprob_dtype {
            WireDtype::Float32 => FloatFormat::F32,
            WireDtype::Float16 => FloatFormat::F16,
        };
        let hidden = match config.distillation.hidden_dtype {
            Dtype::Float32 => FloatFormat::F32,
            Dtype::Float16 => FloatFormat::F16,
            Dtype::Bfloat16 => FloatFormat::Bf16,
        };
        let floats = WireFloats { logprobs, hidden };
        let top_k = i32::try_from(config.distillation.top_k).unwrap_or(i32::MAX);
        let hidden = if top_k < 0 { teacher.hidden_size } else { 0 };
        let vocab = u32::try_from(student.vocab_size).unwrap_or(u32::MAX);
        let bytes = bytes_per_token(top_k, vocab, floats, hidden, true);
        Self { request_bytes_per_token: bytes.request, result_bytes_per_token: bytes.result }
    }
}

/// One of several teachers.
#[derive(Debug, Clone, Serialize)]
pub struct TeacherPlan {
    /// Its name.
    pub name: String,
    /// Hub id or folder of its model.
    pub model: String,
    /// Its weight in mixtures.
    pub weight: f64,
    /// The datasets that it answers for; none: all.
    pub datasets: Option<Vec<String>>,
}

impl TeacherPlan {
    fn all(config: &Config) -> Vec<Self> {
        let plan = |t: &cosmos_config::TeacherEntry| Self {
            name: t.name.clone(),
            model: t.model_name_or_path.clone(),
            weight: t.weight,
            datasets: t.datasets.clone(),
        };
        config.distillation.teachers.iter().filter(|_| config.distillation.enable).map(plan).collect()
    }

    fn line(&self) -> String {
        let datasets = self.datasets.as_ref().map_or("all datasets".to_string(), |names| names.join(", "));
        format!("teacher {}: {}, weight {}, for {datasets}", self.name, self.model, self.weight)
    }
}

/// A plugin of the run.
#[derive(Debug, Clone, Serialize)]
pub struct PluginPlan {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The file.
    pub file: String,
    /// What it may use.
    pub grants: Vec<String>,
}

/// A dataset or reward that a run uses.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Use {
    /// Name of the plugin; empty for columns of a table.
    pub plugin: String,
    /// `dataset`, `reward` or `environment`.
    pub kind: &'static str,
    /// What it is used for.
    pub role: OfferRole,
    /// `plugin/offer`.
    pub name: String,
    /// Its weight; none where nothing is weighed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Rewards: the dataset whose completions it scores, when not all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// Datasets: number of prompts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompts: Option<u64>,
}

impl Use {
    /// The environment that holds the conversations.
    pub fn environment(plugin: &str, name: String) -> Self {
        Self {
            plugin: plugin.to_string(),
            kind: "environment",
            role: OfferRole::Train,
            name,
            weight: None,
            dataset: None,
            prompts: None,
        }
    }

    /// The datasets of `mixture`.
    pub fn datasets(mixture: &Mixture, role: OfferRole) -> Vec<Self> {
        let used = mixture.parts().iter().map(|part| Self {
            plugin: part.offered.as_ref().map(|o| o.plugin_name.clone()).unwrap_or_default(),
            kind: "dataset",
            role,
            name: part.name.clone(),
            weight: part.weight,
            dataset: None,
            prompts: Some(part.dataset.len()),
        });
        used.collect()
    }

    /// The rewards of each dataset; those that are the same for all are listed once.
    pub fn rewards(mixture: &Mixture, routes: &[Vec<Weighted>], role: OfferRole) -> Vec<Self> {
        let same = routes.windows(2).all(|pair| pair[0] == pair[1]);
        let listed = if same { routes.get(..1).unwrap_or_default() } else { routes };
        let mut uses = Vec::new();
        for (part, route) in mixture.parts().iter().zip(listed) {
            let dataset = (!same).then(|| part.name.clone());
            uses.extend(route.iter().map(|w| Self::reward(&w.offered, role, Some(w.weight), dataset.clone())));
        }
        uses
    }

    /// One reward.
    pub fn reward(offered: &Offered, role: OfferRole, weight: Option<f64>, dataset: Option<String>) -> Self {
        let (plugin, name) = (offered.plugin_name.clone(), offered.full());
        Self { plugin, kind: "reward", role, name, weight, dataset, prompts: None }
    }
}

/// Bytes a role is expected to hold at its peak.
#[derive(Debug, Clone, Serialize)]
pub struct RoleMemory {
    /// Student, rollout, teacher, reference.
    pub role: &'static str,
    /// Which of several teachers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Parameters of its model.
    pub parameters: u64,
    /// Weights, the engine's copy of them, gradients and optimizer moments.
    pub weights_bytes: u64,
    /// Whether gradients are among them: they are not where each parameter is updated within the backward.
    pub gradients: bool,
    /// KV cache, kept activations or kept hidden states.
    pub activations_bytes: u64,
}

const F32: u64 = 4;
/// Logits held at a time while the head is walked in chunks.
pub(crate) const LOGITS_CHUNK_BYTES: u64 = 64 << 20;

/// Whether every update goes on within its backward, as far as the configuration says: as [`Student::updates_in_backward`].
///
/// [`Student::updates_in_backward`]: crate::student::Student::updates_in_backward
fn updates_in_backward(config: &Config, ranks: u64) -> bool {
    let train = &config.train;
    let at_once = train.train_policy.samples_of_update(train.train_batch_per_replica);
    config.host.update_in_backward != UpdateInBackward::Never
        && train.optm_grad_norm_clip <= 0.0
        && at_once.is_some_and(|(samples, mini_batch)| samples <= mini_batch)
        && ranks == 1
        && is_native(config)
}

/// Bytes of a teacher's weights; elsewhere than on the CPU its master values and the engine's copy of them.
fn teacher_bytes(config: &Config, teacher: &ModelConfig) -> u64 {
    match is_native(config) {
        true => footprint::scoring_bytes(teacher, teacher_format(config)),
        false => 2 * F32 * teacher.parameter_count(),
    }
}

impl Plan {
    /// Works the plan out from the configuration and the models' shapes; a policy has `ranks` ranks.
    pub fn new(
        config: &Config,
        plan: &RunPlan,
        kind: &'static str,
        validation_prompts: u64,
        student: &ModelConfig,
        teachers: &[TeacherSpec],
        ranks: u64,
    ) -> Self {
        let mini_batch = config.train.train_policy.mini_batch() as u64;
        let context = config.policy.model_max_length as u64;
        let response = (config.rollout.max_response_length as u64).min(context);
        let training_tokens = mini_batch * context.min(response * 2);
        let parameters = student.parameter_count();
        let gradients = !updates_in_backward(config, ranks * plan.policy_replicas);
        // The copy that the engine computes with. Training on the CPU reads the masters; what writes completions, validation
        // too, reads a copy in panels.
        let copy = match (is_native(config), kind != "sft" || validation_prompts > 0) {
            (false, _) => parameters * F32,
            (true, true) => footprint::decoded_bytes(student, rollout_format(config)),
            (true, false) => 0,
        };
        let mut memory = vec![RoleMemory {
            role: "student",
            name: None,
            parameters,
            // Master values, two moments, gradients, and the copy.
            weights_bytes: parameters * F32 * (3 + u64::from(gradients)) + copy,
            gradients,
            activations_bytes: training_tokens * (student.hidden_size * (student.num_hidden_layers + 1)) as u64 * F32
                + (training_tokens * (student.kept_width() * student.num_hidden_layers) as u64 * F32)
                    .min(KEPT_BYTES_MAX as u64)
                + LOGITS_CHUNK_BYTES,
        }];
        if kind != "sft" {
            let kv = 2 * student.num_hidden_layers * student.num_key_value_heads * student.head_dim;
            memory.push(RoleMemory {
                role: "rollout",
                name: None,
                parameters: 0,
                weights_bytes: 0,
                gradients: false,
                activations_bytes: (config.host.decode_slots as u64 * context * kv as u64 * F32)
                    .min(crate::rollout::kv_bytes_max(config).map_or(u64::MAX, |bytes| bytes as u64)),
            });
        }
        for spec in teachers {
            let teacher = &spec.config;
            let parameters = teacher.parameter_count();
            memory.push(RoleMemory {
                role: "teacher",
                name: (teachers.len() > 1).then(|| spec.name.clone()),
                parameters,
                weights_bytes: teacher_bytes(config, teacher),
                gradients: false,
                activations_bytes: spec.wanted.mini_batch as u64
                    * context.min(response * 2)
                    * (teacher.hidden_size * 4) as u64
                    * F32
                    + LOGITS_CHUNK_BYTES,
            });
        }
        Self {
            kind,
            objective: objective_name(config, kind),
            prompts: plan.dataset_len,
            epochs: plan.epochs,
            steps: plan.total_steps(),
            completions_per_step: plan.train_batch * plan.policy_replicas.max(1),
            validation_prompts,
            teachers: TeacherPlan::all(config),
            memory,
            // Of several teachers the one with the widest answers.
            wire: teachers
                .iter()
                .max_by_key(|spec| spec.config.hidden_size)
                .map(|spec| WirePlan::new(config, student, &spec.config)),
            plugins: Vec::new(),
            uses: Vec::new(),
        }
    }

    /// The plan with its plugins and what is used of them.
    pub fn with_plugins(mut self, plugins: &Plugins, uses: Vec<Use>) -> Self {
        let planned = plugins.iter().map(|loaded| PluginPlan {
            name: loaded.plugin.info().name.clone(),
            version: loaded.plugin.info().version.clone(),
            file: loaded.path.display().to_string(),
            grants: loaded.grants.clone(),
        });
        self.plugins = planned.collect();
        self.uses = uses;
        self
    }

    fn plugin_lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = self
            .plugins
            .iter()
            .map(|p| {
                let grants = if p.grants.is_empty() { "none".into() } else { p.grants.join(", ") };
                format!("plugin {} {} ({}), grants: {grants}", p.name, p.version, p.file)
            })
            .collect();
        for (kind, role) in [
            ("dataset", OfferRole::Train),
            ("environment", OfferRole::Train),
            ("reward", OfferRole::Train),
            ("reward", OfferRole::Filter),
            ("dataset", OfferRole::Validation),
            ("reward", OfferRole::Validation),
        ] {
            let used: Vec<String> =
                self.uses.iter().filter(|u| u.kind == kind && u.role == role).map(use_text).collect();
            if !used.is_empty() {
                lines.push(format!("{} {kind}: {}", role.word(), used.join(" + ")));
            }
        }
        lines
    }

    /// Lines for people.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!("{}: {}", self.kind, self.objective),
            format!(
                "{} steps of {} completions from {} prompts x {} epoch(s)",
                self.steps, self.completions_per_step, self.prompts, self.epochs
            ),
        ];
        if self.validation_prompts > 0 {
            lines.push(format!("validation on {} held-out prompts", self.validation_prompts));
        }
        lines.extend(self.plugin_lines());
        lines.extend(self.teachers.iter().map(TeacherPlan::line));
        for m in &self.memory {
            let held = bytes(m.activations_bytes);
            lines.push(match (m.role, m.parameters) {
                ("rollout", _) => format!("rollout: the student's weights, up to {held} of KV cache"),
                ("teacher", n) => format!(
                    "teacher{}: {} parameters, {} of weights, up to {held} of activations",
                    m.name.as_ref().map(|name| format!(" {name}")).unwrap_or_default(),
                    cosmos_report::format_count(n),
                    bytes(m.weights_bytes)
                ),
                (role, n) => format!(
                    "{role}: {} parameters, {} of weights{} and optimizer, up to {held} of activations",
                    cosmos_report::format_count(n),
                    bytes(m.weights_bytes),
                    if m.gradients { ", gradients" } else { "" }
                ),
            });
        }
        if let Some(wire) = self.wire {
            lines.push(format!(
                "between processes: {:.1} bytes a token to the teacher, {:.1} back",
                wire.request_bytes_per_token, wire.result_bytes_per_token
            ));
        }
        lines
    }
}

/// `0.7 x gsm8k/train (7473 prompts)`.
fn use_text(used: &Use) -> String {
    let weight = used.weight.map(|w| format!("{w} x ")).unwrap_or_default();
    let prompts = used.prompts.map(|n| format!(" ({n} prompts)")).unwrap_or_default();
    let dataset = used.dataset.as_ref().map(|d| format!(" for {d}")).unwrap_or_default();
    format!("{weight}{}{prompts}{dataset}", used.name)
}

fn objective_name(config: &Config, kind: &str) -> String {
    let d = &config.distillation;
    match kind {
        "sft" => "negative log-likelihood of the responses".into(),
        "grpo" => "GRPO on the plugins' rewards".into(),
        _ => match d.top_k {
            0 => "sampled reverse KL to the teacher".into(),
            -1 => format!("full-vocabulary generalized JSD to the teacher, beta {}", d.jsd_beta),
            k => match d.objective {
                cosmos_config::ObjectiveKind::Gjsd => format!(
                    "generalized JSD to the teacher over the top {k} tokens, beta {}, mass {:?}",
                    d.jsd_beta, d.top_k_mass
                ),
                cosmos_config::ObjectiveKind::CosmosGjsd => {
                    format!("the original's top-{k} divergence as an advantage, beta {}", d.jsd_beta)
                }
            },
        },
    }
}

fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return format!("{value:.1} {unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    use cosmos_config::ConfigFile;

    use super::*;

    #[test]
    fn a_teacher_weighs_what_its_format_says() {
        let weighs = |text: &str, teacher: &ModelConfig| {
            let config = ConfigFile::parse("run.toml", &format!("[train]\n{text}"))
                .unwrap()
                .resolve("20260102030405")
                .unwrap()
                .config;
            teacher_bytes(&config, teacher) as f64 / teacher.parameter_count() as f64
        };
        let small = ModelConfig::from_folder(&cosmos_testkit::repo_root().join("configs/quickstart/student")).unwrap();
        let large = ModelConfig { num_hidden_layers: 4000, ..small.clone() };
        // A large one is scored with as it is; a small one, and any on another device, has a copy to compute with.
        let bf16 = "[distillation]\nmaster_dtype = \"bfloat16\"\n";
        for (text, teacher, expected) in [
            ("", &small, 8.0),
            ("", &large, 4.0),
            (bf16, &large, 2.0),
            ("[host]\ndevice = \"burn:flex\"\n", &large, 8.0),
        ] {
            let found = weighs(text, teacher);
            assert!((found / expected - 1.0).abs() < 0.01, "{text}: {found} bytes a parameter instead of {expected}");
        }
    }
}
