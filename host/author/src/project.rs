//! A plugin's source folder.

use std::path::{Path, PathBuf};

use crate::error::{AuthorError, Result};
use crate::manifest::Manifest;

/// A folder with a `plugin.toml` that was read and checked.
#[derive(Debug, Clone)]
pub struct Project {
    /// Its folder, absolute, so that tools may run elsewhere.
    pub folder: PathBuf,
    /// Its `plugin.toml`.
    pub manifest: Manifest,
}

impl Project {
    /// Opens the project in `folder`.
    ///
    /// # Errors
    /// The folder is none, or its `plugin.toml` is missing or wrong.
    pub fn open(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            let hint = "give the folder that holds plugin.toml, or make one with `cosmos-host plugin new`";
            return Err(AuthorError::project(format!("`{}` is no folder", folder.display()), hint));
        }
        let manifest = Manifest::read(folder)?;
        let folder = folder.canonicalize().map_err(AuthorError::io("cannot open", folder))?;
        let project = Self { folder, manifest };
        for source in &project.manifest.sources {
            let path = project.folder.join(source);
            if !path.exists() {
                let hint = format!("correct `sources` in `{}`", project.folder.join(crate::manifest::FILE).display());
                return Err(AuthorError::project(format!("source `{}` is missing", path.display()), hint));
            }
        }
        Ok(project)
    }

    /// Where everything that building makes goes; safe to delete.
    pub fn build_dir(&self) -> PathBuf {
        self.folder.join("build")
    }

    /// Where `plugin build` leaves the component unless told otherwise.
    pub fn component(&self) -> PathBuf {
        self.build_dir().join(format!("{}.wasm", self.manifest.name))
    }

    /// The SDK's folder.
    pub fn sdk(&self) -> PathBuf {
        self.folder.join(&self.manifest.sdk)
    }

    /// The folder of golden cases.
    pub fn cases(&self) -> PathBuf {
        self.folder.join("cases")
    }
}
