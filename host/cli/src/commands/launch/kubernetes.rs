//! `launch kubernetes`: a manifest.

use std::path::PathBuf;

use cosmos_launch::kubernetes::{self, CONFIG_INSIDE, Options, RUNS_INSIDE};
use cosmos_launch::multi_node::NodeCommand;

use crate::args::ConfigArgs;
use crate::commands::config::resolve;
use crate::failure::{Exit, Failure};
use crate::output::Output;

use super::sizes::SizeArgs;

/// Arguments of `launch kubernetes`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Prints YAML: cosmos-host launch kubernetes … | kubectl apply -f -. Before that, once: kubectl create \
                        secret generic NAME-token --from-literal=token=$(openssl rand -hex 32)"
)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Plugin with the dataset and the rewards, at its path inside the image or the volume. May be repeated
    #[arg(long = "plugin", short, value_name = "FILE")]
    plugins: Vec<PathBuf>,
    /// Name of the job
    #[arg(long, value_name = "NAME", default_value = "cosmos-job")]
    name: String,
    /// Namespace [default: that of whoever applies it]
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Image with `cosmos-host` and the plugins in it
    #[arg(long, value_name = "IMAGE")]
    image: String,
    /// Claim of a volume that all pods can write; without one nothing is resumed
    #[arg(long, value_name = "NAME")]
    volume_claim: Option<String>,
    /// Secret that has the run's token under the key `token` [default: NAME-token]
    #[arg(long, value_name = "NAME")]
    token_secret: Option<String>,
    /// Environment variable. May be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// How often pods that failed are replaced, all together
    #[arg(long, value_name = "N", default_value_t = 3)]
    retries: u32,
    /// Shared memory of a pod in GiB
    #[arg(long, value_name = "GIB", default_value_t = 16)]
    shared_memory_gib: u32,
    /// Seconds that a pod may take to save and end when it is told to
    #[arg(long, value_name = "SECONDS", default_value_t = 570)]
    save_wait: u64,
    /// GPUs of one pod [default: 8; none where `host.device` is a CPU]
    #[arg(long, value_name = "N", alias = "ngpu-per-node")]
    gpus_per_node: Option<usize>,
    /// Pods at most; for runs on CPUs, pods to spread over [default: as many as are needed]
    #[arg(long, value_name = "N")]
    nodes: Option<usize>,
    #[command(flatten)]
    sizes: SizeArgs,
}

/// Prints it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let run = PathBuf::from(RUNS_INSIDE).join(&args.name);
    let mut set = args.config.overrides.set.clone();
    set.extend(args.sizes.overrides());
    set.push(format!("train.output_dir={}", run.join("outputs").display()));
    let resolved = resolve(&args.config.config, &set)?;
    args.sizes.check_roles(&resolved)?;
    let placement = args.sizes.place(&resolved, args.gpus_per_node, args.nodes)?;
    let command = NodeCommand {
        config: CONFIG_INSIDE.into(),
        plugins: args.plugins,
        run,
        nodes: placement.nodes,
        gpus_per_node: placement.gpus_per_node,
        cores_per_node: args.sizes.cores_per_node.unwrap_or(0),
        ranks_per_node: args.sizes.ranks_per_node.unwrap_or(0),
        ports: placement.ports,
        save_wait_s: args.save_wait,
        one_process: args.sizes.one_process,
    };
    let options = Options {
        token_secret: args.token_secret.unwrap_or_else(|| format!("{}-token", args.name)),
        name: args.name,
        namespace: args.namespace,
        image: args.image,
        volume_claim: args.volume_claim,
        envs: args.env,
        retries: args.retries,
        shared_memory_gib: args.shared_memory_gib,
    };
    out.text(kubernetes::manifest(&options, &placement, &command, &resolved.to_toml()?)?)?;
    Ok(Exit::Done)
}
