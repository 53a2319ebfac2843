//! The commands of a run of several processes, where they say no; and what would be launched.

use super::*;

const GOOD: [&str; 2] = ["--config", "good.toml"];

fn with<'a>(start: &[&'a str], rest: &[&'a str]) -> Vec<&'a str> {
    [start, &GOOD, rest].concat()
}

#[test]
fn a_role_has_to_be_told_which_run_is_its_own() {
    assert_told("role_of_no_run", &with(&["rollout"], &[]));
    assert_told("role_of_two_runs", &with(&["teacher"], &["--run", "a", "--controller", "http://a:1"]));
    assert_told("role_without_token", &with(&["policy"], &["--controller", "http://127.0.0.1:1"]));
}

#[test]
fn a_token_is_never_taken_from_the_command_line() {
    for role in ["controller", "policy", "rollout", "teacher"] {
        let text = told(&with(&[role], &["--token", "x"]));
        assert!(text.starts_with("exit 2") && text.contains("unexpected argument"), "{text}");
    }
}

#[test]
fn an_address_that_is_none_is_refused() {
    let output = cosmos_host()
        .args(with(&["rollout"], &["--controller", "redis://a:1"]))
        .env("COSMOS_CONTROL_TOKEN", "t".repeat(40))
        .output()
        .expect("the binary starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(text.contains("`--controller redis://a:1` is no `http://` address"), "{text}");
    assert!(!text.contains("tttt"));
}

#[test]
fn what_cannot_be_launched_is_refused_before_anything_starts() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = folder.path().join("run").display().to_string();
    let launch = |rest: &[&str]| told(&[&["launch", "local"], &GOOD[..], &["--run", &run], rest].concat());
    for (rest, said) in [
        (["--policies", "0"], "1 to 256 policies, and not 0"),
        (["--teachers", "999"], "1 to 256 teachers, and not 999"),
        (["--set", "redis=nonsense://x"], "redis"),
    ] {
        let text = launch(&rest);
        assert!(!text.starts_with("exit 0") && text.contains(said), "{text}");
    }
    assert!(!Path::new(&run).join("control.json").exists());
}

#[test]
fn a_dry_run_names_every_process() {
    let rest = ["--policies", "2", "--rollouts", "3", "--dry-run", "--set", "host.control_address=127.0.0.1:7001"];
    let text = told(&with(&["launch", "local"], &rest));
    assert!(text.starts_with("exit 0"), "{text}");
    for name in ["redis ", "controller ", "policy-0", "policy-1", "rollout-0", "rollout-2", "127.0.0.1:7001"] {
        assert!(text.contains(name), "{name} is missing:\n{text}");
    }
    assert!(!text.contains("policy-2") && !text.contains("rollout-3"), "{text}");
}

#[test]
fn a_launch_takes_the_options_of_run_and_of_the_other_launchers() {
    let rest = ["--device", "cpu", "--output-dir", "out", "--n-policy-replicas", "2", "--n-teacher-replicas", "2"];
    let text = told(&with(&["launch", "local", "--dry-run"], &rest));
    assert!(text.starts_with("exit 0") && text.contains("policy-1") && text.contains("teacher-1"), "{text}");
    let both = told(&with(&["launch", "local", "--dry-run"], &["--output-dir", "out", "--run", "out/1"]));
    assert!(both.starts_with("exit 2") && both.contains("cannot be used with"), "{both}");
    let no_gpu = told(&with(&["launch", "local", "--dry-run"], &["--device", "burn:cuda"]));
    assert!(no_gpu.starts_with("exit 2") && no_gpu.contains("burn:cuda"), "{no_gpu}");
}

#[test]
fn the_status_of_no_run_says_so() {
    assert_told("status_of_no_run", &["status", "no-such-run"]);
    let folder = tempfile::tempdir().expect("a temporary folder");
    // A controller that was killed leaves its file; nobody listens on port 1.
    let left = format!("{{\"url\": \"http://127.0.0.1:1\", \"token\": \"{}\", \"pid\": 1}}", "t".repeat(40));
    std::fs::write(folder.path().join("control.json"), left).expect("a file");
    let text = told(&["status", &folder.path().display().to_string()]);
    assert!(text.starts_with("exit 1") && text.contains("does not answer at http://127.0.0.1:1"), "{text}");
}
