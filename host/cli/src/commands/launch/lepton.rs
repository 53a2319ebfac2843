//! `launch lepton`: a job for NVIDIA DGX Cloud Lepton.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::ValueHint;
use cosmos_launch::lepton::{self, CONFIG_INSIDE, Options, Workspace};
use cosmos_launch::multi_node::NodeCommand;
use serde_json::Value;

use crate::args::ConfigArgs;
use crate::commands::config::resolve;
use crate::failure::{Exit, Failure};
use crate::output::Output;

use super::sizes::SizeArgs;

const REFERENCE_BYTES_MAX: u64 = 4 << 20;

/// Arguments of `launch lepton`; `--lepton-…` as in the original.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The job is submitted to $LEPTON_WORKSPACE_URL with $LEPTON_WORKSPACE_TOKEN. Workers find each \
                        other by the names that Lepton gives them."
)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Plugin with the dataset and the rewards, at its path inside the image or a mount. May be repeated
    #[arg(long = "plugin", short, value_name = "FILE")]
    plugins: Vec<PathBuf>,
    /// Run folder, at its path inside the job; on a mount, or nothing outlives the job
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// GPUs of one worker [default: what the resource shape's name says]
    #[arg(long, value_name = "N", alias = "ngpu-per-node")]
    gpus_per_node: Option<usize>,
    /// Workers at most; for runs on CPUs, workers to spread over [default: as many as are needed]
    #[arg(long, value_name = "N", alias = "num-workers")]
    nodes: Option<usize>,
    /// Seconds that a worker may take to save and end after a signal
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    save_wait: u64,
    /// Print the job as JSON instead of submitting it
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    sizes: SizeArgs,
    #[command(flatten)]
    lepton: LeptonArgs,
}

/// Options of the job itself.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Lepton")]
struct LeptonArgs {
    /// Name of the job
    #[arg(long, value_name = "NAME", default_value = "cosmos-job")]
    lepton_job_name: String,
    /// Job to start from, as JSON: what the other options leave open stays as it is there
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    lepton_reference_job: Option<PathBuf>,
    /// Image with `cosmos-host` in it
    #[arg(long, value_name = "IMAGE")]
    lepton_container_image: Option<String>,
    /// Port of the container, as `PORT[:PROTOCOL]`. May be repeated
    #[arg(long, value_name = "PORT")]
    lepton_container_port: Vec<String>,
    /// Shape of a worker, such as `gpu.8xh100-80gb`
    #[arg(long, value_name = "SHAPE")]
    lepton_resource_shape: Option<String>,
    /// Id of a dedicated node group. May be repeated
    #[arg(long, value_name = "ID")]
    lepton_node_group: Vec<String>,
    /// Id of a node in the group. May be repeated
    #[arg(long, value_name = "ID")]
    lepton_node_id: Vec<String>,
    /// Restarts of one worker
    #[arg(long, value_name = "N")]
    lepton_max_failure_retry: Option<u32>,
    /// Restarts of the whole job
    #[arg(long, value_name = "N")]
    lepton_max_job_failure_retry: Option<u32>,
    /// Environment variable. May be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    lepton_env: Vec<String>,
    /// Environment variable from a secret of the workspace, which stands in the job by its name only. May be repeated
    #[arg(long, value_name = "NAME[=SECRET]")]
    lepton_secret: Vec<String>,
    /// Storage, as `STORAGE_PATH:MOUNT_PATH:VOLUME`. May be repeated
    #[arg(long, value_name = "MOUNT")]
    lepton_mount: Vec<String>,
    /// Secret for the image's registry. May be repeated
    #[arg(long, value_name = "NAME")]
    lepton_image_pull_secrets: Vec<String>,
    /// Let workers reach each other; with several they always can
    #[arg(long, value_name = "BOOL")]
    lepton_intra_job_communication: Option<bool>,
    /// Run the container with all rights on the node
    #[arg(long)]
    lepton_privileged: bool,
    /// Seconds that the job stays after its end
    #[arg(long, value_name = "SECONDS", default_value_t = 259_200)]
    lepton_ttl_seconds_after_finished: u32,
    /// Keep the job's logs
    #[arg(long, value_name = "BOOL")]
    lepton_log_collection: Option<bool>,
    /// Priority from 1 to 9, in a dedicated node group
    #[arg(long, value_name = "N")]
    lepton_queue_priority: Option<u8>,
    /// Others may take this job's place
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    lepton_can_be_preempted: Option<bool>,
    /// This job may take the place of others
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    lepton_can_preempt: Option<bool>,
    /// Who sees it
    #[arg(long, value_name = "WHO", value_parser = ["public", "private"])]
    lepton_visibility: Option<String>,
    /// Shared memory in MiB
    #[arg(long, value_name = "MIB")]
    lepton_shared_memory_size: Option<u32>,
    /// Id of a reservation, in a dedicated node group
    #[arg(long, value_name = "ID")]
    lepton_with_reservation: Option<String>,
}

impl LeptonArgs {
    fn options(self) -> Options {
        Options {
            job_name: self.lepton_job_name,
            container_image: self.lepton_container_image,
            container_ports: self.lepton_container_port,
            resource_shape: self.lepton_resource_shape,
            node_groups: self.lepton_node_group,
            node_ids: self.lepton_node_id,
            max_failure_retry: self.lepton_max_failure_retry,
            max_job_failure_retry: self.lepton_max_job_failure_retry,
            envs: self.lepton_env,
            secrets: self.lepton_secret,
            mounts: self.lepton_mount,
            image_pull_secrets: self.lepton_image_pull_secrets,
            intra_job_communication: self.lepton_intra_job_communication,
            privileged: self.lepton_privileged,
            ttl_seconds_after_finished: Some(self.lepton_ttl_seconds_after_finished),
            log_collection: self.lepton_log_collection,
            queue_priority: self.lepton_queue_priority,
            can_be_preempted: self.lepton_can_be_preempted,
            can_preempt: self.lepton_can_preempt,
            visibility: self.lepton_visibility,
            shared_memory_size: self.lepton_shared_memory_size,
            with_reservation: self.lepton_with_reservation,
        }
    }
}

/// Submits it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    if !args.run.is_absolute() {
        return Err(Failure::usage(format!("`--run {}` is no absolute path", args.run.display()))
            .with_hint("it is a path inside the job, on one of its mounts: as in `--run /mnt/runs/first`"));
    }
    let reference = args.lepton.lepton_reference_job.as_deref().map(read_json).transpose()?;
    let mut set = args.config.overrides.set.clone();
    set.extend(args.sizes.overrides());
    set.push(format!("train.output_dir={}", args.run.join("outputs").display()));
    let resolved = resolve(&args.config.config, &set)?;
    let options = args.lepton.options();
    let shape = options
        .resource_shape
        .clone()
        .or_else(|| reference.as_ref()?.pointer("/spec/resource_shape").and_then(Value::as_str).map(str::to_owned));
    let gpus = args.gpus_per_node.or_else(|| lepton::gpus_of_shape(shape.as_deref()?));
    if gpus.is_none()
        && let Some(shape) = &shape
    {
        return Err(Failure::usage(format!("the resource shape `{shape}` does not tell how many GPUs it has"))
            .with_hint("give `--gpus-per-node N`"));
    }
    args.sizes.check_roles(&resolved)?;
    let placement = args.sizes.place(&resolved, gpus, args.nodes)?;
    let command = NodeCommand {
        config: CONFIG_INSIDE.into(),
        plugins: args.plugins,
        run: args.run,
        nodes: placement.nodes,
        gpus_per_node: placement.gpus_per_node,
        cores_per_node: args.sizes.cores_per_node.unwrap_or(0),
        ranks_per_node: args.sizes.ranks_per_node.unwrap_or(0),
        ports: placement.ports,
        save_wait_s: args.save_wait,
        one_process: args.sizes.one_process,
    };
    let job = lepton::specification(&options, &placement, &command, &resolved.to_toml()?, reference.as_ref())?;
    if args.dry_run {
        out.json(&job)?;
        return Ok(Exit::Done);
    }
    let workspace = Workspace::from_environment(&|name| std::env::var(name).ok())?;
    let id = lepton::submit(&workspace, &job)?;
    out.text(placement.to_string())?;
    out.line(format!("job {id}"))?;
    Ok(Exit::Done)
}

fn read_json(path: &Path) -> Result<Value, Failure> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(REFERENCE_BYTES_MAX).read_to_string(&mut text))
        .map_err(|e| Failure::usage(format!("cannot read the reference job {}: {e}", path.display())))?;
    serde_json::from_str(&text)
        .map_err(|e| Failure::usage(format!("{}:{}:{}: no JSON: {e}", path.display(), e.line(), e.column())))
}
