//! Configurations resolve to what upstream resolves them to.

use cosmos_config::{Config, ConfigFile, explain};
use cosmos_testkit::{golden, read_json};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The upstream files were resolved with this start time, given as `train.timestamp`.
const TIMESTAMP: &str = "20260102030405";

/// Every `*.toml` that has a `*.resolved.json` beside it.
fn cases(folder: &Path) -> Vec<(PathBuf, PathBuf)> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut found: Vec<(PathBuf, PathBuf)> = entries
        .map(|entry| entry.expect("a folder entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .map(|path| (path.clone(), path.with_extension("resolved.json")))
        .filter(|(_, resolved)| resolved.exists())
        .collect();
    found.sort();
    assert!(!found.is_empty(), "{} holds no `*.toml` with a `*.resolved.json`", folder.display());
    found
}

fn resolve(path: &Path, overrides: &[String]) -> Config {
    let mut file = ConfigFile::read(path).unwrap_or_else(|e| panic!("{e}"));
    file.set(overrides).unwrap_or_else(|e| panic!("{e}"));
    file.resolve("19990101000000").unwrap_or_else(|e| panic!("{}:\n{e}", path.display())).config
}

/// Where two JSON values differ. Keys that only `ours` has are listed in `extra`.
fn differences(path: &str, ours: &Value, theirs: &Value, wrong: &mut Vec<String>, extra: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            let join = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
            for (key, value) in theirs {
                match ours.get(key) {
                    Some(mine) => differences(&join(key), mine, value, wrong, extra),
                    // Keys of models that are not trained here may be missing.
                    None if ["policy.lora", "policy.diffusers", "vla"].iter().any(|table| path.starts_with(table)) => {
                        eprintln!("skipped: `{}` is not a key of ours", join(key));
                    }
                    None => wrong.push(format!("{} is missing, upstream has {value}", join(key))),
                }
            }
            extra.extend(ours.keys().filter(|key| !theirs.contains_key(*key)).map(|key| join(key)));
        }
        (Value::Array(ours), Value::Array(theirs)) if ours.len() == theirs.len() => {
            for (index, (mine, value)) in ours.iter().zip(theirs).enumerate() {
                differences(&format!("{path}[{index}]"), mine, value, wrong, extra);
            }
        }
        (Value::Number(mine), Value::Number(value)) if mine.as_f64() == value.as_f64() => {}
        (mine, value) if mine == value => {}
        (mine, value) => wrong.push(format!("{path} is {mine}, upstream has {value}")),
    }
}

#[test]
fn golden_configs_resolve_as_upstream() {
    let Some(folder) = golden("configs") else { return };
    for (toml, resolved) in cases(&folder) {
        let config = resolve(&toml, &[format!("train.timestamp={TIMESTAMP}")]);
        let (mut wrong, mut extra) = (Vec::new(), Vec::new());
        differences("", &config.to_json(), &read_json(&resolved), &mut wrong, &mut extra);
        assert!(wrong.is_empty(), "{}:\n{}", toml.display(), wrong.join("\n"));
        for key in extra {
            let doc = explain(&key).unwrap_or_else(|e| panic!("{e}")).doc;
            assert!(
                doc.contains("ot in the original"),
                "`{key}` is not in {} but is not marked as ours",
                resolved.display()
            );
        }
    }
}

#[test]
fn golden_configs_survive_their_own_toml() {
    let Some(folder) = golden("configs") else { return };
    for (toml, _) in cases(&folder) {
        let config = resolve(&toml, &[]);
        let text = config.to_toml().expect("a resolved configuration is TOML");
        let again = ConfigFile::parse("again.toml", &text).and_then(|f| f.resolve("20000101000000"));
        assert_eq!(again.unwrap_or_else(|e| panic!("{}:\n{e}\n{text}", toml.display())).config, config);
    }
}
