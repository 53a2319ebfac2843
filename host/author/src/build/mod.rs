//! `plugin build`: a project becomes a component.

pub mod c;
pub mod js;
pub mod python;
pub mod rust;
mod step;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use step::Step;

use crate::error::{AuthorError, Result};
use crate::manifest::Language;
use crate::project::Project;

/// What to build and how.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// The project's folder.
    pub folder: PathBuf,
    /// Where the component goes; without it [`Project::component`].
    pub out: Option<PathBuf>,
    /// Show the tools' output as it comes, instead of only keeping it.
    pub verbose: bool,
    /// How long one tool may run.
    pub tool_seconds_max: u64,
}

impl BuildOptions {
    /// The usual build of `folder`.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), out: None, verbose: false, tool_seconds_max: 1800 }
    }
}

/// What was built.
#[derive(Debug, Clone)]
pub struct Built {
    /// The component's file.
    pub component: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// What built it, with versions.
    pub toolchain: String,
}

/// One build under way: what the languages' builders get.
#[derive(Debug)]
pub struct Build<'a> {
    /// The project.
    pub project: &'a Project,
    /// Its folder for everything that is made; it exists.
    pub dir: PathBuf,
    /// Show the tools' output as it comes.
    pub verbose: bool,
    /// How long one tool may run.
    pub deadline: Duration,
}

impl Build<'_> {
    /// A step of this build. Its output is kept in `<project>/build/<name>.log`.
    pub fn step(&self, name: &str, program: &Path) -> Step {
        Step::new(name, program, self.dir.join(format!("{name}.log")), self.deadline, self.verbose)
    }
}

/// Builds the project in `options.folder`.
///
/// # Errors
/// The project is wrong, a tool is missing (how to get it is in the hint) or failed (its last lines are in the message).
pub fn build(options: &BuildOptions) -> Result<Built> {
    let started = Instant::now();
    let project = Project::open(&options.folder)?;
    let dir = project.build_dir();
    std::fs::create_dir_all(&dir).map_err(AuthorError::io("cannot make folder", &dir))?;
    let build = Build {
        project: &project,
        dir: dir.clone(),
        verbose: options.verbose,
        deadline: Duration::from_secs(options.tool_seconds_max.max(1)),
    };
    // The builders leave the component here; its last name is taken only when it is whole.
    let made = dir.join(format!(".{}.new.wasm", project.manifest.name));
    let toolchain = match project.manifest.language {
        Language::Rust => rust::build(&build, &made)?,
        Language::Python => python::build(&build, &made)?,
        Language::Js => js::build(&build, &made)?,
        Language::C => c::build(&build, &made)?,
    };
    let component = options.out.clone().unwrap_or_else(|| project.component());
    put(&made, &component)?;
    let bytes = std::fs::metadata(&component).map_err(AuthorError::io("cannot read", &component))?.len();
    Ok(Built { component, bytes, seconds: started.elapsed().as_secs_f64(), toolchain })
}

/// Moves `made` to `component`, also over the border of a file system.
fn put(made: &Path, component: &Path) -> Result<()> {
    let cannot = || AuthorError::io("cannot write", component);
    if let Some(folder) = component.parent().filter(|f| !f.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(AuthorError::io("cannot make folder", folder))?;
    }
    if std::fs::rename(made, component).is_ok() {
        return Ok(());
    }
    let mut beside = component.as_os_str().to_owned();
    beside.push(format!(".{}.tmp", std::process::id()));
    let copied = std::fs::copy(made, &beside).and_then(|_| std::fs::rename(&beside, component));
    if copied.is_err() {
        // Half a component is of no use; the first error is the one to report.
        let _ = std::fs::remove_file(&beside);
    }
    copied.map_err(cannot())?;
    // Only a left-over of the build.
    let _ = std::fs::remove_file(made);
    Ok(())
}

/// A core module becomes the component `made`; what is a component already is only moved there.
///
/// # Errors
/// The module is not one, or lacks its world.
pub fn componentize(module: &Path, made: &Path) -> Result<()> {
    if is_component(module)? {
        std::fs::copy(module, made).map_err(AuthorError::io("cannot write", made))?;
        return Ok(());
    }
    Ok(cosmos_plugin::componentize_file(module, made)?)
}

/// Whether the file starts as a component does, not as a core module.
fn is_component(path: &Path) -> Result<bool> {
    use std::io::Read;
    let mut head = Vec::new();
    let file = std::fs::File::open(path).map_err(AuthorError::io("cannot read", path))?;
    file.take(8).read_to_end(&mut head).map_err(AuthorError::io("cannot read", path))?;
    Ok(head.len() == 8 && head.starts_with(b"\0asm") && head[6] == 1)
}
