//! A run whose reward panics, loops, answers nonsense and eats memory goes on, and says which samples it lost.

use std::path::{Path, PathBuf};

use cosmos_testkit::repo_root;
use wit_component::StringEncoding;
use wit_parser::Resolve;

use super::{Models, distil, metrics, succeed, text};

/// The reward `trouble` of `tests/guests` as a component in `folder`.
fn trouble(folder: &Path) -> PathBuf {
    let guests = repo_root().join("tests/guests");
    let part = |name: &str| std::fs::read_to_string(guests.join(name)).unwrap();
    let wit = std::fs::read_to_string(repo_root().join("wit/since-v0.1.0/plugin.wit")).unwrap();
    let mut resolve = Resolve::default();
    let package = resolve.push_str("plugin.wit", &wit).unwrap();
    let world = resolve.select_world(&[package], Some("reward-plugin")).unwrap();
    let mut module = wat::parse_str(format!("(module {} {})", part("trouble.wat"), part("reward_base.wat"))).unwrap();
    wit_component::embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).unwrap();
    let path = folder.join("trouble.wasm");
    std::fs::write(&path, cosmos_plugin::componentize(&module).unwrap()).unwrap();
    path
}

#[test]
fn a_run_outlives_its_reward() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let mut command = super::host();
    command.args(["run", "--config", "configs/quickstart/countdown.toml", "--plugin"]).arg(trouble(dir.path()));
    command.args(distil(&models, &run, &[]).get_args().skip(3));
    for set in [
        "distillation.enable=false",
        "rollout.n_generation=4",
        "plugin.hostile.call_ms_max=400",
        "train.train_policy.bypass_reward=false",
        "train.train_policy.reward_function=hostile/r",
    ] {
        command.args(["--set", set]);
    }
    let output = succeed(&mut command);
    let said = text(&output);
    assert_eq!(metrics(&run).len(), 4, "{said}");
    assert_eq!(output.status.code(), Some(0));
    for reason in ["a panic, an abort", "took longer than", "the score is NaN", "not today", "out of memory"] {
        assert!(said.contains(reason), "no sample failed for `{reason}`: {said}");
    }
    let logged = said.lines().filter(|line| line.contains("of sample") && line.contains("left out")).count();
    let steps = metrics(&run);
    let counted: f64 = steps.iter().filter_map(|step| step["reward/hostile/failed"].as_f64()).sum();
    assert_eq!(logged as f64, counted, "{said}");
    // Five in eight of 64, give or take.
    assert!((20..64).contains(&logged), "{logged} of 64 samples were left out: {said}");
    for step in steps {
        assert!(step["train/loss_avg"].is_number() && step["train/grad_norm"].is_number(), "{step:#}");
    }
}
