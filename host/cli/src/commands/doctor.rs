//! `doctor`: what this machine has, what is missing and how to get it.

use std::path::PathBuf;

use clap::ValueHint;
use comfy_table::{Cell, Table, presets};

use crate::args::Overrides;
use crate::commands::TableOrJson;
use crate::commands::config::resolve;
use crate::commands::launch::sizes::SizeArgs;
use crate::doctor::{self, Launch, Report, Status};
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A table to read, or JSON for programs
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: TableOrJson,
    /// Also check what a launch of this config needs on this node: placement, GPUs, Redis, ports
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    config: Option<PathBuf>,
    #[command(flatten)]
    overrides: Overrides,
    /// Also check that this plugin is on this node. May be repeated
    #[arg(long = "plugin", short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    plugins: Vec<PathBuf>,
    /// Also check this container image of a launch
    #[arg(long, value_name = "IMAGE")]
    container: Option<String>,
    /// GPUs of one node, as they are given to the launch [default: 8; none where `host.device` is a CPU]
    #[arg(long, value_name = "N", requires = "config")]
    gpus_per_node: Option<usize>,
    /// Nodes, as they are given to the launch [default: as many as are needed]
    #[arg(long, value_name = "N", requires = "config")]
    nodes: Option<usize>,
    /// Which of its nodes this machine will be, from 0
    #[arg(long, value_name = "N", requires = "config", default_value_t = 0)]
    worker_idx: usize,
    #[command(flatten)]
    sizes: SizeArgs,
}

/// Exit 1 when a run would suffer or fail on this machine.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let resolved = args.config.as_deref().map(|file| resolve(file, &args.overrides.set)).transpose()?;
    let place = |resolved| args.sizes.place(resolved, args.gpus_per_node, args.nodes).map_err(doctor::why);
    let launch = Launch {
        placement: resolved.as_ref().map(place),
        one_process: args.sizes.one_process,
        node: args.worker_idx,
        resolved,
        plugins: args.plugins,
        container: args.container,
    };
    let report = doctor::examine(&launch);
    match args.format {
        TableOrJson::Json => out.json(&report)?,
        TableOrJson::Table => print(&report, out)?,
    }
    Ok(if report.ready { Exit::Done } else { Exit::Failed })
}

fn print(report: &Report, out: &mut Output) -> Result<(), Failure> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for check in &report.checks {
        let mark = match check.status {
            Status::Ok => "ok",
            Status::Missing => "-",
            Status::Problem => "problem",
        };
        table.add_row([Cell::new(mark), Cell::new(check.id), Cell::new(&check.found)]);
    }
    for line in table.lines() {
        out.line(line.trim_end())?;
    }
    let fixable: Vec<_> = report.checks.iter().filter_map(|c| Some((c, c.fix.as_ref()?))).collect();
    if !fixable.is_empty() {
        out.line("\nNot there, or in the way:")?;
    }
    for (check, fix) in fixable {
        out.line(format!("  {}, for {}:\n      {fix}", check.id, check.needed_for))?;
    }
    Ok(())
}
