//! Writes what was got into the cases, so that it is what is expected from now on.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter};
use serde_json::{Map, Value};

use super::{Case, Kind, Verdict, read_text};
use crate::error::{AuthorError, Result};

/// Replaces the expectations of the cases that differ, and gives one to those that expect nothing. Other lines stay
/// as they are, to the byte; the order of a changed line's fields and its unknown fields stay too. Cases whose offer
/// could not even be opened are left alone. Gives the number of changed cases.
///
/// # Errors
/// A file cannot be read again or replaced.
pub fn update(cases: &[Case], verdicts: &[Verdict]) -> Result<usize> {
    let mut by_file: BTreeMap<&Path, BTreeMap<usize, (&Case, &Verdict)>> = BTreeMap::new();
    for (case, verdict) in cases.iter().zip(verdicts) {
        if verdict.opened && (!verdict.agrees() || !verdict.judged.expects()) {
            by_file.entry(&case.place.file).or_default().insert(case.place.line, (case, verdict));
        }
    }
    let changed = by_file.values().map(BTreeMap::len).sum();
    for (file, lines) in by_file {
        let text = read_text(file)?;
        let mut new = String::with_capacity(text.len());
        for (index, line) in text.split_inclusive('\n').enumerate() {
            match lines.get(&(index + 1)) {
                Some((case, verdict)) => {
                    let body = line.trim_end_matches(['\n', '\r']);
                    new.push_str(&written(&renewed(case, &verdict.got), body));
                    new.push_str(&line[body.len()..]);
                }
                None => new.push_str(line),
            }
        }
        replace(file, &new)?;
    }
    Ok(changed)
}

fn replace(file: &Path, text: &str) -> Result<()> {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let new = file.with_file_name(format!(".{name}.{}", std::process::id()));
    let write = || {
        let mut out = std::fs::File::create(&new)?;
        out.write_all(text.as_bytes())?;
        out.sync_all()?;
        std::fs::rename(&new, file)
    };
    write().map_err(|error| {
        let _ = std::fs::remove_file(&new);
        AuthorError::io("cannot replace the cases", file)(error)
    })
}

/// The case's line with the expectations that `got` fulfils.
fn renewed(case: &Case, got: &Map<String, Value>) -> Map<String, Value> {
    let mut line = case.line.clone();
    let fresh = refreshed(&case.expected, got);
    if case.subject.kind != Kind::Reward {
        line.insert("expect".into(), fresh.into());
        return line;
    }
    for key in ["score", "metrics", "error"] {
        match fresh.get(key) {
            Some(value) => {
                line.insert(key.into(), value.clone());
            }
            // In place: the other fields keep their order.
            None => {
                line.shift_remove(key);
            }
        }
    }
    line
}

/// What was expected with the values of `got`; all of `got` when nothing was.
fn refreshed(expected: &Map<String, Value>, got: &Map<String, Value>) -> Map<String, Value> {
    if let Some(error) = got.get("error") {
        return Map::from_iter([("error".to_owned(), error.clone())]);
    }
    let kept: Map<String, Value> = expected
        .iter()
        .filter_map(|(key, expected)| {
            got.get(key).map(|got| {
                let value = match (expected, got) {
                    (Value::Object(expected), Value::Object(got)) => refreshed(expected, got).into(),
                    _ => got.clone(),
                };
                (key.clone(), value)
            })
        })
        .collect();
    if !kept.is_empty() {
        return kept;
    }
    let empty = |value: &Value| {
        value.is_null() || value.as_object().is_some_and(Map::is_empty) || value.as_str().is_some_and(str::is_empty)
    };
    got.iter().filter(|(_, value)| !empty(value)).map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// On one line, with spaces after `:` and `,` where `like` has them.
fn written(line: &Map<String, Value>, like: &str) -> String {
    let mut out = Vec::new();
    let done = if like.contains("\": ") {
        line.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced))
    } else {
        line.serialize(&mut serde_json::Serializer::with_formatter(&mut out, CompactFormatter))
    };
    match (done, String::from_utf8(out)) {
        (Ok(()), Ok(text)) => text,
        // Writing JSON to memory fails for no value that was read from JSON.
        _ => Value::Object(line.clone()).to_string(),
    }
}

/// As Python's `json.dumps` writes by default.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cases::{Judged, read};

    fn verdict(case: &Case, got: Value, judged: Judged) -> Verdict {
        let Value::Object(got) = got else { panic!("an object") };
        Verdict { got, judged, ..Verdict::blank(case, "r") }
    }

    #[test]
    fn only_what_differs_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.jsonl");
        let text = concat!(
            "{\"reward\":   \"r\"}\n",
            "{\"id\":1,  \"completion\":\"same\",\"score\":1}\n",
            "{\"note\": [1, {\"a\": 2}], \"completion\": \"é\", \"score\": 1, \"metrics\": {\"a\": 1}, \"last\": true}\r\n",
            "\n",
            "{\"completion\":\"new\"}\n",
            "{\"completion\":\"fails\",\"score\":1,\"z\":0}\n",
            "{\"index\":0,\"expect\":{\"prompt\":\"old\"},\"z\":0}",
        );
        std::fs::write(&path, text).unwrap();
        let cases = read(std::slice::from_ref(&path)).unwrap();
        let verdicts = [
            verdict(&cases[0], json!({"score": 1.0}), Judged::Agrees),
            verdict(&cases[1], json!({"score": 0.5, "metrics": {"a": 2.0, "b": 3.0}}), Judged::Differs),
            verdict(&cases[2], json!({"score": 0.25, "metrics": {}}), Judged::ExpectsNothing),
            verdict(&cases[3], json!({"error": "why"}), Judged::Differs),
            verdict(&cases[4], json!({"prompt": "new", "metadata": {}}), Judged::Differs),
        ];
        assert_eq!(update(&cases, &verdicts).unwrap(), 4);
        let expected = concat!(
            "{\"reward\":   \"r\"}\n",
            "{\"id\":1,  \"completion\":\"same\",\"score\":1}\n",
            "{\"note\": [1, {\"a\": 2}], \"completion\": \"é\", \"score\": 0.5, \"metrics\": {\"a\": 2.0}, \"last\": true}\r\n",
            "\n",
            "{\"completion\":\"new\",\"score\":0.25}\n",
            "{\"completion\":\"fails\",\"z\":0,\"error\":\"why\"}\n",
            "{\"index\":0,\"expect\":{\"prompt\":\"new\"},\"z\":0}",
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left behind");
    }
}
