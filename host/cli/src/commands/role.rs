//! `controller`, `policy`, `rollout`, `teacher`: one process of a run.

use std::path::{Path, PathBuf};

use clap::ValueHint;
use cosmos_broker::RedisServer;
use cosmos_config::Wire;
use cosmos_control::TOKEN_VARIABLE;
use cosmos_launch::{BROKER_VARIABLE, REDIS_FOLDER_VARIABLE, RESTARTED_VARIABLE};
use cosmos_run::roles::{self, ReplicaPart, RoleOptions, RoleOutcome};

use crate::args::ConfigArgs;
use crate::commands::config::resolve;
use crate::failure::{Exit, Failure};

/// What every process of a run is given.
#[derive(Debug, clap::Args)]
pub struct Common {
    #[command(flatten)]
    config: ConfigArgs,
    /// Plugin (a WebAssembly component) with the dataset and the rewards. May be repeated
    #[arg(long = "plugin", short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    plugins: Vec<PathBuf>,
}

/// Arguments of `controller`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The run's token is taken from $COSMOS_CONTROL_TOKEN, or is a new random one; it is written to \
                        DIR/control.json, which only its owner can read. $COSMOS_BROKER_URL is used in place of `redis`."
)]
pub struct ControllerArgs {
    #[command(flatten)]
    common: Common,
    /// Folder of the run: ledger, metrics, records [default: train.output_dir]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    run: Option<PathBuf>,
    /// Go on from the newest good checkpoint of the run folder
    #[arg(long)]
    resume: bool,
}

/// Arguments of `policy`, `rollout` and `teacher`.
#[derive(Debug, clap::Args)]
#[command(after_help = "With --controller, the run's token is taken from $COSMOS_CONTROL_TOKEN; with --run, from the \
                        control.json in there. Config, overrides and plugins have to be the controller's. A teacher \
                        with neither of them answers a trainer of the original over the config's `redis`, where \
                        `distillation.wire = \"cosmos-rl\"`.")]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Folder of the run to join, shared with the controller
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    run: Option<PathBuf>,
    /// Where the run's controller listens, such as `http://10.0.0.1:8000`
    #[arg(long, value_name = "URL", conflicts_with = "run")]
    controller: Option<String>,
    /// Name of this replica, unique in the run [default: made of role, host and process]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    part: PartArgs,
}

/// Which process of its replica a policy or teacher is.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "A policy or teacher over several processes")]
struct PartArgs {
    /// Which of its processes this is, from 0; the first one speaks for the others
    #[arg(long, value_name = "N", requires_all = ["nodes", "rendezvous", "name"])]
    node_rank: Option<usize>,
    /// How many processes it has, each with as many of its ranks
    #[arg(long, value_name = "N", requires = "node_rank")]
    nodes: Option<usize>,
    /// Where its first process waits for the others: the same address for all, reachable from each
    #[arg(long, value_name = "HOST:PORT", requires = "node_rank")]
    rendezvous: Option<String>,
}

impl PartArgs {
    fn part(self) -> Option<ReplicaPart> {
        Some(ReplicaPart { node: self.node_rank?, nodes: self.nodes?, rendezvous: self.rendezvous? })
    }
}

type Role = fn(RoleOptions) -> cosmos_run::Result<RoleOutcome>;

/// Runs the controller.
pub fn controller(args: ControllerArgs) -> Result<Exit, Failure> {
    let (resolved, run_folder) = resolved(&args.common, args.run.as_deref())?;
    let run_folder = run_folder.unwrap_or_else(|| PathBuf::from(&resolved.config.train.output_dir));
    let options = RoleOptions {
        resolved,
        plugins: args.common.plugins,
        run_folder: Some(run_folder),
        controller_url: None,
        token: variable(TOKEN_VARIABLE),
        name: None,
        part: None,
        broker_url: variable(BROKER_VARIABLE),
        resume: args.resume,
        restarted: variable(RESTARTED_VARIABLE).is_some(),
    };
    let launcher = std::os::unix::process::parent_id();
    let ended = enter(roles::controller, options);
    // The launcher ends its Redis itself, unless it was killed.
    if std::os::unix::process::parent_id() != launcher
        && let Some(folder) = variable(REDIS_FOLDER_VARIABLE)
    {
        match RedisServer::take_over(Path::new(&folder)) {
            Ok(left_behind) => drop(left_behind),
            Err(error) => tracing::warn!("the launcher's Redis may be left over: {error}"),
        }
    }
    ended
}

/// Runs a policy.
pub fn policy(args: Args) -> Result<Exit, Failure> {
    join(roles::policy, Who::Other, args)
}

/// Runs a rollout.
pub fn rollout(args: Args) -> Result<Exit, Failure> {
    if args.part.node_rank.is_some() {
        return Err(Failure::usage("a rollout is one process, and `--node-rank` says that it has several")
            .with_hint("more rollouts come with more processes of other names"));
    }
    join(roles::rollout, Who::Other, args)
}

/// Runs a teacher.
pub fn teacher(args: Args) -> Result<Exit, Failure> {
    join(roles::teacher, Who::Teacher, args)
}

/// Who joins.
enum Who {
    Teacher,
    Other,
}

fn join(role: Role, who: Who, args: Args) -> Result<Exit, Failure> {
    let token = variable(TOKEN_VARIABLE);
    if args.controller.is_some() && token.is_none() {
        return Err(Failure::usage(format!("with `--controller` the run's token is needed in ${TOKEN_VARIABLE}"))
            .with_hint("take it from `control.json` in the run folder of the controller"));
    }
    if let Some(url) = args.controller.as_ref().filter(|url| !url.starts_with("http://")) {
        return Err(Failure::usage(format!("`--controller {url}` is no `http://` address")));
    }
    let part = args.part.part();
    let (resolved, run_folder) = resolved(&args.common, args.run.as_deref())?;
    let alone = args.run.is_none() && args.controller.is_none();
    let foreign = resolved.config.distillation.enable && resolved.config.distillation.wire == Wire::CosmosRl;
    let role = match (alone, who) {
        (false, _) => role,
        // Its trainer is one of the original's, which has no controller that it could join.
        (true, Who::Teacher) if foreign => roles::teacher_alone,
        (true, _) => {
            return Err(Failure::usage("it is not said which run this process belongs to")
                .with_hint("name the run's folder by `--run DIR`, or its controller by `--controller URL`"));
        }
    };
    let options = RoleOptions {
        resolved,
        plugins: args.common.plugins,
        run_folder,
        controller_url: args.controller,
        token,
        name: args.name,
        part,
        broker_url: if alone { variable(BROKER_VARIABLE) } else { None },
        resume: false,
        restarted: false,
    };
    enter(role, options)
}

/// The config, with what is written going to the run folder.
fn resolved(common: &Common, run: Option<&Path>) -> Result<(cosmos_config::Resolved, Option<PathBuf>), Failure> {
    let mut set = common.config.overrides.set.clone();
    set.extend(run.map(|dir| format!("train.output_dir={}", dir.display())));
    Ok((resolve(&common.config.config, &set)?, run.map(Path::to_path_buf)))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn enter(role: Role, options: RoleOptions) -> Result<Exit, Failure> {
    cosmos_launch::end_with_the_launcher();
    let text = options.resolved.text().clone();
    match role(options).map_err(|e| Failure::from_run(e, &text))? {
        RoleOutcome::Done => Ok(Exit::Done),
        RoleOutcome::Saved => Ok(Exit::Requeue),
    }
}
