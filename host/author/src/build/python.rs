//! Python through componentize-py.
//!
//! The author's module is imported while the component is built and what it holds then is kept; the SDK's bridge turns
//! what it declared into the classes that componentize-py looks for.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Build, Step};
use crate::error::{AuthorError, Result};
use crate::manifest::Manifest;
use crate::toolchain::{self, Found, Need, Tool};
use crate::wit;

/// What `plugin toolchain python --install` gets.
const VERSION: &str = "0.25.1";
const FIX: &str = "run `cosmos-host plugin toolchain python --install`";
const INSTALL_SECONDS_MAX: u64 = 900;
/// Module that the build writes; componentize-py takes its classes.
const ENTRY: &str = "cosmos_entry";
/// Modules that the author's must not hide.
const TAKEN: [&str; 4] = [ENTRY, "cosmos_plugin", "wit_world", "componentize_py_types"];
/// Of a failed build's output.
const LOG_BYTES_MAX: u64 = 1 << 20;

/// What building needs.
pub fn needs() -> Vec<Need> {
    let found = find(None).map(|f| format!("{} ({})", f.version, f.path.display()));
    vec![Need { what: "componentize-py", found, fix: FIX.into() }]
}

/// The author's own first: the project's `.venv`, an active one, `PATH`; then the private one.
fn find(project: Option<&Path>) -> Option<Found> {
    let active = std::env::var_os("VIRTUAL_ENV").filter(|v| !v.is_empty()).map(PathBuf::from);
    let own = project.map(|folder| folder.join(".venv")).into_iter().chain(active);
    let own = own.map(|venv| venv.join("bin/componentize-py")).filter(|path| toolchain::is_program(path));
    own.into_iter().find_map(found).or_else(|| toolchain::find(Tool::ComponentizePy))
}

fn found(path: PathBuf) -> Option<Found> {
    let version = toolchain::answer(&path, ["--version"])?.lines().next()?.trim().to_owned();
    Some(Found { path, version })
}

/// Gets componentize-py into a private virtual environment.
///
/// # Errors
/// What could not be fetched.
pub fn install(tell: &mut dyn FnMut(&str)) -> Result<()> {
    if let Some(found) = find(None) {
        tell(&format!("nothing to do: {} ({})", found.version, found.path.display()));
        return Ok(());
    }
    let python =
        toolchain::need(Tool::Python, "python3", "install Python 3.10 or newer: `apt-get install python3-venv`")?;
    let tools = toolchain::private_dir_needed()?;
    let venv = tools.join("python");
    std::fs::create_dir_all(&tools).map_err(AuthorError::io("cannot make folder", &tools))?;
    tell(&format!("componentize-py {VERSION} goes to {} (70 MB)", venv.display()));
    let deadline = Duration::from_secs(INSTALL_SECONDS_MAX);
    let log = tools.join("python.log");
    Step::new("python3 -m venv", &python.path, log.clone(), deadline, false)
        .args(["-m".as_ref(), "venv".as_ref(), venv.as_os_str()])
        .hint("on Debian and Ubuntu: `apt-get install python3-venv`")
        .run()?;
    let wanted = format!("componentize-py=={VERSION}");
    Step::new("pip install", &venv.join("bin/python"), log, deadline, false)
        .args(["-m", "pip", "install", "--disable-pip-version-check", "--no-input", wanted.as_str()])
        .hint("componentize-py has wheels for Linux, macOS and Windows on x86-64 and ARM; pip needs the network or a mirror")
        .run()
}

/// Builds the component `made`; what built it comes back.
///
/// # Errors
/// componentize-py is missing or failed; what Python said of the author's files is in the message.
pub fn build(build: &Build<'_>, made: &Path) -> Result<String> {
    let project = build.project;
    let module = module_name(&project.manifest)?;
    let sdk = project.sdk();
    if !sdk.join("cosmos_plugin/__init__.py").is_file() {
        let hint =
            "name the SDK's folder in plugin.toml as `sdk`; `cosmos-host plugin new` makes a project that has it";
        return Err(AuthorError::project(format!("`{}` holds no package `cosmos_plugin`", sdk.display()), hint));
    }
    let missing = || AuthorError::Missing { what: "componentize-py".into(), hint: FIX.into() };
    let tool = find(Some(&project.folder)).ok_or_else(missing)?;
    let wit_dir = build.dir.join("wit");
    wit::write(project, &wit_dir)?;
    let generated = build.dir.join("python");
    std::fs::create_dir_all(&generated).map_err(AuthorError::io("cannot make folder", &generated))?;
    let entry_path = generated.join(format!("{ENTRY}.py"));
    std::fs::write(&entry_path, entry(&project.manifest, &module))
        .map_err(AuthorError::io("cannot write", &entry_path))?;
    let mounts = [project.folder.as_path(), &generated, &sdk];
    let paths = mounts.iter().flat_map(|path| ["-p".as_ref(), path.as_os_str()]);
    // WASI is not stubbed out: the host gives a sandboxed one without any grant, and with a stub an import, `print` or
    // the clock would trap where now they work or raise an exception that says why not.
    let step = build
        .step("componentize-py", &tool.path)
        .args(["-q".as_ref(), "-d".as_ref(), wit_dir.as_os_str(), "-w".as_ref(), wit::WORLD.as_ref()])
        .args(["componentize", ENTRY])
        .args(paths)
        .args(["-o".as_ref(), made.as_os_str()])
        .env("RUST_BACKTRACE", "0")
        .env("RUST_LIB_BACKTRACE", "0")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .current_dir(&project.folder);
    step.run().map_err(|error| readable(error, &mounts))?;
    Ok(tool.version)
}

/// `src/app.py` as `src.app`.
fn module_name(manifest: &Manifest) -> Result<String> {
    let bad = |message: String| AuthorError::project(message, "for example `sources = [\"app.py\"]` in plugin.toml");
    let [source] = manifest.sources.as_slice() else {
        let count = manifest.sources.len();
        return Err(bad(format!(
            "a Python plugin starts in one file, which imports the others; `sources` has {count}"
        )));
    };
    let shown = source.display();
    if source.extension().is_none_or(|extension| extension != "py") {
        return Err(bad(format!("source `{shown}` is no Python file")));
    }
    let is_identifier = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    let stem = source.with_extension("");
    let parts: Vec<&str> = stem.iter().filter_map(|part| part.to_str()).filter(|part| *part != ".").collect();
    if parts.is_empty() || !parts.iter().all(|part| is_identifier(part)) {
        return Err(bad(format!("source `{shown}` cannot be imported: use letters, digits and `_`")));
    }
    if TAKEN.contains(&parts[0]) {
        return Err(bad(format!("source `{shown}` has the name of a module that the build needs")));
    }
    Ok(parts.join("."))
}

/// The module that componentize-py starts from.
fn entry(manifest: &Manifest, module: &str) -> String {
    let mut text = String::from("# Written by `cosmos-host plugin build`.\n\nimport importlib\n\n");
    text.push_str("from componentize_py_types import Err, Ok\nfrom cosmos_plugin import _bridge, _host\n");
    let list = |names: &[&str]| names.join(", ");
    let exports: Vec<&str> = manifest.exports.iter().map(|export| export.name()).collect();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "from wit_world.exports import {}", list(&[&["metadata"], exports.as_slice()].concat()));
    let imports: Vec<&str> = manifest.imports.iter().map(|import| import.name()).collect();
    let modules: Vec<String> = imports.iter().map(|name| name.replace('-', "_")).collect();
    for (name, module) in imports.iter().zip(&modules) {
        let _ = writeln!(text, "from wit_world.imports import {module}\n\n_host.lend({name:?}, {module})");
    }
    text.push_str("from wit_world.imports import types\n\n_host.lend(\"types\", types)\n");
    let keywords: Vec<String> = exports.iter().map(|name| format!(", {name}={name}")).collect();
    let source = manifest.sources.first().map(|path| path.display().to_string()).unwrap_or_default();
    let _ = writeln!(text, "_host.hold()\nimportlib.import_module({module:?})");
    let _ = writeln!(text, "wit = _bridge.Wit(Ok, Err, types, metadata=metadata{})", keywords.concat());
    let _ = writeln!(text, "globals().update(_bridge.exports(wit, {imports:?}, {source:?}))");
    text
}

/// What Python said, without what componentize-py and the interpreter's own frames say around it.
fn readable(error: AuthorError, mounts: &[&Path]) -> AuthorError {
    let AuthorError::Tool { tool, reason, log, tail, hint } = error else { return error };
    let said = read_log(&log).and_then(|text| python_said(&text, mounts));
    let tail = said.unwrap_or(tail);
    let hint = match tail.contains("ModuleNotFoundError") || tail.contains("ImportError") {
        true => {
            "only packages of pure Python fit into a component: put them into the project's folder, or `pip install` \
                 them into a virtual environment and activate it"
                .into()
        }
        false => hint,
    };
    AuthorError::Tool { tool, reason, log, tail, hint }
}

fn read_log(path: &Path) -> Option<String> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path).ok()?.take(LOG_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// componentize-py prints its own traceback, then `AssertionError: `, the guest's output, and after `Caused by:` the
/// frames of its sandbox.
fn python_said(log: &str, mounts: &[&Path]) -> Option<String> {
    let (_, said) = log.split_once("AssertionError: ")?;
    let said = said.split("\nCaused by:").next().unwrap_or(said);
    let mut lines: Vec<String> = Vec::new();
    let mut skipping = false;
    for line in said.lines() {
        let is_frame = line.trim_start().starts_with("File \"");
        // Frames of the entry module, of importlib and of the SDK lie between the author and the error.
        if is_frame {
            let ours = ["\"/1/", "\"/2/", "\"<frozen", "\"/python/"];
            skipping = ours.iter().any(|place| line.contains(place));
        } else if !line.starts_with("    ") {
            skipping = false;
        }
        if !skipping {
            lines.push(host_path(line, mounts));
        }
    }
    let text = lines.join("\n").trim_end().to_owned();
    (!text.is_empty()).then_some(text)
}

/// `File "/0/app.py"` with the folder that was mounted there.
fn host_path(line: &str, mounts: &[&Path]) -> String {
    for (at, folder) in mounts.iter().enumerate() {
        let mount = format!("File \"/{at}/");
        if let Some((before, after)) = line.split_once(&mount) {
            return format!("{before}File \"{}/{after}", folder.display());
        }
    }
    line.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Export, Import, Language};

    fn manifest(sources: &[&str]) -> Manifest {
        Manifest {
            name: "x".into(),
            language: Language::Python,
            sources: sources.iter().map(PathBuf::from).collect(),
            sdk: "sdk".into(),
            exports: vec![Export::Dataset, Export::Reward],
            imports: vec![Import::Log, Import::ChatTemplate],
        }
    }

    #[test]
    fn a_source_is_one_importable_module() {
        assert_eq!(module_name(&manifest(&["app.py"])).unwrap(), "app");
        assert_eq!(module_name(&manifest(&["./src/my_app.py"])).unwrap(), "src.my_app");
        for sources in [&["a.py", "b.py"][..], &["app.txt"], &["my-app.py"], &["cosmos_plugin.py"], &["2/app.py"]] {
            let error = module_name(&manifest(sources)).unwrap_err();
            assert!(error.is_usage() && error.hint().unwrap().contains("app.py"), "{error}");
        }
    }

    #[test]
    fn the_entry_lends_what_the_manifest_imports() {
        let text = entry(&manifest(&["app.py"]), "app");
        for line in [
            "from wit_world.exports import metadata, dataset, reward\n",
            "from wit_world.imports import chat_template\n\n_host.lend(\"chat-template\", chat_template)\n",
            "importlib.import_module(\"app\")\n",
            "wit = _bridge.Wit(Ok, Err, types, metadata=metadata, dataset=dataset, reward=reward)\n",
            "_bridge.exports(wit, [\"log\", \"chat-template\"], \"app.py\")",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }

    #[test]
    fn only_the_authors_part_of_a_failure_is_shown() {
        let log = "Traceback (most recent call last):\n  File \"/usr/bin/componentize-py\", line 8\nAssertionError: \
                   Traceback (most recent call last):\n  File \"/1/cosmos_entry.py\", line 9, in <module>\n    \
                   importlib.import_module(\"app\")\n    ~~~~~^^^\n  File \"/python/importlib/__init__.py\", line 88\n    \
                   return x\n  File \"<frozen importlib._bootstrap>\", line 1387, in _gcd_import\n  File \"/0/app.py\", \
                   line 2, in <module>\n    import numpy\nModuleNotFoundError: No module named 'numpy'\n\n\nCaused by:\n    \
                   ModuleNotFoundError: No module named 'numpy'\n";
        let said = python_said(log, &[Path::new("/home/me/p")]).unwrap();
        let wanted = "Traceback (most recent call last):\n  File \"/home/me/p/app.py\", line 2, in <module>\n    \
                      import numpy\nModuleNotFoundError: No module named 'numpy'";
        assert_eq!(said, wanted);
        assert_eq!(python_said("something else", &[]), None);
    }
}
