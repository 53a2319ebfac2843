//! Processes of a run that are killed, asked to leave, slow, or strangers. Unless said otherwise the criterion is that of
//! [`Cluster::must_end_like`]: no hang, nothing lost, nothing trained twice, no masking, the same weights bit for bit.
//!
//! Those that are ignored take long; `tests/nightly.sh` runs them.

mod disk;
mod reports;
mod torn;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::cluster::{BATCH, Cluster, STEPS, asked_to_stop, is_alive, possible, signal, steps_recorded, undisturbed};
use super::weights_hash;

const VALIDATING: [&str; 4] =
    ["validation.enable=true", "validation.freq=2", "validation.val_before_train=false", "host.validate_teacher=false"];

/// The undisturbed run that most tests compare with.
static REFERENCE: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let run = undisturbed(dir.path(), &[]);
    (dir, run)
});

fn reference() -> &'static Path {
    &REFERENCE.1
}

/// One run of processes at a time: several would take each other's cores.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `disturb` on a run, which then has to end like the undisturbed one.
fn disturbed(arguments: &[&str], disturb: impl FnOnce(&mut Cluster)) {
    if !possible() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::launch(dir.path(), &[], arguments);
    disturb(&mut cluster);
    cluster.must_end_like(reference());
}

/// Kills `name` while it carries out an order.
fn killed_at(name: &str, doing: &str, at: &str) {
    disturbed(&[], |cluster| {
        let id = cluster.freeze(name, doing, at);
        signal(id, "KILL");
    });
}

/// Kills the controller while `name` carries out an order, which it finishes meanwhile.
fn controller_killed_while(name: &str, doing: &str, at: &str) {
    disturbed(&[], |cluster| {
        let id = cluster.freeze(name, doing, at);
        let controller = cluster.id("controller");
        signal(controller, "KILL");
        signal(id, "CONT");
        cluster.until("the controller's end", || (!is_alive(controller)).then_some(()));
    });
}

// What is read is only let go of when its result is stored, so the next teacher of this name has it again at once.
#[test]
fn a_teacher_that_is_killed_between_read_and_acknowledge() {
    disturbed(&[], |cluster| {
        let id = cluster.freeze_teacher_with_requests("teacher-0");
        signal(id, "KILL");
    });
}

#[test]
fn a_rollout_that_is_killed_while_it_generates() {
    killed_at("rollout-0", "generate", "weights 2");
}

// Steps 3 and 4 are made again from the checkpoint of step 2, and recorded once.
#[test]
fn the_only_policy_is_killed_while_it_trains() {
    killed_at("policy-0", "train", "step 4");
}

/// A policy and a teacher of four ranks, over two processes each.
const SHARDED: [&str; 6] = [
    "policy.parallelism.dp_shard_size=2",
    "policy.parallelism.tp_size=2",
    "distillation.parallelism.dp_shard_size=2",
    "distillation.parallelism.tp_size=2",
    "distillation.mini_batch=8",
    "distillation.batch_size_per_replica=16",
];

/// The run of the same ranks in one process each, which nobody disturbs.
static SHARDED_REFERENCE: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::launch(dir.path(), &SHARDED, &[]);
    assert_eq!(cluster.wait(), Some(0), "{}", cluster.logs());
    let run = cluster.run.clone();
    (dir, run)
});

/// Kills a process of a replica that has two; both are started again, and the run ends as if nothing had been.
fn one_of_two_processes_is_killed(who: &str, catch: impl FnOnce(&Cluster) -> u32) {
    if !possible() {
        return;
    }
    let _alone = alone();
    let reference = &SHARDED_REFERENCE.1;
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::launch(dir.path(), &SHARDED, &["--ranks-per-node", "2"]);
    let (caught, both) = (catch(&cluster), cluster.processes());
    assert_eq!(both.keys().filter(|name| name.starts_with("policy-0")).count(), 2);
    signal(both[who], "KILL");
    signal(caught, "CONT");
    cluster.must_end_like(reference);
    let logs = cluster.logs();
    let replica = who.split('.').next().unwrap();
    assert!(logs.contains(&format!("the processes of `{replica}` cannot go on")), "{logs}");
    assert!(logs.contains("lost process"), "{logs}");
}

#[test]
fn the_second_process_of_the_only_policy_is_killed_while_it_trains() {
    one_of_two_processes_is_killed("policy-0.1", |cluster| cluster.freeze("policy-0", "train", "step 4"));
}

#[test]
#[ignore = "long: nightly"]
fn the_first_process_of_the_only_policy_is_killed_while_it_trains() {
    one_of_two_processes_is_killed("policy-0", |cluster| cluster.freeze("policy-0", "train", "step 3"));
}

#[test]
#[ignore = "long: nightly"]
fn the_second_process_of_the_only_teacher_is_killed_while_it_holds_requests() {
    one_of_two_processes_is_killed("teacher-0.1", |cluster| cluster.freeze_teacher_with_requests("teacher-0"));
}

#[test]
fn the_controller_is_killed_while_a_policy_trains() {
    controller_killed_while("policy-0", "train", "step 3");
}

#[test]
#[ignore = "long: nightly"]
fn the_only_policy_is_killed_while_it_saves() {
    killed_at("policy-0", "save", "step 2");
}

#[test]
#[ignore = "long: nightly"]
fn the_only_policy_is_killed_before_the_first_step() {
    killed_at("policy-0", "load", "step 0");
}

#[test]
#[ignore = "long: nightly"]
fn the_only_policy_is_killed_in_the_first_step() {
    killed_at("policy-0", "train", "step 1");
}

#[test]
#[ignore = "long: nightly"]
fn the_only_policy_is_killed_in_its_last_save() {
    killed_at("policy-0", "save", "step 5");
}

#[test]
#[ignore = "long: nightly"]
fn the_controller_is_killed_before_the_first_step() {
    controller_killed_while("policy-0", "load", "step 0");
}

#[test]
#[ignore = "long: nightly"]
fn the_controller_is_killed_while_a_rollout_generates() {
    controller_killed_while("rollout-0", "generate", "weights 3");
}

#[test]
#[ignore = "long: nightly"]
fn the_controller_is_killed_while_a_policy_saves() {
    controller_killed_while("policy-0", "save", "step 4");
}

#[test]
#[ignore = "long: nightly"]
fn the_controller_is_killed_while_the_run_finishes() {
    disturbed(&[], |cluster| {
        let policy = cluster.freeze("policy-0", "train", "step 5");
        // It has nothing to do any more, and is not there to hear that the run is over.
        let rollout = cluster.id("rollout-0");
        signal(rollout, "STOP");
        signal(policy, "CONT");
        cluster.until("the end", || cluster.order("rollout-0", "finish", ""));
        let controller = cluster.id("controller");
        signal(controller, "KILL");
        cluster.until("the controller's end", || (!is_alive(controller)).then_some(()));
        signal(rollout, "CONT");
    });
}

// The launcher starts everything again, five times at most; here each is killed once, and the controller in each step.
#[test]
#[ignore = "long: nightly"]
fn everything_is_killed_once() {
    disturbed(&[], |cluster| {
        for (name, doing, at) in
            [("rollout-0", "generate", "weights 1"), ("policy-0", "train", "step 3"), ("policy-0", "save", "step 4")]
        {
            let id = cluster.freeze(name, doing, at);
            signal(cluster.id("controller"), "KILL");
            signal(id, "KILL");
        }
        let id = cluster.id("teacher-0");
        signal(id, "KILL");
    });
}

// Its share is given to the next one; a validation is recorded once.
fn killed_while_validating(who: &str) {
    if !possible() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let whole = undisturbed(dir.path(), &VALIDATING);
    let mut cluster = Cluster::launch(dir.path(), &VALIDATING, &[]);
    let id = cluster.freeze("rollout-0", "validate", "step 2");
    match who {
        "rollout-0" => signal(id, "KILL"),
        other => {
            signal(cluster.id(other), "KILL");
            signal(id, "CONT");
        }
    }
    cluster.must_end_like(&whole);
    let validations = |run: &Path| {
        let rows = super::metrics(run).into_iter().filter(|row| row["val/reward_avg"].is_number());
        rows.map(|row| (row["step"].clone(), row["val/reward_avg"].clone())).collect::<Vec<_>>()
    };
    assert_eq!(validations(&cluster.run), validations(&whole));
    assert_eq!(validations(&whole).len(), 3);
}

#[test]
#[ignore = "long: nightly"]
fn a_rollout_that_is_killed_while_it_validates() {
    killed_while_validating("rollout-0");
}

#[test]
#[ignore = "long: nightly"]
fn the_controller_is_killed_while_a_rollout_validates() {
    killed_while_validating("controller");
}

// The other one hands its state over; no step is made again. Two policies train on twice as many samples a step, so the run
// is compared with two policies that nobody disturbed.
#[test]
#[ignore = "long: nightly"]
fn one_of_two_policies_is_killed() {
    if !possible() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let two = ["--policies", "2"];
    let whole = dir.path().join("whole");
    std::fs::create_dir(&whole).unwrap();
    let mut undisturbed = Cluster::launch(&whole, &[], &two);
    assert_eq!(undisturbed.wait(), Some(0), "{}", undisturbed.logs());
    undisturbed.must_have_lost_nothing(STEPS * BATCH * 2);
    for victim in ["policy-1", "policy-0"] {
        let dir = tempfile::tempdir().unwrap();
        let mut cluster = Cluster::launch(dir.path(), &[], &two);
        signal(cluster.freeze(victim, "train", "step 4"), "KILL");
        assert_eq!(cluster.wait(), Some(0), "{}", cluster.logs());
        cluster.must_have_lost_nothing(STEPS * BATCH * 2);
        assert_eq!(weights_hash(&cluster.run, STEPS), weights_hash(&undisturbed.run, STEPS), "{victim}");
        // Had it gone back to step 2, its log would tell.
        assert!(!cluster.logs().contains("the run went back"), "{victim}\n{}", cluster.logs());
    }
}

// The processes notice that their launcher is gone, save and end by themselves; then the run goes on.
#[test]
#[ignore = "long: nightly"]
fn the_launcher_is_killed() {
    if !possible() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::launch(dir.path(), &[], &[]);
    cluster.wait_for_steps(1);
    let processes = cluster.children();
    assert_eq!(processes.len(), 5, "{processes:?}, Redis being one of them");
    signal(cluster.launcher(), "KILL");
    assert_eq!(cluster.wait(), None);
    let deadline = Instant::now() + Duration::from_secs(120);
    while processes.iter().any(|id| is_alive(*id)) {
        assert!(Instant::now() < deadline, "{processes:?} outlive their launcher\n{}", cluster.logs());
        std::thread::sleep(Duration::from_millis(20));
    }
    cluster.resume();
    cluster.must_end_like(reference());
}

/// SIGTERM to `name` in the middle: the run is saved, ends with exit code 75, and goes on to the same weights.
fn asked_to_leave(name: &str) {
    if !possible() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::launch(dir.path(), &[], &[]);
    let steps = asked_to_stop(&mut cluster, name, 3);
    // What was trained is saved, not only what an earlier checkpoint holds.
    assert!((2..STEPS).contains(&steps), "{steps} steps\n{}", cluster.logs());
    assert!(cluster.run.join(format!("checkpoints/step_{steps:08}")).is_dir(), "step {steps}\n{}", cluster.logs());
    cluster.resume();
    cluster.must_end_like(reference());
}

#[test]
fn the_launcher_is_asked_to_leave() {
    asked_to_leave("launcher");
}

#[test]
#[ignore = "long: nightly"]
fn the_controller_is_asked_to_leave() {
    asked_to_leave("controller");
}

#[test]
fn the_only_policy_is_asked_to_leave() {
    asked_to_leave("policy-0");
}

#[test]
#[ignore = "long: nightly"]
fn the_only_rollout_is_asked_to_leave() {
    asked_to_leave("rollout-0");
}

#[test]
#[ignore = "long: nightly"]
fn the_only_teacher_is_asked_to_leave() {
    asked_to_leave("teacher-0");
}

// As a batch system does that ends a job.
#[test]
#[ignore = "long: nightly"]
fn all_processes_are_asked_to_leave_at_once() {
    if !possible() {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::launch(dir.path(), &[], &[]);
    let policy = cluster.freeze("policy-0", "train", "step 3");
    let all = cluster.processes();
    signal(cluster.launcher(), "TERM");
    all.values().for_each(|id| signal(*id, "TERM"));
    signal(policy, "CONT");
    assert_eq!(cluster.wait(), Some(75), "{}", cluster.logs());
    cluster.resume();
    cluster.must_end_like(reference());
}

// It works one hundredth of the time; everything waits for it and nothing is masked.
#[test]
#[ignore = "long: nightly"]
fn a_teacher_that_is_a_hundred_times_slower() {
    disturbed(&[], |cluster| {
        cluster.wait_for_steps(1);
        let id = cluster.id("teacher-0");
        let until = Instant::now() + Duration::from_secs(40);
        while Instant::now() < until && steps_recorded(&cluster.run).len() < 4 {
            signal(id, "STOP");
            std::thread::sleep(Duration::from_millis(495));
            signal(id, "CONT");
            std::thread::sleep(Duration::from_millis(5));
        }
    });
}

// One that joins gets work, and the run neither waits for one that leaves nor loses what it was doing.
#[test]
#[ignore = "long: nightly"]
fn rollouts_and_teachers_join_and_leave() {
    disturbed(&[], |cluster| {
        cluster.wait_for_steps(1);
        cluster.join("rollout", "rollout-guest", &[]);
        cluster.join("teacher", "teacher-guest", &[]);
        cluster.until("the guests", || {
            let status = cluster.status()?;
            let names: Vec<&str> = status["replicas"].as_array()?.iter().filter_map(|r| r["name"].as_str()).collect();
            (names.contains(&"rollout-guest") && names.contains(&"teacher-guest")).then_some(())
        });
        // The hosts leave, the guests stay to the end.
        for name in ["rollout-0", "teacher-0"] {
            let id = cluster.id(name);
            signal(id, "TERM");
            cluster.until("it to leave", || (!is_alive(id)).then_some(()));
        }
        assert_eq!(cluster.wait(), Some(0), "{}", cluster.logs());
        for guest in 0..2 {
            assert_eq!(cluster.wait_for_joined(guest), Some(0), "{}", cluster.logs());
        }
    });
}

// They are refused with a reason, and the run does not notice.
#[test]
#[ignore = "long: nightly"]
fn strangers_are_refused() {
    disturbed(&[], |cluster| {
        cluster.wait_for_steps(1);
        cluster.join("rollout", "other-config", &["--set", "train.seed=7"]);
        let code = cluster.wait_for_joined(0);
        let said = std::fs::read_to_string(cluster.run.join("logs/other-config.log")).unwrap();
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains("was started differently from the run: `train.seed` is 7, and not "), "{said}");

        let control = std::fs::read_to_string(cluster.run.join("control.json")).unwrap();
        let control: serde_json::Value = serde_json::from_str(&control).unwrap();
        let mut command: Command = super::host();
        command.args(["rollout", "--config", "configs/quickstart/countdown.toml", "--plugin"]);
        command.args(["plugins/dist/countdown.wasm", "--controller", control["url"].as_str().unwrap()]);
        let output = command.env("COSMOS_CONTROL_TOKEN", "x".repeat(48)).output().unwrap();
        let said = super::text(&output);
        assert!(output.status.code().is_some_and(|code| code != 0) && said.contains("token"), "{said}");
        assert!(!said.contains("xxxx"), "{said}");
    });
}
