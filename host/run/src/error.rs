//! Everything that can end a run early, with the fix where there is one.

use std::path::PathBuf;

use cosmos_broker::BrokerError;
use cosmos_control::ControlError;
use cosmos_data::DataError;
use cosmos_engine::EngineError;
use cosmos_parallel::ParallelError;
use cosmos_plugin::PluginError;
use cosmos_report::ReportError;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, RunError>;

/// A run that could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration asks for what cannot be done. Exit code 2.
    #[error("{place}{message}")]
    Config {
        /// `file:line:column: `, or empty where no single value is guilty.
        place: String,
        /// What does not fit, with the key.
        message: String,
        /// How to mend it.
        hint: String,
    },
    /// A model, checkpoint or device.
    #[error("{role}: {source}")]
    Engine {
        /// Which model: student, teacher, reference.
        role: &'static str,
        /// The engine's own message.
        source: EngineError,
    },
    /// A dataset, tokenizer or chat template.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A plugin.
    #[error(transparent)]
    Plugin(#[from] PluginError),
    /// The broker.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The controller, or the way to it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Ranks or replicas that work together.
    #[error(transparent)]
    Parallel(#[from] ParallelError),
    /// A replica over several processes that cannot go on: all of them end, and are started again together.
    #[error("the processes of `{replica}` cannot go on: {source}")]
    Replica {
        /// Its name.
        replica: String,
        /// What failed first, as far as it is known here.
        source: Box<RunError>,
    },
    /// The run folder or one of its records.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// A checkpoint of a run.
    #[error("checkpoint {}: {message}", path.display())]
    Checkpoint {
        /// Folder or file.
        path: PathBuf,
        /// What is wrong.
        message: String,
        /// How to mend it.
        hint: String,
    },
    /// Something that one role leaves for another: published weights, a teacher's head.
    #[error("{place}: {message}")]
    Shared {
        /// Folder or server.
        place: String,
        /// What is wrong, and who was waited for.
        message: String,
        /// How to mend it.
        hint: String,
    },
    /// A step failed: the input was fine when the run started.
    #[error("after step {step}: {source}")]
    During {
        /// Steps made.
        step: u64,
        /// What failed.
        source: Box<RunError>,
    },
    /// Training went wrong for too many steps in a row.
    #[error("{message}")]
    Diverged {
        /// What was seen, at which step.
        message: String,
        /// Where to look.
        hint: String,
    },
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl RunError {
    /// The fix, for the `hint:` line.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Config { hint, .. }
            | Self::Checkpoint { hint, .. }
            | Self::Shared { hint, .. }
            | Self::Diverged { hint, .. } => hint.clone(),
            Self::Engine { source, .. } => source.hint().unwrap_or_default().to_string(),
            Self::Data(e) => e.hint().map(|h| h.to_string()).unwrap_or_default(),
            Self::Plugin(e) => e.hint().map(|h| h.to_string()).unwrap_or_default(),
            Self::Broker(e) => e.hint().map(|h| h.to_string()).unwrap_or_default(),
            Self::Report(e) => e.hint().map(|h| h.to_string()).unwrap_or_default(),
            Self::Control(e) => e.hint().map(|h| h.to_string()).unwrap_or_default(),
            Self::Parallel(e) => e.hint().map(|h| h.to_string()).unwrap_or_default(),
            Self::During { source, .. } | Self::Replica { source, .. } => source.hint().unwrap_or_default(),
            Self::Io { source, .. } if cosmos_report::is_full(source) => {
                "free space and continue with `--resume`; `train.ckpt.max_keep` bounds how many checkpoints are kept"
                    .into()
            }
            Self::Io { .. } => String::new(),
        };
        (!text.is_empty()).then_some(text)
    }

    /// Whether the input was wrong before anything ran (exit code 2) rather than the run itself (exit code 1).
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Config { .. } | Self::Engine { .. } | Self::Data(_) | Self::Plugin(_) | Self::Report(_) => true,
            Self::Checkpoint { .. } | Self::Io { .. } => true,
            Self::Broker(e) => e.is_usage(),
            // A report that the controller refuses comes from a run under way.
            Self::Control(ControlError::Refused { kind, .. }) if kind == "request" => false,
            Self::Control(e) => e.is_usage(),
            Self::Parallel(_)
            | Self::Replica { .. }
            | Self::Shared { .. }
            | Self::Diverged { .. }
            | Self::During { .. } => false,
        }
    }

    /// The same error, and the place of the value that it is about, where it names none.
    pub(crate) fn at(mut self, value: impl FnOnce() -> String) -> Self {
        if let Self::Config { place, .. } = &mut self
            && place.is_empty()
        {
            *place = value();
        }
        self
    }

    /// The same error, but of a run under way: no longer wrong usage.
    pub(crate) fn during(self, step: u64) -> Self {
        match self {
            Self::Diverged { .. } | Self::During { .. } => self,
            source => Self::During { step, source: Box::new(source) },
        }
    }

    /// What lies between roles is not as it should be.
    pub(crate) fn shared(place: impl Into<String>, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Shared { place: place.into(), message: message.into(), hint: hint.into() }
    }

    /// A configuration that cannot be carried out.
    pub(crate) fn config(place: impl Into<String>, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Config { place: place.into(), message: message.into(), hint: hint.into() }
    }
}

/// Names the model an engine error belongs to.
pub(crate) trait Role<T> {
    /// `role` is student, teacher or reference.
    fn role(self, role: &'static str) -> Result<T>;
}

impl<T> Role<T> for cosmos_engine::Result<T> {
    fn role(self, role: &'static str) -> Result<T> {
        self.map_err(|source| RunError::Engine { role, source })
    }
}
