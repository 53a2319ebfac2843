//! `eval`: a plugin's dataset and reward over a model folder.

use std::path::PathBuf;

use clap::ValueHint;
use cosmos_run::evaluate::{EvalOptions, EvalReport, evaluate};

use crate::args::{ModelArgs, Overrides, SamplingArgs};
use crate::commands::TableOrJson;
use crate::commands::config::resolve;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Arguments of `eval`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Plugin (a WebAssembly component) with the dataset and the reward
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    plugin: PathBuf,
    /// Config with the plugin's grants, its settings and `[validation.dataset]`
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    config: Option<PathBuf>,
    #[command(flatten)]
    overrides: Overrides,
    /// Dataset by name [default: the first one for validation]
    #[arg(long, value_name = "NAME")]
    dataset: Option<String>,
    /// Reward by name [default: the first one for validation]
    #[arg(long, value_name = "NAME")]
    reward: Option<String>,
    /// At most this many prompts
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Completions of each prompt
    #[arg(long, short, value_name = "N", default_value_t = 1)]
    n: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// A few lines, or JSON with every completion
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: TableOrJson,
}

/// Runs it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let config = match (&args.config, args.overrides.set.is_empty()) {
        (Some(file), _) => Some(resolve(file, &args.overrides.set)?.config),
        (None, true) => None,
        (None, false) => {
            return Err(
                Failure::usage("`--set` changes a config, but there is none").with_hint("name it with `--config`")
            );
        }
    };
    let options = EvalOptions {
        config,
        model: args.model.model,
        plugin: args.plugin,
        dataset: args.dataset,
        reward: args.reward,
        prompts_max: args.limit,
        device: args.model.device,
        params: args.sampling.params(),
        n: args.n,
        response_tokens_max: args.sampling.max_tokens,
    };
    let report = evaluate(&options)?;
    match args.format {
        TableOrJson::Json => out.json(&report)?,
        TableOrJson::Table => show(&report, out)?,
    }
    Ok(Exit::Done)
}

fn show(report: &EvalReport, out: &mut Output) -> Result<(), Failure> {
    out.line(format!("prompts      {}", report.prompts))?;
    out.line(format!("completions  {}", report.completions))?;
    out.line(format!("reward       {:.4}", report.reward_avg))?;
    if report.reward_failed + report.prompts_failed > 0 {
        out.line(format!("failed       {} rewards, {} prompts", report.reward_failed, report.prompts_failed))?;
    }
    out.line(format!("length       {:.1} tokens", report.completion_length_mean))?;
    out.line(format!("speed        {:.0} tokens a second", report.tokens_per_second))
}
