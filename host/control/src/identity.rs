//! What all processes of a run must have in common.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::error::{ControlError, Result};

/// Bytes of all that an identity holds.
const BYTES_MAX: usize = 2 << 20;
/// Config keys that a refusal names.
const KEYS_NAMED_MAX: usize = 3;
/// Characters of a value that it shows.
const VALUE_CHARS_MAX: usize = 80;

/// What all processes of a run must have in common: config, plugins and program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The resolved config: dotted keys with their values as JSON.
    pub config: BTreeMap<String, String>,
    /// File name and SHA-256 of every plugin.
    pub plugins: BTreeMap<String, String>,
    /// Version of the program.
    pub version: String,
}

impl Identity {
    /// Of a resolved config and the plugins' files. `left_out` names keys (dotted) in which processes of one run may
    /// differ, such as `train.output_dir`.
    pub fn new(config: &Value, left_out: &[&str], plugins: &[impl AsRef<Path>], version: &str) -> Result<Self> {
        let mut flat = BTreeMap::new();
        flatten("", config, &mut flat);
        let within =
            |key: &str, table: &str| key.strip_prefix(table).is_some_and(|r| r.is_empty() || r.starts_with('.'));
        flat.retain(|key, _| !left_out.iter().any(|table| within(key, table)));
        let mut named = BTreeMap::new();
        for path in plugins {
            let path = path.as_ref();
            let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
            named.insert(name, hash_of_file(path)?);
        }
        Ok(Self { config: flat, plugins: named, version: version.into() })
    }

    /// Whether `other` differs from this, and only in these keys of the config.
    pub fn differs_only_in(&self, other: &Self, keys: &[&str]) -> bool {
        let without = |identity: &Self| {
            let mut rest = identity.clone();
            rest.config.retain(|key, _| !keys.contains(&key.as_str()));
            rest
        };
        self != other && without(self) == without(other)
    }

    /// What of `other` differs from this, in words; none if they are the same.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let short = |hash: &str| hash.chars().take(12).collect::<String>();
        let mut all = Vec::new();
        if self.version != other.version {
            all.push(format!("program `{}`, and not `{}`", other.version, self.version));
        }
        all.extend(self.keys_that_differ(other));
        for (name, hash) in &self.plugins {
            match other.plugins.get(name) {
                None => all.push(format!("no plugin `{name}`")),
                Some(theirs) if theirs != hash => {
                    all.push(format!("plugin `{name}` with SHA-256 {}…, and not {}…", short(theirs), short(hash)));
                }
                Some(_) => {}
            }
        }
        for name in other.plugins.keys().filter(|name| !self.plugins.contains_key(*name)) {
            all.push(format!("plugin `{name}` that the run does not have"));
        }
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// The first config keys of `other` that differ from this, and how many more there are.
    fn keys_that_differ(&self, other: &Self) -> Vec<String> {
        let keys: BTreeSet<&String> = self.config.keys().chain(other.config.keys()).collect();
        let differing: Vec<&String> =
            keys.into_iter().filter(|key| self.config.get(*key) != other.config.get(*key)).collect();
        let value = |of: &Self, key: &String| match of.config.get(key) {
            None => "unset".to_owned(),
            Some(text) if text.chars().count() > VALUE_CHARS_MAX => {
                text.chars().take(VALUE_CHARS_MAX).chain(['…']).collect()
            }
            Some(text) => text.clone(),
        };
        let named = differing.iter().take(KEYS_NAMED_MAX);
        let mut said: Vec<String> =
            named.map(|key| format!("`{key}` is {}, and not {}", value(other, key), value(self, key))).collect();
        match differing.len().saturating_sub(KEYS_NAMED_MAX) {
            0 => {}
            1 => said.push("1 more key of the config".into()),
            more => said.push(format!("{more} more keys of the config")),
        }
        said
    }

    /// Whether it is of a size that this program would write.
    pub(crate) fn is_bounded(&self) -> bool {
        let both = self.config.iter().chain(&self.plugins);
        self.version.len() + both.map(|(name, text)| name.len() + text.len()).sum::<usize>() <= BYTES_MAX
    }
}

/// Every value in `value` that holds no others, by its dotted key.
fn flatten(key: &str, value: &Value, into: &mut BTreeMap<String, String>) {
    let below = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match value {
        Value::Object(table) if !table.is_empty() => {
            table.iter().for_each(|(name, value)| flatten(&below(name), value, into));
        }
        Value::Array(tables) if !tables.is_empty() && tables.iter().all(Value::is_object) => {
            tables.iter().enumerate().for_each(|(index, table)| flatten(&format!("{key}[{index}]"), table, into));
        }
        // As text: a number that is read and written again may lose its last bit.
        leaf => drop(into.insert(key.to_owned(), leaf.to_string())),
    }
}

fn hash_of_file(path: &Path) -> Result<String> {
    let failed = |source| ControlError::Io { doing: "read", path: path.into(), source };
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 16];
    loop {
        let count = file.read(&mut buffer).map_err(failed)?;
        if count == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..count]);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn says_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        let plugin = folder.path().join("a.wasm");
        std::fs::write(&plugin, b"one").unwrap();
        let config = json!({"train": {"output_dir": "x", "seed": 1, "lr": 1e-6}, "custom": {"sets": ["a", "b"]}});
        let left_out = ["train.output_dir", "no.such.key"];
        let own = Identity::new(&config, &left_out, &[&plugin], "1").unwrap();
        let moved = json!({"train": {"output_dir": "y", "seed": 1, "lr": 1e-6}, "custom": {"sets": ["a", "b"]}});
        assert_eq!(own.difference(&Identity::new(&moved, &left_out, &[&plugin], "1").unwrap()), None);
        std::fs::write(&plugin, b"two").unwrap();
        let other = json!({"train": {"output_dir": "x", "seed": 2, "lr": 1e-6, "lrs": 1, "z": "z".repeat(99)}});
        let other = Identity::new(&other, &left_out, &[&plugin], "2").unwrap();
        let text = own.difference(&other).unwrap();
        for part in [
            "program `2`, and not `1`; ",
            "; `custom.sets` is unset, and not [\"a\",\"b\"]; `train.lrs` is 1, and not unset; ",
            "`train.seed` is 2, and not 1; 1 more key of the config; plugin `a.wasm` with SHA-256 ",
        ] {
            assert!(text.contains(part), "{text}");
        }
        let long = json!({"z": "z".repeat(99)});
        let short = json!({"z": ""});
        let of = |config| Identity::new(config, &[], &[&plugin], "1").unwrap();
        let text = of(&short).difference(&of(&long)).unwrap();
        assert!(text.starts_with("`z` is \"zz") && text.ends_with("zz…, and not \"\""), "{text}");
        // What came over the wire is the same, to the last bit of a number.
        let again: Identity = serde_json::from_str(&serde_json::to_string(&own).unwrap()).unwrap();
        assert_eq!(own, again);
        assert!(own.is_bounded() && !Identity { version: "v".repeat(BYTES_MAX), ..own.clone() }.is_bounded());
        let none = Identity { plugins: BTreeMap::new(), ..own.clone() };
        let longer = json!({"z": "", "train": {"steps": 3}});
        let longer = of(&longer);
        assert!(of(&short).differs_only_in(&longer, &["train.steps"]) && !own.differs_only_in(&own, &["z"]));
        assert!(!longer.differs_only_in(&of(&long), &["train.steps"]));
        assert_eq!(own.difference(&none).unwrap(), "no plugin `a.wasm`");
        assert_eq!(none.difference(&own).unwrap(), "plugin `a.wasm` that the run does not have");
    }
}
