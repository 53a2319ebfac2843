//! Finding where an earlier part of a run left off.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use cosmos_controller::{Memory, SampleRef};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::checkpoint::{self, Snapshot};
use crate::error::{Result, RunError};
use crate::records::History;
use crate::rewards::Tally;
use crate::roles::policy::{Buffered, PolicyState};
use crate::roles::{LEDGER, history_at};
use crate::rollout::Completion;
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

/// What `state.json` of a checkpoint holds.
pub enum SavedState {
    /// A run of one process wrote it.
    OfOne(Box<RunState>),
    /// A policy process wrote it; numbers of the records are in the controller's books.
    OfProcesses(Box<PolicyState>),
}

impl SavedState {
    /// Reads `state`, of the checkpoint in `folder`.
    ///
    /// # Errors
    /// A state of another version of this program.
    pub fn of(state: &Value, folder: &Path) -> Result<Self> {
        if state.get("policy_step").is_some() {
            return parse(state, folder).map(|state| Self::OfProcesses(Box::new(state)));
        }
        parse(state, folder).map(|state| Self::OfOne(Box::new(state)))
    }

    /// For a policy process that goes on from it.
    pub fn for_policy(self) -> PolicyState {
        match self {
            Self::OfProcesses(state) => *state,
            Self::OfOne(state) => {
                let RunState { controller, completions, optimizer_steps, .. } = *state;
                let names: HashMap<u64, SampleRef> = controller.buffered().map(|name| (name.sample, *name)).collect();
                let named = |completion: Completion| {
                    names.get(&completion.sample).map(|sample| Buffered { sample: *sample, completion })
                };
                PolicyState {
                    policy_step: controller.step(),
                    order: controller.last_order().0,
                    optimizer_steps,
                    buffered: completions.into_iter().filter_map(named).collect(),
                    controller: Some(controller),
                }
            }
        }
    }

    /// For a run of one process that goes on from it in `run_folder`.
    fn for_one(self, run_folder: &Path, folder: &Path) -> Result<RunState> {
        match self {
            Self::OfOne(state) => Ok(*state),
            Self::OfProcesses(state) => {
                let PolicyState { policy_step, optimizer_steps, buffered, controller, .. } = *state;
                let controller = controller.ok_or_else(|| no_memory(folder))?;
                let (history, tally) = history_at(run_folder, policy_step)?;
                let completions = buffered.into_iter().map(|buffered| buffered.completion).collect();
                Ok(RunState { controller, completions, history, optimizer_steps, tally })
            }
        }
    }
}

fn parse<T: DeserializeOwned>(state: &Value, folder: &Path) -> Result<T> {
    T::deserialize(state).map_err(|e| RunError::Checkpoint {
        path: folder.to_path_buf(),
        message: format!("`state.json` is not a run's state: {e}"),
        hint: "it was written by another version of this program".into(),
    })
}

fn no_memory(folder: &Path) -> RunError {
    RunError::Checkpoint {
        path: folder.to_path_buf(),
        message: "it does not say where in the dataset its run was".into(),
        hint: "start anew from `ckpt export`'s folder as `policy.model_name_or_path`".into(),
    }
}

/// An earlier part of a run, for a controller process that has no ledger of it.
pub struct Begun {
    /// What the controller has to remember.
    pub controller: Memory,
    /// Records so far.
    pub history: History,
    /// Numbers of the rewards since the last step.
    pub tally: Tally,
    /// The checkpoint.
    pub checkpoint: PathBuf,
}

/// The newest good checkpoint of a run folder, for a controller process.
pub fn begun(run_folder: &Path) -> Result<Option<Begun>> {
    let Some(checkpoint) = checkpoint::newest(&run_folder.join("checkpoints"))? else { return Ok(None) };
    let state = SavedState::of(&checkpoint::read_state(&checkpoint)?, &checkpoint)?;
    let RunState { controller, history, tally, .. } = state.for_one(run_folder, &checkpoint)?;
    Ok(Some(Begun { controller, history, tally, checkpoint }))
}

/// The newest good checkpoint of `output_dir` or, as in the original, of a sibling named by a timestamp.
pub fn newest(output_dir: &Path) -> Result<Option<Resumed>> {
    for folder in run_folders(output_dir) {
        if let Some(found) = checkpoint::newest(&folder.join("checkpoints"))? {
            return from(&found).map(Some);
        }
    }
    Ok(None)
}

/// The newest run folder that [`newest`] would look into, of those with something to go on from: checkpoints, or the ledger
/// of a run of processes.
pub fn newest_run(output_dir: &Path) -> Option<PathBuf> {
    let begun = |folder: &PathBuf| folder.join("checkpoints").is_dir() || folder.join(LEDGER).is_file();
    run_folders(output_dir).into_iter().find(begun)
}

/// Where earlier parts of a run may be, the likeliest first: `output_dir`, then its siblings from the newest on.
fn run_folders(output_dir: &Path) -> Vec<PathBuf> {
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
    folders
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
    let run_folder = folder.parent().and_then(Path::parent).ok_or_else(|| {
        RunError::config("", format!("{} lies in no run folder", folder.display()), "name `RUN/checkpoints/step_N`")
    })?;
    let state = SavedState::of(&snapshot.state, folder)?.for_one(run_folder, folder)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_run_is_one_that_something_is_left_of() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let new = at("20260105000000");
        assert_eq!(newest_run(&new), None);
        for name in
            ["20260101000000/checkpoints", "20260102000000/logs", "20260103000000/checkpoints", "notes/checkpoints"]
        {
            fs::create_dir_all(at(name)).unwrap();
        }
        assert_eq!(newest_run(&new), Some(at("20260103000000")));
        fs::write(at("20260102000000/ledger.log"), "").unwrap();
        assert_eq!(newest_run(&new), Some(at("20260103000000")));
        fs::create_dir_all(&new).unwrap();
        fs::write(new.join("ledger.log"), "").unwrap();
        assert_eq!(newest_run(&new), Some(new));
    }
}
