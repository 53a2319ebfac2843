//! The command line: arguments, terminal, exit codes. What the commands do lives in the crates below.
//!
//! Exit codes: 0 done, 1 the run or a check failed, 2 wrong usage or config, 75 saved and asking to be started again.

mod args;
mod commands;
mod doctor;
mod failure;
mod log;
mod output;
mod panics;
mod render;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Cli;
use crate::output::Output;

/// Flex allocates every result; the system allocator costs a quarter of its speed.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli.global.color.apply();
    let result = log::start(cli.global.log_level.as_deref())
        .and_then(|()| panics::caught(|| commands::dispatch(cli.command, &mut Output::stdout())));
    match result {
        Ok(exit) => exit.code(),
        Err(failure) => {
            render::notices(failure.notices());
            failure.exit().code()
        }
    }
}
