//! What a plugin author writes against: [`Plugin`], [`Dataset`], [`Reward`] and [`export_plugin!`].
//!
//! The WIT package in `wit/since-v0.1.0` is the contract; the [`bindings`] are generated from it. A component imports
//! only those host interfaces that its code calls, so a plugin that reads no table needs no `table` grant.

mod bridge;
mod settings;

/// The generated bindings of world `plugin`. Authors rarely need them: the items below say the same more plainly.
#[allow(missing_docs, unsafe_code, clippy::all)]
pub mod bindings {
    // SAFETY (allowed above): the generated code moves values over the component boundary with raw pointers.
    wit_bindgen::generate!({
        path: "../../wit/since-v0.1.0",
        world: "plugin",
        export_macro_name: "export_component",
        pub_export_macro: true,
        default_bindings_module: "cosmos_plugin_sdk::bindings",
        additional_derives: [Clone, PartialEq],
    });
}

pub use bindings::cosmos::plugin::types::{Message, Prompt, StringPair};
pub use bindings::exports::cosmos::plugin::dataset::Example;
pub use bindings::exports::cosmos::plugin::metadata::{
    DatasetOffer, DatasetRole, Description, RewardOffer, RewardRole,
};
pub use bindings::exports::cosmos::plugin::reward::{Metric, Sample, Score};
pub use bridge::Bridge;
pub use settings::{DatasetSettings, Settings, Splits, TestSize};

/// Host imports. Calling one makes the component import it, and the run's configuration must grant it.
pub mod host {
    pub use crate::bindings::cosmos::plugin::{chat_template, log, table};
}

/// A plugin: what it is, and how its datasets and rewards are made.
pub trait Plugin: 'static {
    /// Name, version, offers, settings schema and wanted grants.
    fn describe() -> Description;

    /// The dataset called `name`, set up from `settings`.
    ///
    /// # Errors
    /// The text that the user reads when the settings are wrong or the data cannot be opened.
    fn dataset(name: &str, settings: &Settings) -> Result<Box<dyn Dataset>, String>;

    /// The reward called `name`, set up from `settings`.
    ///
    /// # Errors
    /// The text that the user reads when the settings are wrong.
    fn reward(name: &str, settings: &Settings) -> Result<Box<dyn Reward>, String>;
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
    /// Why this one sample cannot be scored, for example because its reference is broken. A wrong answer is a score, not an error.
    fn score(&self, sample: &Sample) -> Result<Score, String>;
}

/// A score with no extra metrics.
pub fn plain_score(value: f64) -> Score {
    Score { value, metrics: Vec::new() }
}

/// Makes `$plugin`, a type that implements [`Plugin`], the component's exports.
#[macro_export]
macro_rules! export_plugin {
    ($plugin:ty) => {
        #[cfg(target_arch = "wasm32")]
        mod exported_component {
            #![allow(unsafe_code, missing_docs)]
            use super::*;
            // SAFETY (allowed above): the generated exports only forward to the bridge.
            pub type Exported = $crate::Bridge<$plugin>;
            $crate::bindings::export_component!(Exported with_types_in $crate::bindings);
        }
    };
}
