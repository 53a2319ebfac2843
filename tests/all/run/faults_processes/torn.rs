//! Files of a run that are damaged: cut short, with a bit turned over, or gone. Criterion: what is damaged is named, and never
//! loaded; the newest checkpoint that is whole is; and the run ends like the undisturbed one, each step recorded once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::cluster::{BATCH, Cluster, STEPS, asked_to_stop, possible, signal};
use super::super::{succeed, weights_hash};
use super::{alone, reference};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Damage {
    CutShort,
    BitTurned,
    Gone,
}

fn damage(file: &Path, how: Damage) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    match how {
        Damage::CutShort => bytes.truncate(middle),
        Damage::BitTurned => bytes[middle] ^= 0x10,
        Damage::Gone => return fs::remove_file(file).unwrap(),
    }
    fs::write(file, bytes).unwrap();
}

fn checkpoint(run: &Path, step: u64) -> PathBuf {
    run.join(format!("checkpoints/step_{step:08}"))
}

/// A run that was asked to leave after step 4, and is saved there and at step 2.
fn saved_at_4(dir: &Path, extra: &[&str]) -> PathBuf {
    let mut cluster = Cluster::launch(dir, extra, &[]);
    assert_eq!(asked_to_stop(&mut cluster, "launcher", 4), 4, "{}", cluster.logs());
    assert!(checkpoint(&cluster.run, 2).is_dir() && checkpoint(&cluster.run, 4).is_dir(), "{}", cluster.logs());
    cluster.run.clone()
}

/// Goes on with a run whose newest checkpoint is damaged: from the one before.
fn must_pass_over_step_4(cluster: &mut Cluster) {
    assert_eq!(cluster.wait(), Some(0), "{}", cluster.logs());
    let said = cluster.said();
    assert!(said.contains("passed over") && said.contains("step_00000004"), "{said}");
    assert!(said.contains("the run went back from step 4 to step 2"), "{said}");
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    if !possible() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let run = saved_at_4(dir.path(), &[]);
    damage(&checkpoint(&run, 4).join("model.safetensors"), Damage::BitTurned);
    let mut cluster = Cluster::take_up(run, &[]);
    must_pass_over_step_4(&mut cluster);
    cluster.must_be_like(reference());
}

// Ranks save whole tensors, so that each file of a checkpoint is a piece of it that may be damaged.
#[test]
#[ignore = "long: nightly"]
fn a_damaged_piece_of_a_sharded_runs_checkpoint() {
    if !possible() {
        return;
    }
    let _alone = alone();
    let sharded = ["policy.parallelism.dp_shard_size=2"];
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    fs::create_dir(&whole).unwrap();
    let mut whole = Cluster::launch(&whole, &sharded, &[]);
    assert_eq!(whole.wait(), Some(0), "{}", whole.logs());
    let run = saved_at_4(dir.path(), &sharded);
    for (file, how) in [
        ("model.safetensors", Damage::CutShort),
        ("optimizer.safetensors", Damage::BitTurned),
        ("optimizer.safetensors", Damage::Gone),
        ("manifest.json", Damage::CutShort),
    ] {
        let copy = dir.path().join(format!("{how:?}-{file}")).join("run");
        fs::create_dir_all(&copy).unwrap();
        succeed(Command::new("cp").arg("-r").arg(format!("{}/.", run.display())).arg(&copy));
        damage(&checkpoint(&copy, 4).join(file), how);
        let mut cluster = Cluster::take_up(copy, &sharded);
        must_pass_over_step_4(&mut cluster);
        cluster.must_have_lost_nothing(STEPS * BATCH);
        assert_eq!(weights_hash(&cluster.run, STEPS), weights_hash(&whole.run, STEPS), "{file} {how:?}");
    }
}

// Damaged as the policy that holds the state dies.
#[test]
#[ignore = "long: nightly"]
fn a_checkpoint_that_is_damaged_when_it_is_needed() {
    if !possible() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::launch(dir.path(), &[], &[]);
    let policy = cluster.freeze("policy-0", "train", "step 5,");
    damage(&checkpoint(&cluster.run, 4).join("optimizer.safetensors"), Damage::CutShort);
    signal(policy, "KILL");
    must_pass_over_step_4(&mut cluster);
    cluster.must_be_like(reference());
}

#[test]
#[ignore = "long: nightly"]
fn without_a_checkpoint_that_is_whole_the_run_begins_again() {
    if !possible() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let run = saved_at_4(dir.path(), &[]);
    damage(&checkpoint(&run, 4).join("model.safetensors"), Damage::CutShort);
    damage(&checkpoint(&run, 2).join("state.json"), Damage::BitTurned);
    let mut cluster = Cluster::take_up(run, &[]);
    assert_eq!(cluster.wait(), Some(0), "{}", cluster.logs());
    assert!(cluster.said().contains("the run went back from step 4 to step 0"), "{}", cluster.logs());
    cluster.must_be_like(reference());
}

// A rollout waits for what is damaged, never loads it, and has it published again.
#[test]
#[ignore = "waits for deadlines: nightly"]
fn damaged_weights_are_refused_and_published_again() {
    if !possible() {
        return;
    }
    let _alone = alone();
    for how in [Damage::CutShort, Damage::BitTurned, Damage::Gone] {
        let dir = tempfile::tempdir().unwrap();
        let mut cluster = Cluster::launch(dir.path(), &[], &[]);
        // The rollout has nothing to do until the weights of step 2 are there.
        let policy = cluster.freeze("policy-0", "train", "step 2,");
        let rollout = cluster.id("rollout-0");
        signal(rollout, "STOP");
        signal(policy, "CONT");
        cluster.until("weights 2", || cluster.order("rollout-0", "generate", "weights 2"));
        let files = fs::read_dir(cluster.run.join("weights")).unwrap().map(|entry| entry.unwrap().path());
        let is_of_2 = |path: &PathBuf| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.starts_with("v00000002-") && name.ends_with(".safetensors")
        };
        let files: Vec<PathBuf> = files.filter(is_of_2).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        damage(&files[0], how);
        signal(rollout, "CONT");
        cluster.must_end_like(reference());
        assert!(cluster.said().contains("for weights 2 of the policy: `v00000002-"), "{how:?}\n{}", cluster.logs());
    }
}
