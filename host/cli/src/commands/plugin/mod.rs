//! `plugin`: make, look at, try and measure components.

pub mod bench;
pub mod build;
pub mod check;
pub mod inspect;
pub mod new;
pub mod test;
pub mod toolchain;
mod workbench;

use clap::{Subcommand, ValueEnum};
use cosmos_author::manifest::Language;
use cosmos_plugin::PluginHost;

use crate::failure::{Exit, Failure};
use crate::output::Output;

/// What to do with a plugin.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a project that builds and passes its own test
    New(new::Args),
    /// Make a component of a project, or of a core WebAssembly module
    Build(build::Args),
    /// Show which compilers for plugins this machine has; `--install` gets them
    Toolchain(toolchain::Args),
    /// Show what a component is, offers and wants, without granting it anything
    Inspect(inspect::Args),
    /// Say whether a run could load a component, and which grants it would need
    Check(check::Args),
    /// Put recorded cases to a plugin; exit 1 when an answer differs from the expected one
    Test(test::Args),
    /// Measure how a component starts, how fast it scores and what memory it takes
    Bench(bench::Args),
}

/// Languages for plugins. The values say it all; documented, each would take a line of every help page.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Lang {
    Rust,
    Python,
    Js,
    C,
}

impl From<Lang> for Language {
    fn from(lang: Lang) -> Self {
        match lang {
            Lang::Rust => Self::Rust,
            Lang::Python => Self::Python,
            Lang::Js => Self::Js,
            Lang::C => Self::C,
        }
    }
}

/// Runs it.
pub fn run(command: Command, out: &mut Output) -> Result<Exit, Failure> {
    match command {
        Command::New(args) => new::run(args, out),
        Command::Build(args) => build::run(args, out),
        Command::Toolchain(args) => toolchain::run(args, out),
        Command::Inspect(args) => inspect::run(args, out),
        Command::Check(args) => check::run(args, out),
        Command::Test(args) => test::run(args, out),
        Command::Bench(args) => bench::run(args, out),
    }
}

fn host() -> Result<PluginHost, Failure> {
    Ok(PluginHost::new(PluginHost::default_cache_dir())?)
}
