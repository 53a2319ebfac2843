//! `ckpt`: list, verify and export checkpoints.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum, ValueHint};
use comfy_table::{Table, presets};
use cosmos_run::checkpoint;

use crate::commands::TableOrJson;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// What to do with checkpoints.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the checkpoints of a run folder, oldest first
    Ls {
        /// Run folder, or its `checkpoints` folder
        #[arg(value_hint = ValueHint::DirPath)]
        folder: PathBuf,
        /// A table to read, or JSON for programs
        #[arg(long, value_name = "FORMAT", default_value = "table")]
        format: TableOrJson,
    },
    /// Check every file of a checkpoint against its manifest; exit 1 when one differs
    Verify {
        /// Checkpoint folder
        #[arg(value_hint = ValueHint::DirPath)]
        checkpoint: PathBuf,
    },
    /// Write a checkpoint's weights as a Hugging Face folder
    Export {
        /// Checkpoint folder
        #[arg(value_hint = ValueHint::DirPath)]
        checkpoint: PathBuf,
        /// New folder
        #[arg(value_hint = ValueHint::DirPath)]
        out: PathBuf,
        /// Stored type of the weights
        #[arg(long, value_name = "DTYPE", default_value = "bfloat16")]
        dtype: Dtype,
    },
}

/// Stored types of exported weights.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Dtype {
    #[value(alias = "f32")]
    Float32,
    #[value(alias = "bf16")]
    Bfloat16,
}

/// Runs it.
pub fn run(command: Command, out: &mut Output) -> Result<Exit, Failure> {
    match command {
        Command::Ls { folder, format } => {
            let found = checkpoint::list(&folder)?;
            match format {
                TableOrJson::Json => out.json(&found)?,
                TableOrJson::Table => table(&found, out)?,
            }
            Ok(Exit::Done)
        }
        Command::Verify { checkpoint: folder } => {
            // Whatever is wrong with it, the answer to the question is "no", not wrong usage.
            let manifest = checkpoint::verify(&folder).map_err(|e| Failure::from_error(Exit::Failed, &e, e.hint()))?;
            out.line(format!(
                "{}: step {}, {} files match their hashes",
                folder.display(),
                manifest.step,
                manifest.files.len()
            ))?;
            Ok(Exit::Done)
        }
        Command::Export { checkpoint: folder, out: target, dtype } => {
            let dtype = dtype.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default();
            cosmos_run::export::checkpoint_to_folder(&folder, &target, &dtype)?;
            out.line(format!("{}: exported as {dtype}", target.display()))?;
            Ok(Exit::Done)
        }
    }
}

fn table(found: &[checkpoint::CheckpointInfo], out: &mut Output) -> Result<(), Failure> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["step", "MB", "state", "folder"]);
    for info in found {
        table.add_row([
            info.step.to_string(),
            format!("{:.1}", info.bytes as f64 / 1e6),
            info.problem.clone().unwrap_or_else(|| "complete".to_owned()),
            info.path.display().to_string(),
        ]);
    }
    for line in table.lines() {
        out.line(line.trim_end())?;
    }
    Ok(())
}
