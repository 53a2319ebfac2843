//! What a run will do and hold in memory, for `run --dry-run` and the first lines of a run.

use cosmos_config::Config;
use cosmos_engine::model::ModelConfig;
use serde::Serialize;

use crate::controller::Policy;

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
    /// Memory by role.
    pub memory: Vec<RoleMemory>,
}

/// Bytes a role is expected to hold at its peak.
#[derive(Debug, Clone, Serialize)]
pub struct RoleMemory {
    /// Student, rollout, teacher, reference.
    pub role: &'static str,
    /// Parameters of its model.
    pub parameters: u64,
    /// Weights, gradients and optimizer moments.
    pub weights_bytes: u64,
    /// KV cache, block inputs or kept hidden states.
    pub activations_bytes: u64,
}

const F32: u64 = 4;
/// Logits held at a time while the head is walked in chunks.
pub(crate) const LOGITS_CHUNK_BYTES: u64 = 64 << 20;

impl Plan {
    /// Works the plan out from the configuration and the models' shapes.
    pub fn new(
        config: &Config,
        policy: &Policy,
        kind: &'static str,
        validation_prompts: u64,
        student: &ModelConfig,
        teacher: Option<&ModelConfig>,
        mini_batch: u64,
    ) -> Self {
        let context = config.policy.model_max_length as u64;
        let response = (config.rollout.max_response_length as u64).min(context);
        let training_tokens = mini_batch * context.min(response * 2);
        let parameters = student.parameter_count();
        let mut memory = vec![RoleMemory {
            role: "student",
            parameters,
            weights_bytes: parameters * F32 * 4,
            activations_bytes: training_tokens * (student.hidden_size * (student.num_hidden_layers + 1)) as u64 * F32
                + LOGITS_CHUNK_BYTES,
        }];
        if kind != "sft" {
            let kv = 2 * student.num_hidden_layers * student.num_key_value_heads * student.head_dim;
            memory.push(RoleMemory {
                role: "rollout",
                parameters: 0,
                weights_bytes: 0,
                activations_bytes: config.host.decode_slots as u64 * context * kv as u64 * F32,
            });
        }
        if let Some(teacher) = teacher {
            let parameters = teacher.parameter_count();
            memory.push(RoleMemory {
                role: "teacher",
                parameters,
                weights_bytes: parameters * F32,
                activations_bytes: config.distillation.mini_batch as u64
                    * context.min(response * 2)
                    * (teacher.hidden_size * 4) as u64
                    * F32
                    + LOGITS_CHUNK_BYTES,
            });
        }
        Self {
            kind,
            objective: objective_name(config, kind),
            prompts: policy.dataset_len,
            epochs: policy.epochs,
            steps: policy.total_steps(),
            completions_per_step: policy.train_batch,
            validation_prompts,
            memory,
        }
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
        for m in &self.memory {
            let held = bytes(m.activations_bytes);
            lines.push(match (m.role, m.parameters) {
                ("rollout", _) => format!("rollout: the student's weights, up to {held} of KV cache"),
                ("teacher", n) => format!(
                    "teacher: {} parameters, {} of weights, up to {held} of activations",
                    cosmos_report::format_count(n),
                    bytes(m.weights_bytes)
                ),
                (role, n) => format!(
                    "{role}: {} parameters, {} of weights, gradients and optimizer, up to {held} of activations",
                    cosmos_report::format_count(n),
                    bytes(m.weights_bytes)
                ),
            });
        }
        lines
    }
}

fn objective_name(config: &Config, kind: &str) -> String {
    let d = &config.distillation;
    match kind {
        "sft" => "negative log-likelihood of the responses".into(),
        "grpo" => "GRPO on the plugin's reward".into(),
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
