//! Strangers, garbage, large and slow requests.

use std::io::{Read, Write};
use std::net::TcpStream;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::wire::BODY_BYTES_MAX;
use crate::{ControlError, ControlFile, Token, fetch_status};

/// Sends bytes and reads the whole answer; the status and the body.
fn talk(endpoint: &Endpoint, bytes: &[u8]) -> (u16, String) {
    let mut stream = TcpStream::connect(endpoint.url().trim_start_matches("http://")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // The endpoint may hang up before it has read everything.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_default();
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
    (status, body)
}

fn request(path: &str, token: &str, body: &str) -> Vec<u8> {
    format!(
        "POST {path} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

#[test]
fn without_the_token_nothing_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, _reports) = start(folder.path(), 1);
    let own = endpoint.token().reveal().to_owned();
    let headers = [
        String::new(),
        "authorization: \r\n".into(),
        "authorization: Bearer \r\n".into(),
        format!("authorization: Bearer {}\r\n", &own[1..]),
        format!("authorization: Bearer {own}0\r\n"),
        format!("authorization: {own}\r\n"),
        format!("authorization: Basic {own}\r\n"),
    ];
    for path in ["/status", "/v1/join", "/nothing", "/"] {
        for header in &headers {
            let bytes = format!("GET {path} HTTP/1.1\r\nhost: a\r\n{header}\r\n");
            assert_eq!(talk(&endpoint, bytes.as_bytes()), (401, String::new()), "{path} {header}");
        }
    }
    let target = Target::At { url: endpoint.url().into(), token: Token::random().unwrap() };
    let error = fetch_status(&target, 10_000).unwrap_err();
    assert!(error.is_usage() && error.to_string().contains("does not accept the token"), "{error}");
    assert_eq!(talk(&endpoint, b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n").0, 200);
}

#[test]
fn a_wrong_token_ends_a_role_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, _reports) = start(folder.path(), 1);
    ControlFile { url: endpoint.url().into(), token: Token::random().unwrap(), pid: 1 }.write(folder.path()).unwrap();
    let error = client(folder.path(), "a").join(None, None, &identity()).unwrap_err();
    assert!(matches!(&error, ControlError::Refused { kind, .. } if kind == "token"), "{error}");
}

#[test]
fn too_large_bodies_are_refused_before_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, _reports) = start(folder.path(), 1);
    let token = endpoint.token().reveal();
    let declared = format!(
        "POST /v1/done HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\ncontent-length: 999999999999\r\n\r\n"
    );
    let (status, body) = talk(&endpoint, declared.as_bytes());
    assert_eq!(status, 413, "{body}");
    let mut chunked = format!(
        "POST /v1/done HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    .into_bytes();
    let chunk = [format!("{:x}\r\n", 1 << 20).as_bytes(), &vec![b'x'; 1 << 20], b"\r\n"].concat();
    (0..BODY_BYTES_MAX / (1 << 20) + 2).for_each(|_| chunked.extend(&chunk));
    // The endpoint hangs up while the rest is still coming, so the answer itself may be lost.
    let (status, _) = talk(&endpoint, &chunked);
    assert!(matches!(status, 413 | 0), "{status}");
    assert_eq!(endpoint.status().unwrap()["events"], 0);
}

#[test]
fn who_is_slow_is_hung_up_on_and_hinders_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    options.deadlines.request_ms_max = 300;
    let (endpoint, _reports) = Endpoint::start(options, Rounds::new(1)).unwrap();
    let token = endpoint.token().reveal().to_owned();
    let address = endpoint.url().trim_start_matches("http://").to_owned();
    let head =
        format!("POST /v1/done HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\ncontent-length: 1000\r\n\r\n");
    let beginnings = ["", "POST /v1/do", "GET /health HTTP/1.1\r\n", head.as_str()];
    let slow: Vec<_> = beginnings
        .into_iter()
        .cycle()
        .take(64)
        .map(|start| {
            let mut stream = TcpStream::connect(&address).unwrap();
            stream.write_all(start.as_bytes()).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            stream
        })
        .collect();
    let rollout = client(folder.path(), "a");
    rollout.join(None, None, &identity()).unwrap();
    order(&rollout);
    for mut stream in slow {
        // One that trickles is no better than one that says nothing.
        let _ = stream.write_all(b"x");
        let mut answer = String::new();
        let ended = stream.read_to_string(&mut answer);
        let timed_out = ended.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!timed_out, "it is still connected");
        assert!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

#[test]
fn garbage_is_answered_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, _reports) = start(folder.path(), 1);
    let token = endpoint.token().reveal();
    for path in ["/v1/join", "/v1/next", "/v1/beat", "/v1/done", "/v1/failed", "/v1/leave"] {
        let deep = "[".repeat(100_000);
        for body in ["", "{}", "null", "[]", "\u{0}", "{\"replica\": 1}", &deep] {
            let (status, answer) = talk(&endpoint, &request(path, token, body));
            assert_eq!(status, 400, "{path} {answer}");
        }
    }
    let unknown =
        json!({"replica": "x", "incarnation": 3, "order": 1, "outcome": {"outcome": "trained"}, "wait_ms": 0});
    for path in ["/v1/next", "/v1/done"] {
        assert_eq!(talk(&endpoint, &request(path, token, &unknown.to_string())).0, 410);
    }
    assert_eq!(talk(&endpoint, &request("/v1/nothing", token, "{}")).0, 404);
    assert!(matches!(talk(&endpoint, b"\x16\x03\x01\x02\x00\x01\x00garbage\r\n\r\n").0, 400 | 0));
    let long_name = json!({"replica": "x".repeat(500), "role": "rollout", "nonce": 1, "identity": identity()});
    assert_eq!(talk(&endpoint, &request("/v1/join", token, &long_name.to_string())).0, 400);
    assert_eq!(endpoint.status().unwrap()["events"], 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_json_is_read_or_refused(text in "\\PC{0,200}", number in any::<f64>(), seq in any::<u64>()) {
        for body in [
            json!({"replica": text, "incarnation": seq, "order": seq, "reason": text, "progress": text}),
            json!({"replica": text, "incarnation": number, "order": [text], "outcome": {"outcome": text}}),
            json!({"replica": text, "role": "policy", "holds": seq, "address": text, "nonce": seq, "identity": identity()}),
        ] {
            let bytes = body.to_string();
            if let Ok(join) = serde_json::from_str::<crate::wire::Join>(&bytes) {
                let fits = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b));
                prop_assert!(join.check().is_err() || fits && !text.is_empty());
            }
            let _ = serde_json::from_str::<crate::wire::Done>(&bytes);
            let _ = serde_json::from_str::<crate::wire::Failed>(&bytes);
            let _ = serde_json::from_str::<crate::wire::Beat>(&bytes);
        }
        prop_assert!(crate::wire::short(&text, 16).len() <= 16);
    }
}
