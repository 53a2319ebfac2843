//! From a file to a checked configuration, and back to text.

use crate::check::Check;
use crate::document::{Document, Node, NodeValue};
use crate::keys::Config;
use crate::problem::{ConfigError, ConfigErrors, Place, Problem, Severity, Warning};
use crate::{FILE_BYTES_MAX, rules};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// A configuration as written: a TOML file, or none, with `--set` arguments laid over it.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    document: Document,
}

/// A checked configuration that knows the place of every value.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The values, with defaults filled in and upstream's rewrites applied.
    pub config: Config,
    /// What is probably not as meant.
    pub warnings: Vec<Warning>,
    document: Document,
}

impl ConfigFile {
    /// Reads and parses a TOML file of at most [`FILE_BYTES_MAX`] bytes.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let read = |source| ConfigError::Read { path: path.into(), source };
        let bytes = std::fs::metadata(path).map_err(read)?.len();
        if bytes > FILE_BYTES_MAX {
            return Err(ConfigError::TooLarge { path: path.into(), bytes });
        }
        let bytes = std::fs::read(path).map_err(read)?;
        let text = String::from_utf8(bytes)
            .map_err(|e| ConfigError::NotText { path: path.into(), offset: e.utf8_error().valid_up_to() })?;
        Ok(Self::parse(&path.display().to_string(), &text)?)
    }

    /// Parses TOML text; `file` is its name in messages. An empty text is a configuration of defaults.
    pub fn parse(file: &str, text: &str) -> Result<Self, ConfigErrors> {
        let failed = |problems| ConfigErrors { file: file.into(), text: text.into(), problems };
        if text.len() as u64 > FILE_BYTES_MAX {
            let message = format!(
                "the text has {} bytes, more than the {FILE_BYTES_MAX} that a configuration may have",
                text.len()
            );
            let problem = Problem { severity: Severity::Error, key: String::new(), message, hint: None, place: None };
            return Err(failed(vec![problem]));
        }
        Ok(Self { document: Document::parse(file, text).map_err(failed)? })
    }

    /// Lays arguments of the form `a.b=c` over the file, in their order. The value is read as TOML; where that fails, or
    /// where the key wants a string and the text is not one, the text itself is the value.
    pub fn set(&mut self, overrides: &[String]) -> Result<(), ConfigErrors> {
        let apply = |argument: &String| self.document.apply_override(argument).err();
        let problems: Vec<Problem> = overrides.iter().filter_map(apply).collect();
        if problems.is_empty() { Ok(()) } else { Err(self.errors(problems)) }
    }

    /// Checks everything, applies upstream's rewrites and fills in defaults. `now` is the start time as `YYYYMMDDhhmmss`: it
    /// becomes `train.timestamp`, and the last part of `train.output_dir`, when the file has a `[train]` without one.
    pub fn resolve(&self, now: &str) -> Result<Resolved, ConfigErrors> {
        let document = &self.document;
        let mut check = Check::new(document);
        let value = check.run();
        let mut problems = check.problems;
        let entries = document.root.table().map(Vec::as_slice).unwrap_or_default();
        let has_train = entries.iter().any(|(key, _)| key == "train");
        if !entries.is_empty() && !has_train {
            problems.push(Problem {
                severity: Severity::Error,
                key: "train".into(),
                message: "the table `[train]` is missing".into(),
                hint: Some("add `[train]`, at least with `output_dir`".into()),
                place: Some(document.place_of(0..0)),
            });
        }
        let mut config: Config = match serde_json::from_value(value) {
            Ok(config) => config,
            Err(_) if problems.iter().any(|p| p.severity == Severity::Error) => Config::default(),
            Err(error) => {
                let message = format!("the configuration cannot be used: {error}");
                problems.push(Problem {
                    severity: Severity::Error,
                    key: String::new(),
                    message,
                    hint: None,
                    place: None,
                });
                Config::default()
            }
        };
        if has_train && config.train.timestamp.is_empty() {
            config.train.timestamp = now.into();
            config.train.output_dir = join_path(&config.train.output_dir, now);
        }
        // With a wrong type the value is the default here, and a rule could blame the wrong key.
        if problems.iter().all(|p| p.severity == Severity::Warning) {
            problems.extend(rules::apply(&mut config, document));
        }
        problems.sort_by_key(|p| p.place.as_ref().map_or(usize::MAX, |place| place.span.start));
        if problems.iter().any(|p| p.severity == Severity::Error) {
            return Err(self.errors(problems));
        }
        Ok(Resolved { config, warnings: problems, document: document.clone() })
    }

    /// The file's name in messages.
    pub fn name(&self) -> &str {
        &self.document.file
    }

    /// The file's text, in which spans count bytes.
    pub fn text(&self) -> &Arc<str> {
        &self.document.text
    }

    fn errors(&self, problems: Vec<Problem>) -> ConfigErrors {
        ConfigErrors { file: self.document.file.clone(), text: self.document.text.clone(), problems }
    }
}

impl Resolved {
    /// Where `key` (`train.optm_lr`) was written; `None` when it has its default.
    pub fn place(&self, key: &str) -> Option<Place> {
        let parts = crate::document::key_parts(key)?;
        self.document.root.at(parts.iter().map(String::as_str)).map(|node| self.document.place(node))
    }

    /// Where the value at `path` was written, part by part; a part below a list is an index. When the file does not have
    /// it, where the table that lacks it stands; `None` when nothing of the path was written.
    pub fn nearest_place(&self, path: &[&str]) -> Option<Place> {
        let (node, depth) = self.document.root.deepest(path);
        (depth > 0).then(|| if depth < path.len() { self.document.key_place(node) } else { self.document.place(node) })
    }

    /// Where `name` was written at `path`: the text itself, an item of a list, or the key of a table.
    pub fn place_of_name(&self, path: &[&str], name: &str) -> Option<Place> {
        let (node, depth) = self.document.root.deepest(path);
        if depth == 0 || depth < path.len() {
            return None;
        }
        let is_name = |node: &&Node| matches!(&node.value, NodeValue::Text(text) if text == name);
        match &node.value {
            NodeValue::Table(entries) => {
                entries.iter().find(|(key, _)| key == name).map(|(_, node)| self.document.key_place(node))
            }
            NodeValue::List(items) => items.iter().find(is_name).map(|node| self.document.place(node)),
            _ => Some(self.document.place(node)),
        }
    }

    /// An error about `key` found by someone else (a batch that does not fit the data, a folder that is not there), with the
    /// place of its value, ready to be shown like the configuration's own.
    pub fn error(&self, key: &str, message: impl Into<String>, hint: Option<String>) -> ConfigErrors {
        let problem = Problem {
            severity: Severity::Error,
            key: key.into(),
            message: message.into(),
            hint,
            place: self.place(key),
        };
        ConfigErrors { file: self.document.file.clone(), text: self.document.text.clone(), problems: vec![problem] }
    }

    /// Refuses what upstream's files may ask for and this program cannot do (adapters, 8-bit optimizers, several turns, …).
    /// Such a file can be checked and resolved, but not run.
    pub fn check_runnable(&self) -> Result<(), ConfigErrors> {
        let problems = rules::unsupported(&self.config, &self.document);
        if problems.is_empty() {
            return Ok(());
        }
        Err(ConfigErrors { file: self.document.file.clone(), text: self.document.text.clone(), problems })
    }

    /// The file's name in messages.
    pub fn name(&self) -> &str {
        &self.document.file
    }

    /// The file's text, in which spans count bytes.
    pub fn text(&self) -> &Arc<str> {
        &self.document.text
    }

    /// All values as JSON, keys in the order of the reference.
    pub fn to_json(&self) -> Value {
        self.config.to_json()
    }

    /// All values as TOML that resolves to the same configuration.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        self.config.to_toml()
    }
}

impl Config {
    /// All values as JSON, keys in the order of the reference.
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// All values as TOML that resolves to the same configuration. Keys without a value are left out.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        let mut value = self.to_json();
        // Absent would mean its default of 1, and TOML has no null.
        if let Some(size) = value.pointer_mut("/train/train_policy/dataloader_batch_size").filter(|v| v.is_null()) {
            *size = 0.into();
        }
        // The two exclude each other, so the default of the one would refuse the other.
        if let (false, Some(table)) = (self.distillation.teachers.is_empty(), value.pointer_mut("/distillation"))
            && let Some(table) = table.as_object_mut()
        {
            table.remove("model_name_or_path");
        }
        drop_nulls(&mut value);
        Ok(toml::to_string_pretty(&value)?)
    }
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(object) => {
            object.retain(|_, v| !v.is_null());
            object.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// Python's `os.path.join` for a relative second part: no slash is doubled or put at the start.
fn join_path(folder: &str, name: &str) -> String {
    if folder.is_empty() || folder.ends_with('/') { format!("{folder}{name}") } else { format!("{folder}/{name}") }
}
