//! Faults of Redis, of messages and of their formats in live runs of several processes. The criterion is the same all over,
//! and is written at each test: the run ends well by itself, and its weights are bit for bit those of the undisturbed run
//! in one process, so that nothing was lost, trained twice or silently left out.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cosmos_testkit::repo_root;

use super::{Models, distil, host, succeed, text, weights_hash};

const STEPS: u64 = 6;
const WAIT: Duration = Duration::from_secs(240);

/// A Redis of the test's own: no password, this machine only, nothing on disk.
struct Redis {
    port: u16,
    child: Child,
    _dir: tempfile::TempDir,
}

fn has_redis() -> bool {
    let found = Command::new("redis-server").arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        eprintln!("skipped: there is no `redis-server`");
    }
    found
}

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

impl Redis {
    fn start() -> Self {
        Self::on(free_port(), &[])
    }

    fn on(port: u16, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"])
            .arg(dir.path())
            .args(more)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let redis = Self { port, child, _dir: dir };
        until("Redis to answer", || {
            redis.client().is_some_and(|mut c| c.ask(&[b"PING"]) == Reply::Text("PONG".into()))
        });
        redis
    }

    /// Killed, and started again with nothing in it.
    fn restart_empty(mut self) -> Self {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        Self::on(self.port, &[])
    }

    fn client(&self) -> Option<Client> {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Some(Client(BufReader::new(stream)))
    }

    fn set(&self) -> String {
        format!("redis={}", self.port)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Just enough of a client to be hostile.
struct Client(BufReader<TcpStream>);

#[derive(Debug, Clone, PartialEq)]
enum Reply {
    Nothing,
    Text(String),
    Bytes(Vec<u8>),
    Number(i64),
    List(Vec<Reply>),
}

impl Reply {
    fn list(self) -> Vec<Reply> {
        if let Reply::List(list) = self { list } else { Vec::new() }
    }

    fn bytes(self) -> Vec<u8> {
        if let Reply::Bytes(bytes) = self { bytes } else { Vec::new() }
    }
}

impl Client {
    fn ask(&mut self, command: &[&[u8]]) -> Reply {
        let mut out = format!("*{}\r\n", command.len()).into_bytes();
        for part in command {
            out.extend(format!("${}\r\n", part.len()).bytes());
            out.extend_from_slice(part);
            out.extend(b"\r\n");
        }
        match self.0.get_mut().write_all(&out) {
            Ok(()) => self.reply(),
            Err(_) => Reply::Nothing,
        }
    }

    fn reply(&mut self) -> Reply {
        let mut line = String::new();
        if self.0.read_line(&mut line).unwrap_or(0) == 0 {
            return Reply::Nothing;
        }
        let (kind, rest) = line.trim_end().split_at(1);
        let number: i64 = rest.parse().unwrap_or(-1);
        match kind {
            ":" => Reply::Number(number),
            "$" if number >= 0 => {
                let mut bytes = vec![0; number as usize + 2];
                self.0.read_exact(&mut bytes).unwrap();
                bytes.truncate(number as usize);
                Reply::Bytes(bytes)
            }
            "*" if number >= 0 => Reply::List((0..number).map(|_| self.reply()).collect()),
            "$" | "*" => Reply::Nothing,
            _ => Reply::Text(rest.into()),
        }
    }

    fn keys(&mut self, pattern: &str) -> Vec<Vec<u8>> {
        self.ask(&[b"KEYS", pattern.as_bytes()]).list().into_iter().map(Reply::bytes).collect()
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < WAIT, "waited for {what}");
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// A launched run, whose output goes to a file. It is ended with the test.
struct Launched {
    child: Child,
    run: PathBuf,
    log: PathBuf,
}

fn settings(sets: &[&str]) -> Vec<String> {
    let steps = format!("train.max_num_steps={STEPS}");
    let own = [steps.as_str(), "policy.parallelism.tp_size=1", "distillation.parallelism.tp_size=1"];
    own.iter().chain(sets).map(|s| s.to_string()).collect()
}

/// The command of [`distil`] as `launch local`.
fn launch(models: &Models, run: &Path, flags: &[&str], sets: &[&str]) -> Launched {
    let sets = settings(sets);
    let template = distil(models, run, &sets.iter().map(String::as_str).collect::<Vec<_>>());
    let mut command = host();
    command.args(["launch", "local", "--run"]).arg(run).args(flags);
    let mut arguments = template.get_args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("--output-dir") => drop(arguments.next()),
            _ => drop(command.arg(argument)),
        }
    }
    let log = run.with_extension("log");
    let out = File::create(&log).unwrap();
    let child = command.stdout(out.try_clone().unwrap()).stderr(out).spawn().unwrap();
    Launched { child, run: run.to_path_buf(), log }
}

impl Launched {
    fn steps(&self) -> usize {
        fs::read_to_string(self.run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for a state of the run; one that ended before fails the test.
    fn wait(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(self.child.try_wait().unwrap().is_none(), "the run ended before {what}\n{}", self.said());
            assert!(begun.elapsed() < WAIT, "waited for {what}\n{}", self.said());
            std::thread::sleep(Duration::from_millis(3));
        }
    }

    fn code(&mut self) -> Option<i32> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(begun.elapsed() < WAIT, "the run does not end\n{}", self.said());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn ends_well(mut self) -> String {
        let code = self.code();
        assert_eq!(code, Some(0), "{}", self.said());
        self.said()
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Weights of the undisturbed run in one process.
fn alone(models: &Models, run: &Path, sets: &[&str]) -> String {
    let sets = settings(sets);
    succeed(&mut distil(models, run, &sets.iter().map(String::as_str).collect::<Vec<_>>()));
    weights_hash(run, STEPS)
}

#[test]
fn redis_that_is_killed_and_comes_back_empty_costs_nothing() {
    if !has_redis() {
        return;
    }
    let (models, dir) = (Models::new(), tempfile::tempdir().unwrap());
    let expected = alone(&models, &dir.path().join("alone/run"), &[]);
    // In the middle of writing completions, and with those of a step stored.
    for (name, steps, pattern) in [("writing", 0, "*:teacher:*:requests"), ("stored", 2, "*:blob:completion/*")] {
        let redis = Redis::start();
        let run = dir.path().join(name);
        let mut launched = launch(&models, &run, &[], &[&redis.set()]);
        let mut client = redis.client().unwrap();
        launched.wait(name, |l| l.steps() >= steps && !client.keys(pattern).is_empty());
        let _redis = redis.restart_empty();
        launched.ends_well();
        assert_eq!(weights_hash(&run, STEPS), expected, "{name}");
    }
}

#[test]
fn the_launchers_redis_is_started_again_with_what_it_held() {
    if !has_redis() {
        return;
    }
    let (models, dir) = (Models::new(), tempfile::tempdir().unwrap());
    let expected = alone(&models, &dir.path().join("alone/run"), &[]);
    let run = dir.path().join("run");
    let mut launched = launch(&models, &run, &[], &[]);
    launched.wait("two steps", |l| l.steps() >= 2);
    assert!(Command::new("kill").args(["-9", &redis_of(&run).to_string()]).status().unwrap().success());
    let said = launched.ends_well();
    assert!(said.contains("is started again"), "{said}");
    assert_eq!(weights_hash(&run, STEPS), expected);
}

/// The process of the server that a launcher started.
fn redis_of(run: &Path) -> u32 {
    let url = fs::read_to_string(run.join("redis/redis.url")).unwrap();
    let port = url.rsplit(':').next().unwrap().split('/').next().unwrap().to_string();
    let named = |pid: u32| {
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.starts_with("redis-server") && line.contains(&format!(":{port}"))
    };
    let mut processes = fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok());
    processes.find(|pid| named(*pid)).unwrap_or(0)
}

/// Criterion: nobody is left behind by a launcher that could not say good-bye.
#[test]
fn a_killed_launcher_leaves_no_redis_behind() {
    if !has_redis() {
        return;
    }
    let (models, dir) = (Models::new(), tempfile::tempdir().unwrap());
    killed(&models, &dir.path().join("run"));
}

/// Starts a run, kills its launcher after two steps and waits until its Redis is gone.
fn killed(models: &Models, run: &Path) {
    let mut launched = launch(models, run, &[], &[]);
    launched.wait("two steps", |l| l.steps() >= 2);
    launched.child.kill().unwrap();
    launched.child.wait().unwrap();
    until("Redis to be ended", || redis_of(run) == 0);
}

/// Criterion: the run that a killed launcher left goes on by `--resume` from its newest good checkpoint.
#[test]
#[ignore = "part of the nightly tests"]
fn a_run_whose_launcher_was_killed_goes_on() {
    if !has_redis() {
        return;
    }
    let (models, dir) = (Models::new(), tempfile::tempdir().unwrap());
    let expected = alone(&models, &dir.path().join("alone/run"), &[]);
    let run = dir.path().join("run");
    killed(&models, &run);
    launch(&models, &run, &["--resume"], &[]).ends_well();
    assert_eq!(weights_hash(&run, STEPS), expected);
}

/// Criterion: while the server takes nothing in, the run waits; then it goes on as if nothing had been.
#[test]
fn a_full_redis_holds_the_run_up_and_no_more() {
    if !has_redis() {
        return;
    }
    let (models, dir) = (Models::new(), tempfile::tempdir().unwrap());
    let expected = alone(&models, &dir.path().join("alone/run"), &[]);
    let (redis, run) = (Redis::start(), dir.path().join("run"));
    let mut launched = launch(&models, &run, &[], &[&redis.set()]);
    launched.wait("a step", |l| l.steps() >= 1);
    let mut client = redis.client().unwrap();
    client.ask(&[b"CONFIG", b"SET", b"maxmemory", b"1"]);
    std::thread::sleep(Duration::from_secs(3));
    assert!(launched.child.try_wait().unwrap().is_none(), "{}", launched.said());
    client.ask(&[b"CONFIG", b"SET", b"maxmemory", b"0"]);
    launched.ends_well();
    assert_eq!(weights_hash(&run, STEPS), expected);
}

/// Criterion: the run fails within its deadlines, and names the server, what is wrong with it and the fix.
#[test]
#[ignore = "waits for deadlines; part of the nightly tests"]
fn a_redis_that_stays_full_fails_the_run_with_its_name_and_the_fix() {
    if !has_redis() {
        return;
    }
    let (models, dir) = (Models::new(), tempfile::tempdir().unwrap());
    let redis = Redis::on(free_port(), &["--maxmemory", "1"]);
    let sets = [&redis.set(), "host.broker_wait_ms_max=1000", "host.teacher_wait_ms_max=1000", "host.restarts_max=1"];
    let mut launched = launch(&models, &dir.path().join("run"), &[], &sets);
    assert_eq!(launched.code(), Some(1), "{}", launched.said());
    let said = launched.said();
    let server = format!("redis `127.0.0.1:{}` is full", redis.port);
    assert!(said.contains(&server) && said.contains("raise its `maxmemory`"), "{said}");
}

/// Criterion: refused before anything runs (exit code 2), with what to change.
#[test]
fn what_is_wrong_with_the_server_is_said_before_anything_starts() {
    if !has_redis() {
        return;
    }
    let (models, dir) = (Models::new(), tempfile::tempdir().unwrap());
    let evicting = Redis::on(free_port(), &["--maxmemory-policy", "allkeys-lfu"]);
    let url = format!("redis=redis://127.0.0.1:{}", evicting.port);
    for (set, said) in [
        (evicting.set(), "maxmemory-policy noeviction"),
        (url, "maxmemory-policy noeviction"),
        ("redis=nonsense://x".into(), "is no address of a Redis server"),
    ] {
        let run = dir.path().join("run");
        let mut launched = launch(&models, &run, &[], &[&set]);
        assert_eq!(launched.code(), Some(2), "{}", launched.said());
        assert!(launched.said().contains(said) && launched.said().contains("hint:"), "{}", launched.said());
        assert!(!run.join("control.json").exists());
    }
    let check = host().args(["config", "check", "configs/quickstart/countdown.toml", "--set", "redis=1:2"]).output();
    let check = check.unwrap();
    assert_eq!(check.status.code(), Some(2), "{}", text(&check));
}

/// Puts what does not belong there into the live streams, results and completions; counts what it did.
fn harass(client: &mut Client, done: &mut [usize; 4]) {
    for stream in client.keys("*:teacher:*:requests") {
        if done[0] >= 60 {
            break;
        }
        client.ask(&[b"XADD", &stream, b"*", b"x", b"foreign"]);
        client.ask(&[b"XADD", &stream, b"*", b"s", b"00000000-0000-0000-0000-000000000001", b"f", &[0; 50]]);
        done[0] += 1;
        for entry in client.ask(&[b"XRANGE", &stream, b"-", b"+", b"COUNT", b"3"]).list() {
            let fields: Vec<Vec<u8>> =
                entry.list().pop().map(Reply::list).unwrap_or_default().into_iter().map(Reply::bytes).collect();
            let [_, sample, _, frame] = fields.as_slice() else { continue };
            if sample.len() != 36 || frame.len() < 30 {
                continue;
            }
            // A copy, out of its order; then one cut short and one damaged.
            client.ask(&[b"XADD", &stream, b"*", b"s", sample, b"f", frame]);
            client.ask(&[b"XADD", &stream, b"*", b"s", sample, b"f", &frame[..20]]);
            let mut damaged = frame.clone();
            damaged[25] ^= 4;
            client.ask(&[b"XADD", &stream, b"*", b"s", sample, b"f", &damaged]);
            done[1] += 1;
        }
    }
    for sample in client.keys("*:teacher:*:s:*").into_iter().take(20) {
        let result = client.ask(&[b"HGET", &sample, b"r"]).bytes();
        if done[2] < 8 && result.len() > 10 {
            let cut = if done[2].is_multiple_of(2) { result[..result.len() / 2].to_vec() } else { b"junk".to_vec() };
            client.ask(&[b"HSET", &sample, b"r", &cut]);
            done[2] += 1;
        }
    }
    let blobs = client.keys("*:blob:completion/*");
    if let ([one, other, ..], true) = (blobs.as_slice(), done[3] < 6) {
        let (a, b) = (client.ask(&[b"GET", one]).bytes(), client.ask(&[b"GET", other]).bytes());
        if a.len() > 40 && b.len() > 40 {
            match done[3] % 3 {
                0 => drop(client.ask(&[b"SET", one, &a[..a.len() / 2]])),
                1 => drop((client.ask(&[b"SET", one, &b]), client.ask(&[b"SET", other, &a]))),
                _ => {
                    let mut damaged = a.clone();
                    damaged[39] ^= 1;
                    client.ask(&[b"SET", one, &damaged]);
                }
            }
            done[3] += 1;
        }
    }
}

/// Criterion: what is foreign or damaged is dropped and named in a log; what it stood for is asked for or written again.
#[test]
fn duplicate_corrupt_truncated_reordered_and_foreign_messages_change_nothing() {
    if !has_redis() {
        return;
    }
    let (models, dir) = (Models::new(), tempfile::tempdir().unwrap());
    let expected = alone(&models, &dir.path().join("alone/run"), &["distillation.top_k=0"]);
    let (redis, run) = (Redis::start(), dir.path().join("run"));
    let mut launched = launch(&models, &run, &[], &[&redis.set(), "distillation.top_k=0"]);
    let (mut client, mut done) = (redis.client().unwrap(), [0; 4]);
    while launched.child.try_wait().unwrap().is_none() && !(done[0] >= 60 && done[2] >= 8 && done[3] >= 6) {
        harass(&mut client, &mut done);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(done.iter().all(|n| *n > 0), "nothing was done to the run: {done:?}");
    let said = launched.ends_well();
    assert!(said.contains("message dropped") && said.contains("foreign"), "{said}");
    assert_eq!(weights_hash(&run, STEPS), expected);
}

/// Criterion: the placement of the roles and the way of the weights change no bit, whatever the formats between them.
#[test]
fn formats_and_transports_between_processes_change_no_bit() {
    if !has_redis() {
        return;
    }
    let (models, dir) = (Models::new(), tempfile::tempdir().unwrap());
    let plain = alone(&models, &dir.path().join("plain/run"), &["distillation.top_k=0"]);
    let formats = ["distillation.top_k=0", "distillation.wire_logprob_dtype=float16"];
    for (name, sets) in [
        ("store", vec!["host.weights_transport=store"]),
        ("logprobs", formats.to_vec()),
        ("hidden", vec!["distillation.top_k=-1", "distillation.hidden_dtype=bfloat16"]),
        ("sampled-bf16", vec!["distillation.top_k=0", "train.transfer_dtype=bfloat16"]),
        ("sampled-int8", vec!["distillation.top_k=0", "rollout.quantization=int8"]),
        ("teacher-bf16", vec!["distillation.top_k=-1", "distillation.master_dtype=bfloat16"]),
    ] {
        let expected = alone(&models, &dir.path().join(format!("{name}-alone/run")), &sets);
        let run = dir.path().join(name);
        launch(&models, &run, &[], &sets).ends_well();
        assert_eq!(weights_hash(&run, STEPS), expected, "{name}");
        assert_ne!(expected, plain, "{name}");
        assert!(!run.join("weights").exists(), "{name}: left over");
    }
}

/// A Python with what the peers need; skipped where there is none and none can be made.
fn python() -> Option<PathBuf> {
    let has_both = |program: &Path| {
        let check = Command::new(program).args(["-c", "import redis, msgpack"]).stderr(Stdio::null()).status();
        check.is_ok_and(|status| status.success())
    };
    let venv = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("cosmos-rl-peer-venv");
    let python = venv.join("bin/python");
    if has_both(Path::new("python3")) {
        return Some("python3".into());
    }
    let ran =
        |command: &mut Command| command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success());
    let made = has_both(&python)
        || ran(Command::new("python3").args(["-m", "venv"]).arg(&venv))
            && ran(Command::new(&python).args(["-m", "pip", "install", "-q", "--timeout", "15", "redis", "msgpack"]))
            && has_both(&python);
    if !made {
        eprintln!("skipped: there is no Python with `redis` and `msgpack`, and none could be installed");
    }
    made.then_some(python)
}

fn peer(python: &Path, redis: &Redis, arguments: &[&str]) -> Child {
    Command::new(python)
        .arg(repo_root().join("tests/python/cosmos_rl_roles.py"))
        .args(arguments)
        .env("PEER_REDIS_URL", format!("redis://127.0.0.1:{}", redis.port))
        .spawn()
        .unwrap()
}

fn peer_ends_well(mut child: Child) {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "the peer ended with {status}");
            return;
        }
        if begun.elapsed() > WAIT {
            let _ = child.kill();
            let _ = child.wait();
            panic!("the peer does not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Criterion: each of the original's requests is answered once, with numbers of the right shape that are log-probs, and the
/// teacher ends with the original's end marker.
#[test]
fn our_teacher_alone_serves_a_trainer_of_the_original() {
    let (true, Some(python)) = (has_redis(), python()) else { return };
    let models = Models::new();
    for top_k in ["0", "4"] {
        let redis = Redis::start();
        let mut command = host();
        command.args(["teacher", "--config", "configs/quickstart/countdown.toml"]);
        command.args(["--plugin", "plugins/dist/countdown.wasm", "--set", &redis.set()]);
        for set in [
            format!("policy.model_name_or_path={}", models.student.display()),
            format!("distillation.model_name_or_path={}", models.teacher.display()),
            format!("distillation.top_k={top_k}"),
            "distillation.wire=cosmos-rl".into(),
        ] {
            command.args(["--set", &set]);
        }
        let teacher = command.spawn().unwrap();
        peer_ends_well(peer(&python, &redis, &["trainer", "--top-k", top_k]));
        peer_ends_well(teacher);
    }
}

/// Criterion: every completion of the run is trained on with the original teacher's numbers (none is missing), and that
/// teacher hears of the end.
#[test]
fn our_run_trains_on_what_a_teacher_of_the_original_says() {
    let (true, Some(python)) = (has_redis(), python()) else { return };
    let (models, dir) = (Models::new(), tempfile::tempdir().unwrap());
    let (redis, run) = (Redis::start(), dir.path().join("run"));
    let teacher = peer(&python, &redis, &["teacher", "--top-k", "0"]);
    let include = "distillation.include_prompt=true";
    let sets = [&redis.set(), "distillation.wire=cosmos-rl", "distillation.top_k=0", include];
    let said = launch(&models, &run, &["--teachers", "0"], &sets).ends_well();
    peer_ends_well(teacher);
    assert!(!said.contains("left out of the loss"), "{said}");
    let last = super::metrics(&run).pop().unwrap();
    assert!(last["train/loss_avg"].as_f64().is_some_and(f64::is_finite), "{last:#}");
}
