//! Runs of several processes end where a run in one process ends, whoever is killed meanwhile.

use std::path::{Path, PathBuf};

use super::roles::{Roles, configured, has_redis, settings};
use super::{Models, host, metrics, succeed, text, weights_hash};

const STEPS: u64 = 6;

/// The same run in one process.
fn in_one(dir: &Path, sets: &[String]) -> PathBuf {
    let run = dir.join("one/run");
    let mut command = host();
    command.arg("run");
    configured(&mut command, sets);
    command.args(["--set", "train.timestamp=20260102030405", "--output-dir"]).arg(&run);
    succeed(&mut command);
    run
}

fn with(models: &Models, more: &[&str]) -> Vec<String> {
    let mut sets = settings(models);
    sets.extend(more.iter().map(|set| set.to_string()));
    sets
}

#[test]
fn many_processes_make_the_run_of_one() {
    if !has_redis() {
        return;
    }
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let validation = ["validation.enable=true", "validation.freq=3", "custom.countdown.holdout=100"];
    let sets = with(&models, &[&validation[..], &["host.validate_teacher=true"]].concat());
    let one = in_one(dir.path(), &sets);
    let mut roles = Roles::new(dir.path(), sets);
    roles.start(&["policy-0", "rollout-0", "rollout-1", "teacher-0"]);
    roles.wait_for_end(0);
    assert_eq!(weights_hash(&roles.run, STEPS), weights_hash(&one, STEPS), "{}", roles.log());
    for part in ["summary.json", "samples.jsonl", "learning_curve.svg", "safetensors/step_00000006/config.json"] {
        assert!(roles.run.join(part).exists(), "{part} is missing\n{}", roles.log());
    }
    for part in ["weights", "teachers", "hand_over", "control.json"] {
        assert!(!roles.run.join(part).exists(), "{part} is left over");
    }
    let summary = std::fs::read(roles.run.join("summary.json")).unwrap();
    let summary: serde_json::Value = serde_json::from_slice(&summary).unwrap();
    assert!(summary["tokens_per_second"]["teacher"].as_f64() > Some(0.0), "{summary}");
    assert!(metrics(&one)[0]["val/teacher_reward_avg"].is_number());
    let names = [
        "train/loss_avg",
        "train/grad_norm",
        "rollout/completion_length_mean",
        "val/reward_avg",
        "val/teacher_kl",
        "val/teacher_reward_avg",
    ];
    let numbers = |run: &Path| -> Vec<Vec<Option<f64>>> {
        let of = |line: &serde_json::Value| names.iter().map(|name| line[name].as_f64()).collect();
        metrics(run).iter().map(of).collect()
    };
    let (own, whole) = (numbers(&roles.run), numbers(&one));
    assert_eq!(own.len(), whole.len());
    for (own, whole) in own.into_iter().flatten().zip(whole.into_iter().flatten()) {
        match (own, whole) {
            // The means of two shares may be added in another order.
            (Some(own), Some(whole)) => assert!((own - whole).abs() <= 1e-6 * whole.abs().max(1.0), "{own} {whole}"),
            (own, whole) => assert_eq!(own, whole),
        }
    }
}

#[test]
fn whoever_is_killed_the_weights_are_those_of_an_undisturbed_run() {
    if !has_redis() {
        return;
    }
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let sets = settings(&models);
    let one = in_one(dir.path(), &sets);
    for (name, after) in [("rollout-0", 1), ("teacher-0", 2), ("policy-0", 3), ("controller", 2)] {
        let mut roles = Roles::new(&dir.path().join(name), sets.clone());
        roles.start(&["policy-0", "rollout-0", "rollout-1", "teacher-0"]);
        roles.wait_for_steps(after);
        roles.kill_and_restart(name);
        roles.wait_for_end(0);
        assert_eq!(weights_hash(&roles.run, STEPS), weights_hash(&one, STEPS), "{name}\n{}", roles.log());
        assert_eq!(roles.steps(), STEPS as usize, "{name}: steps are recorded once\n{}", roles.log());
    }
}

#[test]
fn a_broker_that_comes_back_empty_costs_nothing_but_time() {
    if !has_redis() {
        return;
    }
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let sets = settings(&models);
    let one = in_one(dir.path(), &sets);
    let mut roles = Roles::new(dir.path(), sets);
    roles.start(&["policy-0", "rollout-0", "teacher-0"]);
    roles.wait_for_steps(2);
    roles.redis.restart_empty();
    roles.wait_for_end(0);
    assert_eq!(weights_hash(&roles.run, STEPS), weights_hash(&one, STEPS), "{}", roles.log());
}

#[test]
fn a_run_that_was_asked_to_leave_goes_on_with_other_processes() {
    if !has_redis() {
        return;
    }
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let sets = settings(&models);
    let one = in_one(dir.path(), &sets);
    let mut roles = Roles::new(dir.path(), sets);
    roles.start(&["policy-0", "rollout-0", "teacher-0"]);
    roles.wait_for_steps(2);
    let status = roles.signal("controller", "-TERM");
    assert_eq!(status.code(), Some(75), "{}", roles.log());
    roles.wait_for_end(75);
    roles.controller(true);
    ["policy-1", "rollout-1", "teacher-1"].iter().for_each(|name| roles.role(name));
    roles.wait_for_end(0);
    assert_eq!(weights_hash(&roles.run, STEPS), weights_hash(&one, STEPS), "{}", roles.log());
    assert_eq!(roles.steps(), STEPS as usize);
}

/// The f32 values of a checkpoint's weights.
fn weights(run: &Path, step: u64) -> Vec<f32> {
    let bytes = std::fs::read(run.join(format!("checkpoints/step_{step:08}/model.safetensors"))).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// How far the weights of a step are apart, relative to their size.
fn apart(own: &Path, whole: &Path, step: u64) -> f64 {
    let (own, whole) = (weights(own, step), weights(whole, step));
    assert_eq!(own.len(), whole.len());
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    norm(&mut own.iter().zip(&whole).map(|(a, b)| a - b)) / norm(&mut whole.iter().copied())
}

/// Adam's first steps are as large for gradients near nothing, whose last bits decide their sign, as for others. With this
/// they are in proportion, and only the bits that sums in another order lose are left of the distance.
const IN_PROPORTION: &str = "train.epsilon=1";
const APART_MAX: f64 = 1e-5;
/// A mini-batch for each of two ranks.
const TWO_RANKS: &str = "distillation.batch_size_per_replica=16";

#[test]
fn two_policies_make_the_steps_of_one_with_twice_the_batch() {
    if !has_redis() {
        return;
    }
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let one = in_one(dir.path(), &with(&models, &[IN_PROPORTION]));
    let halves = ["train.train_batch_per_replica=16", "policy.parallelism.n_init_replicas=2", IN_PROPORTION];
    let mut roles = Roles::new(dir.path(), with(&models, &halves));
    roles.start(&["policy-0", "policy-1", "rollout-0", "teacher-0"]);
    roles.wait_for_end(0);
    let apart = apart(&roles.run, &one, 2);
    println!("two policies: {apart:.1e}");
    assert!(apart < APART_MAX, "{apart}\n{}", roles.log());
    assert_eq!(roles.steps(), STEPS as usize);
}

#[test]
fn a_policy_that_stands_still_does_not_hold_up_the_other() {
    if !has_redis() {
        return;
    }
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let sets = with(&models, &["train.train_batch_per_replica=16", "policy.parallelism.n_init_replicas=2"]);
    let mut roles = Roles::new(dir.path(), sets);
    roles.start(&["policy-0", "policy-1", "rollout-0", "teacher-0"]);
    roles.wait_for_steps(1);
    // Its connections stay, so that only the controller's word tells the other; by itself that would wait for minutes.
    roles.freeze("policy-1");
    roles.wait_for_log("the other ranks are not waited for any longer");
    roles.kill_and_restart("policy-1");
    roles.wait_for_end(0);
    assert_eq!(roles.steps(), STEPS as usize);
}

#[test]
fn a_sharded_policy_ends_where_a_whole_one_does() {
    if !has_redis() {
        return;
    }
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let one = in_one(dir.path(), &with(&models, &[IN_PROPORTION]));
    for (mesh, sizes) in [
        ("dp_shard 2, tp 2", ["policy.parallelism.dp_shard_size=2", "policy.parallelism.tp_size=2"]),
        ("pp 2, cp 2", ["policy.parallelism.pp_size=2", "policy.parallelism.cp_size=2"]),
    ] {
        let [one_size, other] = sizes;
        let sets = with(&models, &[one_size, other, IN_PROPORTION]);
        let mut roles = Roles::new(&dir.path().join(mesh.replace([' ', ','], "_")), sets);
        roles.start(&["policy-0", "rollout-0", "teacher-0"]);
        roles.wait_for_end(0);
        // At the first checkpoint: later ones are trained on other completions, where a draw falls the other way.
        let apart = apart(&roles.run, &one, 2);
        println!("{mesh}: {apart:.1e}");
        assert!(apart < APART_MAX, "{mesh}: {apart}\n{}", roles.log());
        assert_eq!(roles.steps(), STEPS as usize);
    }
}

#[test]
fn a_sharded_teacher_makes_the_run_of_a_whole_one() {
    if !has_redis() {
        return;
    }
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let tables = ["tp_size=2", "dp_shard_size=2", "pp_size=2"];
    for top_k in ["distillation.top_k=0", "distillation.top_k=8", "distillation.top_k=-1"] {
        let dir = dir.path().join(top_k);
        let short = [top_k, "train.max_num_steps=2", "distillation.hidden_dtype=float32", TWO_RANKS, IN_PROPORTION];
        let sets = with(&models, &short);
        let one = in_one(&dir, &sets);
        for table in tables {
            let mut sets = sets.clone();
            sets.push(format!("distillation.parallelism.{table}"));
            let mut roles = Roles::new(&dir.join(table), sets);
            roles.start(&["policy-0", "rollout-0", "teacher-0"]);
            roles.wait_for_end(0);
            let apart = apart(&roles.run, &one, 2);
            println!("{top_k}, {table}: {apart:.1e}");
            assert!(apart < APART_MAX, "{top_k}, {table}: {apart}\n{}", roles.log());
        }
    }
}

#[test]
fn one_process_and_many_say_whose_checkpoint_it_is() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let mut sets = with(&models, &["train.max_num_steps=2"]);
    let one = in_one(dir.path(), &sets);
    let mut command = host();
    command.args(["controller", "--resume", "--run"]).arg(&one);
    configured(&mut command, &sets);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("holds a run of one process"), "{}", text(&output));
    assert!(text(&output).contains("`run --resume`"), "{}", text(&output));
    let named = format!("train.resume={}", one.join("checkpoints/step_00000002").display());
    let mut command = host();
    command.args(["controller", "--run"]).arg(dir.path().join("other"));
    configured(&mut command, &with(&models, &[&named]));
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("`train.resume` names a checkpoint"), "{}", text(&output));
    if !has_redis() {
        return;
    }
    let mut roles = Roles::new(dir.path(), sets.clone());
    roles.start(&["policy-0", "rollout-0", "teacher-0"]);
    roles.wait_for_end(0);
    sets.push(format!("train.resume={}", roles.run.join("checkpoints/step_00000002").display()));
    let mut command = host();
    command.args(["run", "--output-dir"]).arg(dir.path().join("again"));
    configured(&mut command, &sets);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("written by a run of several processes"), "{}", text(&output));
    assert!(text(&output).contains("`launch local --resume`"), "{}", text(&output));
}
