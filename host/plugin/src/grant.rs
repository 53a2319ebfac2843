//! What the configuration allows a plugin to reach.

use std::fmt;
use std::path::{Component, PathBuf};
use std::str::FromStr;

use crate::PluginError;

/// One permission. Nothing is granted by default.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grant {
    /// Write to the host's log.
    Log,
    /// Read dataset rows through the host.
    Table,
    /// Render messages with the student's chat template.
    ChatTemplate,
    /// Read the files of a directory under the same path (WASI guests only). Nothing in it can be changed, and nothing
    /// outside it can be reached.
    Dir {
        /// Absolute path.
        path: PathBuf,
    },
}

impl FromStr for Grant {
    type Err = PluginError;

    fn from_str(text: &str) -> Result<Self, PluginError> {
        let bad = |detail: &str| PluginError::BadGrant { text: text.escape_debug().to_string(), detail: detail.into() };
        match text {
            "log" => return Ok(Self::Log),
            "table" => return Ok(Self::Table),
            "chat-template" => return Ok(Self::ChatTemplate),
            _ => {}
        }
        let rest = text.strip_prefix("dir:").ok_or_else(|| bad("no such grant"))?;
        let (path, mode) = rest.rsplit_once(':').ok_or_else(|| bad("`:ro` at the end is missing"))?;
        match mode {
            "ro" => {}
            "rw" => return Err(bad("plugins may only read: no grant lets them write files")),
            _ => return Err(bad("it does not end in `:ro`")),
        }
        let path = PathBuf::from(path);
        if !path.is_absolute() {
            return Err(bad("the path is not absolute"));
        }
        if path.components().any(|part| part == Component::ParentDir) {
            return Err(bad("the path contains `..`"));
        }
        Ok(Self::Dir { path })
    }
}

impl fmt::Display for Grant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Log => f.write_str("log"),
            Self::Table => f.write_str("table"),
            Self::ChatTemplate => f.write_str("chat-template"),
            Self::Dir { path } => write!(f, "dir:{}:ro", path.display()),
        }
    }
}

/// What an import of the component needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Need {
    /// Types only, or the sandboxed WASI: no grant.
    Nothing,
    /// WASI, always sandboxed.
    Wasi,
    /// A grant of the configuration.
    Grant(Grant),
    /// Nobody provides it.
    Unknown,
}

impl Need {
    /// What the import `name`, for example `cosmos:plugin/log@0.1.0`, needs.
    pub(crate) fn of(name: &str) -> Self {
        let (interface, version) = name.split_once('@').unwrap_or((name, ""));
        match interface {
            "cosmos:plugin/types" => return Self::Nothing,
            "cosmos:plugin/log" => return Self::Grant(Grant::Log),
            "cosmos:plugin/table" => return Self::Grant(Grant::Table),
            "cosmos:plugin/chat-template" => return Self::Grant(Grant::ChatTemplate),
            _ => {}
        }
        let wasi = ["cli", "clocks", "filesystem", "io", "random", "sockets"];
        let package = interface.strip_prefix("wasi:").and_then(|rest| rest.split_once('/')).map(|(package, _)| package);
        match package {
            Some(package) if wasi.contains(&package) && version.starts_with("0.2.") => Self::Wasi,
            _ => Self::Unknown,
        }
    }
}

fn quoted(names: &[&String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// Refuses imports that no grant can give.
pub(crate) fn check_unknown(plugin: &str, imports: &[String]) -> Result<(), PluginError> {
    let unknown: Vec<_> = imports.iter().filter(|name| Need::of(name) == Need::Unknown).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    Err(PluginError::UnknownImport { plugin: plugin.into(), imports: quoted(&unknown) })
}

/// Refuses imports that `grants` do not cover, before any of the component's code is compiled.
pub(crate) fn check_imports(plugin: &str, imports: &[String], grants: &[Grant]) -> Result<(), PluginError> {
    check_unknown(plugin, imports)?;
    let mut allow = grants.to_vec();
    let mut refused = Vec::new();
    for name in imports {
        if let Need::Grant(grant) = Need::of(name)
            && !grants.contains(&grant)
        {
            refused.push(name);
            allow.push(grant);
        }
    }
    if refused.is_empty() {
        return Ok(());
    }
    allow.sort();
    allow.dedup();
    let allow = allow.iter().map(|grant| format!("{:?}", grant.to_string())).collect::<Vec<_>>().join(", ");
    let line = format!("[plugin.{plugin}] allow = [{allow}]");
    Err(PluginError::NotGranted { plugin: plugin.into(), imports: quoted(&refused), line })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grants_read_and_print_the_same_text() {
        for text in ["log", "table", "chat-template", "dir:/data:ro", "dir:/a b/c:d:ro"] {
            assert_eq!(text.parse::<Grant>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "Log",
            "net",
            "dir:",
            "dir:/data",
            "dir:data:ro",
            "dir:/data:rx",
            "dir:/data:rw",
            "dir:/data/../etc:ro",
            "dir::ro",
        ] {
            let error = text.parse::<Grant>().unwrap_err();
            assert!(error.hint().unwrap().contains("dir:/absolute/path:ro"), "{text}: {error}");
        }
    }

    #[test]
    fn the_refusal_names_the_whole_line_to_write() {
        let imports = ["cosmos:plugin/log@0.1.0", "cosmos:plugin/table@0.1.0", "cosmos:plugin/types@0.1.0"];
        let imports = imports.map(String::from);
        let error = check_imports("deepmath", &imports, &[Grant::Log]).unwrap_err();
        assert!(error.to_string().contains("`cosmos:plugin/table@0.1.0`"), "{error}");
        assert!(!error.to_string().contains("log"), "{error}");
        assert!(error.hint().unwrap().contains("[plugin.deepmath] allow = [\"log\", \"table\"]"));
        check_imports("deepmath", &imports, &[Grant::Table, Grant::Log]).unwrap();
    }

    #[test]
    fn only_the_sandboxed_part_of_wasi_passes() {
        for (name, need) in [
            ("wasi:cli/stdout@0.2.6", Need::Wasi),
            ("wasi:sockets/tcp@0.2.0", Need::Wasi),
            ("wasi:cli/stdout@0.3.0", Need::Unknown),
            ("wasi:http/outgoing-handler@0.2.0", Need::Unknown),
            ("wasi:cli", Need::Unknown),
            ("environment", Need::Unknown),
            ("cosmos:plugin/secrets@0.1.0", Need::Unknown),
        ] {
            assert_eq!(Need::of(name), need, "{name}");
        }
    }
}
