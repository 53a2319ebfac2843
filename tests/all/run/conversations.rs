//! Runs of several turns, with an environment that needs no toolchain.

use std::path::{Path, PathBuf};
use std::process::Command;

use cosmos_testkit::repo_root;
use serde_json::Value;

use super::{Models, distil, metrics, succeed, text, weights_hash};

/// A template in the quickstart's characters: `:` before what the student hears, `=` before what it says.
const TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<eos>{% else %}:{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}={% endif %}";

/// Everything that these runs share.
struct Stage {
    models: Models,
    dir: tempfile::TempDir,
    talker: PathBuf,
    template: String,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let talker = dir.path().join("talker.wasm");
        std::fs::write(&talker, component("talker")).unwrap();
        let template = dir.path().join("template.jinja");
        std::fs::write(&template, TEMPLATE).unwrap();
        let template = format!("rollout.multi_turn_config.custom_chat_template_path={}", template.display());
        Self { models: Models::new(), dir, talker, template }
    }

    /// A distillation of three steps over several turns into `name`.
    fn run(&self, name: &str, extra: &[&str]) -> (PathBuf, Command) {
        let run = self.dir.path().join(name).join("run");
        let mut sets = vec![
            "rollout.multi_turn_config.enable=true",
            "rollout.multi_turn_config.max_assistant_turns=4",
            &self.template,
            "policy.model_max_length=60",
            "rollout.max_response_length=40",
            "train.max_num_steps=3",
            "host.samples_logged=64",
        ];
        sets.extend(extra);
        let mut command = distil(&self.models, &run, &sets);
        command.arg("--plugin").arg(&self.talker);
        (run, command)
    }

    fn ran(&self, name: &str, extra: &[&str]) -> PathBuf {
        let (run, mut command) = self.run(name, extra);
        succeed(&mut command);
        run
    }
}

/// An environment guest as a component.
fn component(name: &str) -> Vec<u8> {
    let guest = std::fs::read_to_string(repo_root().join("tests/guests").join(format!("{name}.wat"))).unwrap();
    let contract = std::fs::read_to_string(repo_root().join("wit/since-v0.2.0/plugin.wit")).unwrap();
    let mut resolve = wit_parser::Resolve::default();
    let package = resolve.push_str("plugin.wit", &contract).unwrap();
    let world = resolve.select_world(&[package], Some("environment-plugin")).unwrap();
    let mut module = wat::parse_str(guest).unwrap();
    wit_component::embed_component_metadata(&mut module, &resolve, world, wit_component::StringEncoding::UTF8).unwrap();
    cosmos_plugin::componentize(&module).unwrap()
}

fn samples(run: &Path) -> Vec<Value> {
    let lines = std::fs::read_to_string(run.join("samples.jsonl")).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_distillation_over_several_turns() {
    let stage = Stage::new();
    let run = stage.ran("plain", &["validation.enable=true", "validation.freq=3", "custom.countdown.holdout=100"]);
    let metrics = metrics(&run);
    let step = metrics.iter().find(|m| m["step"] == 1).unwrap();
    let number = |name: &str| step[name].as_f64().unwrap_or_else(|| panic!("{name}: {step:#}"));
    assert!(number("rollout/turns_max") > 1.0 && number("rollout/turns_max") <= 4.0);
    assert!(number("train/teacher_kl_jsd_full").is_finite());
    assert!(number("reward/talker/turns") >= 1.0);
    assert!((number("reward/talker/sums") - number("reward/talker/bytes") / 10.0).abs() < 1e-9);
    // With a teacher the environment's reward is only looked at.
    assert!((number("train/reward_mean") - number("reward/talker/sums")).abs() < 1e-9);
    assert_eq!(number("rollout/advantage_max"), 0.0);
    let heard = number("rollout/heard_length_mean") * 16.0;
    let own = number("rollout/completion_length_mean") * 16.0;
    assert!(heard > 0.0);
    let samples = samples(&run);
    let trained: Vec<&Value> = samples.iter().filter(|s| s["split"] == "train" && s["step"] == 1).collect();
    assert_eq!(trained.len(), 16);
    let (mut with_kl, mut without) = (0, 0);
    for sample in &trained {
        let (kl, ids) = (sample["kl"].as_array().unwrap(), sample["token_ids"].as_array().unwrap());
        assert_eq!(kl.len(), ids.len());
        with_kl += kl.iter().filter(|kl| !kl.is_null()).count();
        without += kl.iter().filter(|kl| kl.is_null()).count();
        let said = sample["conversation"].as_array().unwrap();
        assert_eq!(said[0]["role"], "assistant");
        assert!(said.iter().filter(|m| m["role"] == "tool").all(|m| m["content"] == "1+1" || m["content"] == "2*3"));
        let reward: f64 = said
            .iter()
            .filter(|m| m["role"] == "assistant")
            .map(|m| m["content"].as_str().unwrap().len() as f64 / 10.0)
            .sum();
        assert!((sample["reward"].as_f64().unwrap() - reward).abs() < 1e-9, "{sample}");
    }
    assert_eq!((with_kl as f64, without as f64), (own.round(), heard.round()));
    let validated = metrics.iter().find(|m| m["val/teacher_kl"].is_number()).unwrap();
    assert!(validated["val/reward/talker/turns"].as_f64().unwrap() >= 1.0, "{validated:#}");
    assert!(validated["val/reward_avg"].is_number());
    // A conversation that the environment cannot go on with is left out with its reason, and the run goes on.
    let (_, mut command) = stage.run("again", &["train.max_num_steps=6"]);
    assert!(text(&succeed(&mut command)).contains("left out: plugin `talker` failed"));
}

#[test]
fn conversations_do_not_depend_on_waves_and_slots() {
    let stage = Stage::new();
    let results: Vec<String> = ["1", "5", "64"]
        .iter()
        .map(|slots| {
            let slots_set = format!("host.decode_slots={slots}");
            let run = stage.ran(slots, &[&slots_set, "rollout.n_generation=2"]);
            std::fs::read_to_string(run.join("samples.jsonl")).unwrap() + &weights_hash(&run, 3)
        })
        .collect();
    assert!(results[0].len() > 1000 && results.iter().all(|r| *r == results[0]));
}

#[test]
fn conversations_in_flight_are_resumed_bit_for_bit() {
    let stage = Stage::new();
    // Some completions of each rollout wait for the next step.
    let sets = [
        "rollout.n_generation=30",
        "train.train_policy.on_policy=false",
        "train.train_policy.allowed_outdated_steps=2",
        "train.train_policy.bypass_reward=false",
        "distillation.top_k=4",
        "distillation.top_k_support=student",
        "train.max_num_steps=4",
    ];
    let run = stage.ran("whole", &sets);
    let whole = (weights_hash(&run, 4), metrics(&run));
    for lost in ["checkpoints/step_00000003", "checkpoints/step_00000004"] {
        std::fs::remove_dir_all(run.join(lost)).unwrap();
    }
    let state = std::fs::read_to_string(run.join("checkpoints/step_00000002/state.json")).unwrap();
    let state: Value = serde_json::from_str(&state).unwrap();
    let waiting = state["completions"].as_array().unwrap();
    assert!(waiting.iter().any(|c| c["own"].as_array().is_some_and(|own| own.contains(&false.into()))), "{waiting:?}");
    let output = succeed(stage.run("whole", &sets).1.arg("--resume"));
    assert!(text(&output).contains("resumed at step 2"), "{}", text(&output));
    assert_eq!((weights_hash(&run, 4), metrics(&run)), whole);
}

#[test]
fn every_objective_takes_conversations() {
    let stage = Stage::new();
    let cases: [(&str, &[&str]); 6] = [
        ("sampled", &["distillation.top_k=0", "distillation.kl_discount_factor=0.9"]),
        ("union", &["distillation.top_k=4", "distillation.top_k_support=union"]),
        ("recompute", &["distillation.top_k=4", "distillation.rollout_top_k_recompute=true"]),
        ("prompt", &["distillation.top_k=-1", "distillation.include_prompt=true"]),
        (
            "reward",
            &["train.train_policy.bypass_reward=false", "rollout.n_generation=4", "train.train_policy.kl_beta=0.1"],
        ),
        (
            "no_teacher",
            &[
                "distillation.enable=false",
                "rollout.n_generation=4",
                "train.train_policy.use_decoupled_loss=true",
                "train.train_policy.mu_iterations=2",
            ],
        ),
    ];
    for (name, extra) in cases {
        let run = stage.ran(name, &[extra, &["train.max_num_steps=2"][..]].concat());
        for step in metrics(&run) {
            assert_eq!(step["train/non_finite_rows"].as_f64(), Some(0.0), "{name}");
            assert!(step["train/grad_norm"].as_f64().unwrap() > 0.0, "{name}: {step:#}");
        }
    }
}

#[test]
fn what_cannot_be_held_is_refused_before_the_run() {
    let stage = Stage::new();
    let no_template = "rollout.multi_turn_config.custom_chat_template_path=none.jinja";
    let plain = stage.dir.path().join("plain.jinja");
    std::fs::write(&plain, "{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    let plain = format!("rollout.multi_turn_config.custom_chat_template_path={}", plain.display());
    let cases: [(&str, &str); 4] = [
        ("host.environment=other/sums", "the plugins offer: `talker/sums`"),
        (no_template, "none.jinja"),
        (&plain, "stop tokens"),
        ("rollout.multi_turn_config.continue_final_message=true", "a continuation of the last message"),
    ];
    for (set, why) in cases {
        let (run, mut command) = stage.run("refused", &[set]);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{set}: {}", text(&output));
        assert!(text(&output).contains(why) && text(&output).contains("hint:"), "{set}: {}", text(&output));
        assert!(!run.exists());
    }
    let sets = ["rollout.multi_turn_config.enable=true"];
    let output = distil(&stage.models, &stage.dir.path().join("alone"), &sets).output().unwrap();
    assert!(text(&output).contains("no plugin offers an environment"), "{}", text(&output));
}
