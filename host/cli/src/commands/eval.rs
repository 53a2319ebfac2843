//! `eval`: the plugins' datasets and rewards over a model folder.

use std::path::PathBuf;

use clap::ValueHint;
use cosmos_config::OneOrMany;
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
    /// Plugin (a WebAssembly component) with datasets and rewards. May be repeated
    #[arg(long = "plugin", short, value_name = "FILE", value_hint = ValueHint::FilePath, required = true)]
    plugins: Vec<PathBuf>,
    /// Config with the plugins' grants, their settings and `[validation]`
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    config: Option<PathBuf>,
    #[command(flatten)]
    overrides: Overrides,
    /// Dataset, as `plugin/dataset` or one of the two names; may be repeated [default: the config's, else the only one
    /// for validation]
    #[arg(long = "dataset", value_name = "NAME")]
    datasets: Vec<String>,
    /// Reward, as `plugin/reward` or one of the two names, with `=WEIGHT` if it is not 1; may be repeated [default: the
    /// config's, else the only one for validation]
    #[arg(long = "reward", value_name = "NAME")]
    rewards: Vec<String>,
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
    let mut config = match (&args.config, args.overrides.set.is_empty()) {
        (Some(file), _) => resolve(file, &args.overrides.set)?,
        (None, true) => cosmos_config::ConfigFile::parse("defaults", "")?.resolve("")?,
        (None, false) => {
            return Err(
                Failure::usage("`--set` changes a config, but there is none").with_hint("name it with `--config`")
            );
        }
    };
    if !args.datasets.is_empty() {
        config.config.host.validation_dataset = Some(OneOrMany::Many(args.datasets));
    }
    if !args.rewards.is_empty() {
        config.config.validation.reward_function =
            args.rewards.iter().map(|text| weighted(text)).collect::<Result<_, _>>()?;
    }
    let text = config.text().clone();
    let options = EvalOptions {
        config,
        model: args.model.model,
        plugins: args.plugins,
        prompts_max: args.limit,
        device: args.model.device,
        params: args.sampling.params(),
        n: args.n,
        response_tokens_max: args.sampling.max_tokens,
    };
    let report = evaluate(&options).map_err(|e| Failure::from_run(e, &text))?;
    match args.format {
        TableOrJson::Json => out.json(&report)?,
        TableOrJson::Table => show(&report, out)?,
    }
    Ok(Exit::Done)
}

/// `NAME` or `NAME=WEIGHT`.
fn weighted(text: &str) -> Result<(String, f64), Failure> {
    let Some((name, weight)) = text.rsplit_once('=') else { return Ok((text.to_owned(), 1.0)) };
    match weight.parse::<f64>() {
        Ok(weight) if weight.is_finite() => Ok((name.to_owned(), weight)),
        _ => Err(Failure::usage(format!("`--reward {text}`: `{weight}` is no weight"))
            .with_hint("write a number, as in `--reward format=0.1`")),
    }
}

fn show(report: &EvalReport, out: &mut Output) -> Result<(), Failure> {
    out.line(format!("prompts      {}", report.prompts))?;
    out.line(format!("completions  {}", report.completions))?;
    out.line(format!("reward       {:.4}", report.reward_avg))?;
    for (name, value) in report.rewards.iter().filter(|(name, _)| !name.ends_with("/failed")) {
        out.line(format!("  {name}  {value:.4}"))?;
    }
    if report.reward_failed + report.prompts_failed > 0 {
        out.line(format!("failed       {} rewards, {} prompts", report.reward_failed, report.prompts_failed))?;
    }
    out.line(format!("length       {:.1} tokens", report.completion_length_mean))?;
    out.line(format!("speed        {:.0} tokens a second", report.tokens_per_second))
}
