//! Sandboxed WebAssembly components: datasets, rewards and environments.
//!
//! The host never runs user code any other way. [`PluginHost::load`] takes a component that implements a world of
//! `cosmos:plugin` (see `wit/`), with the grants of the configuration and limits on everything; [`Plugin::dataset`],
//! [`Plugin::reward`] and [`Plugin::environment`] open what it offers. A guest that traps, loops, eats memory or answers nonsense costs one
//! sample ([`SampleFailure`]), never the run.
//!
//! This crate knows nothing of models, configuration files or dataset formats: what a plugin may borrow from the rest
//! of the program comes in through [`Capabilities`].

mod accept;
mod batch;
mod cache;
mod capability;
mod clock;
mod compiler;
mod component_file;
mod componentize;
mod crew;
mod error;
mod grant;
mod guest;
mod host;
mod info;
mod lend;
mod limits;
mod open;
mod plugin;
mod sample;
mod sandbox;
mod seat;
mod settings;
mod since_v0_1_0;
mod since_v0_2_0;
mod trap;
mod voice;

pub use capability::{Capabilities, ChatRenderer, TableRequest, TableRows, TableSource};
pub use component_file::World;
pub use componentize::{componentize, componentize_file};
pub use error::PluginError;
pub use grant::Grant;
pub use host::{Inspection, LoadTimes, PluginHost};
pub use info::{Offer, PluginInfo};
pub use limits::Limits;
pub use open::{Dataset, Environment, Pending, Reward};
pub use plugin::Plugin;
pub use sample::{
    Action, ChatMessage, EpisodeStart, Example, Opened, Prompt, RewardSample, SampleFailure, Score, Turn,
};
pub use settings::SettingsProblem;
