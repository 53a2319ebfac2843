//! What this machine has, what is missing and how to get it.
//!
//! Checks only look: at files, at search paths and at the versions that programs print. No library is loaded, nothing
//! is written. Only the checks of a [`Launch`], which the user asks for, open a connection and compile plugins.

mod accelerator;
mod files;
mod launch;
mod machine;
mod tools;

pub use accelerator::lacks_device;
pub use launch::{Launch, why};

use cosmos_author::manifest::Language;
use serde::Serialize;
use serde_json::{Map, Value};

/// What a check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// There and usable.
    Ok,
    /// Not there; only some uses need it.
    Missing,
    /// A run would suffer or fail.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// Stable name.
    pub id: &'static str,
    /// What the check came to.
    pub status: Status,
    /// In one line.
    pub found: String,
    /// What uses it.
    pub needed_for: &'static str,
    /// How to get it, when it is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
    /// The same as data.
    pub details: Map<String, Value>,
}

impl Finding {
    fn new(id: &'static str, needed_for: &'static str, status: Status, found: impl Into<String>) -> Self {
        Self { id, status, found: found.into(), needed_for, fix: None, details: Map::new() }
    }

    fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    fn detail(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.details.insert(name.to_owned(), value.into());
        self
    }
}

/// Everything that was found, as `doctor --format json` prints it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Of this program.
    pub version: &'static str,
    /// Whether no check came to a problem.
    pub ready: bool,
    /// In a fixed order.
    pub checks: Vec<Finding>,
}

/// Looks at everything, and at what a launch needs.
pub fn examine(launch: &Launch) -> Report {
    let mut checks = vec![
        machine::system(),
        machine::cpu(),
        machine::memory(),
        machine::disk(),
        machine::open_files(),
        accelerator::devices(),
        accelerator::gpu(),
        accelerator::nvrtc(),
        accelerator::nccl(),
        tools::plugin_cache(),
        tools::wasm("wasm_rust", Language::Rust, "building plugins from Rust (the shipped ones come built)"),
        tools::wasm("wasm_python", Language::Python, "building plugins from Python"),
        tools::wasm("wasm_javascript", Language::Js, "building plugins from JavaScript"),
        tools::wasm("wasm_c", Language::C, "building plugins from C"),
        tools::hub_cache(),
        tools::redis(),
        tools::slurm(),
        launch::srun(),
    ];
    checks.extend(launch::checks(launch));
    let ready = checks.iter().all(|c| c.status != Status::Problem);
    Report { version: env!("CARGO_PKG_VERSION"), ready, checks }
}
