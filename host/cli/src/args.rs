//! What the user may type, before any of it means something.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use crate::commands;

/// On-policy distillation of language models in one binary.
#[derive(Debug, Parser)]
#[command(
    name = "cosmos-host",
    version,
    max_term_width = 110,
    subcommand_required = true,
    arg_required_else_help = true
)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage or config, 75 saved and asking to be started again."
)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// What to log on standard error: error, warn, info, debug or trace, or per crate as in `info,cosmos_engine=debug`
    /// [default: $COSMOS_LOG_LEVEL, else info]
    #[arg(long, global = true, value_name = "LEVEL", hide_default_value = true)]
    pub log_level: Option<String>,
    /// Colour of errors and logs; `auto` means on a terminal without NO_COLOR
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub color: Color,
}

/// When to colour. The values say it all; documented, each would take a line of every help page.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Color {
    Auto,
    Always,
    Never,
}

impl Color {
    /// Makes the choice for everything this process prints.
    pub fn apply(self) {
        match self {
            Self::Auto => anstream::ColorChoice::Auto,
            Self::Always => anstream::ColorChoice::Always,
            Self::Never => anstream::ColorChoice::Never,
        }
        .write_global();
    }
}

/// The commands, one file each under `commands/`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train: distil, GRPO or SFT, as the config says
    Run(commands::run::Args),
    /// Place, start and watch the processes of a run
    #[command(subcommand)]
    Launch(commands::launch::Command),
    /// Be the controller of a run of several processes
    Controller(Box<commands::role::ControllerArgs>),
    /// Be a policy of a run: it trains the student
    Policy(Box<commands::role::Args>),
    /// Be a rollout of a run: it writes completions and scores them by the rewards
    Rollout(Box<commands::role::Args>),
    /// Be a teacher of a run: it scores completions token by token
    Teacher(Box<commands::role::Args>),
    /// Who does what in a run of several processes
    Status(commands::status::Args),
    /// Check, resolve and explain configs
    #[command(subcommand)]
    Config(commands::config::Command),
    /// Look at and try out dataset and reward plugins
    #[command(subcommand)]
    Plugin(commands::plugin::Command),
    /// Talk to a checkpoint
    Sample(commands::sample::Args),
    /// Log-probabilities of given text, JSONL in and out
    Score(commands::score::Args),
    /// Score a checkpoint with a plugin's dataset and reward
    Eval(commands::eval::Args),
    /// List, verify and export checkpoints
    #[command(subcommand)]
    Ckpt(commands::ckpt::Command),
    /// What this machine has, what is missing and how to get it
    Doctor(commands::doctor::Args),
    /// Print a completion script for a shell
    Completions(commands::completions::Args),
}

/// A config file and what the command line changes in it.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// Config file (TOML)
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: PathBuf,
    /// Overrides of single keys.
    #[command(flatten)]
    pub overrides: Overrides,
}

/// `--set` of every command that reads a config.
#[derive(Debug, Args)]
pub struct Overrides {
    /// Change one key, as in `--set train.optm_lr=1e-4`; the value is TOML, or plain text. May be repeated, the last wins
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// Which model folder, and where it computes.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Model folder in Hugging Face's layout, such as one that `ckpt export` wrote
    #[arg(long, short, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub model: PathBuf,
    /// Where the model computes
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
}

/// How tokens are chosen.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Longest completion in tokens
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub max_tokens: usize,
    /// Divides the logits; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    pub temperature: f32,
    /// Choose among the most likely tokens of this total probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Choose among this many most likely tokens; -1 for all
    #[arg(long, value_name = "K", default_value_t = -1, allow_hyphen_values = true)]
    pub top_k: i64,
    /// Above 1, tokens that came before are less likely
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// The same seed gives the same completions
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub seed: u64,
}

impl SamplingArgs {
    /// As the engine takes it.
    pub fn params(&self) -> cosmos_engine::generate::SamplingParams {
        cosmos_engine::generate::SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        }
    }
}
