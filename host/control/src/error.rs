//! What can go wrong between controller and roles.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, ControlError>;

/// A controller that cannot be started or reached, or that said no.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A file of the run folder.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried, as `write`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The address cannot be listened on.
    #[error("the controller cannot listen on `{address}`: {source}")]
    Bind {
        /// As configured.
        address: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A part of this program could not be started.
    #[error("cannot start the controller's {what}: {source}")]
    Start {
        /// Which part.
        what: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The ledger is damaged before its end.
    #[error("ledger {}: damaged at byte {byte}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the bad record begins.
        byte: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The ledger is that of another run.
    #[error("ledger {}: it belongs to another run: {differs}", path.display())]
    OtherRun {
        /// The file.
        path: PathBuf,
        /// What differs.
        differs: String,
    },
    /// Another controller is at work on the same run.
    #[error("another controller is at work in {}", path.display())]
    Taken {
        /// The run folder.
        path: PathBuf,
    },
    /// The ledger could not be written, so what was asked for was not done.
    #[error("ledger {}: nothing more can be recorded: {reason}", path.display())]
    LedgerFull {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// `control.json` is not what a controller writes.
    #[error("{}: {reason}", path.display())]
    ControlFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A token that no controller gives.
    #[error("the token {reason}")]
    Token {
        /// What is wrong; never the token itself.
        reason: String,
    },
    /// No answer within the deadline.
    #[error("`{replica}` has waited {waited_ms} ms for the controller at {url} to answer `{request}`: {reason}")]
    Unreachable {
        /// Who waited.
        replica: String,
        /// Where the controller should be.
        url: String,
        /// Which request.
        request: String,
        /// How long.
        waited_ms: u64,
        /// How the last attempt failed.
        reason: String,
    },
    /// The controller said no.
    #[error("the controller at {url} refuses `{request}` of `{replica}`: {message}")]
    Refused {
        /// Who asked.
        replica: String,
        /// Whom.
        url: String,
        /// What.
        request: String,
        /// What kind of refusal, for programs.
        kind: String,
        /// Why.
        message: String,
    },
    /// The run has failed.
    #[error("the run has failed: {reason}")]
    RunFailed {
        /// As the controller says it.
        reason: String,
    },
    /// The endpoint has been stopped.
    #[error("the controller's endpoint is stopped")]
    Stopped,
}

impl ControlError {
    /// How to mend it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Bind { .. } => "set `host.control_address` to a free address of this machine; port 0 takes any free one".into(),
            Self::Damaged { .. } => {
                "the disk has lost data: start again from the newest checkpoint with `--resume` after moving the ledger away".into()
            }
            Self::OtherRun { .. } => "take another `--run` folder, or the config and plugins that this run was started with".into(),
            Self::Taken { .. } => "take another `--run` folder, or end the other one first".into(),
            Self::LedgerFull { .. } => "free space on the disk of the run folder; the roles go on by themselves".into(),
            Self::ControlFile { .. } => "a controller writes it as it starts; is `--run` the folder of a running job?".into(),
            Self::Token { .. } => format!("take it from `control.json` of the run folder, or from ${TOKEN}", TOKEN = crate::TOKEN_VARIABLE),
            Self::Unreachable { .. } => {
                "look at the controller's log; `host.control_wait_ms_max` is how long a role waits for it".into()
            }
            Self::Refused { kind, .. } if kind == "token" => {
                format!("take the token from `control.json` of the run folder, or from ${}", crate::TOKEN_VARIABLE)
            }
            Self::Refused { kind, .. } if kind == "identity" => {
                "start the role with the config, the `--set` arguments and the plugins of the controller".into()
            }
            Self::Refused { kind, .. } if kind == "name" => "give it another `--name`".into(),
            Self::RunFailed { .. } => "the controller's log says more".into(),
            _ => return None,
        })
    }

    /// Whether the caller gave something wrong (exit code 2), rather than that something broke (exit code 1).
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Bind { .. }
            | Self::Taken { .. }
            | Self::OtherRun { .. }
            | Self::ControlFile { .. }
            | Self::Token { .. } => true,
            Self::Refused { kind, .. } => matches!(kind.as_str(), "token" | "identity" | "name" | "request"),
            _ => false,
        }
    }
}
