//! What a key means: for `config explain` and for the reference page.

use crate::document::{key_parts, known_path};
use crate::problem::ConfigError;
use crate::shape::{self, Key, Shape};
use serde_json::Value;
use std::fmt::Write as _;

/// Everything that is known about a key.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// Its dotted path.
    pub key: String,
    /// What a value may be, in words.
    pub kind: String,
    /// The value when the file does not set it; `None` when there is none then, and for tables.
    pub default: Option<Value>,
    /// The allowed texts and what each means; empty when any value of the kind is allowed.
    pub allowed: Vec<(String, String)>,
    /// What it means.
    pub doc: String,
    /// The keys of a table with what each means; empty for a value.
    pub keys: Vec<(String, String)>,
}

/// What `key` (`train.optm_lr`, or a table such as `distillation`) means. An empty key is the whole configuration.
pub fn explain(key: &str) -> Result<Explanation, ConfigError> {
    let key = key.trim();
    let unknown = |nearest| ConfigError::UnknownKey { key: key.into(), nearest };
    let parts = if key.is_empty() { Vec::new() } else { key_parts(key).ok_or_else(|| unknown(None))? };
    known_path(&parts).map_err(|(_, nearest)| unknown(nearest))?;
    let mut found: Vec<(Option<&Key>, &Shape)> = vec![(None, shape::root())];
    for part in &parts {
        found = found.iter().flat_map(|(_, shape)| shape.child(part)).collect();
    }
    let Some((about, shape)) = found.first().copied() else { return Err(unknown(None)) };
    let mut doc = about.map(|k| k.doc.clone()).unwrap_or_default();
    let default = about.map(|k| &k.default).filter(|d| !d.is_null() && !is_table(shape));
    // The same name in another kind of training.
    for other in found.iter().skip(1).filter_map(|(key, _)| *key).filter(|_| !is_table(shape)) {
        if other.doc != doc {
            let _ = write!(doc, " With `type = \"sft\"`: {}", other.doc);
        }
        if about.is_some_and(|k| k.default != other.default) {
            let _ = write!(doc, " With `type = \"sft\"` the default is `{}`.", toml_text(&other.default));
        }
    }
    Ok(Explanation {
        key: key.into(),
        kind: shape.describe(),
        default: default.cloned(),
        allowed: shape.choices().iter().map(|c| (c.value.clone(), c.doc.clone())).collect(),
        doc,
        keys: shape.key_names().iter().map(|name| (name.to_string(), child_doc(shape, name))).collect(),
    })
}

impl std::fmt::Display for Explanation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", if self.key.is_empty() { "the whole configuration" } else { &self.key })?;
        if !self.doc.is_empty() {
            writeln!(f, "  {}", self.doc)?;
        }
        if self.keys.is_empty() {
            writeln!(f, "  type:    {}", self.kind)?;
            let default = self.default.as_ref().map_or("none".to_string(), toml_text);
            writeln!(f, "  default: {default}")?;
        }
        for (value, doc) in &self.allowed {
            writeln!(f, "  \"{value}\": {doc}")?;
        }
        for (name, doc) in &self.keys {
            writeln!(f, "  {name}: {doc}")?;
        }
        Ok(())
    }
}

fn child_doc(shape: &Shape, name: &str) -> String {
    shape.child(name).first().and_then(|(key, _)| *key).map(|key| key.doc.clone()).unwrap_or_default()
}

fn is_table(shape: &Shape) -> bool {
    matches!(shape, Shape::Table(_) | Shape::Tagged { .. })
}

/// A JSON value as it is written in TOML.
fn toml_text(value: &Value) -> String {
    match value {
        Value::Null => "none".into(),
        Value::Array(items) => format!("[{}]", items.iter().map(toml_text).collect::<Vec<_>>().join(", ")),
        Value::Object(entries) => {
            let entries: Vec<String> = entries
                .iter()
                .filter(|(_, v)| !v.is_null())
                .map(|(key, value)| format!("{key} = {}", toml_text(value)))
                .collect();
            if entries.is_empty() { "{}".into() } else { format!("{{ {} }}", entries.join(", ")) }
        }
        other => other.to_string(),
    }
}

/// The reference page: every table and key with type, default and meaning.
pub fn markdown_reference() -> String {
    let mut page = String::from(
        "# Configuration reference\n\n\
         Every key of a configuration file. This page is written by the program from the definition that it checks files with \
         (`config schema --format markdown`); do not edit it.\n\n\
         \"Not in the original\" marks the keys that only this program has. \"No effect here\" marks keys that are accepted so that \
         files of the original load unchanged. Unknown keys are warnings; wrong types and values are errors.\n",
    );
    table_page(&mut page, "", "", shape::root());
    page
}

fn table_page(page: &mut String, path: &str, doc: &str, shape: &Shape) {
    match shape {
        Shape::Table(keys) => keys_page(page, path, doc, keys, ""),
        Shape::Tagged { tag, cases } => {
            for (case, keys) in cases {
                keys_page(page, path, doc, keys, &format!(" with `{tag} = \"{case}\"`"));
            }
        }
        Shape::Map(of) if is_table(of) => table_page(page, &format!("{path}.<name>"), doc, of),
        Shape::List { of, .. } if is_table(of) => table_page(page, &format!("[{path}]"), doc, of),
        Shape::Either(shapes) => shapes.iter().for_each(|s| table_page(page, path, doc, s)),
        _ => {}
    }
}

fn keys_page(page: &mut String, path: &str, doc: &str, keys: &[Key], case: &str) {
    let has_table = |key: &&Key| match &key.shape {
        Shape::Map(of) | Shape::List { of, .. } => is_table(of),
        shape => is_table(shape),
    };
    let title = if path.is_empty() { "Top level".to_string() } else { format!("`[{path}]`{case}") };
    let _ = write!(page, "\n## {title}\n\n");
    if !doc.is_empty() {
        let _ = write!(page, "{doc}\n\n");
    }
    if keys.iter().any(|k| !has_table(&k)) {
        page.push_str("| key | value | default | meaning |\n|---|---|---|---|\n");
    }
    for key in keys.iter().filter(|k| !has_table(k)) {
        let mut meaning = key.doc.clone();
        for choice in key.shape.choices().iter().filter(|c| !c.doc.is_empty()) {
            let _ = write!(meaning, "<br>`\"{}\"`: {}", choice.value, choice.doc);
        }
        let default = if key.name == "type" { String::new() } else { format!("`{}`", toml_text(&key.default)) };
        let default = if key.default.is_null() && key.name != "type" { "none".into() } else { default };
        let cells = [&format!("`{}`", key.name), &key.shape.describe(), &default, &meaning];
        let _ = writeln!(page, "| {} |", cells.map(|c| c.replace('|', "\\|")).join(" | "));
    }
    for key in keys.iter().filter(has_table) {
        // A table below an item of a list has one pair of brackets.
        let path = path.trim_matches(['[', ']']);
        let below = if path.is_empty() { key.name.clone() } else { format!("{path}.{}", key.name) };
        table_page(page, &below, &key.doc, &key.shape);
    }
}
