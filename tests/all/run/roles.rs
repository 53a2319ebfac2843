//! A run of several processes under the hands of a test: roles that are started, killed and started again, with a private
//! Redis.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use cosmos_control::{Target, fetch_status};
use serde_json::Value;

use super::{Models, host};

/// No run of these tests takes nearly as long.
const PATIENCE: Duration = Duration::from_secs(180);

/// Whether there is a `redis-server`; a line says so when there is none.
pub fn has_redis() -> bool {
    let found = Command::new("redis-server").arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        eprintln!("skipped: there is no `redis-server`");
    }
    found
}

/// A private Redis server.
pub struct Redis {
    child: Child,
    pub port: u16,
}

impl Redis {
    pub fn start() -> Self {
        let port = free_port();
        Self { child: Self::spawn(port), port }
    }

    fn spawn(port: u16) -> Child {
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"]);
        command.args(["--port", &port.to_string()]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Kills it.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Kills it and starts an empty one in its place.
    pub fn restart_empty(&mut self) {
        self.kill();
        self.child = Self::spawn(self.port);
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Settings of a run that takes seconds; the same for one process and for many.
pub fn settings(models: &Models) -> Vec<String> {
    [
        format!("policy.model_name_or_path={}", models.student.display()),
        format!("distillation.model_name_or_path={}", models.teacher.display()),
    ]
    .into_iter()
    .chain(
        [
            "train.max_num_steps=6",
            "train.train_batch_per_replica=32",
            "train.train_policy.mini_batch=8",
            "train.ckpt.save_freq=2",
            "train.ckpt.max_keep=-1",
            "validation.enable=false",
            "rollout.max_response_length=8",
            "distillation.mini_batch=8",
            "distillation.batch_size_per_replica=8",
            "host.decode_slots=8",
            "host.silent_ms_max=1500",
            "policy.parallelism.tp_size=1",
            "distillation.parallelism.tp_size=1",
        ]
        .map(str::to_string),
    )
    .collect()
}

/// Adds config, plugin and settings to a command of the binary.
pub fn configured(command: &mut Command, sets: &[String]) {
    command.args(["--config", "configs/quickstart/countdown.toml", "--plugin", "plugins/dist/countdown.wasm"]);
    for set in sets {
        command.args(["--set", set]);
    }
}

/// The processes of a run.
pub struct Roles {
    pub run: PathBuf,
    pub redis: Redis,
    pub sets: Vec<String>,
    children: BTreeMap<String, Child>,
    logs: PathBuf,
    starts: usize,
    /// Where the processes of a replica that has two of them meet.
    rendezvous: BTreeMap<String, u16>,
}

impl Roles {
    /// A run in `dir` whose processes all have `sets`; none is started yet.
    pub fn new(dir: &Path, sets: Vec<String>) -> Self {
        let logs = dir.join("logs");
        fs::create_dir_all(&logs).unwrap();
        Self {
            run: dir.join("run"),
            redis: Redis::start(),
            sets,
            children: BTreeMap::new(),
            logs,
            starts: 0,
            rendezvous: BTreeMap::new(),
        }
    }

    /// Starts a controller, or goes on with its run.
    pub fn controller(&mut self, resume: bool) {
        let mut command = host();
        command.arg("controller");
        if resume {
            command.arg("--resume");
        }
        command.arg("--run").arg(&self.run);
        self.spawn("controller", command);
    }

    /// Starts `policy-0`, `rollout-1` and the like. `policy-0.0` and `policy-0.1` are the two processes of `policy-0`.
    pub fn role(&mut self, name: &str) {
        let mut command = host();
        let (replica, part) = name.split_once('.').map_or((name, None), |(replica, part)| (replica, Some(part)));
        command.arg(name.split('-').next().unwrap()).args(["--name", replica]);
        if let Some(part) = part {
            let port = *self.rendezvous.entry(replica.to_string()).or_insert_with(free_port);
            command.args(["--nodes", "2", "--node-rank", part, "--rendezvous", &format!("127.0.0.1:{port}")]);
        }
        command.arg("--run").arg(&self.run);
        self.spawn(name, command);
    }

    /// Starts a role that knows only the controller's address.
    pub fn role_at(&mut self, name: &str, url: &str, token: &str) {
        let mut command = host();
        command.arg(name.split('-').next().unwrap()).args(["--name", name, "--controller", url]);
        command.env("COSMOS_CONTROL_TOKEN", token);
        self.spawn(name, command);
    }

    /// Starts a policy that may write no file of more than `kib_max` KiB.
    pub fn policy_with_small_files(&mut self, name: &str, kib_max: u64) {
        let mut command = Command::new("sh");
        // The signal (XFSZ) would end it before it could say why. The shell counts in blocks of 512 bytes.
        let script = format!("trap '' 25; ulimit -f {}; exec \"$@\"", kib_max * 2);
        command.args(["-c", &script, "sh"]).arg(host().get_program()).args(["policy", "--name", name]);
        let own = host();
        command.current_dir(own.get_current_dir().unwrap());
        own.get_envs().filter_map(|(key, value)| Some((key, value?))).for_each(|(key, value)| {
            command.env(key, value);
        });
        command.arg("--run").arg(&self.run);
        self.spawn(name, command);
    }

    /// The controller's address and token, once it is there.
    pub fn control(&mut self) -> (String, String) {
        let mut found = None;
        let file = self.run.join("control.json");
        self.wait_until("`control.json`", || {
            found = fs::read(&file).ok().and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
            found.is_some()
        });
        let found = found.unwrap();
        let word = |key: &str| found[key].as_str().unwrap().to_string();
        (word("url"), word("token"))
    }

    /// Starts a controller and these roles.
    pub fn start(&mut self, names: &[&str]) {
        self.controller(false);
        names.iter().for_each(|name| self.role(name));
    }

    fn spawn(&mut self, name: &str, mut command: Command) {
        configured(&mut command, &self.sets);
        command.args(["--set", &format!("redis=redis://127.0.0.1:{}", self.redis.port)]);
        self.starts += 1;
        let log = File::create(self.logs.join(format!("{:02}-{name}.log", self.starts))).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log).stdin(Stdio::null());
        let child = command.spawn().unwrap();
        assert!(self.children.insert(name.to_string(), child).is_none(), "{name} runs already");
    }

    /// Steps recorded so far.
    pub fn steps(&self) -> usize {
        fs::read_to_string(self.run.join("metrics.jsonl")).map(|t| t.lines().count()).unwrap_or(0)
    }

    /// Waits until `steps` are recorded.
    pub fn wait_for_steps(&mut self, steps: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.steps() < steps {
            self.check(deadline, &format!("step {steps}"));
        }
    }

    /// Waits until the controller knows a process.
    pub fn wait_until_joined(&mut self, name: &str) {
        let target = Target::Run(self.run.clone());
        let knows =
            |status: &Value| status["replicas"].as_array().is_some_and(|all| all.iter().any(|r| r["name"] == name));
        self.wait_until(name, || fetch_status(&target, 1_000).is_ok_and(|status| knows(&status)));
    }

    /// Waits until `happened` says so.
    pub fn wait_until(&mut self, what: &str, mut happened: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !happened() {
            self.check(deadline, what);
        }
    }

    /// Waits until some process has said this.
    pub fn wait_for_log(&mut self, words: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(words) {
            self.check(deadline, &format!("`{words}`"));
        }
    }

    fn check(&mut self, deadline: Instant, what: &str) {
        assert!(Instant::now() < deadline, "{what} has not come\n{}", self.log());
        std::thread::sleep(Duration::from_millis(5));
    }

    /// Ends a process with `signal` (as `-KILL`) and waits until it has gone.
    pub fn signal(&mut self, name: &str, signal: &str) -> ExitStatus {
        let mut child = self.children.remove(name).unwrap();
        let status = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert!(status.success() || child.try_wait().unwrap().is_some());
        child.wait().unwrap()
    }

    /// Stops a process where it is; it keeps its connections and says nothing.
    pub fn freeze(&self, name: &str) {
        let id = self.children[name].id().to_string();
        assert!(Command::new("kill").args(["-STOP", &id]).status().unwrap().success());
    }

    /// Kills a process and starts it again.
    pub fn kill_and_restart(&mut self, name: &str) {
        self.signal(name, "-KILL");
        match name {
            "controller" => self.controller(true),
            role => self.role(role),
        }
    }

    /// Waits for the end of one process.
    pub fn wait_for_end_of(&mut self, name: &str) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        let mut child = self.children.remove(name).unwrap();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            self.check(deadline, &format!("the end of {name}"));
        }
    }

    /// Waits for the end of all processes; each must end with `code`.
    pub fn wait_for_end(&mut self, code: i32) {
        let deadline = Instant::now() + PATIENCE;
        while !self.children.is_empty() {
            let mut ended = Vec::new();
            for (name, child) in &mut self.children {
                if let Some(status) = child.try_wait().unwrap() {
                    ended.push((name.clone(), status));
                }
            }
            for (name, status) in ended {
                self.children.remove(&name);
                assert_eq!(status.code(), Some(code), "{name} ended with {status}\n{}", self.log());
            }
            let left: Vec<&str> = self.children.keys().map(String::as_str).collect();
            let what = format!("the end of {}", left.join(", "));
            self.check(deadline, &what);
        }
    }

    /// What all processes have written.
    pub fn log(&self) -> String {
        let mut files: Vec<PathBuf> = fs::read_dir(&self.logs).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        let text = |path: &PathBuf| format!("== {}\n{}", path.display(), fs::read_to_string(path).unwrap_or_default());
        files.iter().map(text).collect()
    }
}

impl Drop for Roles {
    fn drop(&mut self) {
        for child in self.children.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
