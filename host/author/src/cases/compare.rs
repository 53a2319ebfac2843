//! Expected against got: everything that is expected must be there, nothing else matters.

use serde::Serialize;
use serde_json::{Map, Value};

/// Differences of one case that are told; a changed list of thousands says no more.
const DIFFERENCES_MAX: usize = 50;

/// One value that is not the expected one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Which, as `metrics.format` or `turns[1].messages[0].content`.
    pub what: String,
    /// Null where no failure was expected.
    pub expected: Value,
    /// Null where it is missing.
    pub got: Value,
}

/// What of `expected` is otherwise in `got`. Numbers may be off by `tolerance`; an expected `error` is a part of the
/// real one's text; a failure that is not expected is a difference.
pub(super) fn differences(expected: &Map<String, Value>, got: &Map<String, Value>, tolerance: f64) -> Vec<Difference> {
    let mut found = Vec::new();
    compare_objects("", expected, got, tolerance, &mut found);
    found.truncate(DIFFERENCES_MAX);
    found
}

fn compare_objects(
    at: &str,
    expected: &Map<String, Value>,
    got: &Map<String, Value>,
    tolerance: f64,
    found: &mut Vec<Difference>,
) {
    if let Some(error) = got.get("error").filter(|_| !expected.contains_key("error")) {
        // The rest is missing because of it.
        found.push(Difference { what: join(at, "error"), expected: Value::Null, got: error.clone() });
        return;
    }
    for (key, expected) in expected {
        let what = join(at, key);
        match (expected, got.get(key)) {
            (Value::String(part), Some(Value::String(text))) if key == "error" && text.contains(part.as_str()) => {}
            (_, Some(got)) => compare(what, expected, got, tolerance, found),
            (Value::Null, None) => {}
            (_, None) => found.push(Difference { what, expected: expected.clone(), got: Value::Null }),
        }
    }
}

fn compare(what: String, expected: &Value, got: &Value, tolerance: f64, found: &mut Vec<Difference>) {
    match (expected, got) {
        (Value::Object(expected), Value::Object(got)) => compare_objects(&what, expected, got, tolerance, found),
        (Value::Array(expected), Value::Array(got)) if expected.len() == got.len() => {
            for (index, (expected, got)) in expected.iter().zip(got).enumerate() {
                compare(format!("{what}[{index}]"), expected, got, tolerance, found);
            }
        }
        (Value::Number(a), Value::Number(b)) => {
            let near = match (a.as_f64(), b.as_f64()) {
                (Some(a), Some(b)) => (a - b).abs() <= tolerance,
                _ => a == b,
            };
            if !near {
                found.push(Difference { what, expected: expected.clone(), got: got.clone() });
            }
        }
        _ if expected == got => {}
        _ => found.push(Difference { what, expected: expected.clone(), got: got.clone() }),
    }
}

fn join(at: &str, key: &str) -> String {
    if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn told(expected: Value, got: Value) -> Vec<String> {
        let (Value::Object(expected), Value::Object(got)) = (expected, got) else { panic!("objects") };
        differences(&expected, &got, 0.01)
            .into_iter()
            .map(|d| format!("{}: {} / {}", d.what, d.expected, d.got))
            .collect()
    }

    #[test]
    fn only_what_is_expected_counts() {
        assert!(told(json!({}), json!({"score": 1.0})).is_empty());
        assert!(told(json!({"score": 1}), json!({"score": 1.005, "metrics": {"a": 1}})).is_empty());
        assert_eq!(told(json!({"score": 1}), json!({"score": 0.5})), ["score: 1 / 0.5"]);
        assert_eq!(told(json!({"metrics": {"a": 1}}), json!({"score": 1, "metrics": {}})), ["metrics.a: 1 / null"]);
        assert_eq!(
            told(json!({"reference": {"n": [1, 2]}}), json!({"reference": {"n": [1, 3], "t": 1}})),
            ["reference.n[1]: 2 / 3"]
        );
        assert_eq!(told(json!({"messages": [1]}), json!({"messages": []})), ["messages: [1] / []"]);
        assert_eq!(told(json!({"prompt": "a"}), json!({"prompt": 1})), ["prompt: \"a\" / 1"]);
    }

    #[test]
    fn failures_are_compared_by_a_part_of_their_text() {
        assert!(told(json!({"error": "no JSON"}), json!({"error": "the reference is no JSON: x"})).is_empty());
        assert_eq!(told(json!({"error": "x"}), json!({"error": "y"})), ["error: \"x\" / \"y\""]);
        assert_eq!(told(json!({"error": "x"}), json!({"score": 1})), ["error: \"x\" / null"]);
        assert_eq!(told(json!({"score": 1, "metrics": {"a": 1}}), json!({"error": "y"})), ["error: null / \"y\""]);
        assert_eq!(told(json!({}), json!({"error": "y"})), ["error: null / \"y\""]);
        assert_eq!(
            told(json!({"turns": [{"done": true}]}), json!({"turns": [{"error": "y"}]})),
            ["turns[0].error: null / \"y\""]
        );
    }
}
