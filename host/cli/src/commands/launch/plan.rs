//! `launch plan`: the placement, for people and programs.

use crate::args::ConfigArgs;
use crate::commands::config::resolve;
use crate::failure::{Exit, Failure};
use crate::output::Output;

use super::sizes::SizeArgs;

/// Arguments of `launch plan`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// GPUs of one node [default: 8; none where `host.device` is a CPU]
    #[arg(long, value_name = "N", alias = "ngpu-per-node")]
    gpus_per_node: Option<usize>,
    /// Nodes at most; for runs on CPUs, nodes to spread over [default: as many as are needed]
    #[arg(long, value_name = "N")]
    nodes: Option<usize>,
    /// JSON for programs instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sizes: SizeArgs,
}

/// Prints it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let resolved = resolve(&args.config.config, &args.config.overrides.set)?;
    let placement = args.sizes.place(&resolved, args.gpus_per_node, args.nodes)?;
    if args.json {
        out.json(&placement)?
    } else {
        out.text(placement.to_string())?
    }
    Ok(Exit::Done)
}
