//! `--data DIR`: datasets by the name that a plugin gives them, read from a folder instead of the hub.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use cosmos_plugin::{TableRequest, TableRows, TableSource};

/// Looks for a dataset in a folder first.
pub struct FolderTables {
    folder: PathBuf,
    otherwise: Arc<dyn TableSource>,
}

impl FolderTables {
    /// The dataset `a/b` is `folder/a/b` or `folder/b` where one of them exists; what is in neither is left to `otherwise`.
    pub fn new(folder: PathBuf, otherwise: Arc<dyn TableSource>) -> Self {
        Self { folder, otherwise }
    }

    fn find(&self, name: &str) -> Option<PathBuf> {
        let name = Path::new(name);
        // A name that leads out of the folder is none of its.
        if name.as_os_str().is_empty() || !name.components().all(|part| matches!(part, Component::Normal(_))) {
            return None;
        }
        [Some(name.as_os_str()), name.file_name()]
            .into_iter()
            .flatten()
            .map(|name| self.folder.join(name))
            .find(|path| path.exists())
    }
}

impl TableSource for FolderTables {
    fn open(&self, source: &TableRequest) -> Result<Box<dyn TableRows>, String> {
        match self.find(&source.name) {
            Some(path) => {
                let name = path.to_string_lossy().into_owned();
                self.otherwise.open(&TableRequest { name, ..source.clone() })
            }
            None => self.otherwise.open(source),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl TableSource for Nothing {
        fn open(&self, source: &TableRequest) -> Result<Box<dyn TableRows>, String> {
            Err(source.name.clone())
        }
    }

    #[test]
    fn names_stay_inside_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("in/openai/gsm8k")).unwrap();
        std::fs::create_dir_all(folder.path().join("in/flat")).unwrap();
        let tables = FolderTables::new(folder.path().join("in"), Arc::new(Nothing));
        let asked = |name: &str| {
            let (subset, revision) = (String::new(), String::new());
            let request = TableRequest { name: name.into(), subset, revision, splits: Vec::new() };
            tables.open(&request).err().unwrap()
        };
        let inside = |name: &str| folder.path().join("in").join(name).display().to_string();
        assert_eq!(asked("openai/gsm8k"), inside("openai/gsm8k"));
        assert_eq!(asked("someone/flat"), inside("flat"));
        for other in ["other/set", "../in/flat", "/in/flat", ""] {
            assert_eq!(asked(other), other);
        }
    }
}
