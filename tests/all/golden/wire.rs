//! The original's msgpack: our reader and writer against Python's.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cosmos_broker::Rows;
use cosmos_broker::wire::cosmos_rl::{
    Request, Scores, WireLimits, decode_request, decode_scores, encode_request, encode_scores,
};
use serde_json::{Map, Value, json};

/// What the script says when Python has no msgpack.
const NO_MSGPACK: i32 = 77;

/// The `.msgpack` files of the folder whose names begin with `kind`, each with its `.json`.
fn cases(folder: &Path, kind: &str) -> Vec<(PathBuf, PathBuf)> {
    let mut found: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "msgpack"))
        .filter(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(kind)))
        .map(|path| (path.clone(), path.with_extension("json")))
        .collect();
    found.sort();
    found
}

fn nested<T: Copy + Into<Value>>(rows: &Rows<T>) -> Value {
    rows.iter().map(|row| row.iter().map(|&value| value.into()).collect::<Vec<Value>>()).collect::<Vec<_>>().into()
}

fn request_json(request: &Request) -> Map<String, Value> {
    let mut map = Map::new();
    if request.is_end {
        map.insert("is_end".into(), true.into());
    }
    map.insert("prompt_idx".into(), request.prompt_idx.into());
    map.insert(
        "completion_token_ids".into(),
        request.completion_token_ids.iter().map(nested).collect::<Vec<_>>().into(),
    );
    if let Some(rows) = &request.prompt_token_ids {
        map.insert("prompt_token_ids".into(), nested(rows));
    }
    map.insert("teacher_result_uuid".into(), json!(request.teacher_result_uuid));
    map.insert("replica_name".into(), json!(request.replica_name));
    map
}

fn scores_json(scores: &Scores) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("teacher_logprobs".into(), nested(&scores.teacher_logprobs));
    let tokens =
        [("completion_token_ids", &scores.completion_token_ids), ("prompt_token_ids", &scores.prompt_token_ids)];
    for (key, rows) in tokens {
        if let Some(rows) = rows {
            map.insert(key.into(), nested(rows));
        }
    }
    map.insert("timestamp".into(), json!(scores.timestamp));
    map.insert("replica_name".into(), json!(scores.replica_name));
    map
}

/// Whether Python reads `bytes` as what `json` says; none without Python's msgpack.
fn equal_in_python(bytes: &[u8], json: &Path) -> Option<bool> {
    let script = cosmos_testkit::repo_root().join("tests/all/golden/wire_check.py");
    let started = Command::new("python3").arg(script).arg(json).stdin(Stdio::piped()).spawn();
    let Ok(mut child) = started else { return None };
    // A script that ends early closes the pipe; its exit status says why.
    let _ = child.stdin.take().unwrap().write_all(bytes);
    let status = child.wait().unwrap();
    (status.code() != Some(NO_MSGPACK)).then_some(status.success())
}

/// Equal but for the last bit of a float: serde_json's default parser may round it the other way. (Python's comparison is
/// exact.)
fn equal(got: &Value, expected: &Value) -> bool {
    match (got, expected) {
        (Value::Number(a), Value::Number(b)) if a.is_f64() && b.is_f64() => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            (a - b).abs() <= 2.0 * f64::EPSILON * b.abs()
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && b.iter().all(|(key, b)| a.get(key).is_some_and(|a| equal(a, b)))
        }
        (a, b) => a == b,
    }
}

/// Checks every case of one kind: decoded equal to the JSON, and what we encode decodes to the same, here and in Python.
fn check<T: PartialEq + std::fmt::Debug>(
    folder: &Path,
    kind: &str,
    decode: impl Fn(&[u8]) -> T,
    encode: impl Fn(&T) -> Vec<u8>,
    to_json: impl Fn(&T) -> Map<String, Value>,
) -> usize {
    let cases = cases(folder, kind);
    let mut no_python = 0;
    for (message, json) in &cases {
        let name = message.display();
        let bytes = std::fs::read(message).unwrap();
        let decoded = decode(&bytes);
        let expected = cosmos_testkit::read_json(json);
        let got = Value::Object(to_json(&decoded));
        assert!(equal(&got, &expected), "{name}:\n{got}\n{expected}");
        let ours = encode(&decoded);
        assert_eq!(decode(&ours), decoded, "{name}: written and read again");
        match equal_in_python(&ours, json) {
            Some(equal) => assert!(equal, "{name}: Python reads another message from what we write"),
            None => no_python += 1,
        }
    }
    if no_python > 0 {
        eprintln!("skipped: {no_python} messages were not read by Python, which has no `msgpack` here");
    }
    cases.len()
}

#[test]
fn golden_wire() {
    let Some(folder) = cosmos_testkit::golden("wire") else { return };
    let limits = WireLimits::default();
    let requests = check(
        &folder,
        "request",
        |bytes| decode_request(bytes, &limits).unwrap_or_else(|e| panic!("{e}")),
        encode_request,
        request_json,
    );
    let results = check(
        &folder,
        "result",
        |bytes| decode_scores(bytes, &limits).unwrap_or_else(|e| panic!("{e}")),
        encode_scores,
        scores_json,
    );
    assert!(requests + results > 0, "{} holds no `request*.msgpack` and no `result*.msgpack`", folder.display());
}
