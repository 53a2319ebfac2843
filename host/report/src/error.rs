//! What can go wrong while a run is recorded.

use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong while a run is recorded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// A file or folder of the run cannot be written.
    #[error("cannot write `{}`: {source}", path.display())]
    CannotWrite {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file or folder of the run cannot be read.
    #[error("cannot read `{}`: {source}", path.display())]
    CannotRead {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A new run was asked for in a folder that holds one already.
    #[error("`{}` already holds a run (`{found}` is there)", path.display())]
    AlreadyARun {
        /// The folder.
        path: PathBuf,
        /// The file that gave it away.
        found: &'static str,
    },
    /// The folder to go on in holds no run.
    #[error("`{}` is not a run folder: `{missing}` is missing", path.display())]
    NotARunFolder {
        /// The folder.
        path: PathBuf,
        /// What should have been there.
        missing: &'static str,
    },
    /// A line of a JSONL file is not what this program writes.
    #[error("`{}` line {line}: {reason}", path.display())]
    BadLine {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A record of a TensorBoard file is not what this program writes.
    #[error("`{}` at byte {offset}: {reason}", path.display())]
    BadRecord {
        /// The file.
        path: PathBuf,
        /// Where the record begins.
        offset: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A metric's name cannot be recorded.
    #[error("metric name `{name}` {reason}")]
    BadMetricName {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A learning curve without a single finite point.
    #[error("the learning curve has no finite point to draw")]
    NothingToPlot,
    /// The drawing library refused.
    #[error("cannot draw the learning curve: {reason}")]
    Plot {
        /// What it said.
        reason: String,
    },
}

/// Whether there is no room for what was to be written: on the disk, within a quota, or within the largest file allowed.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

impl ReportError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            ReportError::CannotWrite { source, .. } => Some(match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    "set `train.output_dir` to a folder that you may write to, or change its permissions"
                }
                _ if is_full(source) => "free some space, or set `train.output_dir` to another disk",
                io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => {
                    "a file stands where a folder is needed: set `train.output_dir` to another path"
                }
                io::ErrorKind::ReadOnlyFilesystem => "set `train.output_dir` to a disk that is not read-only",
                _ => "check `train.output_dir`: it must be a folder that you may write to",
            }),
            ReportError::CannotRead { .. } => Some("check the path and its permissions"),
            ReportError::AlreadyARun { .. } => Some("go on with `--resume`, or set `train.output_dir` to a new folder"),
            ReportError::NotARunFolder { .. } => Some("give the folder of an earlier run, the one with `config.json`"),
            ReportError::BadLine { .. } | ReportError::BadRecord { .. } => {
                Some("the file was changed by another program: move it away and the run goes on without it")
            }
            ReportError::BadMetricName { .. } => Some("use a name such as `train/loss_avg`"),
            ReportError::NothingToPlot | ReportError::Plot { .. } => None,
        }
    }

    /// Whether the user's input is to blame (exit code 2), not a failure on the way.
    pub fn is_bad_input(&self) -> bool {
        !matches!(self, ReportError::NothingToPlot | ReportError::Plot { .. } | ReportError::BadMetricName { .. })
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(io::Error) -> ReportError {
        let path = path.to_owned();
        move |source| ReportError::CannotWrite { path, source }
    }

    pub(crate) fn read(path: &Path) -> impl FnOnce(io::Error) -> ReportError {
        let path = path.to_owned();
        move |source| ReportError::CannotRead { path, source }
    }
}
