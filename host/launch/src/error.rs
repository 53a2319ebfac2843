//! What can go wrong with the processes of a run.

use std::path::PathBuf;

use cosmos_broker::BrokerError;
use cosmos_control::ControlError;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, LaunchError>;

/// Processes that could not be started or kept alive.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The config asks for what cannot be launched.
    #[error("{message}")]
    Config {
        /// What, with the key.
        message: String,
        /// The fix.
        hint: String,
    },
    /// A file of the run folder.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The folder is in use.
    #[error("a run is going on in {} already (its controller is process {pid})", path.display())]
    Running {
        /// The run folder.
        path: PathBuf,
        /// The controller's process.
        pid: u32,
    },
    /// A process could not be started.
    #[error("cannot start `{name}`: {source}")]
    Spawn {
        /// Which.
        name: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A process has ended and is not started again.
    #[error("`{name}` ended with {status}{restarts}; the end of {}:\n{tail}", log.display())]
    Died {
        /// Which.
        name: String,
        /// Exit code or signal, in words.
        status: String,
        /// How often it was started again before, in words.
        restarts: String,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
        /// Whether it said that its input was wrong.
        usage: bool,
    },
    /// The replicas do not fit, or an option makes no sense.
    #[error("{message}")]
    Usage {
        /// What is wrong, with the numbers.
        message: String,
        /// How to mend it.
        hint: String,
    },
    /// A program of the system that is needed could not be started.
    #[error("cannot start `{program}`: {source}")]
    Start {
        /// The program.
        program: String,
        /// Why not.
        source: std::io::Error,
        /// How to get it.
        hint: String,
    },
    /// A program or server answered that it would not.
    #[error("{who} refused: {answer}")]
    Refused {
        /// Who.
        who: String,
        /// Its answer, shortened.
        answer: String,
        /// How to mend it.
        hint: String,
    },
    /// Somebody did not appear in time.
    #[error("waited {waited_s} s for {whom}")]
    Waited {
        /// Whom.
        whom: String,
        /// For how long.
        waited_s: u64,
        /// How to mend it.
        hint: String,
    },
    /// A process of the run ended before the others were started.
    #[error("{message}")]
    Ended {
        /// Which and how.
        message: String,
        /// Where to look.
        hint: String,
    },
    /// The Redis server.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The run's token or `control.json`.
    #[error(transparent)]
    Control(#[from] ControlError),
}

impl LaunchError {
    /// Wrong usage with its fix.
    pub fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: hint.into() }
    }

    /// A failed file operation, for `map_err`.
    pub fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }

    /// How to mend it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Config { hint, .. }
            | Self::Usage { hint, .. }
            | Self::Start { hint, .. }
            | Self::Refused { hint, .. }
            | Self::Waited { hint, .. }
            | Self::Ended { hint, .. } => Some(hint.clone()).filter(|hint| !hint.is_empty()),
            Self::Running { path, .. } => {
                Some(format!("take another `--run` folder; `cosmos-host status {}` shows it", path.display()))
            }
            Self::Died { usage: true, .. } => None,
            Self::Died { .. } => {
                Some("`host.restarts_max` and `host.restart_window_ms` say how often a process is started again".into())
            }
            Self::Broker(e) => e.hint().map(|h| h.to_string()),
            Self::Control(e) => e.hint(),
            Self::Io { .. } | Self::Spawn { .. } => None,
        }
    }

    /// Whether the input was wrong (exit code 2), rather than that something broke (exit code 1).
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Config { .. } | Self::Usage { .. } | Self::Running { .. } => true,
            Self::Died { usage, .. } => *usage,
            Self::Control(e) => e.is_usage(),
            Self::Broker(e) => e.is_usage(),
            _ => false,
        }
    }
}
