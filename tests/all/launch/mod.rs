//! Launching beyond one machine: plans, jobs for schedulers, and nodes that are started by hand on this machine.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const DEEPMATH: &str = "configs/qwen3/qwen3-8b-distill-deepmath.toml";
const QUICKSTART: &str = "configs/quickstart/countdown.toml";
/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(120);

fn cosmos_host() -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("cosmos-host"));
    for variable in ["SLURM_NODEID", "LEPTON_JOB_WORKER_INDEX", "JOB_COMPLETION_INDEX", "COSMOS_CONTROL_TOKEN"] {
        command.env_remove(variable);
    }
    command.current_dir(cosmos_testkit::repo_root()).stdin(Stdio::null());
    command
}

fn launch(arguments: &[&str]) -> Output {
    cosmos_host().arg("launch").args(arguments).output().expect("the binary starts")
}

fn printed(arguments: &[&str]) -> String {
    let output = launch(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refused(arguments: &[&str]) -> String {
    let output = launch(arguments);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
    text
}

#[test]
fn a_plan_is_a_table_and_json() {
    let gpus = ["--config", DEEPMATH, "--set", "host.device=burn:cuda"];
    let table = printed(&[&["plan"], &gpus[..]].concat());
    for line in ["NODE  PROCESS     RANKS  DEVICES  CORES  PORT   RENDEZVOUS", "1 node of 8 GPUs, 0 idle"] {
        assert!(table.lines().any(|l| l == line), "{line} is missing in\n{table}");
    }
    let plan: Value = serde_json::from_str(&printed(&[&["plan", "--json"], &gpus[..]].concat())).unwrap();
    assert_eq!(plan["nodes"], 1);
    let devices: Vec<&Value> = plan["replicas"].as_array().unwrap().iter().map(|r| &r["parts"][0]["devices"]).collect();
    assert_eq!(devices.len(), 3);
    let apart: Value =
        serde_json::from_str(&printed(&[&["plan", "--json", "--gpus-per-node", "4"], &gpus[..]].concat())).unwrap();
    assert_eq!(apart["nodes"], 2);
    let error = refused(&[&["plan", "--gpus-per-node", "4", "--nodes", "1"], &gpus[..]].concat());
    assert!(error.contains("need 8 GPUs on 2 nodes of 4, and there are 1 nodes with 4 GPUs"), "{error}");
    assert!(refused(&[&["plan", "--gpus-per-node", "0"], &gpus[..]].concat()).contains("the nodes have 0 GPUs"));
}

#[test]
fn a_slurm_job_is_printed_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("runs");
    let root = root.to_str().unwrap();
    let job =
        ["slurm", "--config-path", QUICKSTART, "--plugin", "plugins/dist/countdown.wasm", "--output-root-path", root];
    let script = printed(&[&job[..], &["--dry-run", "--duration", "1.5", "--extra-sbatch-args", "qos=high"]].concat());
    for line in ["#SBATCH --time=01:30:00", "#SBATCH --signal=B:USR1@1200", "#SBATCH --qos=high", "#SBATCH --requeue"] {
        assert!(script.lines().any(|l| l == line), "{line} is missing in\n{script}");
    }
    assert!(!Path::new(root).exists());
    let late = [&job[..], &["--duration", "0.1"]].concat();
    assert!(refused(&late).contains("leaves no time"));
    let no_image = [&job[..], &["--container", "/no/such.sqsh"]].concat();
    assert!(refused(&no_image).contains("/no/such.sqsh"));
    for (more, said) in [
        (&["--mount-dirs", "/tmp:/data"][..], "--cosmos-container"),
        (&["--job-name", "../a"], "is no name"),
        (&["--duration", "-1"], "no number of hours"),
        (&["--set", "host.device=tpu"], "which is no device: this build offers cpu"),
    ] {
        assert!(refused(&[&job[..], more].concat()).contains(said), "{more:?}");
    }
    if !cfg!(feature = "burn-cuda") {
        let no_gpu = refused(&[&job[..], &["--set", "host.device=burn:cuda"]].concat());
        assert!(
            no_gpu.contains("this build offers cpu, burn:flex") && no_gpu.contains("--features burn-cuda"),
            "{no_gpu}"
        );
    }
    // What every node would refuse is refused before the job is queued.
    let plugin = |files: &[&str]| {
        let given: Vec<&str> = files.iter().flat_map(|file| ["--plugin", *file]).collect();
        refused(&[&["slurm", "--config-path", QUICKSTART, "--output-root-path", root][..], &given].concat())
    };
    assert!(plugin(&[]).contains("there is nothing to train on"));
    assert!(plugin(&["LICENSE"]).contains("is not WebAssembly: it is text"));
    assert!(plugin(&["plugins/dist/calculator.wasm"]).contains("does not grant"));
    assert!(!Path::new(root).exists());
    // Without sbatch in PATH the job is written, and the way to submit it is told.
    let output = cosmos_host().arg("launch").args(job).env("PATH", "/nonexistent").output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.code() == Some(1) && error.contains("cannot start `sbatch`") && error.contains("doctor"),
        "{error}"
    );
}

#[test]
fn a_node_tells_why_its_controller_ended() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().to_str().unwrap();
    let script = folder.path().join("role");
    std::fs::write(&script, "#!/bin/sh\necho \"error: $1 was told nonsense\" >&2\nexit 2\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let output = cosmos_host()
        .args(["launch", "node", "--config", QUICKSTART, "--run", run, "--set", "redis=redis://127.0.0.1:1/0"])
        .env("COSMOS_LAUNCH_PROGRAM", &script)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(2) && error.contains(" was told nonsense"), "{error}");
    let empty = refused(&["node", "--config", QUICKSTART, "--run", run, "--node-ip-list", " ;"]);
    assert!(empty.contains("`--node-ip-list` has no address"), "{empty}");
}

#[test]
fn nodes_say_for_whom_they_waited() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().to_str().unwrap();
    let output = cosmos_host()
        .args(["launch", "node", "--config", QUICKSTART, "--run", run, "--nodes", "2", "--names-wait", "0"])
        .envs([("LEPTON_JOB_WORKER_INDEX", "0"), ("LEPTON_JOB_NAME", "job"), ("LEPTON_SUBDOMAIN", "invalid")])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("worker 1 (`job-1.invalid`)"), "{error}");
    let lost = refused(&["node", "--config", QUICKSTART, "--run", run, "--nodes", "2"]);
    assert!(lost.contains("nothing says where they are"), "{lost}");
    let no_token = refused(&[
        "node",
        "--config",
        QUICKSTART,
        "--run",
        run,
        "--node-ip-list",
        "127.0.0.1;127.0.0.2",
        "--worker-idx",
        "0",
    ]);
    assert!(no_token.contains("share no token"), "{no_token}");
}

/// Two nodes on loopback, with roles that a script plays.
struct Nodes {
    folder: tempfile::TempDir,
    children: Vec<Child>,
}

impl Nodes {
    fn start(steps: u32, more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let play = folder.path().join("play");
        std::fs::create_dir_all(&play).unwrap();
        let script = cosmos_testkit::repo_root().join("tests/slurm/stand_in.sh");
        let children = ["0", "1"].map(|index| {
            cosmos_host()
                .args(["launch", "node", "--config", QUICKSTART, "--run"])
                .arg(folder.path())
                // A server of somebody else: none is started.
                .args(["--set", "redis=redis://127.0.0.1:1/0", "--n-rollout-replicas", "2"])
                .args(["--node-ip-list", "127.0.0.1;127.0.0.2", "--worker-idx", index])
                .args(more)
                .env("COSMOS_CONTROL_TOKEN", "t".repeat(64))
                .env("COSMOS_LAUNCH_PROGRAM", &script)
                .env("STAND_IN", &play)
                .env("STEPS", steps.to_string())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        });
        Self { folder, children: children.into() }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("play").join(name)
    }

    fn wait_for(&self, name: &str) {
        let until = Instant::now() + PATIENCE;
        while !self.file(name).exists() {
            assert!(Instant::now() < until, "no {name}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn codes(&mut self) -> Vec<Option<i32>> {
        let until = Instant::now() + PATIENCE;
        let wait = |child: &mut Child| loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < until, "a node did not end");
            std::thread::sleep(Duration::from_millis(20));
        };
        self.children.iter_mut().map(wait).collect()
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn two_nodes_run_to_the_end() {
    let mut nodes = Nodes::start(6, &[]);
    assert_eq!(nodes.codes(), [Some(0), Some(0)]);
    for name in ["controller", "policy-0", "rollout-0", "rollout-1", "teacher-0"] {
        assert!(nodes.file(&format!("seen-{name}")).exists(), "{name} was not started");
        assert!(nodes.folder.path().join(format!("launch/attempt-1/logs/{name}.log")).exists());
    }
    assert_eq!(std::fs::read_to_string(nodes.file("seen-policy-0")).unwrap(), "policy none token 64\n");
}

#[test]
fn two_nodes_save_when_the_first_is_told_to() {
    let mut nodes = Nodes::start(1_000_000, &[]);
    nodes.wait_for("history");
    let first = nodes.children[0].id().to_string();
    assert!(Command::new("kill").args(["-USR1", &first]).status().unwrap().success());
    assert_eq!(nodes.codes(), [Some(75), Some(75)]);
}

#[test]
fn jobs_are_what_lepton_and_kubernetes_read() {
    let python = std::env::var("COSMOS_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let output = Command::new(&python)
        .arg(cosmos_testkit::repo_root().join("tests/python/launch_specs.py"))
        .arg("--binary")
        .arg(assert_cmd::cargo::cargo_bin!("cosmos-host"))
        .output();
    let Ok(output) = output else {
        eprintln!("skipped: jobs_are_what_lepton_and_kubernetes_read ({python} is not there)");
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(77) {
        eprintln!("skipped: jobs_are_what_lepton_and_kubernetes_read ({})", text.trim());
        return;
    }
    assert!(output.status.success(), "{text}");
}

#[test]
fn a_lepton_job_is_submitted_with_the_users_token() {
    let server = tiny_http::Server::http("127.0.0.1:0").unwrap();
    let url = format!("http://{}/api/v2/workspaces/w", server.server_addr());
    let listener = std::thread::spawn(move || {
        let mut request = server.recv_timeout(PATIENCE).unwrap().expect("the job comes");
        let authorized =
            request.headers().iter().any(|h| h.field.equiv("authorization") && h.value == "Bearer of-the-user");
        let mut body = String::new();
        request.as_reader().read_to_string(&mut body).unwrap();
        request.respond(tiny_http::Response::from_string(r#"{"metadata": {"id": "first-try-x1"}}"#)).unwrap();
        (authorized, serde_json::from_str::<Value>(&body).unwrap())
    });
    let output = cosmos_host()
        .args(["launch", "lepton", "--config", QUICKSTART, "--run", "/mnt/runs/a", "--lepton-job-name", "first-try"])
        .args(["--lepton-reference-job", "configs/lepton/reference-job.json"])
        .envs([("LEPTON_WORKSPACE_URL", url.as_str()), ("LEPTON_WORKSPACE_TOKEN", "of-the-user")])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("job first-try-x1") && !text.contains("of-the-user"), "{text}");
    let (authorized, job) = listener.join().unwrap();
    assert!(authorized);
    assert_eq!(job["metadata"]["id"], "first-try");
    assert_eq!(job["spec"]["envs"][1]["value_from"]["secret_name_ref"], "cosmos-control-token");
}

/// Takes minutes and root, so only where it is asked for: `COSMOS_TEST_SLURM=1`, or its scenarios by name.
#[test]
fn jobs_on_a_real_slurm() {
    let Ok(wanted) = std::env::var("COSMOS_TEST_SLURM") else {
        eprintln!("skipped: jobs_on_a_real_slurm (COSMOS_TEST_SLURM is not set)");
        return;
    };
    let scenarios: Vec<&str> = wanted.split_whitespace().filter(|name| *name != "1").collect();
    let output = Command::new(cosmos_testkit::repo_root().join("tests/slurm/run.sh"))
        .arg(assert_cmd::cargo::cargo_bin!("cosmos-host"))
        .args(scenarios)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(77) {
        eprintln!("skipped: jobs_on_a_real_slurm ({})", text.trim());
        return;
    }
    assert!(output.status.success(), "{text}");
}
