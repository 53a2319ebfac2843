//! Disks that are full. Criterion: as long as there is no space, the run waits, or ends with an error that names the file and
//! the fix; what was saved before can be loaded; and once there is space, it ends like the undisturbed run, by itself or by
//! `--resume`.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::cluster::{Cluster, asked_to_stop, possible, signal, steps_recorded};
use super::super::roles::{Redis, Roles, has_redis, settings};
use super::super::{Models, host, metrics, succeed, weights_hash};
use super::{alone, reference};

/// What the system says of a full disk.
const FULL: &str = "No space left on device";

/// A disk of a few megabytes, in memory. It needs the right to mount.
struct SmallDisk {
    at: PathBuf,
}

impl SmallDisk {
    /// None where mounting is not allowed, which it says.
    fn mount(at: &Path) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let output = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64m", "none"]).arg(at).output();
        match output {
            Ok(output) if output.status.success() => Some(Self { at: at.to_path_buf() }),
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr).trim().to_string();
                eprintln!("skipped: a small disk cannot be mounted here: {why}");
                None
            }
            Err(error) => {
                eprintln!("skipped: there is no `mount`: {error}");
                None
            }
        }
    }

    fn filler(&self) -> PathBuf {
        self.at.join("filler")
    }

    /// Leaves not a byte.
    fn fill(&self) {
        let mut file = File::create(self.filler()).unwrap();
        let error = std::iter::repeat_with(|| file.write_all(&[0; 4096])).find_map(Result::err).unwrap();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    }

    fn free(&self) {
        fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

/// Fills the disk under `folder` of the run folder while the policy makes step `step`. With `space` there is space again as
/// soon as the logs say all of `words`; without, the run fails saying them, and goes on by `--resume` once there is.
fn full(folder: &str, step: u64, words: &[&str], space: bool, extra: &[&str]) {
    if !possible() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(&dir.path().join("run").join(folder)) else { return };
    let mut cluster = Cluster::launch(dir.path(), extra, &[]);
    let policy = cluster.freeze("policy-0", "train", &format!("step {step},"));
    disk.fill();
    signal(policy, "CONT");
    if space {
        cluster.until_said(words);
        disk.free();
        return cluster.must_end_like(reference());
    }
    assert_eq!(cluster.wait(), Some(1), "{}", cluster.logs());
    let said = cluster.said();
    assert!(words.iter().all(|word| said.contains(word)), "{words:?}\n{said}");
    for saved in (2..step).step_by(2) {
        let checkpoint = cluster.run.join(format!("checkpoints/step_{saved:08}"));
        succeed(host().args(["ckpt", "verify"]).arg(checkpoint));
    }
    disk.free();
    cluster.resume();
    cluster.must_end_like(reference());
}

const CHECKPOINT: [&str; 3] = [".step_00000004-", FULL, "free space"];
const WEIGHTS: [&str; 4] = ["weights 3 could not be published", "/weights/v00000003", FULL, "free space"];
const LEDGER: [&str; 4] =
    ["ledger.log", "nothing more can be recorded", FULL, "free space on the disk of the run folder"];

#[test]
fn a_full_disk_holds_up_a_checkpoint() {
    full("checkpoints", 4, &CHECKPOINT, true, &[]);
}

#[test]
#[ignore = "waits for the last of many attempts: nightly"]
fn a_disk_that_stays_full_at_a_checkpoint() {
    full("checkpoints", 4, &CHECKPOINT, false, &[]);
}

#[test]
#[ignore = "long: nightly"]
fn a_full_disk_holds_up_the_weights() {
    full("weights", 3, &WEIGHTS, true, &[]);
}

#[test]
#[ignore = "waits for the last of many attempts: nightly"]
fn a_disk_that_stays_full_at_the_weights() {
    full("weights", 3, &WEIGHTS, false, &[]);
}

// The whole run folder is on it, the logs too.
#[test]
fn a_full_disk_holds_up_the_ledger() {
    if possible() {
        let redis = Redis::start();
        full("", 3, &LEDGER, true, &[&format!("redis={}", redis.port)]);
    }
}

#[test]
#[ignore = "waits for deadlines: nightly"]
fn a_disk_that_stays_full_at_the_ledger() {
    if possible() {
        let redis = Redis::start();
        let impatient = ["host.control_wait_ms_max=4000", "host.restarts_max=1", &format!("redis={}", redis.port)];
        full("", 3, &LEDGER, false, &impatient);
    }
}

// With the launcher's own Redis on it, which then takes nothing in.
#[test]
#[ignore = "long: nightly"]
fn a_full_disk_holds_up_redis() {
    full("", 3, &["takes nothing in while", "MISCONF"], true, &[]);
}

// The same without the right to mount: no file may be larger than the weights are, and the optimizer's state is.
#[test]
fn a_checkpoint_that_is_larger_than_a_file_may_be() {
    if !has_redis() {
        return;
    }
    let _alone = alone();
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let mut roles = Roles::new(&dir.path().join("whole"), settings(&models));
    roles.start(&["policy-0", "rollout-0", "teacher-0"]);
    roles.wait_for_end(0);
    let whole = roles.run.clone();
    let kib =
        |name: &str| fs::metadata(whole.join("checkpoints/step_00000002").join(name)).unwrap().len().div_ceil(1024);
    let (model, optimizer) = (kib("model.safetensors"), kib("optimizer.safetensors"));
    assert!(model + 4 < optimizer, "{model} and {optimizer} KiB");
    let mut roles = Roles::new(&dir.path().join("bounded"), settings(&models));
    roles.controller(false);
    roles.policy_with_small_files("policy-0", model.midpoint(optimizer));
    ["rollout-0", "teacher-0"].iter().for_each(|name| roles.role(name));
    roles.wait_for_log("free space and continue");
    assert!(roles.log().contains("optimizer.safetensors: File too large"), "{}", roles.log());
    roles.kill_and_restart("policy-0");
    roles.wait_for_end(0);
    let steps: Vec<u64> = metrics(&roles.run).iter().map(|row| row["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6], "{}", roles.log());
    assert_eq!(weights_hash(&roles.run, 6), weights_hash(&whole, 6), "{}", roles.log());
}

// What cannot be recorded is not passed over: the run ends at once, and records it when it goes on.
fn full_at_a_record(name: &str) {
    if !possible() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(&dir.path().join("disk")) else { return };
    // More than a page in every step.
    let mut cluster = Cluster::launch(dir.path(), &["host.samples_logged=32"], &[]);
    assert_eq!(asked_to_stop(&mut cluster, "launcher", 1), 1, "{}", cluster.logs());
    // The record moves to the small disk, where the rest of its last page is all that is left.
    let record = cluster.run.join(name);
    fs::copy(&record, disk.at.join(name)).unwrap();
    fs::remove_file(&record).unwrap();
    std::os::unix::fs::symlink(disk.at.join(name), &record).unwrap();
    disk.fill();
    cluster.resume();
    assert_eq!(cluster.wait(), Some(1), "{}", cluster.logs());
    let said = cluster.said();
    assert!(said.contains(&format!("cannot write `{}`: {FULL}", record.display())), "{said}");
    assert!(said.contains("free some space"), "{said}");
    let steps = steps_recorded(&cluster.run);
    assert!(steps.is_sorted() && steps.len() < 5, "{steps:?}");
    disk.free();
    cluster.resume();
    cluster.must_end_like(reference());
}

#[test]
#[ignore = "long: nightly"]
fn a_full_disk_at_the_metrics() {
    full_at_a_record("metrics.jsonl");
}

#[test]
#[ignore = "long: nightly"]
fn a_full_disk_at_the_samples() {
    full_at_a_record("samples.jsonl");
}
