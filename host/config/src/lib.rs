//! TOML to a checked, resolved configuration that knows the place of every value.
//!
//! The files of cosmos-rl load unchanged: same keys, same defaults, same rewrites. What is unknown is a warning with the
//! nearest known key; what is wrong is an error with file, line and column, and all of them are reported at once.
//!
//! [`ConfigFile`] is a file as written, with `--set` arguments laid over it; [`ConfigFile::resolve`] makes a [`Resolved`] of
//! it, whose [`Config`] has one public field per key. The fields' doc comments are the documentation of the keys: see
//! [`explain`], [`schema`] and [`markdown_reference`].
//!
//! This crate knows nothing of models, data or plugins: what can only be checked with those in hand is checked there, and
//! reported with [`Resolved::error`] at the line of the key.

mod check;
mod document;
mod explain;
mod keys;
mod problem;
mod resolve;
mod rules;
mod shape;
pub mod shapes;
#[cfg(test)]
mod tests;

pub use explain::{Explanation, explain, markdown_reference};
pub use keys::*;
pub use problem::{ConfigError, ConfigErrors, Place, Problem, Severity, Warning};
pub use resolve::{ConfigFile, Resolved};
pub use shape::{nearest, schema};
pub use shapes::{Amount, DatasetNames, FlagOrText, LearningRate, OneOrMany, RewardWeights};

/// Bytes of a configuration file at most.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
