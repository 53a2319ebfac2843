//! The YAML head of a dataset card (`README.md`), as far as it says which files make up which subset and split.

use saphyr_parser::{Event, Parser};
use serde_json::{Map, Value};

/// Bytes of a head; those of datasets with hundreds of subsets reach a few.
const HEAD_BYTES_MAX: usize = 4 << 20;
/// How deep the head may nest.
const DEPTH_MAX: usize = 32;

/// One entry of `configs:`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Config {
    /// The subset.
    pub name: String,
    /// Whether it is the one taken when none is named.
    pub default: bool,
    /// A folder that its files lie in, empty for the whole repository.
    pub data_dir: String,
    /// Splits and the patterns of their files, in order; empty when the names of the files tell.
    pub data_files: Vec<(String, Vec<String>)>,
}

/// The configurations that a card lists; none when it has no head or no `configs:`.
pub(super) fn configs(card: &str) -> Result<Vec<Config>, String> {
    let Some(head) = head(card) else { return Ok(Vec::new()) };
    if head.len() > HEAD_BYTES_MAX {
        return Err(format!("its YAML head has {} bytes, more than the limit of {HEAD_BYTES_MAX}", head.len()));
    }
    let head = yaml(head)?;
    let entries = head.get("configs").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    entries.iter().map(config).collect()
}

/// What stands between the first line `---` and the next.
fn head(card: &str) -> Option<&str> {
    let card = card.trim_start_matches('\u{feff}');
    let rest = card.strip_prefix("---")?.trim_start_matches([' ', '\t', '\r']).strip_prefix('\n')?;
    let mut at = 0;
    for line in rest.split_inclusive('\n') {
        if line.trim_end() == "---" {
            return Some(&rest[..at]);
        }
        at += line.len();
    }
    None
}

fn config(entry: &Value) -> Result<Config, String> {
    let text = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let name = match text("config_name") {
        name if name.is_empty() => "default".to_owned(),
        name => name,
    };
    let wrong = || format!("`data_files` of the configuration `{name}` is not understood");
    let data_files = match entry.get("data_files") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Object(splits)) => {
            let split = |(split, paths): (&String, &Value)| Ok((split.clone(), patterns(paths).ok_or_else(wrong)?));
            splits.iter().map(split).collect::<Result<_, String>>()?
        }
        Some(Value::Array(items)) if items.iter().any(Value::is_object) => {
            let split = |item: &Value| {
                let split = item.get("split").and_then(Value::as_str).unwrap_or("train");
                Some((split.to_owned(), patterns(item.get("path")?)?))
            };
            items.iter().map(|item| split(item).ok_or_else(wrong)).collect::<Result<_, String>>()?
        }
        Some(paths) => vec![("train".to_owned(), patterns(paths).ok_or_else(wrong)?)],
    };
    let default = entry.get("default").and_then(Value::as_str) == Some("true");
    Ok(Config { data_dir: text("data_dir"), default, data_files, name })
}

/// One pattern or a list of them.
fn patterns(paths: &Value) -> Option<Vec<String>> {
    match paths {
        Value::String(path) => Some(vec![path.clone()]),
        Value::Array(paths) => paths.iter().map(|path| path.as_str().map(str::to_owned)).collect(),
        _ => None,
    }
}

/// YAML with every scalar as text: that is all a card's `configs` need. References are refused where they are used, as
/// a few lines of them can stand for gigabytes.
fn yaml(text: &str) -> Result<Value, String> {
    let mut open: Vec<(Value, Option<String>)> = Vec::new();
    let mut done = Value::Null;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| format!("its YAML head is broken: {error}"))?;
        let value = match event {
            Event::SequenceStart(..) | Event::MappingStart(..) => {
                if open.len() >= DEPTH_MAX {
                    return Err(format!("its YAML head nests deeper than {DEPTH_MAX} levels"));
                }
                let container = if matches!(event, Event::SequenceStart(..)) {
                    Value::Array(Vec::new())
                } else {
                    Value::Object(Map::new())
                };
                open.push((container, None));
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => open.pop().map_or(Value::Null, |(value, _)| value),
            Event::Scalar(text, ..) => Value::String(text.into_owned()),
            Event::Alias(_) => {
                return Err(format!(
                    "its YAML head has a reference (`*…`) in line {}, which is not read",
                    span.start.line()
                ));
            }
            _ => continue,
        };
        match open.last_mut() {
            None => done = value,
            Some((Value::Array(items), _)) => items.push(value),
            Some((Value::Object(map), key)) => match key.take() {
                None => *key = Some(value.as_str().unwrap_or_default().to_owned()),
                Some(name) => drop(map.insert(name, value)),
            },
            Some(_) => {}
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_data_files() {
        let card = "---\nconfigs:\n- config_name: a\n  default: true\n  data_files: a/*.parquet\n- config_name: b\n  data_dir: b\n- config_name: c\n  data_files:\n    train: [x.jsonl, y.jsonl]\n    test: z.jsonl\n---\n";
        let found = configs(card).unwrap();
        assert_eq!(found[0].data_files, [("train".to_owned(), vec!["a/*.parquet".to_owned()])]);
        assert!(found[0].default && !found[1].default);
        assert_eq!((found[1].data_dir.as_str(), found[1].data_files.len()), ("b", 0));
        assert_eq!(found[2].data_files[1].0, "test");
    }

    #[test]
    fn no_head_and_broken_heads() {
        assert_eq!(configs("# Title\n---\n"), Ok(vec![]));
        assert_eq!(configs("---\nlicense: mit\n---\n"), Ok(vec![]));
        assert_eq!(configs("---\nnot closed"), Ok(vec![]));
        for broken in
            ["---\na: [1\n---\n", "---\na: &x 1\nb: *x\n---\n", "---\nconfigs:\n- data_files: {a: {b: c}}\n---\n"]
        {
            assert!(configs(broken).is_err(), "{broken}");
        }
        assert!(configs(&format!("---\na: {}\n---\n", "[".repeat(10_000))).is_err());
    }
}
