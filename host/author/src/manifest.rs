//! `plugin.toml`: what a project is called, its language, what it exports and imports.

use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{AuthorError, Result};

/// Name of the manifest's file.
pub const FILE: &str = "plugin.toml";
/// A manifest is a page, not data.
const BYTES_MAX: u64 = 1 << 20;
/// Names become file names, crate names and WIT comments.
const NAME_CHARS_MAX: usize = 64;

/// Languages that `plugin build` knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    /// `cargo build --target wasm32-…`.
    Rust,
    /// componentize-py.
    Python,
    /// jco with QuickJS.
    Js,
    /// clang with wasi-libc.
    C,
}

impl Language {
    /// All, in the order in which they are listed.
    pub const ALL: [Self; 4] = [Self::Rust, Self::Python, Self::Js, Self::C];

    /// As `plugin.toml` and `--lang` write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rust => "rust",
            Self::Python => "python",
            Self::Js => "js",
            Self::C => "c",
        }
    }
}

impl fmt::Display for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Interfaces that a plugin can export, beside `metadata`, which every plugin does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Export {
    /// Prompts.
    Dataset,
    /// Scores.
    Reward,
    /// Conversations of several turns.
    Environment,
}

impl Export {
    /// Its name in the WIT package and in `plugin.toml`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dataset => "dataset",
            Self::Reward => "reward",
            Self::Environment => "environment",
        }
    }
}

/// Interfaces that a plugin can import; each needs the grant of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Import {
    /// Log lines.
    Log,
    /// Rows of datasets.
    Table,
    /// The student's chat template.
    ChatTemplate,
}

impl Import {
    /// Its name in the WIT package, in `plugin.toml` and as a grant.
    pub fn name(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Table => "table",
            Self::ChatTemplate => "chat-template",
        }
    }
}

/// A project's `plugin.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Name of the plugin: letters, digits, `-` and `_`; also the component's file stem.
    pub name: String,
    /// What it is written in.
    pub language: Language,
    /// Where the code starts: Python module, JavaScript file, C files; Rust needs none.
    #[serde(default)]
    pub sources: Vec<PathBuf>,
    /// Where the SDK lies, relative to the project; without it `sdk`. Rust reads `Cargo.toml` instead.
    #[serde(default = "default_sdk")]
    pub sdk: PathBuf,
    /// What it exports. The world that Python, JavaScript and C are built against has just these.
    pub exports: Vec<Export>,
    /// What it imports. Empty: the component needs no grant.
    #[serde(default)]
    pub imports: Vec<Import>,
}

fn default_sdk() -> PathBuf {
    "sdk".into()
}

/// Why `name` cannot be a plugin's name.
pub fn check_name(name: &str) -> std::result::Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if !name.starts_with(|c: char| c.is_ascii_alphabetic()) || !name.chars().all(allowed) {
        return Err(format!(
            "`{}` is no name for a plugin: a letter first, then letters, digits, `-` or `_`",
            name.escape_debug()
        ));
    }
    if name.len() > NAME_CHARS_MAX {
        return Err(format!("a plugin's name of {} characters is too long: {NAME_CHARS_MAX} at most", name.len()));
    }
    Ok(())
}

impl Manifest {
    /// Reads `folder/plugin.toml`.
    ///
    /// # Errors
    /// The file is missing, too large or not what it must be, with the line.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let bad = |place: String, message: String| AuthorError::Project {
            place,
            message,
            hint: "`cosmos-host plugin new` writes one that works".into(),
        };
        let bytes = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(bad(
                    String::new(),
                    format!("`{}` has no {FILE}: it is no plugin project", folder.display()),
                ));
            }
            Err(error) => return Err(AuthorError::io("cannot read", &path)(error)),
        };
        if bytes > BYTES_MAX {
            return Err(bad(format!("{}: ", path.display()), format!("{bytes} bytes are no manifest")));
        }
        let text = std::fs::read_to_string(&path).map_err(AuthorError::io("cannot read", &path))?;
        let manifest: Self = toml::from_str(&text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let before = text.get(..start).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            let column = before.len() - before.rfind('\n').map_or(0, |at| at + 1) + 1;
            bad(format!("{}:{line}:{column}: ", path.display()), error.message().to_owned())
        })?;
        manifest.check().map_err(|message| bad(format!("{}: ", path.display()), message))?;
        Ok(manifest)
    }

    /// What no type can say.
    fn check(&self) -> std::result::Result<(), String> {
        check_name(&self.name)?;
        if self.exports.is_empty() {
            return Err("`exports` is empty: name `dataset`, `reward` or `environment`".into());
        }
        for (at, export) in self.exports.iter().enumerate() {
            if self.exports[..at].contains(export) {
                return Err(format!("`exports` names `{}` twice", export.name()));
            }
        }
        for (at, import) in self.imports.iter().enumerate() {
            if self.imports[..at].contains(import) {
                return Err(format!("`imports` names `{}` twice", import.name()));
            }
        }
        if self.language != Language::Rust && self.sources.is_empty() {
            return Err(format!("`sources` is empty: name the {} files that are the plugin", self.language));
        }
        for source in &self.sources {
            let inside = source.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
            if !inside || source.as_os_str().is_empty() {
                return Err(format!("source `{}` is not a path inside the project", source.display()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Manifest> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), text).unwrap();
        Manifest::read(folder.path())
    }

    #[test]
    fn a_manifest_is_read() {
        let manifest = read("name = \"a-b\"\nlanguage = \"rust\"\nexports = [\"reward\"]\n").unwrap();
        assert_eq!((manifest.name.as_str(), manifest.language), ("a-b", Language::Rust));
        assert!(manifest.imports.is_empty());
        let c = "name = \"c\"\nlanguage = \"c\"\nsources = [\"src/a.c\"]\nexports = [\"dataset\", \"reward\"]\n\
                 imports = [\"chat-template\"]\n";
        assert_eq!(read(c).unwrap().imports, [Import::ChatTemplate]);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        for (text, said) in [
            ("name = 3", "plugin.toml:1:8: "),
            ("name = \"x\"\nlanguage = \"go\"\nexports = []", "plugin.toml:2:12: "),
            ("name = \"x\"\nlanguage = \"rust\"\nexports = []", "`exports` is empty"),
            ("name = \"x\"\nlanguage = \"c\"\nexports = [\"reward\"]", "`sources` is empty"),
            ("name = \"x\"\nlanguage = \"rust\"\nexports = [\"reward\", \"reward\"]", "twice"),
            ("name = \"../x\"\nlanguage = \"rust\"\nexports = [\"reward\"]", "no name for a plugin"),
            ("name = \"x\"\nlanguage = \"c\"\nsources = [\"../a.c\"]\nexports = [\"reward\"]", "inside the project"),
            ("name = \"x\"\nlanguage = \"rust\"\nexports = [\"reward\"]\nexport = 1", "unknown field"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.to_string().contains(said), "{text}: {error}");
            assert!(error.hint().is_some() && error.is_usage());
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(Manifest::read(folder.path()).unwrap_err().to_string().contains("no plugin project"));
    }

    #[test]
    fn names() {
        for name in ["a", "math-2", "My_Reward"] {
            check_name(name).unwrap();
        }
        for name in ["", "-a", "2a", "a b", "a/b", "é", "a\n", &"a".repeat(65)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }
}
