//! A step on several ranks against the same step on one.

use std::collections::HashMap;

use cosmos_config::{Config, ConfigFile};
use cosmos_engine::head::{self, Head};
use cosmos_engine::model::{Model, ModelConfig, random};
use cosmos_engine::sharded;
use cosmos_parallel::{Mesh, ParallelDims, RankGroups, ThreadWorld};

use super::super::{PolicyRole, StepOutcome};
use crate::checkpoint::HostTensor;
use crate::rollout::Completion;
use crate::shards;
use crate::student::Student;
use crate::teacher::{Answer, TeacherHidden};

/// Sums in another order may move the last bits, and no more.
const APART_MAX: f64 = 1e-5;

fn folder() -> std::path::PathBuf {
    cosmos_testkit::repo_root().join("configs/quickstart/student")
}

/// Adam with an `epsilon` of one makes steps in proportion to the gradients, so that their last bits stay last bits.
fn config(policy: &str, distillation: &str) -> Config {
    let toml = format!(
        "[train]\nseed = 5\noptm_lr = 1e-2\noptm_warmup_steps = 0\nepsilon = 1.0\n[host]\nrandom_init = true\n\
         [train.train_policy]\ntype = \"grpo\"\nmini_batch = 2\ntemperature = 0.9\n{policy}\n\
         [distillation]\nmodel_name_or_path = \"m\"\n{distillation}\n"
    );
    ConfigFile::parse("run.toml", &toml).unwrap().resolve("20260102030405").unwrap().config
}

/// Seven samples of different lengths; of the third nothing is the model's own, the fourth is a conversation.
fn completions(turns: bool) -> Vec<Completion> {
    let completion = |sample: u64| {
        let id = |i: u64| ((sample * 7 + i * 3) % 11) as u32;
        let json = serde_json::json!({"sample": sample, "version": 0, "prompt": "", "prompt_ids": [id(1), id(2)],
            "tokens": (3..6 + sample % 4).map(id).collect::<Vec<_>>(), "text": "", "stopped": true, "logprobs": [],
            "candidate_ids": [], "advantage": 0});
        let mut made = serde_json::from_value::<Completion>(json).unwrap();
        made.advantage = [1.5, -0.5, 0.25][sample as usize % 3];
        match (turns, sample) {
            (true, 2) => made.own = vec![false; made.tokens.len()],
            (true, 3) => made.own = (0..made.tokens.len()).map(|i| i % 3 != 1).collect(),
            _ => {}
        }
        made.logprobs = (0..made.own_len()).map(|i| -2.0 - 0.1 * i as f32).collect();
        made
    };
    (0..7).map(completion).collect()
}

/// What teachers say about all but the sixth.
fn answers(config: &Config, completions: &[Completion], hidden: usize) -> HashMap<u64, Answer> {
    if !config.distillation.enable {
        return HashMap::new();
    }
    let k = config.distillation.top_k.max(0) as usize;
    let wave = |at: usize, by: f32| (at as f32 * by).sin();
    let answer = |c: &Completion| {
        let (rows, seed) = (c.tokens.len(), c.sample as usize * 131);
        let values = (0..rows * hidden).map(|i| wave(i + seed, 0.7)).collect();
        let full = config.distillation.top_k < 0;
        let alone = TeacherHidden { teacher: 0, weight: 1.0, values_rh: values };
        Answer {
            logprobs: if full { Vec::new() } else { (0..rows).map(|i| -3.0 + wave(i + seed, 1.3)).collect() },
            candidate_ids: (0..rows * k).map(|i| ((i % k) * 2 + seed % 3) as u32).collect(),
            candidate_logprobs: (0..rows * k).map(|i| -2.0 + wave(i + seed, 0.9)).collect(),
            hidden: if full { vec![alone] } else { Vec::new() },
            ..Answer::default()
        }
    };
    completions.iter().filter(|c| c.sample != 5).map(|c| (c.sample, answer(c))).collect()
}

struct Made {
    weights: Vec<HostTensor>,
    moments: Vec<HostTensor>,
    outcome: Option<StepOutcome>,
}

fn step(config: &Config, turns: bool, groups: &RankGroups) -> crate::error::Result<Made> {
    let shape = ModelConfig::from_folder(&folder()).unwrap();
    let mut student = Student::load_rank(config, &folder(), 10, groups)?;
    let options = shards::policy_options(&config.train);
    let mut reference = sharded::random(&shape, "cpu", 31, groups, &options).unwrap();
    let teacher = random(&shape, "cpu", 21).unwrap();
    let values = head::values_of(teacher.as_ref()).unwrap();
    let mut heads: Vec<Box<dyn Head>> = vec![head::load("cpu", shape.vocab_size, shape.hidden_size, &values).unwrap()];
    let role = PolicyRole::new(config, config.train.train_policy.grpo().unwrap())?;
    let completions = completions(turns);
    let answers = answers(config, &completions, shape.hidden_size);
    let heads = if config.distillation.enable && config.distillation.top_k < 0 { &mut heads[..] } else { &mut [] };
    let reference: Option<&mut dyn Model> = Some(reference.as_mut());
    let outcome = shards::together(groups, || role.step(&mut student, heads, reference, &completions, answers, 0))?;
    Ok(Made {
        weights: student.weights(true)?,
        moments: student.optimizer_state(true)?,
        outcome: student.place.reports.then_some(outcome),
    })
}

fn apart(own: &[HostTensor], whole: &[HostTensor]) -> f64 {
    let values = |tensors: &[HostTensor]| -> Vec<f64> {
        tensors.iter().flat_map(|t| t.values.iter().map(|v| f64::from(*v))).collect()
    };
    let (own, whole) = (values(own), values(whole));
    assert_eq!(own.len(), whole.len());
    let difference: f64 = own.iter().zip(&whole).map(|(a, b)| (a - b).powi(2)).sum();
    difference.sqrt() / whole.iter().map(|v| v.powi(2)).sum::<f64>().sqrt()
}

/// The meshes, as pp, dp_replicate, dp_shard, cp, tp.
const MESHES: [(&str, [i64; 5]); 7] = [
    ("dp_shard 2", [1, 1, 2, 1, 1]),
    ("dp_replicate 2", [1, 2, 1, 1, 1]),
    ("tp 2", [1, 1, 1, 1, 2]),
    ("cp 2", [1, 1, 1, 2, 1]),
    ("pp 2", [2, 1, 1, 1, 1]),
    ("dp_shard 2, tp 2", [1, 1, 2, 1, 2]),
    ("dp_shard 3", [1, 1, 3, 1, 1]),
];

fn compare(what: &str, config: &Config, turns: bool) {
    let whole = step(config, turns, &RankGroups::single()).unwrap();
    let before = Student::load(config, &folder(), 10).unwrap().weights(true).unwrap();
    assert!(apart(&whole.weights, &before) > 1e-6, "{what}: nothing was learned");
    let seen = whole.outcome.as_ref().unwrap();
    for (name, [pp, dp_replicate, dp_shard, cp, tp]) in MESHES {
        let world = (pp * dp_replicate * dp_shard * cp * tp) as usize;
        let mesh = Mesh::new(ParallelDims { pp, dp_replicate, dp_shard, cp, tp }, world).unwrap();
        let ranks: Vec<Made> = std::thread::scope(|scope| {
            let world = ThreadWorld::new(mesh, 60_000).unwrap();
            let run = |groups| scope.spawn(move || step(config, turns, &groups));
            let started: Vec<_> = world.into_iter().map(run).collect();
            started.into_iter().map(|rank| rank.join().unwrap().unwrap()).collect()
        });
        let (weights, moments) = (apart(&ranks[0].weights, &whole.weights), apart(&ranks[0].moments, &whole.moments));
        println!("{what}, {name}: weights {weights:.1e}, moments {moments:.1e}");
        assert!(weights <= APART_MAX && moments <= APART_MAX, "{what}, {name}: {weights:e}, {moments:e}");
        let mut told = ranks.into_iter().filter_map(|rank| rank.outcome);
        let mut all = told.next().unwrap();
        told.for_each(|other| all.merge(other));
        let close = |a: f64, b: f64| (a - b).abs() <= APART_MAX * b.abs().max(1e-3);
        assert!(close(all.report.total, seen.report.total), "{what}, {name}: loss");
        assert!(close(all.grad_norm, seen.grad_norm), "{what}, {name}: gradient norm");
        assert_eq!(all.report.tokens, seen.report.tokens, "{what}, {name}: tokens");
        assert_eq!(all.report.missing_samples, seen.report.missing_samples, "{what}, {name}: missing");
        assert_eq!(all.kl_of.len(), seen.kl_of.len(), "{what}, {name}: samples");
    }
}

#[test]
fn sampled_tokens_with_a_reference_and_several_updates() {
    let policy = "kl_beta = 0.1\nmu_iterations = 2\nbatch_size_per_optimize = 4";
    compare("top_k 0", &config(policy, "enable = true\ntop_k = 0"), false);
}

#[test]
fn candidates_of_conversations_in_batches_of_tokens() {
    let policy = "max_token_len_per_mini_batch = 16";
    compare("top_k 3", &config(policy, "enable = true\ntop_k = 3"), true);
}

#[test]
fn whole_vocabularies_in_several_optimizer_batches() {
    let policy = "batch_size_per_optimize = 3";
    compare("top_k -1", &config(policy, "enable = true\ntop_k = -1"), true);
}

#[test]
fn rewards_without_a_teacher_and_the_rollouts_log_probs() {
    let policy = "variant = \"gspo\"\nmu_iterations = 2\nuse_rollout_logprobs_for_loss = true\nentropy_coeff = 0.01";
    compare("gspo", &config(policy, "enable = false"), true);
    let policy = "loss_type = \"token-mean\"\nkl_beta = 0.05\nbypass_reward = false\nmu_iterations = 3";
    compare("grpo", &config(policy, "enable = false"), false);
}
