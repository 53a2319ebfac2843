//! One file per command: arguments in, calls into the crates below, text out.

pub mod ckpt;
pub mod completions;
pub mod config;
pub mod doctor;
pub mod eval;
pub mod launch;
pub mod plugin;
pub mod role;
pub mod run;
pub mod sample;
pub mod score;
pub mod status;

use clap::ValueEnum;

use crate::args::Command;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Runs a command and hands its output over.
pub fn dispatch(command: Command, out: &mut Output) -> Result<Exit, Failure> {
    let exit = match command {
        Command::Run(args) => run::run(args),
        Command::Launch(command) => launch::run(command, out),
        Command::Controller(args) => role::controller(*args),
        Command::Policy(args) => role::policy(*args),
        Command::Rollout(args) => role::rollout(*args),
        Command::Teacher(args) => role::teacher(*args),
        Command::Status(args) => status::run(args, out),
        Command::Config(command) => config::run(command, out),
        Command::Plugin(command) => plugin::run(command, out),
        Command::Sample(args) => sample::run(args, out),
        Command::Score(args) => score::run(args, out),
        Command::Eval(args) => eval::run(args, out),
        Command::Ckpt(command) => ckpt::run(command, out),
        Command::Doctor(args) => doctor::run(args, out),
        Command::Completions(args) => completions::run(args, out),
    };
    // What was found before a failure still belongs to the reader.
    out.flush()?;
    exit
}

/// For people or for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TableOrJson {
    Table,
    Json,
}
