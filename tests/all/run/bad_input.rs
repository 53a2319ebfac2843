//! Bad input: a clear error with its place and a hint, exit 2, nothing half written.

use std::fs;
use std::path::Path;

use super::{Models, distil, text};

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().filter_map(|e| e.ok()) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A copy of the student that `damage` has been at, and the error that a run with it gives.
fn with_damaged_student(models: &Models, damage: &dyn Fn(&Path)) -> (Option<i32>, String) {
    let dir = tempfile::tempdir().unwrap();
    let student = dir.path().join("student");
    copy(&models.student, &student);
    damage(&student);
    let run = dir.path().join("run");
    let set = format!("policy.model_name_or_path={}", student.display());
    let output = distil(models, &run, &[&set]).output().unwrap();
    assert!(!run.exists(), "something was written: {}", text(&output));
    (output.status.code(), text(&output))
}

#[test]
fn damaged_models() {
    let models = Models::new();
    let weights = |student: &Path| student.join("model.safetensors");
    let cases: [(&str, &dyn Fn(&Path), &[&str]); 7] = [
        ("missing weights", &|s| fs::remove_file(weights(s)).unwrap(), &["safetensors"]),
        (
            "truncated weights",
            &|s| fs::write(weights(s), &fs::read(weights(s)).unwrap()[..1000]).unwrap(),
            &["model.safetensors"],
        ),
        (
            "a header length that lies",
            &|s| {
                let mut bytes = fs::read(weights(s)).unwrap();
                bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
                fs::write(weights(s), bytes).unwrap();
            },
            &["model.safetensors", "header"],
        ),
        (
            "wrong shapes",
            &|s| {
                let config = fs::read_to_string(s.join("config.json")).unwrap();
                fs::write(
                    s.join("config.json"),
                    config.replace("\"intermediate_size\": 256", "\"intermediate_size\": 128"),
                )
                .unwrap();
            },
            &["shape"],
        ),
        ("no tokenizer", &|s| fs::remove_file(s.join("tokenizer.json")).unwrap(), &["tokenizer.json"]),
        (
            "a broken tokenizer",
            &|s| fs::write(s.join("tokenizer.json"), "{\"model\": 3}").unwrap(),
            &["tokenizer.json"],
        ),
        (
            "another vocabulary than the teacher's",
            &|s| {
                let tokenizer = fs::read_to_string(s.join("tokenizer.json")).unwrap();
                fs::write(s.join("tokenizer.json"), tokenizer.replace("\"+\"", "\"?\"")).unwrap();
            },
            &["student and teacher have different vocabularies", "hint:"],
        ),
    ];
    for (name, damage, expected) in cases {
        let (code, said) = with_damaged_student(&models, damage);
        assert_eq!(code, Some(2), "{name}: {said}");
        for part in expected {
            assert!(said.contains(part), "{name}: `{part}` is not in {said}");
        }
        assert!(!said.contains("panicked"), "{name}: {said}");
    }
}

#[test]
fn settings_that_do_not_fit() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("file");
    fs::write(&nowhere, "").unwrap();
    let cases: [(&str, Vec<String>, &[&str]); 7] = [
        ("a batch that does not divide", vec!["train.train_batch_per_replica=20".into()], &["train_batch_per_replica"]),
        (
            "a context beyond the model's",
            vec!["policy.model_max_length=4096".into()],
            &["model_max_length", "max_position_embeddings"],
        ),
        ("a prompt longer than the context", vec!["policy.model_max_length=4".into()], &["model_max_length"]),
        (
            "an empty dataset",
            vec![
                "custom.countdown.target_max=1".into(),
                "custom.countdown.max=1".into(),
                "custom.countdown.ops=-".into(),
                "custom.countdown.numbers=2".into(),
            ],
            &["dataset"],
        ),
        (
            "a student that is not there",
            vec!["policy.model_name_or_path=/no/such/folder".into()],
            &["/no/such/folder", "hint:"],
        ),
        ("a device that is not there", vec!["host.device=cuda:0".into()], &["cuda:0", "hint:"]),
        ("settings that the plugin refuses", vec!["custom.countdown.numbres=3".into()], &["numbres"]),
    ];
    for (name, sets, expected) in cases {
        let run = dir.path().join("run");
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let output = distil(&models, &run, &sets).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{name}: {}", text(&output));
        for part in expected {
            assert!(text(&output).contains(part), "{name}: `{part}` is not in {}", text(&output));
        }
        assert!(!run.exists(), "{name}");
    }
    let output = distil(&models, &nowhere.join("run"), &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains(&nowhere.display().to_string()), "{}", text(&output));
}

#[test]
fn plugins_that_cannot_run() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad.wasm");
    let cases: [(&str, Option<&[u8]>, &str); 4] = [
        ("no such file", None, "bad.wasm"),
        ("not WebAssembly", Some(b"hello"), "bad.wasm"),
        ("a core module", Some(b"\0asm\x01\0\0\0"), "component"),
        ("an empty component", Some(b"\0asm\x0d\0\x01\0"), "metadata"),
    ];
    for (name, bytes, expected) in cases {
        let _ = fs::remove_file(&bad);
        if let Some(bytes) = bytes {
            fs::write(&bad, bytes).unwrap();
        }
        let run = dir.path().join("run");
        let output = distil(&models, &run, &[]).args(["--plugin"]).arg(&bad).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{name}: {}", text(&output));
        assert!(text(&output).contains(expected), "{name}: {}", text(&output));
        assert!(!run.exists(), "{name}");
    }
}

#[test]
fn a_plugin_gets_nothing_that_the_config_does_not_grant() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let output = distil(&models, &run, &[]).args(["--plugin", "plugins/dist/deepmath.wasm"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains("[plugin.deepmath]") && text(&output).contains("allow"), "{}", text(&output));
}
