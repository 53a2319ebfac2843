//! What all processes of a run must have in common.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{ControlError, Result};

const PLUGINS_MAX: usize = 256;
const TEXT_BYTES_MAX: usize = 256;

/// What all processes of a run must have in common: config, plugins and program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// SHA-256 of the resolved config.
    pub config: String,
    /// File name and SHA-256 of every plugin.
    pub plugins: BTreeMap<String, String>,
    /// Version of the program.
    pub version: String,
}

impl Identity {
    /// Of a resolved config and the plugins' files. `left_out` names keys (dotted) in which processes of one run may
    /// differ, such as `train.output_dir`.
    pub fn new(
        config: &serde_json::Value,
        left_out: &[&str],
        plugins: &[impl AsRef<Path>],
        version: &str,
    ) -> Result<Self> {
        let mut config = config.clone();
        for key in left_out {
            remove(&mut config, key);
        }
        let mut named = BTreeMap::new();
        for path in plugins {
            let path = path.as_ref();
            let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
            named.insert(name, hash_of_file(path)?);
        }
        Ok(Self {
            config: hex(&Sha256::digest(config.to_string().as_bytes())),
            plugins: named,
            version: version.into(),
        })
    }

    /// What of `other` differs from this, in words; none if they are the same.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let short = |hash: &str| hash.chars().take(12).collect::<String>();
        let mut all = Vec::new();
        if self.version != other.version {
            all.push(format!("program `{}`, and not `{}`", other.version, self.version));
        }
        if self.config != other.config {
            all.push(format!("config with SHA-256 {}…, and not {}…", short(&other.config), short(&self.config)));
        }
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

    /// Whether it is of a size that this program would write.
    pub(crate) fn is_bounded(&self) -> bool {
        let short = |text: &str| text.len() <= TEXT_BYTES_MAX;
        short(&self.config)
            && short(&self.version)
            && self.plugins.len() <= PLUGINS_MAX
            && self.plugins.iter().all(|(name, hash)| short(name) && short(hash))
    }
}

fn remove(value: &mut serde_json::Value, key: &str) {
    match key.split_once('.') {
        Some((table, rest)) => {
            if let Some(inner) = value.get_mut(table) {
                remove(inner, rest);
            }
        }
        None => {
            if let Some(map) = value.as_object_mut() {
                map.remove(key);
            }
        }
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
        let config = json!({"train": {"output_dir": "x", "seed": 1}});
        let left_out = ["train.output_dir", "no.such.key"];
        let own = Identity::new(&config, &left_out, &[&plugin], "1").unwrap();
        let moved = json!({"train": {"output_dir": "y", "seed": 1}});
        assert_eq!(own.difference(&Identity::new(&moved, &left_out, &[&plugin], "1").unwrap()), None);
        std::fs::write(&plugin, b"two").unwrap();
        let other = json!({"train": {"output_dir": "x", "seed": 2}});
        let other = Identity::new(&other, &left_out, &[&plugin], "2").unwrap();
        let text = own.difference(&other).unwrap();
        for part in ["program `2`", "config with SHA-256", "plugin `a.wasm`"] {
            assert!(text.contains(part), "{text}");
        }
        let none = Identity { plugins: BTreeMap::new(), ..own.clone() };
        assert_eq!(own.difference(&none).unwrap(), "no plugin `a.wasm`");
        assert_eq!(none.difference(&own).unwrap(), "plugin `a.wasm` that the run does not have");
    }
}
