//! `launch node`: one node's share of a run.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueHint;
use cosmos_launch::LaunchError;
use cosmos_launch::multi_node::{self, Ending, Limits, NodeOptions, Run, Whereabouts};

use crate::args::ConfigArgs;
use crate::commands::config::resolve;
use crate::failure::{Exit, Failure};

use super::sizes::SizeArgs;

/// Arguments of `launch node`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Plugin with the dataset and the rewards, at the same path on every node. May be repeated
    #[arg(long = "plugin", short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    plugins: Vec<PathBuf>,
    /// Run folder: logs, token and checkpoints; best on a file system that all nodes share
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    run: PathBuf,
    /// Address of every node in order, separated by `;` [default: what Lepton or Kubernetes say]
    #[arg(long, value_name = "ADDRESSES")]
    node_ip_list: Option<String>,
    /// Which of them this is, from 0 [default: what Slurm, Lepton or Kubernetes say]
    #[arg(long, value_name = "N")]
    worker_idx: Option<usize>,
    /// GPUs of one node [default: 8; none where `host.device` is a CPU]
    #[arg(long, value_name = "N", alias = "ngpu-per-node")]
    gpus_per_node: Option<usize>,
    /// Nodes; the same number on every node [default: as many addresses as are given]
    #[arg(long, value_name = "N")]
    nodes: Option<usize>,
    /// Go on from the newest checkpoint
    #[arg(long)]
    resume: bool,
    /// Which start of the job this is; names the folder of the logs
    #[arg(long, value_name = "N", default_value_t = 1)]
    attempt: u32,
    /// How often each process that dies is started again
    #[arg(long, value_name = "N", default_value_t = 3)]
    restarts: u32,
    /// Seconds from a signal until what still runs is killed
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    save_wait: u64,
    /// Seconds to wait until the other nodes have addresses
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    names_wait: u64,
    /// Print what the processes print, too
    #[arg(long)]
    echo: bool,
    /// Where to write how this node ended, and to look for the file `save`, for the job's script
    #[arg(long, value_name = "DIR", hide = true)]
    end_folder: Option<PathBuf>,
    /// Exit code of a run that was saved, for the job's script
    #[arg(long, value_name = "CODE", default_value_t = 75, hide = true)]
    saved_exit_code: u8,
    #[command(flatten)]
    sizes: SizeArgs,
}

/// Runs it.
pub fn run(args: Args) -> Result<Exit, Failure> {
    // From here on a signal saves the run, and does not just end this process.
    let signals = multi_node::signals(args.end_folder.as_ref().map(|folder| folder.join("save")))?;
    let mut index = args.worker_idx;
    let ended = serve(&args, &signals, &mut index);
    if let (Some(folder), Some(index)) = (&args.end_folder, index) {
        let ending = match &ended {
            Ok(ending) => ending.clone(),
            Err(failure) => {
                let reason = failure.notices().iter().map(|n| n.message.clone()).collect::<Vec<_>>().join("\n");
                if failure.exit() == Exit::Usage { Ending::Refused(reason) } else { Ending::Failed(reason) }
            }
        };
        multi_node::write_ending(&folder.join(format!("node-{index}.end")), &ending)?;
    }
    match ended? {
        Ending::Done => Ok(Exit::Done),
        Ending::Saved if args.saved_exit_code == 0 => Ok(Exit::Done),
        Ending::Saved => Ok(Exit::Requeue),
        Ending::Failed(reason) => Err(Failure::failed(reason)),
        Ending::Refused(reason) => Err(Failure::usage(reason)),
    }
}

fn serve(args: &Args, signals: &std::sync::mpsc::Receiver<i32>, index: &mut Option<usize>) -> Result<Ending, Failure> {
    let environment = |name: &str| std::env::var(name).ok();
    // Known before anything else can go wrong, so that the job's script hears of it.
    *index = index.or_else(|| environment("SLURM_NODEID")?.parse().ok());
    let resolved = resolve(&args.config.config, &args.config.overrides.set)?;
    let given = args.node_ip_list.as_deref().map(|list| multi_node::addresses(list).len());
    if given == Some(0) {
        return Err(
            Failure::usage("`--node-ip-list` has no address").with_hint("as in `--node-ip-list \"10.0.0.1;10.0.0.2\"`")
        );
    }
    args.sizes.check_roles(&resolved)?;
    let placement = args.sizes.place(&resolved, args.gpus_per_node, args.nodes.or(given))?;
    let whereabouts = Whereabouts::find(placement.nodes, args.worker_idx, args.node_ip_list.as_deref(), &environment)?;
    *index = Some(whereabouts.index);
    // What the processes are started from; tests put stand-ins there.
    let program = match std::env::var_os("COSMOS_LAUNCH_PROGRAM") {
        Some(path) => path.into(),
        None => std::env::current_exe().map_err(LaunchError::io("find", "this program"))?,
    };
    let mut overrides = args.config.overrides.set.clone();
    overrides.extend(args.sizes.overrides());
    let options = NodeOptions {
        run: Run {
            program,
            config: args.config.config.clone(),
            overrides,
            plugins: args.plugins.clone(),
            folder: args.run.clone(),
            one_process: args.sizes.one_process,
            starts_redis: args.sizes.starts_redis(&resolved),
            placement,
            resume: args.resume,
            stop_ms: args.save_wait.saturating_mul(1000),
        },
        whereabouts,
        attempt: args.attempt,
        limits: Limits {
            restarts_max: args.restarts,
            save_wait: Duration::from_secs(args.save_wait),
            over_file: args.end_folder.as_ref().map(|folder| folder.join("node-0.end")),
            ..Limits::default()
        },
        names_wait: Duration::from_secs(args.names_wait),
        echo: args.echo,
    };
    Ok(multi_node::run_node(&options, signals)?)
}
