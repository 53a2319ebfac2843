//! `launch local`: all processes of a run on this machine.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::ValueHint;
use comfy_table::{Table, presets};
use cosmos_launch::placement::Counts;
use cosmos_launch::{LaunchOptions, LocalPlan, Machine, Outcome, local_plan};

use crate::args::ConfigArgs;
use crate::commands::config::resolve;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Arguments of `launch local`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Plugin (a WebAssembly component) with the dataset and the rewards. May be repeated
    #[arg(long = "plugin", short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    plugins: Vec<PathBuf>,
    /// Where the run folder goes; same as `--set train.output_dir=DIR`
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    output_dir: Option<PathBuf>,
    /// The run folder itself, in place of a new one in the output folder
    #[arg(long, value_name = "DIR", conflicts_with = "output_dir", value_hint = ValueHint::DirPath)]
    run: Option<PathBuf>,
    /// Where models compute, such as `cpu`; same as `--set host.device=DEVICE`
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Policies, in place of `policy.parallelism.n_init_replicas`
    #[arg(long, value_name = "N", alias = "n-policy-replicas")]
    policies: Option<usize>,
    /// Rollouts, in place of `rollout.parallelism.n_init_replicas`
    #[arg(long, value_name = "N", alias = "n-rollout-replicas")]
    rollouts: Option<usize>,
    /// Teachers, in place of `distillation.parallelism.n_init_replicas`
    #[arg(long, value_name = "N", aliases = ["n-reference-replicas", "n-teacher-replicas"])]
    teachers: Option<usize>,
    /// Let several replicas use one GPU when there are fewer GPUs than they want
    #[arg(long)]
    share_gpus: bool,
    /// On CPUs, ranks of one process: a larger policy or teacher is several processes, as over several nodes [default: no
    /// limit]
    #[arg(long, value_name = "N")]
    ranks_per_node: Option<usize>,
    /// Go on from the newest good checkpoint of the run folder; without `--run`, of the newest one in the output folder
    #[arg(long)]
    resume: bool,
    /// Print which processes there would be, and start none
    #[arg(long)]
    dry_run: bool,
}

/// Runs it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let counts = Counts { policy: args.policies, rollout: args.rollouts, teacher: args.teachers };
    let mut set = args.config.overrides.set.clone();
    set.extend(counts.overrides());
    set.extend(args.output_dir.iter().map(|dir| format!("train.output_dir={}", dir.display())));
    set.extend(args.device.iter().map(|device| format!("host.device={device}")));
    let resolved = resolve(&args.config.config, &set)?;
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let machine = Machine {
        share_gpus: args.share_gpus,
        ranks_per_node: args.ranks_per_node.unwrap_or(0),
        ..Machine::this(visible.as_deref())
    };
    let plan = local_plan(&resolved.config, counts, &machine)?;
    if args.dry_run {
        out.line(table(&plan))?;
        return Ok(Exit::Done);
    }
    super::check_here(&resolved, &args.plugins)?;
    let mut arguments: Vec<OsString> = vec!["--config".into(), args.config.config.into()];
    for plugin in args.plugins {
        arguments.extend(["--plugin".into(), plugin.into()]);
    }
    for value in set {
        arguments.extend(["--set".into(), value.into()]);
    }
    let program = std::env::current_exe()
        .map_err(|e| Failure::failed(format!("cannot find this program, to start it for every role: {e}")))?;
    let run_folder = match args.run {
        Some(folder) => folder,
        None => {
            let new = PathBuf::from(&resolved.config.train.output_dir);
            let newest = args.resume.then(|| cosmos_run::resume::newest_run(&new)).flatten();
            if args.resume && newest.is_none() {
                tracing::warn!("nothing to resume under {}: starting from the beginning", new.display());
            }
            newest.unwrap_or(new)
        }
    };
    if !args.resume && run_folder.join("ledger.log").exists() {
        return Err(Failure::usage(format!("{} holds a run already", run_folder.display()))
            .with_hint("go on with it by `--resume`, or take another folder"));
    }
    let controller_arguments = if args.resume { vec!["--resume".into()] } else { Vec::new() };
    let options = LaunchOptions { program, arguments, controller_arguments, run_folder, plan };
    match cosmos_launch::local(options, &resolved.config)? {
        Outcome::Done => Ok(Exit::Done),
        Outcome::Saved => Ok(Exit::Requeue),
    }
}

fn table(plan: &LocalPlan) -> String {
    let mut table = Table::new();
    let mut header = vec!["process", "ranks", "cores", "gpus", "listens"];
    let devices_at = 3;
    if plan.gpus == 0 {
        header.remove(devices_at);
    }
    table.load_style(presets::NOTHING).set_header(header);
    for process in &plan.processes {
        let cores = process.cores.map_or_else(|| "-".to_owned(), |cores| cores.to_string());
        let devices = if process.devices.is_empty() { "-".to_owned() } else { process.devices.join(",") };
        let mut row = vec![process.name.clone(), process.ranks.to_string(), cores, devices, process.listens.clone()];
        if plan.gpus == 0 {
            row.remove(devices_at);
        }
        table.add_row(row);
    }
    let text = table.to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}
