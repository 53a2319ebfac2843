//! `completions`: a completion script from the one definition of the arguments.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Cli;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "For example: cosmos-host completions bash > ~/.local/share/bash-completion/completions/cosmos-host"
)]
pub struct Args {
    /// The shell
    shell: Shell,
}

/// Prints the script.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "cosmos-host", &mut script);
    out.text(String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}
