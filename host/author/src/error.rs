//! What can go wrong for an author.

use std::path::{Path, PathBuf};

/// What failed, where, and with [`AuthorError::hint`] how to mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorError {
    /// A file or folder cannot be read or written.
    #[error("{doing} `{path}`: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The project's `plugin.toml` or the command's arguments are wrong.
    #[error("{place}{message}")]
    Project {
        /// `file:line:column: `, or nothing.
        place: String,
        /// What is wrong.
        message: String,
        /// The fix.
        hint: String,
    },
    /// A program that building needs is not on this machine.
    #[error("{what} is missing")]
    Missing {
        /// The program or library, and where it was looked for when that helps.
        what: String,
        /// The command that gets it.
        hint: String,
    },
    /// A program ran and failed.
    #[error("`{tool}` failed ({reason}); the last lines of `{log}`:\n{tail}")]
    Tool {
        /// What ran.
        tool: String,
        /// Exit status or deadline.
        reason: String,
        /// Where all of its output is.
        log: PathBuf,
        /// The end of it.
        tail: String,
        /// The fix, where one is known.
        hint: String,
    },
    /// The plugin host refused the component.
    #[error(transparent)]
    Plugin(#[from] cosmos_plugin::PluginError),
}

/// Of this crate.
pub type Result<T> = std::result::Result<T, AuthorError>;

impl AuthorError {
    /// For `map_err` after a file operation: `doing` such as "cannot read".
    pub fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }

    /// A wrong project or argument, with no place in a file.
    pub fn project(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Project { place: String::new(), message: message.into(), hint: hint.into() }
    }

    /// Whether it is the caller's input or machine that must change (exit code 2), not work that failed (1).
    pub fn is_usage(&self) -> bool {
        match self {
            // What is not there was named wrongly; other failures are the machine's.
            Self::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            Self::Tool { .. } => false,
            Self::Project { .. } | Self::Missing { .. } | Self::Plugin(_) => true,
        }
    }

    /// How to mend it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Io { source, .. } => {
                (source.kind() == std::io::ErrorKind::NotFound).then(|| "check the path".to_owned())
            }
            Self::Project { hint, .. } | Self::Missing { hint, .. } | Self::Tool { hint, .. } => {
                (!hint.is_empty()).then(|| hint.clone())
            }
            Self::Plugin(error) => error.hint(),
        }
    }
}
