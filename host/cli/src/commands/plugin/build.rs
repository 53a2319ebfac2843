//! `plugin build`.

use std::path::PathBuf;

use clap::ValueHint;
use cosmos_author::build::{BuildOptions, build};
use cosmos_plugin::componentize_file;

use super::check::check;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Project folder, or a core module (.wasm) that some other build made
    #[arg(value_name = "FOLDER|MODULE", default_value = ".", value_hint = ValueHint::AnyPath)]
    source: PathBuf,
    /// Component to write [default: build/<name>.wasm in the project]
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    out: Option<PathBuf>,
    /// Show what the compilers print, as it comes
    #[arg(long, short)]
    verbose: bool,
}

/// Runs it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    if !args.source.is_dir() {
        let Some(component) = args.out else {
            return Err(Failure::usage(format!("`{}` is no project folder", args.source.display()))
                .with_hint("give a folder with a plugin.toml, or a core module and `--out FILE`"));
        };
        componentize_file(&args.source, &component)?;
        return check(&super::host()?.inspect(&component)?, out);
    }
    let options = BuildOptions { out: args.out, verbose: args.verbose, ..BuildOptions::new(args.source) };
    let built = build(&options)?;
    out.line(format!("built with {} in {:.1} s, {} bytes", built.toolchain, built.seconds, built.bytes))?;
    check(&super::host()?.inspect(&built.component)?, out)
}
