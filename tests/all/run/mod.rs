//! Whole runs of the real binary: learning, records, resuming, killed processes, bad input, the original's presets.

mod bad_input;
mod calculator;
mod cluster;
mod conversations;
mod faults;
mod faults_broker;
mod faults_processes;
mod hostile;
mod objectives;
mod presets;
mod processes;
mod roles;
mod several;
mod teachers;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use cosmos_testkit::repo_root;
use serde_json::Value;

/// Our binary in the repository's root, with compiled plugins cached outside any run.
pub fn host() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cosmos-host"));
    command.current_dir(repo_root()).env("NO_COLOR", "1").env("COSMOS_LOG_LEVEL", "warn");
    command
}

/// Arguments of a small distillation into `out`, then `extra`.
pub fn distil(models: &Models, out: &Path, extra: &[&str]) -> Command {
    let mut command = host();
    command.args(["run", "--config", "configs/quickstart/countdown.toml", "--plugin", "plugins/dist/countdown.wasm"]);
    command.arg("--output-dir").arg(out);
    let sets = [
        "train.timestamp=20260102030405".to_string(),
        format!("policy.model_name_or_path={}", models.student.display()),
        format!("distillation.model_name_or_path={}", models.teacher.display()),
        "train.max_num_steps=4".into(),
        "train.train_batch_per_replica=16".into(),
        "train.train_policy.mini_batch=8".into(),
        "train.ckpt.save_freq=1".into(),
        "train.ckpt.max_keep=-1".into(),
        "validation.enable=false".into(),
        "rollout.max_response_length=8".into(),
        "distillation.mini_batch=8".into(),
        "distillation.batch_size_per_replica=8".into(),
    ];
    for set in sets.iter().map(String::as_str).chain(extra.iter().copied()) {
        command.args(["--set", set]);
    }
    command
}

/// A student and a teacher that have seen one step of training.
pub struct Models {
    _dir: tempfile::TempDir,
    pub student: PathBuf,
    pub teacher: PathBuf,
}

impl Models {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let student = one_step(dir.path(), "student");
        let teacher = one_step(dir.path(), "teacher");
        Self { _dir: dir, student, teacher }
    }
}

fn one_step(dir: &Path, which: &str) -> PathBuf {
    let out = dir.join(which);
    let config = format!("configs/quickstart/{which}-sft.toml");
    let mut command = host();
    command.args(["run", "--config", &config, "--plugin", "plugins/dist/countdown.wasm", "--output-dir"]).arg(&out);
    for set in [
        "train.timestamp=1",
        "train.max_num_steps=1",
        "train.train_batch_per_replica=16",
        "train.train_policy.mini_batch=8",
        "validation.enable=false",
    ] {
        command.args(["--set", set]);
    }
    succeed(&mut command);
    out.join("safetensors/step_00000001")
}

/// Runs a command that must end well.
pub fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?} ended with {}\n{}", output.status, text(&output));
    output
}

/// Standard output and error.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The metrics of a run by step, without those that measure time.
pub fn metrics(run: &Path) -> Vec<Value> {
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    lines
        .lines()
        .map(|line| {
            let mut value: Value = serde_json::from_str(line).unwrap();
            value
                .as_object_mut()
                .unwrap()
                .retain(|name, _| name != "wall_s" && !name.contains("time") && !name.contains("second"));
            value
        })
        .collect()
}

/// SHA-256 of a checkpoint's weights, from its manifest.
pub fn weights_hash(run: &Path, step: u64) -> String {
    let manifest = run.join(format!("checkpoints/step_{step:08}/manifest.json"));
    let manifest: Value = serde_json::from_str(&fs::read_to_string(manifest).unwrap()).unwrap();
    manifest["files"]["model.safetensors"]["sha256"].as_str().unwrap().to_string()
}

#[test]
fn a_run_leaves_its_records() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let output = succeed(&mut distil(
        &models,
        &run,
        &["validation.enable=true", "validation.freq=2", "host.validate_teacher=true", "custom.countdown.holdout=100"],
    ));
    for part in [
        "config.toml",
        "config.json",
        "plugins.json",
        "metrics.jsonl",
        "samples.jsonl",
        "summary.json",
        "learning_curve.svg",
        "tensorboard",
    ] {
        assert!(run.join(part).exists(), "{part} is missing\n{}", text(&output));
    }
    let summary: Value = serde_json::from_str(&fs::read_to_string(run.join("summary.json")).unwrap()).unwrap();
    for key in ["student_before", "student_after", "teacher", "kl_before", "kl_after", "seconds"] {
        assert!(summary[key].is_number(), "{key}: {summary:#}");
    }
    let first = &metrics(&run)[1];
    for name in [
        "train/loss_avg",
        "train/grad_norm",
        "train/learning_rate",
        "train/teacher_kl_jsd_full",
        "rollout/completion_length_mean",
    ] {
        assert!(first[name].is_number(), "{name}: {first:#}");
    }
    let sample: Value =
        serde_json::from_str(fs::read_to_string(run.join("samples.jsonl")).unwrap().lines().last().unwrap()).unwrap();
    assert!(sample["completion"].is_string() && sample["prompt"].is_string());
    let exported = run.join("safetensors/step_00000004");
    succeed(host().arg("sample").arg("--model").arg(&exported).args(["--prompt", "1 2 3=6:", "--max-tokens", "4"]));
    let verify = succeed(host().args(["ckpt", "verify"]).arg(run.join("checkpoints/step_00000004")));
    assert!(text(&verify).contains("match their hashes"));
}

#[test]
fn a_dry_run_prints_the_plan_and_writes_nothing() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let output = succeed(distil(&models, &run, &[]).arg("--dry-run"));
    let whole = text(&output);
    assert!(
        whole.contains("4 steps of 16 completions") && whole.contains("of weights, gradients and optimizer"),
        "{whole}"
    );
    // Gradients that are never there all at once are not counted.
    let at_once = ["train.optm_grad_norm_clip=0", "train.train_policy.mini_batch=16"];
    let updated = text(&succeed(distil(&models, &run, &at_once).arg("--dry-run")));
    assert!(updated.contains("of weights and optimizer"), "{updated}");
    assert!(!run.exists());
}

#[test]
fn completions_do_not_depend_on_how_many_are_decoded_together() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let hashes: Vec<String> = ["1", "5", "64"]
        .iter()
        .map(|slots| {
            let run = dir.path().join(slots);
            succeed(&mut distil(
                &models,
                &run,
                &[&format!("host.decode_slots={slots}"), "rollout.n_generation=2", "host.samples_logged=16"],
            ));
            fs::read_to_string(run.join("samples.jsonl")).unwrap() + &weights_hash(&run, 4)
        })
        .collect();
    assert!(hashes[0].len() > 1000 && hashes.iter().all(|h| *h == hashes[0]));
}
