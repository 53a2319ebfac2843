//! Runs of several processes end where a run in one process ends, whoever is killed meanwhile.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::roles::{Roles, configured, has_redis, settings};
use super::{Models, host, metrics, succeed, text, weights_hash};

const STEPS: u64 = 6;
/// A policy, a rollout and a teacher.
const ONE_OF_EACH: [&str; 3] = ["policy-0", "rollout-0", "teacher-0"];

/// Models to train, and a folder for the runs.
struct Bench {
    models: Models,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { models: Models::new(), dir: tempfile::tempdir().unwrap() }
    }

    /// None where there is no Redis for processes.
    fn with_redis() -> Option<Self> {
        has_redis().then(Self::new)
    }

    /// The settings of all runs, and `more`.
    fn sets(&self, more: &[&str]) -> Vec<String> {
        let mut sets = settings(&self.models);
        sets.extend(more.iter().map(|set| set.to_string()));
        sets
    }

    /// A run of processes in `name`; none is started yet.
    fn roles(&self, name: &str, sets: &[String]) -> Roles {
        Roles::new(&self.dir.path().join(name), sets.to_vec())
    }

    /// The same run in one process, to its end.
    fn in_one(&self, name: &str, sets: &[String]) -> PathBuf {
        let run = self.dir.path().join(name).join("one");
        succeed(&mut run_in_one(&run, sets));
        run
    }
}

/// `run` into a folder.
fn run_in_one(run: &Path, sets: &[String]) -> Command {
    let mut command = host();
    command.arg("run");
    configured(&mut command, sets);
    command.args(["--set", "train.timestamp=20260102030405", "--output-dir"]).arg(run);
    command
}

/// Starts a command whose output is of no interest.
fn begin(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// A command that must be refused; what it says.
fn refused(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    text(&output)
}

impl Roles {
    /// The run has ended well, with these weights.
    fn must_end_like(&mut self, undisturbed: &Path) {
        self.wait_for_end(0);
        assert_eq!(weights_hash(&self.run, STEPS), weights_hash(undisturbed, STEPS), "{}", self.log());
        assert_eq!(self.steps(), STEPS as usize, "steps are recorded once\n{}", self.log());
    }
}

#[test]
fn many_processes_make_the_run_of_one() {
    let Some(bench) = Bench::with_redis() else { return };
    let validation = ["validation.enable=true", "validation.freq=3", "custom.countdown.holdout=100"];
    let sets = bench.sets(&[&validation[..], &["host.validate_teacher=true"]].concat());
    let one = bench.in_one("", &sets);
    let mut roles = bench.roles("", &sets);
    roles.start(&["policy-0", "rollout-0", "rollout-1", "teacher-0"]);
    roles.wait_for_end(0);
    assert_eq!(weights_hash(&roles.run, STEPS), weights_hash(&one, STEPS), "{}", roles.log());
    for part in ["summary.json", "samples.jsonl", "learning_curve.svg", "safetensors/step_00000006/config.json"] {
        assert!(roles.run.join(part).exists(), "{part} is missing\n{}", roles.log());
    }
    let ledger = std::fs::read_to_string(roles.run.join("ledger.log")).unwrap();
    let shortened =
        ledger.lines().nth(1).is_some_and(|line| line.contains("\"snapshot\"") && !line.contains("\"seq\":0,"));
    assert!(shortened, "the ledger is shortened at every checkpoint: {ledger}");
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
    let Some(bench) = Bench::with_redis() else { return };
    let sets = bench.sets(&[]);
    let one = bench.in_one("", &sets);
    for (name, after) in [("rollout-0", 1), ("teacher-0", 2), ("policy-0", 3), ("controller", 2)] {
        let mut roles = bench.roles(name, &sets);
        roles.start(&["policy-0", "rollout-0", "rollout-1", "teacher-0"]);
        roles.wait_for_steps(after);
        roles.kill_and_restart(name);
        roles.must_end_like(&one);
    }
}

#[test]
fn a_broker_that_comes_back_empty_costs_nothing_but_time() {
    let Some(bench) = Bench::with_redis() else { return };
    let sets = bench.sets(&[]);
    let one = bench.in_one("", &sets);
    let mut roles = bench.roles("", &sets);
    roles.start(&ONE_OF_EACH);
    roles.wait_for_steps(2);
    roles.redis.restart_empty();
    roles.must_end_like(&one);
}

#[test]
fn a_run_that_was_asked_to_leave_goes_on_with_other_processes() {
    let Some(bench) = Bench::with_redis() else { return };
    let sets = bench.sets(&[]);
    let one = bench.in_one("", &sets);
    let mut roles = bench.roles("", &sets);
    roles.start(&ONE_OF_EACH);
    roles.wait_for_steps(2);
    let status = roles.signal("controller", "-TERM");
    assert_eq!(status.code(), Some(75), "{}", roles.log());
    roles.wait_for_end(75);
    roles.controller(true);
    ["policy-1", "rollout-1", "teacher-1"].iter().for_each(|name| roles.role(name));
    roles.must_end_like(&one);
}

#[test]
fn a_run_goes_on_as_one_process_and_as_many() {
    let Some(bench) = Bench::with_redis() else { return };
    const LONG: u64 = 14;
    let sets = bench.sets(&["train.max_num_steps=14"]);
    let undisturbed = bench.in_one("", &sets);
    let mut roles = bench.roles("", &sets);
    let start = |roles: &mut Roles| {
        roles.controller(true);
        ONE_OF_EACH.iter().for_each(|name| roles.role(name));
    };
    // Each of them is asked to leave in the middle of a step. What was written for it goes from one to the other.
    let mut child = begin(&mut run_in_one(&roles.run, &sets));
    roles.wait_for_steps(1);
    assert_eq!(asked_to_leave(&mut child), Some(75));
    start(&mut roles);
    roles.wait_for_steps(4);
    // While processes are at work, nobody else goes on with their run.
    let said = refused(run_in_one(&roles.run, &sets).arg("--resume"));
    assert!(said.contains("another controller is at work"), "{said}");
    roles.signal("controller", "-TERM");
    roles.wait_for_end(75);
    let mut child = begin(run_in_one(&roles.run, &sets).arg("--resume"));
    let steps = roles.steps();
    roles.wait_for_steps(steps + 1);
    assert_eq!(asked_to_leave(&mut child), Some(75));
    // They find a folder without a ledger, and the books of before.
    assert!(!roles.run.join("ledger.log").exists());
    start(&mut roles);
    roles.wait_for_end(0);
    assert_eq!(weights_hash(&roles.run, LONG), weights_hash(&undisturbed, LONG), "{}", roles.log());
    let (own, theirs) = (metrics(&roles.run), metrics(&undisturbed));
    for name in ["step", "train/loss_avg", "train/grad_norm", "train/tokens"] {
        let of = |rows: &[serde_json::Value]| rows.iter().map(|row| row[name].clone()).collect::<Vec<_>>();
        assert_eq!(of(&own), of(&theirs), "{name}");
    }
    let summary = |run: &Path| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(run.join("summary.json")).unwrap()).unwrap()
    };
    for name in ["steps", "samples"] {
        assert_eq!(summary(&roles.run)[name], summary(&undisturbed)[name], "{name}");
    }
}

/// Asks a run to save and leave; its exit code.
fn asked_to_leave(child: &mut Child) -> Option<i32> {
    let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    child.wait().unwrap().code()
}

#[test]
fn a_teacher_that_has_lost_its_broker_ends_rather_than_stay_away_unnoticed() {
    let Some(bench) = Bench::with_redis() else { return };
    let mut roles = bench.roles("", &bench.sets(&["host.broker_wait_ms_max=300"]));
    roles.start(&["teacher-0"]);
    roles.wait_until_joined("teacher-0");
    // By then it waits for requests. If it does not yet, it has to end as well.
    std::thread::sleep(Duration::from_secs(1));
    roles.redis.kill();
    let status = roles.wait_for_end_of("teacher-0");
    assert_eq!(status.code(), Some(1), "{}", roles.log());
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
    let Some(bench) = Bench::with_redis() else { return };
    let one = bench.in_one("", &bench.sets(&[IN_PROPORTION]));
    let halves = ["train.train_batch_per_replica=16", "policy.parallelism.n_init_replicas=2", IN_PROPORTION];
    let mut roles = bench.roles("", &bench.sets(&halves));
    roles.start(&["policy-0", "policy-1", "rollout-0", "teacher-0"]);
    roles.wait_for_end(0);
    let apart = apart(&roles.run, &one, 2);
    println!("two policies: {apart:.1e}");
    assert!(apart < APART_MAX, "{apart}\n{}", roles.log());
    assert_eq!(roles.steps(), STEPS as usize);
}

#[test]
fn a_policy_that_stands_still_does_not_hold_up_the_other() {
    let Some(bench) = Bench::with_redis() else { return };
    let sets = bench.sets(&["train.train_batch_per_replica=16", "policy.parallelism.n_init_replicas=2"]);
    let mut roles = bench.roles("", &sets);
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
    let Some(bench) = Bench::with_redis() else { return };
    let one = bench.in_one("", &bench.sets(&[IN_PROPORTION]));
    for (mesh, [one_size, other]) in [
        ("dp_shard_2_tp_2", ["policy.parallelism.dp_shard_size=2", "policy.parallelism.tp_size=2"]),
        ("pp_2_cp_2", ["policy.parallelism.pp_size=2", "policy.parallelism.cp_size=2"]),
    ] {
        let mut roles = bench.roles(mesh, &bench.sets(&[one_size, other, IN_PROPORTION]));
        roles.start(&ONE_OF_EACH);
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
    let Some(bench) = Bench::with_redis() else { return };
    for top_k in ["distillation.top_k=0", "distillation.top_k=8", "distillation.top_k=-1"] {
        let short = [top_k, "train.max_num_steps=2", "distillation.hidden_dtype=float32", TWO_RANKS, IN_PROPORTION];
        let one = bench.in_one(top_k, &bench.sets(&short));
        for table in ["tp_size=2", "dp_shard_size=2", "pp_size=2"] {
            let sharded = format!("distillation.parallelism.{table}");
            let sets = bench.sets(&[&short[..], &[&sharded]].concat());
            let mut roles = bench.roles(&format!("{top_k}/{table}"), &sets);
            roles.start(&ONE_OF_EACH);
            roles.wait_for_end(0);
            let apart = apart(&roles.run, &one, 2);
            println!("{top_k}, {table}: {apart:.1e}");
            assert!(apart < APART_MAX, "{top_k}, {table}: {apart}\n{}", roles.log());
        }
    }
}

/// A policy and a teacher of two processes each, against the same ranks in one process each: bit for bit.
#[test]
fn a_replica_over_two_processes_is_that_of_one() {
    let Some(bench) = Bench::with_redis() else { return };
    let sizes = [
        "policy.parallelism.dp_shard_size=2",
        "policy.parallelism.tp_size=2",
        "distillation.parallelism.tp_size=2",
        TWO_RANKS,
    ];
    for top_k in ["distillation.top_k=8", "distillation.top_k=-1"] {
        let sets = bench.sets(&[&sizes[..], &[top_k]].concat());
        let mut one = bench.roles(&format!("{top_k}/one"), &sets);
        one.start(&ONE_OF_EACH);
        one.wait_for_end(0);
        let mut two = bench.roles(&format!("{top_k}/two"), &sets);
        two.start(&["policy-0.1", "policy-0.0", "rollout-0", "teacher-0.0", "teacher-0.1"]);
        two.wait_for_end(0);
        assert_eq!(two.steps(), STEPS as usize);
        let hash = |roles: &Roles| weights_hash(&roles.run, STEPS);
        assert_eq!(hash(&two), hash(&one), "{top_k}\n{}", two.log());
    }
}

/// Two policies of two processes each make the steps of two policies of one process each.
#[test]
#[ignore = "long: nightly"]
fn two_policies_over_two_processes_each() {
    let Some(bench) = Bench::with_redis() else { return };
    let two = ["policy.parallelism.n_init_replicas=2", "policy.parallelism.dp_shard_size=2", TWO_RANKS];
    let sets = bench.sets(&two);
    let mut whole = bench.roles("whole", &sets);
    whole.start(&["policy-0", "policy-1", "rollout-0", "teacher-0"]);
    whole.wait_for_end(0);
    let mut parts = bench.roles("parts", &sets);
    parts.start(&["policy-0.0", "policy-0.1", "policy-1.0", "policy-1.1", "rollout-0", "teacher-0"]);
    parts.wait_for_end(0);
    assert_eq!(weights_hash(&parts.run, STEPS), weights_hash(&whole.run, STEPS), "{}", parts.log());
}

#[test]
fn processes_go_on_only_in_their_folder_and_with_their_config() {
    let Some(bench) = Bench::with_redis() else { return };
    let short = bench.sets(&["train.max_num_steps=2"]);
    let mut roles = bench.roles("", &short);
    let mut other = host();
    other.args(["controller", "--run"]).arg(bench.dir.path().join("other"));
    configured(&mut other, &bench.sets(&["train.resume=checkpoints/step_00000002"]));
    let said = refused(&mut other);
    assert!(said.contains("`train.resume` names a checkpoint"), "{said}");
    roles.start(&ONE_OF_EACH);
    roles.wait_for_end(0);
    let mut faster = host();
    faster.args(["controller", "--resume", "--run"]).arg(&roles.run);
    configured(&mut faster, &bench.sets(&["train.max_num_steps=2", "train.optm_lr=1e-2"]));
    let said = refused(faster.args(["--set", &format!("redis={}", roles.redis.port)]));
    assert!(said.contains("it belongs to another run: `train.optm_lr` is ") && said.contains("and not 0.01"), "{said}");
    let config = std::fs::read_to_string(roles.run.join("config.toml")).unwrap();
    assert!(!config.contains("optm_lr = 0.01\n"), "what is refused writes nothing");
}

#[test]
fn a_finished_run_goes_on_for_more_steps() {
    let Some(bench) = Bench::with_redis() else { return };
    let of_steps = |steps: u64| bench.sets(&[&format!("train.max_num_steps={steps}")]);
    let one = bench.in_one("", &of_steps(2));
    succeed(run_in_one(&one, &of_steps(STEPS)).arg("--resume"));
    let mut roles = bench.roles("", &of_steps(2));
    roles.start(&ONE_OF_EACH);
    roles.wait_for_end(0);
    roles.sets = of_steps(STEPS);
    roles.controller(true);
    ONE_OF_EACH.iter().for_each(|name| roles.role(name));
    roles.must_end_like(&one);
    let config = std::fs::read_to_string(roles.run.join("config.toml")).unwrap();
    assert!(config.contains("max_num_steps = 6\n"), "{config}");
}

// The original's ratio is to the policy as it was when the step began, so it is 1 however old the completions are, unless
// `use_rollout_logprobs_for_loss` says that it is to the weights that wrote them.
#[test]
fn the_ratio_is_to_the_weights_that_wrote_only_where_that_is_asked_for() {
    let Some(bench) = Bench::with_redis() else { return };
    let late = [
        "distillation.top_k=0",
        "train.train_policy.on_policy=false",
        "train.train_policy.allowed_outdated_steps=3",
        // Step 3 is made from what the weights of the start wrote.
        "train.sync_weight_interval=3",
        "train.max_num_steps=3",
        "train.optm_lr=1e-2",
        "train.optm_warmup_steps=0",
    ];
    for (name, set, is_to_the_writer) in [
        ("collected", "train.train_policy.collect_rollout_logprobs=true", false),
        ("used", "train.train_policy.use_rollout_logprobs_for_loss=true", true),
    ] {
        let mut roles = bench.roles(name, &bench.sets(&[&late[..], &[set]].concat()));
        roles.start(&ONE_OF_EACH);
        roles.wait_for_end(0);
        let last = metrics(&roles.run).pop().unwrap();
        assert_eq!(last["rollout/weight_staleness_max"], 2.0, "{name}: {last:#}");
        let far = |metric: &str| last[metric].as_f64().unwrap() > 1.001;
        assert_eq!(far("train/ratio_max"), is_to_the_writer, "{name}: {last:#}");
        assert_eq!(far("train/behaviour_ratio_max"), !is_to_the_writer, "{name}: {last:#}");
    }
}
