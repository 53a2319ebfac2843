//! `launch slurm`: a job for a Slurm cluster.

use std::path::{Path, PathBuf};

use clap::ValueHint;
use cosmos_launch::LaunchError;
use cosmos_launch::slurm::{self, Container, Job};

use crate::args::Overrides;
use crate::commands::config::resolve;
use crate::failure::{Exit, Failure};
use crate::output::Output;

use super::sizes::SizeArgs;

/// Arguments of `launch slurm`. Their names and meaning are the original's; `--plugin` takes the place of its script.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the job
    #[arg(long, value_name = "NAME", default_value = "cosmos_job")]
    job_name: String,
    /// GPUs of one node
    #[arg(long, value_name = "N", default_value_t = 8, alias = "gpus-per-node")]
    ngpu_per_node: usize,
    /// Nodes at most; for runs on CPUs, nodes to spread over [default: as many as are needed]
    #[arg(long, value_name = "N")]
    nodes: Option<usize>,
    /// Config file (TOML)
    #[arg(long, short, value_name = "FILE", alias = "config", value_hint = ValueHint::FilePath)]
    config_path: PathBuf,
    #[command(flatten)]
    overrides: Overrides,
    /// Plugin with the dataset and the rewards. May be repeated
    #[arg(long = "plugin", short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    plugins: Vec<PathBuf>,
    /// Folder for run folders, on a file system that all nodes share
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    output_root_path: PathBuf,
    /// Folder in which relative paths of the config start [default: this one]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    repo_root_path: Option<PathBuf>,
    /// Container image for pyxis: a squashfs file or a registry's name [default: no container]
    #[arg(long, value_name = "IMAGE", alias = "container")]
    cosmos_container: Option<String>,
    /// Folders that the container sees, as `FROM:TO`, separated by commas; run folder and work folder always are
    #[arg(long, value_name = "MOUNTS", value_delimiter = ',', requires = "cosmos_container")]
    mount_dirs: Vec<String>,
    /// Partition [default: the cluster's]
    #[arg(long, value_name = "NAME")]
    slurm_partition: Option<String>,
    /// Account [default: yours]
    #[arg(long, value_name = "NAME")]
    slurm_account: Option<String>,
    /// Hours of each start of the job, with decimals
    #[arg(long, value_name = "HOURS", default_value_t = 4.0, allow_negative_numbers = true)]
    duration: f64,
    /// The same as Slurm writes it, such as `1-12:00:00`; wins over `--duration`
    #[arg(long, value_name = "TIME")]
    slurm_job_time: Option<String>,
    /// How often a job that failed is put back into the queue
    #[arg(long, value_name = "N", default_value_t = 3)]
    retries: u32,
    /// Seconds before the end at which the run is told to save
    #[arg(long, value_name = "SECONDS", default_value_t = 1200)]
    pre_timeout_signal: u64,
    /// Never put the job back into the queue
    #[arg(long)]
    no_autoresume: bool,
    /// Further options of sbatch, such as `qos=high`. May be repeated
    #[arg(long, value_name = "OPTION", num_args = 1.., allow_hyphen_values = true)]
    extra_sbatch_args: Vec<String>,
    /// Print the batch script and the plan instead of submitting
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    sizes: SizeArgs,
}

/// Submits it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let root = absolute(&args.output_root_path)?;
    let work_folder = absolute(args.repo_root_path.as_deref().unwrap_or(Path::new(".")))?;
    if !work_folder.is_dir() {
        return Err(Failure::usage(format!("`{}` is no folder", work_folder.display())));
    }
    let now = jiff::Zoned::now().strftime("%Y%m%d%H%M%S").to_string();
    let folder = root.join(format!("{}_{now}", args.job_name));
    let mut set = args.overrides.set.clone();
    set.extend(args.sizes.overrides());
    set.push(format!("train.output_dir={}", folder.join("outputs").display()));
    let resolved = resolve(&args.config_path, &set)?;
    args.sizes.check_roles(&resolved)?;
    let placement = args.sizes.place(&resolved, Some(args.ngpu_per_node), args.nodes)?;
    super::check_here(&resolved, &args.plugins)?;
    let plugins = args.plugins.iter().map(|p| absolute(p)).collect::<Result<_, _>>()?;
    let job = Job {
        name: args.job_name,
        folder,
        program: std::env::current_exe().map_err(LaunchError::io("find", "this program"))?,
        config_toml: resolved.to_toml()?,
        plugins,
        work_folder,
        one_process: args.sizes.one_process,
        cores_per_node: args.sizes.cores_per_node.unwrap_or(0),
        ranks_per_node: args.sizes.ranks_per_node.unwrap_or(0),
        placement,
        partition: args.slurm_partition,
        account: args.slurm_account,
        time: match args.slurm_job_time {
            Some(time) => time,
            None => slurm::hours(args.duration)?,
        },
        pre_timeout_s: args.pre_timeout_signal,
        retries: args.retries,
        autoresume: !args.no_autoresume,
        extra_sbatch: args.extra_sbatch_args,
        container: args.cosmos_container.map(|image| Container { image, mounts: args.mount_dirs }),
    };
    if args.dry_run {
        out.text(slurm::script_of(&job)?)?;
        for line in job.placement.to_string().lines() {
            out.line(format!("# {line}"))?;
        }
        return Ok(Exit::Done);
    }
    let script = slurm::write(&job)?;
    let number = slurm::submit(&script)?;
    out.text(job.placement.to_string())?;
    out.line(format!("job {number}: {}", job.folder.display()))?;
    Ok(Exit::Done)
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    // `absolute` keeps a trailing `.`; a folder that is there has a better name.
    path.canonicalize().or_else(|_| std::path::absolute(path)).map_err(|e| LaunchError::io("find", path)(e).into())
}
