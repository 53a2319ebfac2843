//! Sandboxed WebAssembly components: datasets and rewards.
//!
//! The host never runs user code any other way. [`PluginHost::load`] takes a component that implements a world of
//! `cosmos:plugin` (see `wit/`), with the grants of the configuration and limits on everything; [`Plugin::dataset`]
//! and [`Plugin::reward`] open what it offers. A guest that traps, loops, eats memory or answers nonsense costs one
//! sample ([`SampleFailure`]), never the run.
//!
//! This crate knows nothing of models, configuration files or dataset formats: what a plugin may borrow from the rest
//! of the program comes in through [`Capabilities`].

mod batch;
mod cache;
mod capability;
mod clock;
mod component_file;
mod componentize;
mod error;
mod grant;
mod host;
mod limits;
mod plugin;
mod sample;
mod sandbox;
mod since_v0_1_0;
mod voice;
mod worker;

pub use capability::{Capabilities, ChatRenderer, TableRequest, TableRows, TableSource};
pub use component_file::World;
pub use componentize::{componentize, componentize_file};
pub use error::PluginError;
pub use grant::Grant;
pub use host::{Inspection, PluginHost};
pub use limits::Limits;
pub use plugin::{Dataset, Offer, Plugin, PluginInfo, Reward};
pub use sample::{ChatMessage, Example, Prompt, RewardSample, SampleFailure, Score};
