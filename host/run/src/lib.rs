//! The roles of a run and the controller that drives them.
//!
//! [`run`] reads top to bottom: [`prepare`](prepare::prepare) checks everything before anything is written, the
//! [`controller`] decides what happens next, and the [`session`] performs it with the roles ([`rollout`],
//! [`conversation`], [`teacher`], [`policy`], [`sft`], [`validation`]) in one process; [`rewards`] are scored meanwhile.
//! Checkpoints ([`checkpoint`], [`resume`]) hold all of their state.
//!
//! This crate joins the others; it must not know wasmtime, or the tensors of a back end.

use std::path::{Path, PathBuf};

mod capabilities;
pub mod checkpoint;
pub mod choose;
pub mod compared;
pub mod conversation;
mod error;
pub mod evaluate;
pub mod export;
pub mod heads;
pub mod mixture;
pub mod offers;
pub mod plan;
pub mod plugins;
pub mod policy;
pub mod prepare;
pub mod records;
pub mod resume;
pub mod rewards;
pub mod roles;
pub mod rollout;
pub mod sample;
pub mod score;
pub mod session;
pub mod sft;
pub mod shards;
pub mod shelf;
mod signals;
pub mod student;
pub mod task;
pub mod teacher;
pub mod teachers;
pub mod validation;
pub mod weights;

pub use capabilities::lent;
pub use error::{Result, RunError};

/// What to run.
pub struct RunOptions {
    /// The configuration.
    pub config: cosmos_config::Resolved,
    /// Plugin components.
    pub plugins: Vec<PathBuf>,
    /// Continue from the newest good checkpoint, if there is one.
    pub resume: bool,
    /// Only check and print the plan.
    pub dry_run: bool,
}

/// How a run ended.
pub enum Outcome {
    /// All steps made.
    Done {
        /// The result, already printed and written.
        summary: Box<cosmos_report::Summary>,
    },
    /// Asked to leave: saved, to be resumed.
    Saved {
        /// Steps made.
        step: u64,
        /// Where they are.
        checkpoint: PathBuf,
    },
    /// The plan was printed.
    DryRun,
}

/// Checks what the configuration says of servers, without reaching for them.
///
/// # Errors
/// A `redis` that is no port and no URL.
pub fn check_addresses(resolved: &cosmos_config::Resolved) -> Result<()> {
    let redis = &resolved.config.redis;
    if redis.is_empty() {
        return Ok(());
    }
    match cosmos_broker::RedisAddress::parse(redis) {
        Ok(_) => Ok(()),
        Err(error) => {
            let hint = error.hint().unwrap_or_default();
            Err(RunError::config(prepare::place(resolved, "redis"), error.to_string(), hint))
        }
    }
}

/// Runs a configuration to its end.
pub fn run(options: RunOptions) -> Result<Outcome> {
    let RunOptions { config: resolved, plugins, resume, dry_run } = options;
    let wanted = resolved.config.train.resume.clone();
    let output_dir = PathBuf::from(&resolved.config.train.output_dir);
    if resolved.config.logging.logger.iter().any(|l| l == "wandb") {
        tracing::warn!(
            "`logging.logger` names wandb, which is not there yet; metrics go to `metrics.jsonl` and TensorBoard files"
        );
    }
    let distillation = &resolved.config.distillation;
    if distillation.enable && distillation.wire == cosmos_config::Wire::CosmosRl {
        return Err(RunError::Config {
            place: prepare::place(&resolved, "distillation.wire"),
            message: "`distillation.wire = \"cosmos-rl\"` is for a teacher in another process, and `run` has its own"
                .into(),
            hint: "remove it, or start the roles as processes of their own".into(),
        });
    }
    // Compiling plugins and reading datasets may take long, and there is nothing to save yet.
    let unprepared = signals::EndAtOnce::listen()?;
    let prepared = prepare::prepare(resolved, &plugins)?;
    let plan = prepared.plan()?;
    if dry_run {
        plan.lines().iter().for_each(|line| println!("{line}"));
        return Ok(Outcome::DryRun);
    }
    let resumed = match wanted {
        cosmos_config::shapes::FlagOrText::Text(path) => Some(resume::from(Path::new(&path))?),
        cosmos_config::shapes::FlagOrText::Flag(flag) if flag || resume => {
            let found = resume::newest(&output_dir)?;
            if found.is_none() {
                tracing::warn!("nothing to resume under {}: starting from the beginning", output_dir.display());
                resume::clear_unsaved(&output_dir)?;
            }
            found
        }
        cosmos_config::shapes::FlagOrText::Flag(_) => None,
    };
    let session = session::Session::open(prepared, resumed, &plan.lines())?;
    drop(unprepared);
    session.run()
}

#[cfg(test)]
mod scaling_tests;
