//! What a plugin author writes against: [`Plugin`], the traits [`Dataset`], [`Reward`] and [`Environment`], and one of
//! the macros [`export_reward!`], [`export_dataset!`], [`export_plugin!`], [`export_environment!`] or [`export!`].
//!
//! ```
//! use cosmos_plugin_sdk::*;
//!
//! struct Brevity;
//!
//! impl Plugin for Brevity {
//!     fn describe() -> Description {
//!         Description::new("brevity", "0.1.0", "the shorter, the better").reward("brevity", RewardRole::Train)
//!     }
//!
//!     fn reward(_name: &str, _settings: &Settings) -> Result<Box<dyn Reward>, String> {
//!         Ok(Box::new(Brevity))
//!     }
//! }
//!
//! impl Reward for Brevity {
//!     fn score(&self, sample: &Sample) -> Result<Score, String> {
//!         let words = sample.completion.split_whitespace().count() as f64;
//!         Ok(Score::new(1.0 / (1.0 + words)).metric("words", words))
//!     }
//! }
//!
//! export_reward!(Brevity);
//! ```
//!
//! The contract is the WIT package `cosmos:plugin@0.2.0`; [`bindings`] are generated from it ahead of time and are part
//! of this crate. A component imports only those host interfaces that its code calls, so a plugin that reads no table
//! needs no `table` grant. Everything but the host imports also works natively: `cargo test` runs on your own machine.
//!
//! When a call panics, its text is the reason of the failed sample (feature `stderr`, on by default), or a line in the
//! host's log (feature `log`, which needs the grant `log`).

#[rustfmt::skip]
#[allow(missing_docs, unsafe_code, unused, clippy::all)]
pub mod bindings;
mod bridge;
mod export;
mod panics;
mod records;
mod settings;

pub use bindings::cosmos::plugin::types::{Message, Metric, Prompt, StringPair};
pub use bindings::exports::cosmos::plugin::dataset::Example;
pub use bindings::exports::cosmos::plugin::environment::{Action, Opened, Outcome, Start};
pub use bindings::exports::cosmos::plugin::metadata::{
    DatasetOffer, DatasetRole, Description, EnvironmentOffer, RewardOffer, RewardRole,
};
pub use bindings::exports::cosmos::plugin::reward::{Sample, Score};
#[doc(hidden)]
pub use bridge::Bridge;
pub use serde_json;
pub use settings::{DatasetSettings, Settings, Splits, TestSize};

/// Host imports. Calling one makes the component import it, and the run's configuration must grant it.
pub mod host {
    pub use crate::bindings::cosmos::plugin::{chat_template, log, table};
}

/// A plugin: what it is, and how its datasets, rewards and environments are made.
pub trait Plugin: 'static {
    /// Name, version, offers, settings schema and wanted grants.
    fn describe() -> Description;

    /// The dataset called `name`, set up from `settings`.
    ///
    /// # Errors
    /// The text that the user reads when the settings are wrong or the data cannot be opened.
    fn dataset(name: &str, settings: &Settings) -> Result<Box<dyn Dataset>, String> {
        let _ = settings;
        Err(format!("this plugin has no dataset `{name}`"))
    }

    /// The reward called `name`, set up from `settings`.
    ///
    /// # Errors
    /// The text that the user reads when the settings are wrong.
    fn reward(name: &str, settings: &Settings) -> Result<Box<dyn Reward>, String> {
        let _ = settings;
        Err(format!("this plugin has no reward `{name}`"))
    }

    /// The environment called `name`, set up from `settings`.
    ///
    /// # Errors
    /// The text that the user reads when the settings are wrong.
    fn environment(name: &str, settings: &Settings) -> Result<Box<dyn Environment>, String> {
        let _ = settings;
        Err(format!("this plugin has no environment `{name}`"))
    }
}

/// Examples by index.
pub trait Dataset {
    /// How many examples there are.
    ///
    /// # Errors
    /// When the data cannot be read.
    fn len(&self) -> Result<u64, String>;

    /// Whether there is no example at all.
    ///
    /// # Errors
    /// When the data cannot be read.
    fn is_empty(&self) -> Result<bool, String> {
        Ok(self.len()? == 0)
    }

    /// The example at `index`, which is below [`Dataset::len`].
    ///
    /// # Errors
    /// Why this one example cannot be had; the others of the batch are not affected.
    fn get(&self, index: u64) -> Result<Example, String>;
}

/// Scores one completion.
pub trait Reward {
    /// The score of `sample`.
    ///
    /// # Errors
    /// Why this one sample cannot be scored, for example because its reference is broken. A wrong answer is a score,
    /// not an error.
    fn score(&self, sample: &Sample) -> Result<Score, String>;
}

/// Holds conversations of several turns. Whatever must be remembered of one travels in its state: any instance of the
/// plugin may be asked for the next step.
pub trait Environment {
    /// Opens a conversation.
    ///
    /// # Errors
    /// Why this one conversation cannot be had.
    fn reset(&self, start: &Start) -> Result<Opened, String>;

    /// What the model hears after its message, or that the conversation is over.
    ///
    /// # Errors
    /// Why this one conversation cannot go on. A wrong move of the model is something to tell it, not an error.
    fn step(&self, action: &Action) -> Result<Outcome, String>;
}
