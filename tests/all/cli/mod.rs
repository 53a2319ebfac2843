//! Snapshots of the whole command line: help, errors with their place and hint, exit codes.

mod plugin_cases;
mod plugin_projects;
mod processes;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The binary, in an environment that changes nothing of what it prints.
fn cosmos_host() -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("cosmos-host"));
    for variable in ["COSMOS_LOG_LEVEL", "COLUMNS", "NO_COLOR", "CLICOLOR_FORCE", "HF_TOKEN", "HF_HUB_OFFLINE"] {
        command.env_remove(variable);
    }
    command.current_dir(here()).stdin(Stdio::null());
    command
}

fn here() -> PathBuf {
    cosmos_testkit::repo_root().join("tests/all/cli")
}

/// Exit code, standard output and standard error as one text.
fn told(arguments: &[&str]) -> String {
    let output = cosmos_host().args(arguments).output().expect("the binary starts");
    format!(
        "exit {}\n-- stdout\n{}-- stderr\n{}",
        output.status.code().map_or("by a signal".to_owned(), |c| c.to_string()),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Compares with `snapshots/<name>.snap`; paths of this machine, versions and times are masked.
fn assert_told(name: &str, arguments: &[&str]) {
    assert_snapshot(name, &told(arguments));
}

fn assert_snapshot(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(here().join("snapshots"));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    let root = cosmos_testkit::repo_root().display().to_string();
    settings.add_filter(&regex_of(&root), "[repo]");
    settings.add_filter(&regex_of(&std::env::temp_dir().display().to_string()), "[tmp]");
    settings.add_filter(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z?", "[time]");
    settings.add_filter(r"\b\d{14}\b", "[timestamp]");
    settings.add_filter(&format!(r"cosmos-host {}", regex_of(env!("CARGO_PKG_VERSION"))), "cosmos-host [version]");
    settings.bind(|| insta::assert_snapshot!(name, text));
}

/// `text` as a pattern that matches only itself.
fn regex_of(text: &str) -> String {
    text.chars().flat_map(|c| (!c.is_alphanumeric() && c != '/').then_some('\\').into_iter().chain([c])).collect()
}

#[test]
fn help_of_every_command() {
    assert_told("help", &["--help"]);
    assert_told("version", &["--version"]);
    for command in [
        "run",
        "launch",
        "launch local",
        "launch plan",
        "launch node",
        "launch slurm",
        "launch lepton",
        "launch kubernetes",
        "controller",
        "policy",
        "rollout",
        "teacher",
        "status",
        "config",
        "config check",
        "config resolve",
        "config schema",
        "config explain",
        "plugin",
        "plugin inspect",
        "plugin new",
        "plugin build",
        "plugin toolchain",
        "plugin check",
        "plugin test",
        "plugin bench",
        "sample",
        "score",
        "eval",
        "ckpt",
        "ckpt ls",
        "ckpt verify",
        "ckpt export",
        "doctor",
        "completions",
    ] {
        let arguments: Vec<&str> = command.split(' ').chain(["--help"]).collect();
        assert_told(&format!("help_{}", command.replace(' ', "_")), &arguments);
    }
}

#[test]
fn wrong_usage_ends_with_2() {
    assert_told("usage_no_command", &[]);
    assert_told("usage_unknown_command", &["distil"]);
    assert_told("usage_unknown_option", &["run", "--confg", "x.toml"]);
    assert_told("usage_bad_log_level", &["--log-level", "loud", "doctor"]);
    assert_told("usage_missing_config", &["run", "--config", "no-such.toml"]);
    assert_told("usage_bad_override", &["config", "check", "good.toml", "--set", "train.optm_lr"]);
    assert_told("usage_override_of_wrong_type", &["config", "check", "good.toml", "--set", "train.epoch=many"]);
    assert_told("usage_unknown_key", &["config", "explain", "train.optm_lrr"]);
}

/// Every file under `bad_configs/` has its snapshot: a new case is a new file.
#[test]
fn bad_configs_name_their_place() {
    let mut cases: Vec<PathBuf> = std::fs::read_dir(here().join("bad_configs"))
        .expect("the folder of cases is part of the checkout")
        .map(|entry| entry.expect("a readable folder").path())
        .collect();
    cases.sort();
    assert!(!cases.is_empty());
    for case in cases {
        let name = case.file_stem().and_then(|n| n.to_str()).expect("an ASCII name").to_owned();
        let file = format!("bad_configs/{name}.toml");
        let text = told(&["config", "check", &file]);
        assert!(text.starts_with("exit 2") || text.contains("warning"), "{name} was accepted:\n{text}");
        assert_told(&format!("config_{name}"), &["config", "check", &file]);
    }
}

#[test]
fn a_good_config_is_accepted() {
    assert_told("config_good", &["config", "check", "good.toml"]);
    assert_told("config_explain", &["config", "explain", "distillation.top_k"]);
}

#[test]
fn resolving_prints_one_document() {
    let output = cosmos_host()
        .args(["config", "resolve", "good.toml", "--format", "json", "--set", "train.epoch=7"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let config: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(config["train"]["epoch"], 7);
    let output = cosmos_host().args(["config", "resolve", "good.toml", "--format", "toml"]).output().unwrap();
    assert!(output.status.success());
    let again = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    std::fs::write(again.path(), &output.stdout).unwrap();
    let path = again.path().display().to_string();
    let twice = cosmos_host().args(["config", "resolve", &path, "--format", "toml"]).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&twice.stdout),
        "resolving is idempotent"
    );
}

#[test]
fn the_schema_is_json() {
    let output = cosmos_host().args(["config", "schema"]).output().unwrap();
    assert!(output.status.success());
    let schema: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(schema.get("properties").is_some(), "{schema}");
}

#[test]
fn the_reference_page_is_current() {
    let output = cosmos_host().args(["config", "schema", "--format", "markdown"]).output().unwrap();
    let page = std::fs::read_to_string(cosmos_testkit::repo_root().join("docs/config.md")).unwrap();
    let hint = "write it again: cosmos-host config schema --format markdown > docs/config.md";
    assert!(String::from_utf8_lossy(&output.stdout) == page, "docs/config.md differs from the definition; {hint}");
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> String {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

#[test]
fn what_is_no_plugin_is_refused() {
    let folder = tempfile::Builder::new().prefix("plugins").rand_bytes(0).tempdir_in(here_temporary()).unwrap();
    let text = write(folder.path(), "text.wasm", b"hello");
    // A core module's header: version 1, layer 0. A component's layer is 1.
    let core = write(folder.path(), "core.wasm", b"\0asm\x01\0\0\0");
    let torn = write(folder.path(), "torn.wasm", b"\0asm\x0d\0\x01\0\xff");
    let empty_component = write(folder.path(), "empty.wasm", b"\0asm\x0d\0\x01\0");
    assert_told("plugin_missing", &["plugin", "inspect", "no-such.wasm"]);
    assert_told("plugin_text", &["plugin", "inspect", &text]);
    assert_told("plugin_core_module", &["plugin", "check", &core]);
    assert_told("plugin_torn", &["plugin", "check", &torn]);
    assert_told("plugin_empty_component", &["plugin", "check", &empty_component]);
}

/// A folder of one name in every run, so that snapshots stay the same, and of this process alone.
fn here_temporary() -> PathBuf {
    let folder = std::env::temp_dir().join("cosmos-host-cli-tests");
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[test]
fn doctor_reports_every_check_as_json() {
    let output = cosmos_host().args(["doctor", "--format", "json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let ids: Vec<&str> = checks.iter().map(|c| c["id"].as_str().unwrap()).collect();
    for id in [
        "system",
        "cpu",
        "memory",
        "disk",
        "devices",
        "gpu",
        "nvrtc",
        "nccl",
        "plugin_cache",
        "wasm_rust",
        "hub_cache",
        "redis",
        "slurm",
        "srun",
    ] {
        assert!(ids.contains(&id), "{id} is missing from {ids:?}");
    }
    for check in checks {
        let status = check["status"].as_str().unwrap();
        assert!(["ok", "missing", "problem"].contains(&status), "{check}");
        assert_eq!(status != "ok", check.get("fix").is_some(), "what is not there has a fix: {check}");
    }
    let ready = checks.iter().all(|c| c["status"] != "problem");
    assert_eq!(report["ready"], ready);
    assert_eq!(output.status.code(), Some(if ready { 0 } else { 1 }));
}

/// What a launch would stumble over, each with its fix. Only what does not depend on this machine is shown.
#[test]
fn doctor_names_what_a_launch_would_stumble_over() {
    let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let programs = here_temporary().join("programs");
    std::fs::create_dir_all(&programs).unwrap();
    // A cluster's login node whose `srun` is missing.
    std::fs::write(programs.join("sbatch"), "#!/bin/sh\n").unwrap();
    let runnable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(programs.join("sbatch"), runnable).unwrap();
    let asked = |more: &[&str]| {
        let mut command = cosmos_host();
        command.env("PATH", &programs).args(["doctor", "--config", "good.toml", "--format", "json"]).args(more);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let told = |check: &serde_json::Value| {
            let id = check["id"]
                .as_str()
                .filter(|id| ["srun", "plugin_files", "container", "broker", "placement", "ports"].contains(id))?;
            let text = |key: &str| check[key].as_str().unwrap_or("-").replace(&port, "[port]");
            Some(format!("{id}: {}\n    {}\n    fix: {}\n", text("status"), text("found"), text("fix")))
        };
        report["checks"].as_array().unwrap().iter().filter_map(told).collect::<String>()
    };
    let url = ["--plugin", "/no/such.wasm", "--container", "/no/such.sqsh", "--set", "redis=redis://127.0.0.1:1/0"];
    let lost = asked(&[&url[..], &["--port", &port]].concat());
    let uneven = asked(&["--ranks-per-node", "2", "--set", "policy.parallelism.tp_size=3"]);
    assert_snapshot("doctor_launch", &format!("{lost}\n{uneven}"));
}

#[test]
fn doctor_never_prints_a_token() {
    let output =
        cosmos_host().env("HF_TOKEN", "hf_secret_of_the_user").args(["doctor", "--format", "json"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stdout).contains("hf_secret"));
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"token\": true"));
}

#[test]
fn completions_name_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = cosmos_host().args(["completions", shell]).output().unwrap();
        assert!(output.status.success());
        let script = String::from_utf8_lossy(&output.stdout).into_owned();
        for command in ["run", "config", "plugin", "sample", "score", "eval", "ckpt", "doctor"] {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
}

#[test]
fn colour_only_when_asked() {
    let plain = cosmos_host().args(["run", "--config", "no-such.toml"]).output().unwrap();
    assert!(!plain.stderr.contains(&0x1b));
    let coloured = cosmos_host().args(["--color", "always", "run", "--config", "no-such.toml"]).output().unwrap();
    assert!(coloured.stderr.contains(&0x1b));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child =
        cosmos_host().args(["config", "schema"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn checkpoint_errors_name_the_path() {
    assert_told("ckpt_ls_missing", &["ckpt", "ls", "no-such-run"]);
    assert_told("ckpt_verify_missing", &["ckpt", "verify", "no-such-checkpoint"]);
    assert_told("ckpt_export_missing", &["ckpt", "export", "no-such-checkpoint", "out"]);
    assert!(!here().join("out").exists(), "nothing half written");
}
