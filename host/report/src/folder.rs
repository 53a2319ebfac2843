//! The folder that a run leaves behind.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{ReportError, Result};

const CONFIG_JSON: &str = "config.json";
const METRICS: &str = "metrics.jsonl";
const SUMMARY: &str = "summary.json";

/// The folder that a run leaves behind, with the name of every file in it.
///
/// | path | content |
/// |---|---|
/// | `config.toml`, `config.json` | the resolved configuration |
/// | `plugins.json` | hashes and versions of the plugins |
/// | `metrics.jsonl`, `tensorboard/` | numbers of every step, twice |
/// | `samples.jsonl` | completions with rewards and per-token KL |
/// | `checkpoints/` | weights and state, one folder per saved step |
/// | `summary.json`, `learning_curve.svg` | the result |
/// | `run.log` | the log |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFolder {
    root: PathBuf,
}

impl RunFolder {
    /// Makes the folder of a new run, with its parents.
    ///
    /// # Errors
    /// [`ReportError::CannotWrite`] when it cannot be made or written, [`ReportError::AlreadyARun`] when a run is there.
    pub fn create(output_dir: &Path) -> Result<RunFolder> {
        for found in [METRICS, CONFIG_JSON, SUMMARY] {
            if output_dir.join(found).exists() {
                return Err(ReportError::AlreadyARun { path: output_dir.to_owned(), found });
            }
        }
        fs::create_dir_all(output_dir).map_err(ReportError::write(output_dir))?;
        let folder = RunFolder { root: output_dir.to_owned() };
        folder.prepare()?;
        Ok(folder)
    }

    /// The folder of an earlier run, to go on in.
    ///
    /// # Errors
    /// [`ReportError::NotARunFolder`] when no run is there, [`ReportError::CannotWrite`] when it cannot be written.
    pub fn open_existing(output_dir: &Path) -> Result<RunFolder> {
        if !output_dir.join(CONFIG_JSON).is_file() {
            return Err(ReportError::NotARunFolder { path: output_dir.to_owned(), missing: CONFIG_JSON });
        }
        let folder = RunFolder { root: output_dir.to_owned() };
        folder.prepare()?;
        Ok(folder)
    }

    /// Makes the sub-folders and proves that a file can be written, so that a run does not find out after an hour.
    fn prepare(&self) -> Result<()> {
        let probe = self.root.join(".write-probe");
        replace_file(&probe, b"ok")?;
        fs::remove_file(&probe).map_err(ReportError::write(&probe))?;
        for folder in [self.tensorboard(), self.checkpoints()] {
            fs::create_dir_all(&folder).map_err(ReportError::write(&folder))?;
        }
        Ok(())
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved configuration as TOML.
    pub fn config_toml(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    /// The resolved configuration as JSON.
    pub fn config_json(&self) -> PathBuf {
        self.root.join(CONFIG_JSON)
    }

    /// Hashes and versions of the plugins.
    pub fn plugins_json(&self) -> PathBuf {
        self.root.join("plugins.json")
    }

    /// One line of numbers per step.
    pub fn metrics_jsonl(&self) -> PathBuf {
        self.root.join(METRICS)
    }

    /// Completions with rewards and per-token KL.
    pub fn samples_jsonl(&self) -> PathBuf {
        self.root.join("samples.jsonl")
    }

    /// The folder of TensorBoard event files.
    pub fn tensorboard(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    /// The folder of checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The result in numbers.
    pub fn summary_json(&self) -> PathBuf {
        self.root.join(SUMMARY)
    }

    /// The result as a picture.
    pub fn learning_curve_svg(&self) -> PathBuf {
        self.root.join("learning_curve.svg")
    }

    /// The log.
    pub fn run_log(&self) -> PathBuf {
        self.root.join("run.log")
    }
}

static REPLACEMENTS: AtomicU64 = AtomicU64::new(0);

/// Writes `bytes` to `path` so that a reader, or the next start after a crash, finds the old file or the new one, never half.
///
/// # Errors
/// [`ReportError::CannotWrite`]; the old file, if any, is then as it was.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    replace_file_with(path, |file| file.write_all(bytes))
}

/// [`replace_file`] for content that is written piece by piece.
pub(crate) fn replace_file_with(path: &Path, write: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
    let mut name = path.file_name().map(|n| n.to_owned()).unwrap_or_default();
    // Two writers of one path, in one process or two, must not share the file they write to.
    name.push(format!(".{}-{}.tmp", std::process::id(), REPLACEMENTS.fetch_add(1, Ordering::Relaxed)));
    let draft = path.with_file_name(name);
    let written = File::create_new(&draft).and_then(|mut file| {
        write(&mut file)?;
        file.sync_all()?;
        fs::rename(&draft, path)
    });
    if let Err(source) = written {
        // Best effort: the error that matters is the first one.
        let _ = fs::remove_file(&draft);
        return Err(ReportError::CannotWrite { path: path.to_owned(), source });
    }
    // The new name itself must survive a power cut; not every file system lets a folder be synced.
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty())
        && let Ok(folder) = File::open(parent)
    {
        let _ = folder.sync_all();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_run_gets_its_folders_and_no_litter() {
        let temp = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(&temp.path().join("a/b")).unwrap();
        let mut names: Vec<_> =
            fs::read_dir(folder.root()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["checkpoints", "tensorboard"]);
    }

    #[test]
    fn a_second_run_does_not_overwrite_the_first() {
        let temp = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(temp.path()).unwrap();
        replace_file(&folder.config_json(), b"{}").unwrap();
        let error = RunFolder::create(temp.path()).unwrap_err();
        assert!(matches!(error, ReportError::AlreadyARun { .. }), "{error}");
        assert!(error.hint().unwrap().contains("--resume"));
        assert_eq!(RunFolder::open_existing(temp.path()).unwrap(), folder);
    }

    #[test]
    fn a_folder_without_a_run_cannot_be_gone_on_in() {
        let temp = tempfile::tempdir().unwrap();
        let error = RunFolder::open_existing(temp.path()).unwrap_err();
        assert!(error.to_string().ends_with("is not a run folder: `config.json` is missing"), "{error}");
    }

    #[test]
    fn an_output_folder_under_a_file_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("file");
        fs::write(&file, "x").unwrap();
        for path in [file.join("run"), file.clone()] {
            let error = RunFolder::create(&path).unwrap_err();
            assert!(matches!(error, ReportError::CannotWrite { .. }), "{error}");
            assert!(error.is_bad_input());
            assert!(error.hint().unwrap().contains("train.output_dir"));
        }
        assert_eq!(fs::read(&file).unwrap(), b"x");
    }

    #[test]
    fn a_failed_replacement_leaves_the_old_file_and_no_litter() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("file");
        replace_file(&path, b"old").unwrap();
        let failed = replace_file_with(&path, |file| {
            file.write_all(b"half")?;
            Err(std::io::Error::other("pulled the plug"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }
}
