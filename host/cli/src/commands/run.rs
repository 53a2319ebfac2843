//! `run`: train as the config says.

use std::path::PathBuf;

use clap::ValueHint;
use cosmos_run::{Outcome, RunOptions};

use crate::args::ConfigArgs;
use crate::commands::config::resolve;
use crate::failure::{Exit, Failure};

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Plugin (a WebAssembly component) with the dataset and the rewards. May be repeated
    #[arg(long = "plugin", short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    plugins: Vec<PathBuf>,
    /// Go on from the newest good checkpoint of the output folder
    #[arg(long)]
    resume: bool,
    /// Check everything and print the plan: steps, samples, memory
    #[arg(long)]
    dry_run: bool,
    /// Where the run folder goes; same as `--set train.output_dir=DIR`
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    output_dir: Option<PathBuf>,
    /// Where models compute, such as `cpu`; same as `--set host.device=DEVICE`
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
}

/// Runs it. A run that was told to stop saves and asks to be started again.
pub fn run(args: Args) -> Result<Exit, Failure> {
    let mut overrides = args.config.overrides.set.clone();
    overrides.extend(args.output_dir.iter().map(|dir| format!("train.output_dir={}", dir.display())));
    overrides.extend(args.device.iter().map(|device| format!("host.device={device}")));
    let config = resolve(&args.config.config, &overrides)?;
    let text = config.text().clone();
    let options = RunOptions { config, plugins: args.plugins, resume: args.resume, dry_run: args.dry_run };
    match cosmos_run::run(options).map_err(|e| Failure::from_run(e, &text))? {
        Outcome::Done { .. } | Outcome::DryRun => Ok(Exit::Done),
        Outcome::Saved { .. } => Ok(Exit::Requeue),
    }
}
