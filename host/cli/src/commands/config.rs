//! `config`: check, resolve and explain configs.

use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum, ValueHint};
use cosmos_config::{ConfigFile, Resolved};

use crate::args::Overrides;
use crate::failure::{Exit, Failure, Notice};
use crate::output::Output;
use crate::render;

/// What to do with configs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check a config: every error and warning with its place
    Check {
        /// Config file (TOML)
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        #[command(flatten)]
        overrides: Overrides,
    },
    /// Print a config with every default and rewrite filled in
    Resolve {
        /// Config file (TOML)
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        #[command(flatten)]
        overrides: Overrides,
        /// How to print it
        #[arg(long, value_name = "FORMAT", default_value = "toml")]
        format: Format,
    },
    /// Print every key, for editors or for people
    Schema {
        /// A JSON schema, or a page to read
        #[arg(long, value_name = "FORMAT", default_value = "json")]
        format: SchemaFormat,
    },
    /// What a key means, its type, default and allowed values
    Explain {
        /// Dotted path, such as `distillation.top_k`; a table's name lists its keys
        key: String,
    },
}

/// Forms of a resolved config.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Format {
    Toml,
    Json,
}

/// Forms of the schema.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum SchemaFormat {
    Json,
    Markdown,
}

/// Runs it.
pub fn run(command: Command, out: &mut Output) -> Result<Exit, Failure> {
    match command {
        Command::Check { file, overrides } => {
            resolve(&file, &overrides.set)?;
            out.line(format!("{}: ok", file.display()))?;
        }
        Command::Resolve { file, overrides, format } => {
            let resolved = resolve(&file, &overrides.set)?;
            match format {
                Format::Json => out.json(&resolved.to_json())?,
                Format::Toml => out.text(resolved.to_toml()?)?,
            }
        }
        Command::Schema { format: SchemaFormat::Json } => out.json(&cosmos_config::schema())?,
        Command::Schema { format: SchemaFormat::Markdown } => out.text(cosmos_config::markdown_reference())?,
        Command::Explain { key } => out.text(cosmos_config::explain(&key)?.to_string())?,
    }
    Ok(Exit::Done)
}

/// Reads, overrides and resolves a config; its warnings go to standard error.
pub fn resolve(file: &Path, set: &[String]) -> Result<Resolved, Failure> {
    let mut file = ConfigFile::read(file)?;
    file.set(set)?;
    let now = jiff::Zoned::now().strftime("%Y%m%d%H%M%S").to_string();
    let resolved = file.resolve(&now)?;
    let warnings: Vec<Notice> = resolved.warnings.iter().map(|w| Notice::of_config(w, resolved.text())).collect();
    render::notices(&warnings);
    cosmos_run::check_addresses(&resolved).map_err(|e| Failure::from_run(e, resolved.text()))?;
    Ok(resolved)
}
