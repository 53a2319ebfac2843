//! Finding where an earlier part of a run left off.

use std::fs;
use std::path::{Path, PathBuf};

use crate::checkpoint::{self, Snapshot};
use crate::error::{Result, RunError};
use crate::session::RunState;

/// An earlier part of a run.
pub struct Resumed {
    /// Its run folder, which the rest of the run continues.
    pub run_folder: PathBuf,
    /// The checkpoint.
    pub checkpoint: PathBuf,
    /// Weights and optimizer.
    pub snapshot: Snapshot,
    /// The run's own state.
    pub state: RunState,
}

/// The newest good checkpoint of `output_dir` or, as in the original, of a sibling named by a timestamp.
pub fn newest(output_dir: &Path) -> Result<Option<Resumed>> {
    let mut folders = vec![output_dir.to_path_buf()];
    let parent = output_dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut siblings: Vec<PathBuf> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(|e| e.ok())
        .filter(|e| is_timestamp(&e.file_name().to_string_lossy()))
        .map(|e| e.path())
        .collect();
    siblings.sort();
    folders.extend(siblings.into_iter().rev());
    for folder in folders {
        if let Some(found) = checkpoint::newest(&folder.join("checkpoints"))? {
            return from(&found).map(Some);
        }
    }
    Ok(None)
}

fn is_timestamp(name: &str) -> bool {
    name.len() == 14 && name.bytes().all(|b| b.is_ascii_digit())
}

/// A named checkpoint.
pub fn from(folder: &Path) -> Result<Resumed> {
    let (snapshot, manifest) = checkpoint::read(folder)?;
    let unfit =
        |message: String, hint: &str| RunError::Checkpoint { path: folder.to_path_buf(), message, hint: hint.into() };
    if manifest.format < 2 {
        return Err(unfit(
            format!("it was written by {}, whose runs this program cannot go on with", manifest.written_by),
            "`ckpt export` it and start from that as `policy.model_name_or_path`, or finish the run with that version",
        ));
    }
    if snapshot.state.get("policy_step").is_some() {
        return Err(unfit(
            "it was written by a run of several processes".into(),
            "go on with it by `launch local --resume`",
        ));
    }
    let state: RunState = serde_json::from_value(snapshot.state.clone()).map_err(|e| {
        unfit(format!("`state.json` is not a run's state: {e}"), "it was written by another version of this program")
    })?;
    let run_folder = folder.parent().and_then(Path::parent).ok_or_else(|| {
        RunError::config("", format!("{} lies in no run folder", folder.display()), "name `RUN/checkpoints/step_N`")
    })?;
    Ok(Resumed { run_folder: run_folder.to_path_buf(), checkpoint: folder.to_path_buf(), snapshot, state })
}

/// Removes the records of a run that died before its first checkpoint, so that it can start again in its folder.
pub fn clear_unsaved(run_folder: &Path) -> Result<()> {
    for name in ["metrics.jsonl", "samples.jsonl", "config.json", "config.toml", "plugins.json", "tensorboard"] {
        let path = run_folder.join(name);
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removed {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => return Err(RunError::Io { path, source }),
            _ => {}
        }
    }
    Ok(())
}
