//! What `plugin test`, `bench`, `inspect` and `check` are pointed at: a project's folder, or a component.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::error::{AuthorError, Result};
use crate::project::Project;

/// Where `plugin build` leaves the component, in the project's folder.
const BUILD_FOLDER: &str = "build";
/// Where a project keeps its recorded cases.
const CASES_FOLDER: &str = "cases";

/// Files that a component can be made of.
const SOURCE_ENDINGS: [&str; 11] = ["rs", "py", "pyi", "js", "mjs", "ts", "c", "h", "toml", "wit", "json"];
/// Folders that hold results, downloads or cases.
const NO_SOURCES: [&str; 6] = [BUILD_FOLDER, CASES_FOLDER, "target", "node_modules", "venv", "__pycache__"];
const ENTRIES_MAX: usize = 10_000;
const DEPTH_MAX: usize = 8;
/// Case files of one folder.
const CASE_FILES_MAX: usize = 1_000;

/// A component, and the project that it belongs to when one was named.
#[derive(Debug, Clone)]
pub struct Target {
    /// The component's file.
    pub component: PathBuf,
    /// The project.
    pub project: Option<Project>,
    /// Its folder as the caller wrote it, for paths that are shown.
    folder: PathBuf,
}

impl Target {
    /// `path` itself when it is a file; the built component of the project when it is a folder.
    ///
    /// # Errors
    /// The folder is no project, or its component is missing or older than a source.
    pub fn find(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Ok(Self { component: path.into(), project: None, folder: PathBuf::new() });
        }
        let project = Project::open(path)?;
        let folder = path.strip_prefix(".").unwrap_or(path).to_path_buf();
        let name = &project.manifest.name;
        let component = folder.join(BUILD_FOLDER).join(format!("{name}.wasm"));
        let Ok(built) = component.metadata().and_then(|data| data.modified()) else {
            return Err(AuthorError::project(
                format!("`{name}` is not built yet: there is no `{}`", component.display()),
                format!("run `{}` first", build_command(&folder)),
            ));
        };
        if let Some(newer) = newer_source(path, built) {
            return Err(AuthorError::project(
                format!("`{}` is older than `{}`", component.display(), newer.display()),
                format!(
                    "run `{}` first; to use the old one as it is, give its path instead of the folder",
                    build_command(&folder)
                ),
            ));
        }
        Ok(Self { component, project: Some(project), folder })
    }

    /// The files of cases: the one asked for, all of a folder asked for, or the project's own. None when there is
    /// neither a project nor anything asked for.
    ///
    /// # Errors
    /// What was asked for is not there, or is a folder without a case file.
    pub fn case_files(&self, asked: Option<&Path>) -> Result<Option<Vec<PathBuf>>> {
        let folder = match (asked, &self.project) {
            (Some(asked), _) if !asked.is_dir() => return Ok(Some(vec![asked.into()])),
            (Some(asked), _) => asked.to_path_buf(),
            (None, Some(_)) => self.folder.join(CASES_FOLDER),
            (None, None) => return Ok(None),
        };
        let io = |error| AuthorError::io("cannot read the cases in", &folder)(error);
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&folder).map_err(io)? {
            let path = entry.map_err(io)?.path();
            if path.extension().is_some_and(|ending| ending == "jsonl") && path.is_file() {
                files.push(path);
            }
            if files.len() > CASE_FILES_MAX {
                return Err(AuthorError::project(
                    format!("`{}` has more than {CASE_FILES_MAX} case files", folder.display()),
                    "join some: a file may hold any number of cases",
                ));
            }
        }
        if files.is_empty() {
            return Err(AuthorError::project(
                format!("`{}` has no case file (*.jsonl)", folder.display()),
                "write one: each line a case, such as {\"id\": \"right\", \"completion\": \"…\", \"score\": 1.0}",
            ));
        }
        files.sort();
        Ok(Some(files))
    }
}

fn build_command(folder: &Path) -> String {
    if folder.as_os_str().is_empty() {
        return "cosmos-host plugin build".into();
    }
    format!("cosmos-host plugin build {}", folder.display())
}

/// A source that changed after `built`.
fn newer_source(folder: &Path, built: SystemTime) -> Option<PathBuf> {
    let mut folders = vec![(folder.to_path_buf(), 0)];
    let mut seen = 0;
    while let Some((folder, depth)) = folders.pop() {
        // A folder that cannot be read holds nothing that could have been built.
        for entry in std::fs::read_dir(folder).ok()?.flatten() {
            seen += 1;
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            let Ok(kind) = entry.file_type() else { continue };
            if seen > ENTRIES_MAX {
                return None;
            }
            if kind.is_dir() && depth < DEPTH_MAX && !name.starts_with('.') && !NO_SOURCES.contains(&&*name) {
                folders.push((path, depth + 1));
            } else if kind.is_file()
                && path.extension().and_then(|e| e.to_str()).is_some_and(|e| SOURCE_ENDINGS.contains(&e))
                && entry.metadata().and_then(|data| data.modified()).is_ok_and(|changed| changed > built)
            {
                return Some(path);
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn project() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        for name in ["src", "build", "cases", "target"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        write("plugin.toml", "name = \"p\"\nlanguage = \"rust\"\nexports = [\"reward\"]\n");
        write("src/lib.rs", "");
        write("build/p.wasm", "");
        folder
    }

    fn set_time(path: &Path, ago_s: u64) {
        let time = SystemTime::now() - Duration::from_secs(ago_s);
        std::fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
    }

    #[test]
    fn a_project_is_its_newest_component() {
        let folder = project();
        let path = folder.path();
        set_time(&path.join("plugin.toml"), 100);
        set_time(&path.join("src/lib.rs"), 100);
        let target = Target::find(path).unwrap();
        assert_eq!(target.component, path.join("build/p.wasm"));

        std::fs::write(path.join("target/x.rs"), "").unwrap();
        set_time(&path.join("build/p.wasm"), 50);
        Target::find(path).unwrap();
        set_time(&path.join("src/lib.rs"), 10);
        let error = Target::find(path).unwrap_err();
        assert!(error.to_string().contains("older than"), "{error}");
        assert!(error.hint().unwrap().contains("plugin build"));

        std::fs::remove_file(path.join("build/p.wasm")).unwrap();
        assert!(Target::find(path).unwrap_err().to_string().contains("not built yet"));
        let error = Target::find(&path.join("src")).unwrap_err();
        assert!(error.to_string().contains("no plugin project"), "{error}");
    }

    #[test]
    fn case_files_come_in_order() {
        let folder = project();
        set_time(&folder.path().join("plugin.toml"), 100);
        set_time(&folder.path().join("src/lib.rs"), 100);
        let target = Target::find(folder.path()).unwrap();
        assert!(target.case_files(None).unwrap_err().to_string().contains("no case file"));
        for name in ["b.jsonl", "a.jsonl", "notes.txt"] {
            std::fs::write(folder.path().join("cases").join(name), "").unwrap();
        }
        let files = target.case_files(None).unwrap().unwrap();
        let names: Vec<_> = files.iter().map(|f| f.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["a.jsonl", "b.jsonl"]);
        let bare = Target::find(Path::new("x.wasm")).unwrap();
        assert!(bare.case_files(None).unwrap().is_none());
    }
}
