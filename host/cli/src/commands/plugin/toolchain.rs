//! `plugin toolchain`.

use cosmos_author::manifest::Language;
use cosmos_author::toolchain::{install, needs};

use super::Lang;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Language [default: all]
    #[arg(value_name = "LANG")]
    lang: Option<Lang>,
    /// Get what is missing, into a private folder under ~/.cache/cosmos-host
    #[arg(long, requires = "lang")]
    install: bool,
}

/// Runs it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let languages = args.lang.map_or_else(|| Language::ALL.to_vec(), |lang| vec![lang.into()]);
    if args.install {
        for language in &languages {
            install(*language, &mut |line| eprintln!("{line}"))?;
        }
    }
    let mut missing = None;
    for language in languages {
        for need in needs(language) {
            let found = need.found.as_deref().unwrap_or("missing");
            out.line(format!("{:<7} {:<32} {found}", language.name(), need.what))?;
            if need.found.is_none() {
                out.line(format!("{:<7} {:<32}   {}", "", "", need.fix))?;
                missing.get_or_insert((need.what, need.fix));
            }
        }
    }
    // Asked about one language, the exit code answers whether it can be built.
    match missing.filter(|_| args.lang.is_some()) {
        Some((what, fix)) => Err(Failure::usage(format!("{what} is missing")).with_hint(fix)),
        None => Ok(Exit::Done),
    }
}
