//! Everything that can go wrong in the engine, with the file, tensor or sample it happened to.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, EngineError>;

/// An engine failure. `hint()` says how to mend it.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A file of a checkpoint cannot be read or is not what it claims.
    #[error("{}: {message}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
        /// How to mend it.
        hint: String,
    },
    /// A device string that this build or machine does not offer.
    #[error("device `{device}`: {message}")]
    Device {
        /// As asked for.
        device: String,
        /// Why not.
        message: String,
        /// What to use instead.
        hint: String,
    },
    /// Sizes, ids or settings that do not fit together.
    #[error("{message}")]
    Invalid {
        /// What does not fit.
        message: String,
        /// How to mend it.
        hint: String,
    },
    /// A gradient with a number that is NaN or infinite, found when its parameter was to be updated.
    #[error("the gradient of `{tensor}` is not finite{}", if *half { ", and the parameters before it in the backward were already updated" } else { "" })]
    NotFinite {
        /// Whose gradient.
        tensor: String,
        /// Whether parameters were updated before it was found, so that the model is now of no step.
        half: bool,
    },
    /// A rank that is late, gone, or does something else than the others.
    #[error("{0}")]
    Parallel(#[from] cosmos_parallel::ParallelError),
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl EngineError {
    /// The fix, for the `hint:` line.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Checkpoint { hint, .. } | Self::Device { hint, .. } | Self::Invalid { hint, .. } => {
                (!hint.is_empty()).then_some(hint.as_str())
            }
            Self::NotFinite { half: true, .. } => Some(
                "go on from the newest checkpoint with `--resume`; with `host.update_in_backward = \"never\"` such a step \
                 is left out as a whole, and a lower `train.optm_lr` may avoid it",
            ),
            Self::NotFinite { half: false, .. } => None,
            Self::Parallel(error) => error.hint(),
            Self::Io { .. } => None,
        }
    }

    /// Sizes, ids or settings that do not fit together.
    pub fn invalid(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), hint: hint.into() }
    }
}
