//! `plugin test`, `bench`, `inspect` and `check` on projects and components.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::Value;

use super::{assert_told, cosmos_host, here_temporary, told, write};

const RIGHT: &str = r#"{"id": "a", "completion": "<answer>1 + 2 = 3</answer>", "reference": {"nums": [1, 2], "target": 3}, "score": 1.0}"#;

fn shipped(name: &str) -> PathBuf {
    cosmos_testkit::repo_root().join("plugins/dist").join(name)
}

/// A folder of this name in every run, empty.
fn folder(name: &str) -> PathBuf {
    let folder = here_temporary().join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// A project whose component is the shipped `countdown`.
fn project(name: &str, cases: &[(&str, &str)]) -> PathBuf {
    let folder = folder(name);
    let manifest = "name = \"countdown\"\nlanguage = \"rust\"\nexports = [\"dataset\", \"reward\"]\n";
    write(&folder, "plugin.toml", manifest.as_bytes());
    for part in ["src", "build", "cases"] {
        std::fs::create_dir(folder.join(part)).unwrap();
    }
    write(&folder, "src/lib.rs", b"");
    std::fs::copy(shipped("countdown.wasm"), folder.join("build/countdown.wasm")).unwrap();
    for (file, text) in cases {
        write(&folder.join("cases"), file, text.as_bytes());
    }
    aged(&folder.join("plugin.toml"), 100);
    aged(&folder.join("src/lib.rs"), 100);
    aged(&folder.join("build/countdown.wasm"), 50);
    folder
}

fn aged(path: &Path, seconds: u64) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
}

fn text(path: &Path) -> &str {
    path.to_str().expect("an ASCII path")
}

#[test]
fn a_differing_case_is_explained() {
    let more = concat!(
        "{\"reward\": \"validation\"}\n",
        "{\"id\": \"wrong\", \"completion\": \"<answer>1 + 2 = 3</answer>\\nand more\", \"reference\": {\"nums\": [1, 2], \"target\": 3}, \"score\": 0, \"metrics\": {\"format\": 1}}\n",
        "{\"completion\": \"\", \"reference\": [], \"score\": 1}\n",
        "{\"completion\": \"\", \"reference\": [], \"error\": \"another reason\"}\n",
        "{\"completion\": \"\", \"reference\": [], \"error\": \"the reference is not\"}\n",
        "{\"completion\": \"\", \"reference\": {\"nums\": [1, 2], \"target\": 3}}\n",
    );
    let dataset = concat!(
        "{\"settings\": {\"custom\": {\"countdown\": {\"numbers\": 3}}}}\n",
        "{\"index\": 0, \"dataset\": \"train\", \"expect\": {\"messages\": [{\"role\": \"user\", \"content\": \"one line\\nanother\"}], \"reference\": {\"target\": 0}}}\n",
        "{\"index\": 99999999, \"dataset\": \"train\", \"expect\": {\"error\": \"beyond the dataset\"}}\n",
    );
    let project = project("differs", &[("good.jsonl", RIGHT), ("more.jsonl", more), ("problems.jsonl", dataset)]);
    assert_told("plugin_test_differs", &["plugin", "test", text(&project)]);
}

#[test]
fn cases_for_programs_are_json_lines() {
    let wrong = RIGHT.replace("\"a\"", "\"b\"").replace("1.0}", "0.0}");
    let folder = folder("jsonl");
    let cases = write(&folder, "both.jsonl", format!("{RIGHT}\n\n{wrong}\n").as_bytes());
    let plugin = shipped("countdown.wasm");
    let arguments = ["plugin", "test", text(&plugin), "--cases", &cases, "--reward", "validation", "--format", "jsonl"];
    let output = cosmos_host().args(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("1 of 2 cases differs"));
    let lines: Vec<Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        (&lines[0]["id"], &lines[0]["judged"], &lines[0]["score"]),
        (&"a".into(), &"agrees".into(), &1.0.into())
    );
    assert_eq!((&lines[1]["id"], &lines[1]["judged"], &lines[1]["line"]), (&"b".into(), &"differs".into(), &3.into()));
    assert_eq!(lines[1]["differences"][0]["what"], "score");
}

#[test]
fn an_update_makes_the_cases_agree() {
    let wrong = RIGHT.replace("\"a\"", "\"b\"").replace("1.0}", "0.0, \"note\": \"stays\"}");
    let project =
        project("update", &[("c.jsonl", &format!("{RIGHT}\n{wrong}\n{{\"index\": 0, \"dataset\": \"train\"}}\n"))]);
    let update = told(&["plugin", "test", text(&project), "--update"]);
    assert!(update.starts_with("exit 0") && update.contains("2 of 3 cases updated"), "{update}");
    let cases = std::fs::read_to_string(project.join("cases/c.jsonl")).unwrap();
    let lines: Vec<&str> = cases.lines().collect();
    assert_eq!(lines[0], RIGHT);
    assert!(lines[1].ends_with("\"score\": 1.0, \"note\": \"stays\"}"), "{}", lines[1]);
    let again = told(&["plugin", "test", text(&project)]);
    assert!(again.starts_with("exit 0") && again.contains("3 of 3 as expected"), "{again}");
}

#[test]
fn refused_settings_can_be_expected() {
    let cases = "{\"index\": 0, \"dataset\": \"train\", \"settings\": {\"custom\": {\"countdown\": {\"numbrs\": 3}}}, \"expect\": {\"error\": \"numbrs\"}}\n";
    let project = project("settings", &[("c.jsonl", cases)]);
    let good = told(&["plugin", "test", text(&project)]);
    assert!(good.starts_with("exit 0"), "{good}");
    write(&project.join("cases"), "c.jsonl", cases.replace("\"error\": \"numbrs\"", "\"prompt\": \"p\"").as_bytes());
    let left = told(&["plugin", "test", text(&project), "--update"]);
    assert!(left.starts_with("exit 1") && left.contains("0 of 1 cases updated"), "{left}");
}

#[test]
fn what_cannot_be_tested_is_refused_with_the_fix() {
    let project = project("refused", &[]);
    let component = project.join("build/countdown.wasm");
    assert_told("plugin_test_no_project", &["plugin", "test", text(&project.join("src"))]);
    assert_told("plugin_test_no_cases", &["plugin", "test", text(&project)]);
    assert_told("plugin_test_component_alone", &["plugin", "test", text(&component)]);
    let broken = write(&project.join("cases"), "c.jsonl", format!("{RIGHT}\n{{\"id\": 1").as_bytes());
    assert_told("plugin_test_broken_case", &["plugin", "test", text(&project)]);
    write(&project.join("cases"), "c.jsonl", b"{\"completion\": \"\", \"reward\": \"best\"}\n");
    assert_told("plugin_test_unknown_reward", &["plugin", "test", text(&component), "--cases", &broken]);
    aged(&project.join("src/lib.rs"), 10);
    assert_told("plugin_test_older_component", &["plugin", "test", text(&project)]);
    std::fs::remove_file(&component).unwrap();
    assert_told("plugin_test_not_built", &["plugin", "check", text(&project)]);
}

#[test]
fn check_says_what_to_grant() {
    assert_told("plugin_check_needs_nothing", &["plugin", "check", text(&project("check", &[]))]);
    assert_told("plugin_check_grants", &["plugin", "check", text(&shipped("deepmath.wasm"))]);
}

#[test]
fn inspect_as_json_keeps_its_keys() {
    let output = cosmos_host()
        .args(["plugin", "inspect", text(&shipped("deepmath.wasm")), "--format", "json"])
        .output()
        .unwrap();
    let seen: Value = serde_json::from_slice(&output.stdout).unwrap();
    for key in ["path", "bytes", "sha256", "world", "api_version", "imports", "exports", "needs", "unknown_imports"] {
        assert!(seen.get(key).is_some(), "{key} is missing: {seen}");
    }
    for key in ["name", "version", "summary", "datasets", "rewards", "environments", "settings_schema", "wants"] {
        assert!(seen["description"].get(key).is_some(), "{key} is missing: {seen}");
    }
    assert_eq!((&seen["world"], &seen["api_version"]), (&"plugin".into(), &"0.2.0".into()));
    let table = told(&["plugin", "inspect", text(&shipped("deepmath.wasm"))]);
    for part in ["deepmath", "cosmos:plugin/table@0.2.0", "zero (train)", "math (validation)", "question_column"] {
        assert!(table.contains(part), "{part} is missing:\n{table}");
    }
}

/// Not how fast, only that everything is measured.
#[test]
fn bench_measures_and_compares() {
    let project = project("bench", &[("c.jsonl", RIGHT)]);
    let bench = |against: &str| {
        let arguments = ["plugin", "bench", text(&project), "--seconds", "0.05", "--workers", "2", "--format", "json"];
        cosmos_host().args(arguments).args(["--text-bytes", "4096", "--against", against]).output().unwrap()
    };
    let output = bench("while read -r line; do echo 1; done; echo '{\"seconds\": 0.5}'");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let positive = |value: &Value| assert!(value.as_f64().is_some_and(|n| n > 0.0), "{value} in {report}");
    let ways = report["speed"].as_array().unwrap().iter();
    let ways: Vec<_> = ways.map(|s| (s["samples_per_call"].as_u64(), s["workers"].as_u64())).collect();
    assert_eq!(ways, [(1024, 1), (1024, 2), (64, 1), (1, 1)].map(|(n, workers)| (Some(n), Some(workers))));
    for speed in report["speed"].as_array().unwrap() {
        for key in ["scores_per_second", "call_us_p50", "call_us_p99", "score_us_p50", "score_us_p99"] {
            positive(&speed[key]);
        }
    }
    for value in [
        &report["start"]["cold_ms"],
        &report["start"]["parts"]["read_ms"],
        &report["start"]["parts"]["cached_ms"],
        &report["start"]["parts"]["describe_ms"],
        &report["start"]["cached"]["median_ms"],
        &report["start"]["open"]["median_ms"],
        &report["memory"]["instance_bytes"],
        &report["component_bytes"],
        &report["against"]["ratio"],
    ] {
        positive(value);
    }
    assert!(report["text_bytes_mean"].as_f64().unwrap() >= 4096.0);
    let output = bench("while read -r line; do echo 0.5; done");
    assert_eq!(output.status.code(), Some(2));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("scores 1 of 1 samples otherwise"), "{told}");
}

#[test]
fn bench_refuses_what_it_cannot_measure() {
    let project = project("bench_refused", &[("c.jsonl", "{\"completion\": \"\", \"reference\": []}\n")]);
    assert_told("plugin_bench_all_fail", &["plugin", "bench", text(&project)]);
    let read = told(&["plugin", "bench", text(&project), "--seconds", "0"]);
    assert!(read.starts_with("exit 2") && read.contains("0.05 to 600"), "{read}");
    let large = told(&["plugin", "bench", text(&project), "--text-bytes", "2000000"]);
    assert!(large.starts_with("exit 2") && large.contains("more than a call takes"), "{large}");
}
