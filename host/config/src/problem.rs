//! What can be wrong with a configuration, and where.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file, or the whole `--set` argument when the value came from one.
    pub file: String,
    /// Line, from 1; 0 for a `--set` argument.
    pub line: usize,
    /// Column in characters, from 1; 0 for a `--set` argument.
    pub column: usize,
    /// The value's bytes in the file's text; empty for a `--set` argument.
    pub span: Range<usize>,
}

impl Place {
    /// Whether the value came from `--set` and not from a file.
    pub fn is_override(&self) -> bool {
        self.line == 0
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_override() {
            write!(f, "--set {}", self.file)
        } else {
            write!(f, "{}:{}:{}", self.file, self.line, self.column)
        }
    }
}

/// Whether a problem stops the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The configuration cannot be used.
    Error,
    /// It can be used, but probably not as meant.
    Warning,
}

/// One thing that is wrong, with its place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Whether it stops the run.
    pub severity: Severity,
    /// Dotted path of the key; empty when the file is not even TOML.
    pub key: String,
    /// What is wrong.
    pub message: String,
    /// How to repair it.
    pub hint: Option<String>,
    /// Where the guilty value is; `None` when it is a default.
    pub place: Option<Place>,
}

/// A problem that does not stop the run.
pub type Warning = Problem;

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        if self.severity == Severity::Warning {
            f.write_str("warning: ")?;
        }
        f.write_str(&self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

/// Everything that is wrong with a configuration, in the order of the file.
#[derive(Clone, Debug)]
pub struct ConfigErrors {
    /// The file.
    pub file: String,
    /// Its text, in which the problems' spans count bytes.
    pub text: Arc<str>,
    /// At least one error, and the warnings.
    pub problems: Vec<Problem>,
}

impl ConfigErrors {
    /// The problems that stop the run.
    pub fn errors(&self) -> impl Iterator<Item = &Problem> {
        self.problems.iter().filter(|p| p.severity == Severity::Error)
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Why a configuration cannot be read, resolved, written or explained.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read `{}`: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is larger than any configuration.
    #[error("`{}` has {bytes} bytes, more than the {} that a configuration may have", path.display(), crate::FILE_BYTES_MAX)]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The file is not text.
    #[error("`{}` is not UTF-8 text: byte {offset} does not belong to a character", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
        /// Byte at which the text ends.
        offset: usize,
    },
    /// The values are wrong.
    #[error("{0}")]
    Invalid(#[from] ConfigErrors),
    /// `explain` was asked about a key that does not exist.
    #[error("there is no key `{key}`")]
    UnknownKey {
        /// The path asked for.
        key: String,
        /// The nearest one that exists.
        nearest: Option<String>,
    },
    /// A resolved configuration cannot be written as TOML.
    #[error("cannot write the configuration as TOML: {0}")]
    Render(#[from] toml::ser::Error),
}

impl ConfigError {
    /// How to repair it, where that is known. The problems of `Invalid` carry their own hints.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Read { .. } => Some("check the path after `--config` and that the file may be read".into()),
            Self::TooLarge { .. } | Self::NotText { .. } => Some("give the path of a TOML configuration".into()),
            Self::UnknownKey { nearest: Some(nearest), .. } => Some(format!("did you mean `{nearest}`?")),
            Self::UnknownKey { nearest: None, .. } => Some("`config schema` lists every key".into()),
            Self::Invalid(_) | Self::Render(_) => None,
        }
    }
}
