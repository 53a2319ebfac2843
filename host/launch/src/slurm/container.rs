//! A container for the processes, by the pyxis plugin of `srun`.

use std::path::{Path, PathBuf};

use super::Job;
use crate::error::{LaunchError, Result};

/// What the processes run in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// A squashfs file, or a registry's name of an image.
    pub image: String,
    /// Further folders that are seen inside, as `FROM` or `FROM:TO[:FLAGS]`.
    pub mounts: Vec<String>,
}

/// An image that is a file must be there; names of a registry are believed.
pub fn check_image(image: &str) -> Result<()> {
    let is_file = image.starts_with(['/', '.']) || image.ends_with(".sqsh");
    if is_file && !Path::new(image).is_file() {
        return Err(LaunchError::usage(
            format!("the container image `{image}` is not there"),
            "make one by `enroot import docker://IMAGE`, or leave `--container` off: the program needs none",
        ));
    }
    Ok(())
}

impl Container {
    /// What can be checked from the login node: a file must be there, and so must what is mounted.
    pub fn check(&self) -> Result<()> {
        check_image(&self.image)?;
        for mount in &self.mounts {
            let from = mount.split(':').next().unwrap_or_default();
            if !from.starts_with('/') || mount.contains([',', '\n', '\'']) || !Path::new(from).exists() {
                return Err(LaunchError::usage(
                    format!("`{mount}` cannot be mounted: `{from}` must be an absolute path that is there"),
                    "as in `--mount-dirs /lustre:/lustre`",
                ));
            }
        }
        Ok(())
    }

    /// Options of `srun`. The job's folders are seen inside at their own paths, so that the config needs no change.
    pub(super) fn options(&self, job: &Job, home: Option<&Path>) -> Vec<String> {
        let mut mounts = self.mounts.clone();
        let mut own: Vec<PathBuf> = vec![job.folder.clone(), job.work_folder.clone()];
        own.extend(home.map(|home| home.join(".cache/huggingface")).filter(|cache| cache.is_dir()));
        for folder in own {
            let mount = format!("{0}:{0}", folder.display());
            if !mounts.contains(&mount) {
                mounts.push(mount);
            }
        }
        vec![
            format!("--container-image={}", self.image),
            format!("--container-mounts={}", mounts.join(",")),
            "--no-container-mount-home".into(),
            format!("--container-workdir={}", job.work_folder.display()),
        ]
    }
}
