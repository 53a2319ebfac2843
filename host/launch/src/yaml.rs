//! Values as YAML in block style, for manifests that people read.

use serde_json::Value;

/// Deepest nesting that is written; manifests have about ten levels.
const DEPTH_MAX: usize = 64;

/// One document, with a newline at its end.
pub fn document(value: &Value) -> String {
    let mut out = String::new();
    write(value, 0, &mut out, false);
    out
}

/// Writes `value` at `depth`; `inline` if the line has begun with a dash.
fn write(value: &Value, depth: usize, out: &mut String, inline: bool) {
    let indent = "  ".repeat(depth);
    match value {
        _ if depth > DEPTH_MAX => out.push_str("null\n"),
        Value::Object(map) if !map.is_empty() => {
            for (position, (key, value)) in map.iter().enumerate() {
                if !(inline && position == 0) {
                    out.push_str(&indent);
                }
                out.push_str(&scalar(key));
                out.push(':');
                member(value, depth, out);
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for (position, item) in items.iter().enumerate() {
                if !(inline && position == 0) {
                    out.push_str(&indent);
                }
                out.push_str("- ");
                write(item, depth + 1, out, true);
            }
        }
        Value::Object(_) => out.push_str("{}\n"),
        Value::Array(_) => out.push_str("[]\n"),
        Value::String(text) => {
            out.push_str(&scalar(text));
            out.push('\n');
        }
        other => {
            out.push_str(&other.to_string());
            out.push('\n');
        }
    }
}

/// What stands behind a key.
fn member(value: &Value, depth: usize, out: &mut String) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            out.push('\n');
            write(value, depth + 1, out, false);
        }
        Value::Array(items) if !items.is_empty() => {
            out.push('\n');
            write(value, depth + 1, out, false);
        }
        Value::String(text) if is_block(text) => {
            let indent = "  ".repeat(depth + 1);
            out.push_str(" |\n");
            for line in text.trim_end_matches('\n').lines() {
                if !line.is_empty() {
                    out.push_str(&indent);
                    out.push_str(line);
                }
                out.push('\n');
            }
        }
        other => {
            out.push(' ');
            write(other, depth + 1, out, true);
        }
    }
}

/// Whether a text can stand as a literal block and be read back the same.
fn is_block(text: &str) -> bool {
    text.ends_with('\n')
        && !text.ends_with("\n\n")
        && text.lines().next().is_some_and(|line| !line.is_empty() && !line.starts_with(' '))
        && text.chars().all(|c| c == '\n' || (!c.is_control() && c != '\u{2028}' && c != '\u{2029}' && c != '\u{feff}'))
}

/// A plain word where nothing can be mistaken, else as in JSON, which is YAML too.
fn scalar(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
        && !["true", "false", "null", "yes", "no", "on", "off", "y", "n"].contains(&text.to_ascii_lowercase().as_str());
    if plain { text.into() } else { Value::String(text.into()).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_could_be_mistaken_is_quoted() {
        let value = json!({"a": "yes", "b": "8", "c": "x: y", "d": ["one", {"k": 1, "l": []}], "e": {}, "f": "line\nnext\n", "g": null});
        let text = "a: \"yes\"\nb: \"8\"\nc: \"x: y\"\nd:\n  - one\n  - k: 1\n    l: []\ne: {}\nf: |\n  line\n  next\ng: null\n";
        assert_eq!(document(&value), text);
    }
}
