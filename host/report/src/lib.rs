//! Metrics sinks, run folder, plots, progress.
//!
//! A run leaves one folder behind ([`RunFolder`]): the resolved configuration, one JSON line of metrics a step together
//! with the same numbers for TensorBoard ([`MetricsWriter`]), samples of completions ([`SamplesWriter`]), a learning
//! curve ([`LearningCurve`]) and a summary ([`Summary`]); several of them make a [`Comparison`]. On the terminal it shows a live display ([`Progress`]).
//!
//! This crate knows numbers and names; it knows nothing of models, plugins or brokers.

mod error;
mod event_file;
mod folder;
mod format;
mod jsonl;
mod metrics;
mod plot;
mod progress;
mod samples;
pub mod statistics;
mod summary;

pub use error::{ReportError, is_full};
pub use event_file::{EVENT_RECORD_BYTES_MAX, EventFile};
pub use folder::{RunFolder, replace_file};
pub use format::{format_count, format_number, format_percent, format_seconds};
pub use jsonl::LINE_BYTES_MAX;
pub use metrics::MetricsWriter;
pub use plot::{ComparedRun, Comparison, LearningCurve, Theme};
pub use progress::{LogWriter, Progress, ProgressKind, StepLine, log_writer};
pub use samples::{SaidRecord, SampleRecord, SamplesWriter};
pub use summary::{Summary, TokensPerSecond};

/// What the functions of this crate return.
pub type Result<T> = std::result::Result<T, ReportError>;
