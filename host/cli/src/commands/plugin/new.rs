//! `plugin new`.

use std::path::PathBuf;

use clap::{ValueEnum, ValueHint};
use cosmos_author::new::{Kind, NewOptions, new};

use super::Lang;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the plugin: letters, digits, `-` and `_`
    name: String,
    /// Language to write it in
    #[arg(long, short, value_name = "LANG")]
    lang: Lang,
    /// What it brings
    #[arg(long, value_name = "KIND", default_value = "reward")]
    kind: KindName,
    /// Folder to make [default: the plugin's name]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    dir: Option<PathBuf>,
}

/// Kinds of plugins.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum KindName {
    /// Scores completions
    Reward,
    /// Prompts to train or validate on
    Dataset,
    /// Dataset and reward
    Both,
    /// Conversations of several turns, with tools
    Environment,
}

/// Runs it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let kind = match args.kind {
        KindName::Reward => Kind::Reward,
        KindName::Dataset => Kind::Dataset,
        KindName::Both => Kind::Both,
        KindName::Environment => Kind::Environment,
    };
    let language = args.lang.into();
    let made = new(&NewOptions { name: args.name, language, kind, folder: args.dir })?;
    let folder = made.folder.display();
    out.line(format!("made {folder} ({} files); next:", made.files.len()))?;
    out.line(format!("  cd {folder}"))?;
    for (command, says) in [
        ("cosmos-host plugin build", "compiles it to a component"),
        ("cosmos-host plugin test", "scores the cases in cases/"),
    ] {
        out.line(format!("  {command:<26} # {says}"))?;
    }
    let missing = cosmos_author::toolchain::needs(language).into_iter().any(|need| need.found.is_none());
    if missing {
        out.line(format!("something that building needs is missing: `cosmos-host plugin toolchain {language}`"))?;
    }
    Ok(Exit::Done)
}
