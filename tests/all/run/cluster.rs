//! A whole run of processes under `launch local`, watched from outside: who does what, frozen and killed at chosen points.
//!
//! A process is frozen by SIGSTOP when the controller says that it is carrying out a certain order, and only counts as
//! caught if the controller still says so afterwards. So a kill falls where it is meant to, however fast the machine is.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cosmos_broker::{Broker, QueueOptions, RedisAddress, RedisBroker, RedisLimits, RedisLink};
use cosmos_control::{Target, fetch_status};
use serde_json::Value;

use super::{host, metrics, succeed, weights_hash};

/// Steps of the runs here.
pub const STEPS: u64 = 5;
/// Completions of one step and policy.
pub const BATCH: u64 = 64;
/// No run here takes so long, disturbed or not, unless it hangs.
const HANG: Duration = Duration::from_secs(240);
/// How long a point may take to come.
const CATCH: Duration = Duration::from_secs(120);

/// Whether runs of several processes are possible here; says so where they are not.
pub fn possible() -> bool {
    let there = Command::new("redis-server").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    let there = there.is_ok_and(|status| status.success());
    if !there {
        eprintln!("skipped: `redis-server` is not installed");
    }
    there
}

fn settings(extra: &[&str]) -> Vec<String> {
    let mut all = vec![
        "train.timestamp=1".to_string(),
        format!("train.max_num_steps={STEPS}"),
        format!("train.train_batch_per_replica={BATCH}"),
        "train.train_policy.mini_batch=32".into(),
        // Sums over ranks have other last bits than those of the run in one process that these are compared with.
        "policy.parallelism.tp_size=1".into(),
        "distillation.parallelism.tp_size=1".into(),
        "train.ckpt.save_freq=2".into(),
        "train.ckpt.max_keep=-1".into(),
        "validation.enable=false".into(),
        "host.samples_logged=2".into(),
    ];
    all.extend(extra.iter().map(|set| (*set).to_string()));
    all.into_iter().flat_map(|set| ["--set".to_string(), set]).collect()
}

fn what_every_command_gets(command: &mut Command, extra: &[&str]) {
    command.args(["--config", "configs/quickstart/countdown.toml", "--plugin", "plugins/dist/countdown.wasm"]);
    command.args(settings(extra));
}

/// The same run in one process, never disturbed: its folder.
pub fn undisturbed(dir: &Path, extra: &[&str]) -> PathBuf {
    let run = dir.join("undisturbed/run");
    let mut command = host();
    command.arg("run");
    what_every_command_gets(&mut command, extra);
    succeed(command.arg("--output-dir").arg(&run));
    run
}

/// A run that is going on.
pub struct Cluster {
    launcher: Child,
    pub run: PathBuf,
    extra: Vec<String>,
    others: Vec<Child>,
}

impl Cluster {
    /// Launches a run into `dir`. `extra` are settings, `arguments` are `launch local`'s own.
    pub fn launch(dir: &Path, extra: &[&str], arguments: &[&str]) -> Self {
        let run = dir.join("run");
        let extra: Vec<String> = extra.iter().map(|set| (*set).to_string()).collect();
        let launcher = start_launcher(&run, &extra, arguments);
        Self { launcher, run, extra, others: Vec::new() }
    }

    /// Goes on with a run that another has left in `run`.
    pub fn take_up(run: PathBuf, extra: &[&str]) -> Self {
        let extra: Vec<String> = extra.iter().map(|set| (*set).to_string()).collect();
        let launcher = start_launcher(&run, &extra, &["--resume"]);
        Self { launcher, run, extra, others: Vec::new() }
    }

    /// Goes on with a run that has ended.
    pub fn resume(&mut self) {
        self.others.clear();
        self.launcher = start_launcher(&self.run, &self.extra, &["--resume"]);
    }

    /// A role that nobody planned joins. `arguments` follow the usual ones.
    pub fn join(&mut self, role: &str, name: &str, arguments: &[&str]) -> &mut Child {
        let mut command = host();
        let extra: Vec<&str> = self.extra.iter().map(String::as_str).collect();
        command.arg(role);
        what_every_command_gets(&mut command, &extra);
        command.arg("--run").arg(&self.run).args(["--name", name]).args(arguments);
        let log = File::create(self.run.join("logs").join(format!("{name}.log"))).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.others.push(command.spawn().unwrap());
        self.others.last_mut().unwrap()
    }

    /// The launcher's process id.
    pub fn launcher(&self) -> u32 {
        self.launcher.id()
    }

    /// Process ids of what the launcher has started, by name.
    pub fn processes(&self) -> BTreeMap<String, u32> {
        let mut found = BTreeMap::new();
        for id in self.children() {
            let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            let words: Vec<String> = line.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into()).collect();
            let name = words.iter().skip_while(|word| *word != "--name").nth(1);
            match (words.get(1).map(String::as_str), name) {
                (Some("controller"), _) => drop(found.insert("controller".to_string(), id)),
                (_, Some(name)) => {
                    // The further processes of a replica have its name and a number of their own.
                    let rank = words.iter().skip_while(|word| *word != "--node-rank").nth(1);
                    let name = rank.filter(|rank| *rank != "0").map_or(name.clone(), |rank| format!("{name}.{rank}"));
                    found.insert(name, id);
                }
                _ => {}
            }
        }
        found
    }

    /// All that the launcher has started, Redis too.
    pub fn children(&self) -> Vec<u32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.launcher.id())).into_iter().flatten().flatten();
        let children = tasks.map(|task| fs::read_to_string(task.path().join("children")).unwrap_or_default());
        children.flat_map(|ids| ids.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>()).collect()
    }

    /// The process that has this name now.
    pub fn id(&self, name: &str) -> u32 {
        self.until(&format!("a process `{name}`"), || self.processes().get(name).copied())
    }

    /// What the controller says; none while there is none.
    pub fn status(&self) -> Option<Value> {
        fetch_status(&Target::Run(self.run.clone()), 5_000).ok()
    }

    /// The order that a replica carries out, if it is `doing` with details that contain `at`.
    pub fn order(&self, name: &str, doing: &str, at: &str) -> Option<u64> {
        let status = self.status()?;
        let replica = status["replicas"].as_array()?.iter().find(|r| r["name"] == name)?.clone();
        let fits = replica["doing"] == doing && replica["details"].as_str().is_some_and(|d| d.contains(at));
        if fits { replica["order"].as_u64() } else { None }
    }

    /// Freezes a replica in the middle of an order. `doing`: generate, train, load, save, validate, finish; `at`: what the
    /// order's details contain.
    pub fn freeze(&self, name: &str, doing: &str, at: &str) -> u32 {
        self.until(&format!("`{name}` to {doing} ({at})"), || {
            // It runs in slices, so that an order cannot pass between two looks.
            let id = *self.processes().get(name)?;
            signal(id, "STOP");
            let caught = self.order(name, doing, at).filter(|order| {
                // A report that was on its way has arrived by the last of these.
                (0..3).all(|_| {
                    std::thread::sleep(Duration::from_millis(10));
                    self.order(name, doing, at) == Some(*order)
                })
            });
            if caught.is_none() {
                signal(id, "CONT");
                std::thread::sleep(Duration::from_millis(4));
            }
            caught.map(|_| id)
        })
    }

    /// Freezes a teacher while it holds requests: read, and not acknowledged.
    pub fn freeze_teacher_with_requests(&self, name: &str) -> u32 {
        let queue = self.queue();
        self.until(&format!("`{name}` to hold requests"), || {
            let id = *self.processes().get(name)?;
            signal(id, "STOP");
            let held = || queue.stats().unwrap().delivered;
            let (before, _, after) = (held(), std::thread::sleep(Duration::from_millis(20)), held());
            if before > 0 && after == before {
                return Some(id);
            }
            signal(id, "CONT");
            std::thread::sleep(Duration::from_millis(10));
            None
        })
    }

    /// The run's teacher queue.
    pub fn queue(&self) -> RedisBroker {
        let controller = self.id("controller");
        let variables = fs::read(format!("/proc/{controller}/environ")).unwrap();
        let url = variables.split(|b| *b == 0).find_map(|v| v.strip_prefix(b"COSMOS_BROKER_URL=")).unwrap();
        let address = RedisAddress::parse(std::str::from_utf8(url).unwrap()).unwrap();
        let link = RedisLink::connect(&address, RedisLimits::default()).unwrap();
        let run = self.until("the run's name", || fs::read_to_string(self.run.join("run_name")).ok());
        RedisBroker::new(link, QueueOptions::new(&run, "teacher"))
    }

    /// Waits until all of these words stand in the logs.
    pub fn until_said(&self, words: &[&str]) {
        self.until(&format!("{words:?} in the logs"), || {
            let said = self.said();
            words.iter().all(|word| said.contains(word)).then_some(())
        });
    }

    /// Waits until the run has recorded `steps` steps.
    pub fn wait_for_steps(&self, steps: u64) {
        self.until(&format!("{steps} steps"), || (steps_recorded(&self.run).len() as u64 >= steps).then_some(()));
    }

    /// Waits until `found` finds something, as long as the launcher lives.
    pub fn until<T>(&self, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + CATCH;
        loop {
            if let Some(found) = found() {
                return found;
            }
            let alive = is_alive(self.launcher.id());
            assert!(alive, "the launcher ended while waiting for {what}\n{}", self.logs());
            assert!(Instant::now() < deadline, "waited in vain for {what}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for the launcher's end: its exit code; none if a signal ended it. Beyond the deadline it is a hang.
    pub fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + HANG;
        loop {
            if let Some(status) = self.launcher.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "the run hangs\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the end of a role that joined, in the order they did.
    pub fn wait_for_joined(&mut self, index: usize) -> Option<i32> {
        let deadline = Instant::now() + HANG;
        loop {
            if let Some(status) = self.others[index].try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "a role that joined hangs\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Everything that the processes said, and what the controller says.
    pub fn logs(&self) -> String {
        format!("status: {:#}\n", self.status().unwrap_or_default()) + &self.said()
    }

    /// Everything that the processes said.
    pub fn said(&self) -> String {
        let mut all = String::new();
        let mut files = vec![self.run.with_extension("launcher.log")];
        files.extend(fs::read_dir(self.run.join("logs")).into_iter().flatten().flatten().map(|entry| entry.path()));
        for file in files {
            all += &format!("== {}\n{}\n", file.display(), fs::read_to_string(&file).unwrap_or_default());
        }
        all
    }

    /// The pass criterion of every fault: the run ended by itself with exit code 0; each step is recorded once, with all its
    /// samples and all the teacher's answers; and the final weights are those of the undisturbed run, bit for bit.
    pub fn must_end_like(&mut self, undisturbed: &Path) {
        let code = self.wait();
        assert_eq!(code, Some(0), "{}", self.logs());
        self.must_be_like(undisturbed);
    }

    /// What [`Self::must_end_like`] says of a run that has ended.
    pub fn must_be_like(&self, undisturbed: &Path) {
        self.must_have_lost_nothing(STEPS * BATCH);
        for (own, theirs) in train_rows(&self.run).iter().zip(train_rows(undisturbed)) {
            for name in ["train/loss_avg", "train/grad_norm", "train/tokens", "rollout/completion_length_mean"] {
                assert_eq!(own[name], theirs[name], "{name} of step {}\n{}", own["step"], self.logs());
            }
        }
        assert_eq!(weights_hash(&self.run, STEPS), weights_hash(undisturbed, STEPS), "{}", self.logs());
    }

    /// Each step once, `samples` in all, none without its teacher's answer.
    pub fn must_have_lost_nothing(&self, samples: u64) {
        let steps: Vec<u64> = (1..=STEPS).collect();
        assert_eq!(steps_recorded(&self.run), steps, "{}", self.logs());
        for row in train_rows(&self.run) {
            assert_eq!(row["train/teacher_missing_samples"], 0.0, "step {}\n{}", row["step"], self.logs());
            assert_eq!(row["train/skipped_steps"], 0.0, "step {}", row["step"]);
        }
        let summary: Value = serde_json::from_str(&fs::read_to_string(self.run.join("summary.json")).unwrap()).unwrap();
        assert_eq!(summary["samples"], samples, "{summary:#}");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Those that a test has frozen cannot notice that the launcher is gone, and nobody else ends Redis.
        let children = self.children();
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
        for child in &mut self.others {
            let _ = child.kill();
            let _ = child.wait();
        }
        children.into_iter().for_each(|id| signal(id, "KILL"));
    }
}

fn start_launcher(run: &Path, extra: &[String], arguments: &[&str]) -> Child {
    let mut command = host();
    command.args(["launch", "local"]).arg("--run").arg(run).args(arguments);
    let extra: Vec<&str> = extra.iter().map(String::as_str).collect();
    what_every_command_gets(&mut command, &extra);
    let log = fs::OpenOptions::new().create(true).append(true).open(run.with_extension("launcher.log")).unwrap();
    command.env("COSMOS_LOG_LEVEL", "info").stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    command.spawn().unwrap()
}

/// Steps in a run's metrics, in their order, validations left out.
pub fn steps_recorded(run: &Path) -> Vec<u64> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    // The last line may be half written.
    let rows = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    rows.filter(|row| row["train/loss_avg"].is_number()).filter_map(|row| row["step"].as_u64()).collect()
}

fn train_rows(run: &Path) -> Vec<Value> {
    metrics(run).into_iter().filter(|row| row["train/loss_avg"].is_number()).collect()
}

/// Sends a signal.
pub fn signal(id: u32, name: &str) {
    // A process that is gone already needs none.
    let _ = Command::new("kill").args([format!("-{name}"), id.to_string()]).stderr(Stdio::null()).status();
}

/// Whether a process is there and no zombie.
pub fn is_alive(id: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Asks `name` (or the launcher) to leave while the only policy makes step `step`, which it finishes. The run ends as one that
/// is to be resumed: the steps that it has recorded.
pub fn asked_to_stop(cluster: &mut Cluster, name: &str, step: u64) -> u64 {
    let policy = cluster.freeze("policy-0", "train", &format!("step {step},"));
    let id = if name == "launcher" { cluster.launcher() } else { cluster.id(name) };
    signal(id, "TERM");
    // Held back until the controller knows, a run that is faster than the news would be over. A frozen process knows nothing.
    if name != "policy-0" {
        let known = ["asked to leave: saving", &format!("`{name}` was asked to leave and is the last")];
        cluster.until("the controller to know", || {
            let said = fs::read_to_string(cluster.run.join("logs/controller.log")).unwrap_or_default();
            known.iter().any(|words| said.contains(words)).then_some(())
        });
    }
    signal(policy, "CONT");
    assert_eq!(cluster.wait(), Some(75), "{name}\n{}", cluster.logs());
    steps_recorded(&cluster.run).len() as u64
}
