//! JavaScript through componentize-qjs: QuickJS with the author's modules in it.
//!
//! jco does the same with its QuickJS backend and is used where the author has it; what we fetch ourselves is the
//! compiler behind it alone, which is a tenth of the size.

use std::fmt::Write as _;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use super::{Build, Step};
use crate::error::{AuthorError, Result};
use crate::manifest::Manifest;
use crate::toolchain::{self, Need, Tool};
use crate::wit;

/// What `plugin toolchain js --install` gets.
const VERSION: &str = "0.4.5";
const FIX: &str = "run `cosmos-host plugin toolchain js --install`";
const INSTALL_SECONDS_MAX: u64 = 900;
const PACKAGE_BYTES_MAX: u64 = 1 << 20;

/// Programs that make components of JavaScript, the better one first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    ComponentizeQjs,
    Jco,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::ComponentizeQjs => "componentize-qjs",
            Self::Jco => "jco",
        }
    }

    /// The first version that passes a u64 as a number, as the SDK does.
    fn oldest(self) -> [u64; 3] {
        match self {
            Self::ComponentizeQjs => [0, 4, 5],
            Self::Jco => [1, 35, 0],
        }
    }
}

/// One of them on this machine.
#[derive(Debug)]
struct Compiler {
    kind: Kind,
    path: PathBuf,
    version: String,
}

impl std::fmt::Display for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.kind.name(), self.version)
    }
}

/// What building needs.
pub fn needs() -> Vec<Need> {
    let node = toolchain::find(Tool::Node).map(|f| format!("{} ({})", f.version, f.path.display()));
    let compiler = find(None).map(|c| format!("{c} ({})", c.path.display()));
    vec![
        Need { what: "node", found: node, fix: "install Node 20 or newer: `apt-get install nodejs npm`".into() },
        Need { what: "componentize-qjs or jco", found: compiler, fix: FIX.into() },
    ]
}

/// The author's own first: the project's `node_modules`, `PATH`; then the private one.
fn find(project: Option<&Path>) -> Option<Compiler> {
    let own = project.map(|folder| folder.join("node_modules/.bin"));
    let in_path = std::env::var_os("PATH").unwrap_or_default();
    let in_path: Vec<PathBuf> = std::env::split_paths(&in_path).filter(|p| p.is_absolute()).collect();
    let private = toolchain::private_dir().map(|tools| tools.join("js/node_modules/.bin"));
    let folders: Vec<PathBuf> = own.into_iter().chain(in_path).chain(private).collect();
    [Kind::ComponentizeQjs, Kind::Jco].into_iter().find_map(|kind| {
        let paths = folders.iter().map(|folder| folder.join(kind.name())).filter(|path| toolchain::is_program(path));
        // One that is too old is passed over; one that does not say is tried.
        paths.map(|path| (version(&path, kind), path)).find_map(|(version, path)| match version {
            Some(version) if is_older(&version, kind.oldest()) => None,
            version => {
                Some(Compiler { kind, path, version: version.unwrap_or_else(|| "of an unknown version".into()) })
            }
        })
    })
}

fn is_older(version: &str, oldest: [u64; 3]) -> bool {
    let numbers: Vec<u64> = version.split(['.', '-', '+']).map_while(|part| part.parse().ok()).collect();
    numbers.as_slice() < &oldest[..numbers.len().min(3)]
}

/// From the package that the program belongs to: it does not say its version itself.
fn version(program: &Path, kind: Kind) -> Option<String> {
    use std::io::Read;
    let real = program.canonicalize().ok()?;
    let package = real.ancestors().skip(1).take(4).map(|folder| folder.join("package.json")).find(|p| p.is_file())?;
    let mut text = String::new();
    std::fs::File::open(package).ok()?.take(PACKAGE_BYTES_MAX).read_to_string(&mut text).ok()?;
    let package: serde_json::Value = serde_json::from_str(&text).ok()?;
    package["name"].as_str()?.ends_with(kind.name()).then(|| package["version"].as_str().map(str::to_owned))?
}

/// Gets componentize-qjs into a private folder.
///
/// # Errors
/// What could not be fetched.
pub fn install(tell: &mut dyn FnMut(&str)) -> Result<()> {
    let hint = "install Node 20 or newer with npm: `apt-get install nodejs npm`";
    toolchain::need(Tool::Node, "node", hint)?;
    if let Some(compiler) = find(None) {
        tell(&format!("nothing to do: {compiler} ({})", compiler.path.display()));
        return Ok(());
    }
    let npm = toolchain::need(Tool::Npm, "npm", hint)?;
    let tools = toolchain::private_dir_needed()?;
    let folder = tools.join("js");
    std::fs::create_dir_all(&folder).map_err(AuthorError::io("cannot make folder", &folder))?;
    tell(&format!("componentize-qjs {VERSION} goes to {} (40 MB)", folder.display()));
    let deadline = Duration::from_secs(INSTALL_SECONDS_MAX);
    let wanted = format!("componentize-qjs@{VERSION}");
    Step::new("npm install", &npm.path, tools.join("js.log"), deadline, false)
        .args(["install", "--no-fund", "--no-audit", "--save-exact", "--prefix"])
        .args([folder.as_os_str(), wanted.as_ref()])
        .hint("npm needs the network or a mirror; `npm config get registry` says which one it asks")
        .run()
}

/// Builds the component `made`; what built it comes back.
///
/// # Errors
/// The compiler is missing or failed; what QuickJS said of the author's files is in the message.
pub fn build(build: &Build<'_>, made: &Path) -> Result<String> {
    let project = build.project;
    let source = project.folder.join(source(&project.manifest)?);
    let sdk = project.sdk();
    let sdk = sdk.canonicalize().ok().filter(|folder| folder.join("bridge.js").is_file()).ok_or_else(|| {
        let hint =
            "name the SDK's folder in plugin.toml as `sdk`; `cosmos-host plugin new` makes a project that has it";
        AuthorError::project(format!("`{}` holds no `bridge.js`", sdk.display()), hint)
    })?;
    let missing = || AuthorError::Missing { what: "componentize-qjs".into(), hint: FIX.into() };
    let compiler = find(Some(&project.folder)).ok_or_else(missing)?;
    toolchain::need(Tool::Node, "node", "install Node 20 or newer: `apt-get install nodejs`")?;
    let wit_dir = build.dir.join("wit");
    wit::write(project, &wit_dir)?;
    let generated = build.dir.join("js");
    std::fs::create_dir_all(&generated).map_err(AuthorError::io("cannot make folder", &generated))?;
    let bridge = relative(&generated, &sdk.join("bridge.js"));
    let host = relative(&generated, &sdk.join("host.js"));
    let app = relative(&generated, &source);
    let lend_path = generated.join("lend.js");
    std::fs::write(&lend_path, lend(&project.manifest, &host)).map_err(AuthorError::io("cannot write", &lend_path))?;
    let entry_path = generated.join("entry.js");
    let text = entry(&project.manifest, &app, &bridge);
    std::fs::write(&entry_path, text).map_err(AuthorError::io("cannot write", &entry_path))?;
    // Modules are resolved inside this folder only.
    let root = common(&project.folder, &sdk);
    let step = build.step(compiler.kind.name(), &compiler.path).current_dir(&root);
    // WASI is not stubbed out: the host gives a sandboxed one without any grant, and a stub traps where it is used,
    // for example by `Date`.
    let step = match compiler.kind {
        Kind::ComponentizeQjs => step
            .args(["--wit".as_ref(), wit_dir.as_os_str(), "--world".as_ref(), wit::WORLD.as_ref()])
            .args(["--js".as_ref(), entry_path.as_os_str(), "--module-root".as_ref(), root.as_os_str()])
            .args(["--sync".as_ref(), "--output".as_ref(), made.as_os_str()]),
        Kind::Jco => step
            .args(["componentize".as_ref(), entry_path.as_os_str(), "--wit".as_ref(), wit_dir.as_os_str()])
            .args(["--world-name", wit::WORLD, "--backend", "quickjs", "--backend-qjs-disable-async", "--cwd"])
            .args([root.as_os_str(), "-o".as_ref(), made.as_os_str()]),
    };
    step.run().map_err(|error| readable(error, &root))?;
    Ok(compiler.to_string())
}

/// The one file that the plugin starts in.
fn source(manifest: &Manifest) -> Result<&Path> {
    let bad = |message: String| AuthorError::project(message, "for example `sources = [\"app.js\"]` in plugin.toml");
    let [source] = manifest.sources.as_slice() else {
        let count = manifest.sources.len();
        let message =
            format!("a JavaScript plugin starts in one file, which imports the others; `sources` has {count}");
        return Err(bad(message));
    };
    if source.extension().is_none_or(|extension| extension != "js" && extension != "mjs") {
        return Err(bad(format!("source `{}` is no JavaScript file (.js or .mjs)", source.display())));
    }
    Ok(source)
}

/// Evaluated before the author's module: what is lent is there when the host calls the first function.
fn lend(manifest: &Manifest, host: &str) -> String {
    let mut text =
        format!("// Written by `cosmos-host plugin build`.\n\nimport {{ hold, lend }} from {};\n", json!(host));
    for (at, import) in manifest.imports.iter().enumerate() {
        let name = import.name();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "import host{at} from \"cosmos:plugin/{name}@{}\";", wit::VERSION);
        let _ = writeln!(text, "lend(\"{name}\", host{at});");
    }
    text.push_str("hold();\n");
    text
}

fn entry(manifest: &Manifest, app: &str, bridge: &str) -> String {
    let mut text = String::from("// Written by `cosmos-host plugin build`.\n\nimport \"./lend.js\";\n");
    let exports: Vec<&str> = manifest.exports.iter().map(|export| export.name()).collect();
    let imports: Vec<&str> = manifest.imports.iter().map(|import| import.name()).collect();
    let source = manifest.sources.first().map(|path| path.display().to_string()).unwrap_or_default();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "import * as app from {};\nimport {{ bind }} from {};\n", json!(app), json!(bridge));
    let _ =
        writeln!(text, "const made = bind(app.default, {}, {}, {});", json!(exports), json!(imports), json!(source));
    for name in ["metadata"].iter().chain(&exports) {
        let _ = writeln!(text, "export const {name} = made.{name};");
    }
    text
}

/// `to` as an import in a file of the folder `from`; both absolute.
fn relative(from: &Path, to: &Path) -> String {
    let shared = common(from, to);
    let above = from.strip_prefix(&shared).map_or(0, |rest| rest.components().count());
    let below = to.strip_prefix(&shared).unwrap_or(to);
    let names = below.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_string_lossy().into_owned()),
        _ => None,
    });
    let steps: Vec<String> = std::iter::repeat_n("..".to_owned(), above).chain(names).collect();
    let joined = steps.join("/");
    if above == 0 { format!("./{joined}") } else { joined }
}

/// The innermost folder that holds both.
fn common(one: &Path, other: &Path) -> PathBuf {
    one.components().zip(other.components()).take_while(|(a, b)| a == b).map(|(a, _)| a).collect()
}

/// What QuickJS said, with the paths of this machine.
fn readable(error: AuthorError, root: &Path) -> AuthorError {
    let AuthorError::Tool { tool, reason, log, tail, hint } = error else { return error };
    // The compiler repeats its arguments before it starts.
    let said = tail.find("Error: ").map_or(tail.as_str(), |at| &tail[at..]);
    let said = said.trim_start_matches("Error: : ").trim_end();
    let tail = said.replace("(/", &format!("({}/", root.display())).replace("at /", &format!("at {}/", root.display()));
    let hint = match tail.contains("module not found") {
        true => "write relative imports with their file's name (`./grade.js`); packages must lie in the project's \
                 `node_modules` and use nothing of Node itself"
            .into(),
        false => hint,
    };
    AuthorError::Tool { tool, reason, log, tail, hint }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Export, Import, Language};

    fn manifest(sources: &[&str]) -> Manifest {
        Manifest {
            name: "x".into(),
            language: Language::Js,
            sources: sources.iter().map(PathBuf::from).collect(),
            sdk: "sdk".into(),
            exports: vec![Export::Reward],
            imports: vec![Import::Log, Import::ChatTemplate],
        }
    }

    #[test]
    fn imports_are_relative() {
        for (from, to, wanted) in [
            ("/p/build/js", "/p/app.js", "../../app.js"),
            ("/p", "/p/app.js", "./app.js"),
            ("/r/examples/p/build/js", "/r/sdk/javascript/bridge.js", "../../../../sdk/javascript/bridge.js"),
        ] {
            assert_eq!(relative(Path::new(from), Path::new(to)), wanted);
        }
        assert_eq!(common(Path::new("/r/a/b"), Path::new("/r/ab")), Path::new("/r"));
    }

    #[test]
    fn the_entry_exports_what_the_manifest_names() {
        let manifest = manifest(&["app.js"]);
        let text = entry(&manifest, "../../app.js", "../../sdk/bridge.js");
        for line in [
            "import * as app from \"../../app.js\";\n",
            "bind(app.default, [\"reward\"], [\"log\",\"chat-template\"], \"app.js\");\n",
            "export const metadata = made.metadata;\nexport const reward = made.reward;\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        let lent = lend(&manifest, "./host.js");
        assert!(lent.contains("from \"cosmos:plugin/chat-template@0.2.0\";") && lent.ends_with("hold();\n"), "{lent}");
    }

    #[test]
    fn old_compilers_are_known() {
        for (version, older) in
            [("0.4.4", true), ("0.4.5", false), ("0.4.10", false), ("0.5.0-rc.1", false), ("odd", false)]
        {
            assert_eq!(is_older(version, Kind::ComponentizeQjs.oldest()), older, "{version}");
        }
    }

    #[test]
    fn a_source_is_one_script() {
        assert_eq!(source(&manifest(&["app.mjs"])).unwrap(), Path::new("app.mjs"));
        for sources in [&["a.js", "b.js"][..], &["app.ts"]] {
            assert!(source(&manifest(sources)).unwrap_err().hint().unwrap().contains("app.js"));
        }
    }

    #[test]
    fn a_failure_names_the_files_of_this_machine() {
        let error = AuthorError::Tool {
            tool: "componentize-qjs".into(),
            reason: "exit status: 1".into(),
            log: "x.log".into(),
            tail: "componentize-qjs\n  WIT: w\nError: : Failed to finish: Error: boom\n    at f (/app.js:2:33)\n    at /app.js:3:1\n".into(),
            hint: String::new(),
        };
        let AuthorError::Tool { tail, .. } = readable(error, Path::new("/home/me")) else { panic!("another error") };
        assert_eq!(tail, "Failed to finish: Error: boom\n    at f (/home/me/app.js:2:33)\n    at /home/me/app.js:3:1");
    }
}
