//! C through clang and wasi-libc. The world comes from the project's `plugin.toml`, not from an object file.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cosmos_plugin::PluginError;
use wit_component::StringEncoding;

use super::{Build, Step};
use crate::error::{AuthorError, Result};
use crate::manifest::Manifest;
use crate::project::Project;
use crate::toolchain::{self, Need, Tool, is_program};
use crate::wit;

/// Unpacks Debian's clang and wasi-libc.
const INSTALL: &str = include_str!("../../scripts/c-toolchain.sh");
/// A download of 40 MB.
const INSTALL_SECONDS_MAX: u64 = 1800;
const FIX: &str = "run `apt-get install clang lld wasi-libc libclang-rt-dev-wasm32`, or `cosmos-host plugin toolchain c --install` for private \
     ones, or set WASI_SDK_PATH to a wasi-sdk";
/// As much as a Rust guest has; wasm-ld's own 64 KB are few for a recursive parser.
const STACK_BYTES: u32 = 1 << 20;
/// Files of the SDK that are compiled with the author's.
const SDK_SOURCES: [&str; 2] = ["cosmos_plugin.c", "bindings.c"];

/// A clang that can build for WebAssembly, with all that belongs to it.
#[derive(Debug)]
struct Compiler {
    clang: PathBuf,
    version: String,
    linker: PathBuf,
    /// Holds `include/<triple>` and `lib/<triple>`.
    sysroot: PathBuf,
    triple: &'static str,
    /// Where a private compiler's libraries are.
    libraries: Option<OsString>,
}

/// A clang to try.
struct Candidate {
    clang: PathBuf,
    linkers: Vec<PathBuf>,
    sysroots: Vec<PathBuf>,
    libraries: Option<OsString>,
}

/// What building needs.
pub fn needs() -> Vec<Need> {
    let found =
        compiler().map(|c| format!("{} ({}), C library in {}", c.version, c.clang.display(), c.sysroot.display()));
    vec![Need { what: "clang, wasm-ld and wasi-libc", found: found.ok(), fix: FIX.into() }]
}

/// Gets Debian's clang and wasi-libc.
///
/// # Errors
/// What could not be fetched.
pub fn install(tell: &mut dyn FnMut(&str)) -> Result<()> {
    if let Ok(found) = compiler() {
        tell(&format!("nothing to do: {} ({})", found.version, found.clang.display()));
        return Ok(());
    }
    let tools = toolchain::private_dir_needed()?;
    std::fs::create_dir_all(&tools).map_err(AuthorError::io("cannot make folder", &tools))?;
    let folder = tools.join("c");
    tell(&format!("Debian's clang and wasi-libc go to {}", folder.display()));
    let deadline = Duration::from_secs(INSTALL_SECONDS_MAX);
    Step::new("c-toolchain.sh", Path::new("bash"), tools.join("c.log"), deadline, false)
        .args(["-c".as_ref(), INSTALL.as_ref(), "c-toolchain.sh".as_ref(), folder.as_os_str()])
        .hint(
            "`apt-get install clang lld wasi-libc libclang-rt-dev-wasm32` as root does the same for the whole machine",
        )
        .run()
}

/// The first complete compiler, or what the most promising one lacks.
fn compiler() -> Result<Compiler> {
    let mut lacking: Option<String> = None;
    for candidate in candidates() {
        match complete(&candidate) {
            Ok(compiler) => return Ok(compiler),
            Err(what) => lacking = lacking.or(Some(what)),
        }
    }
    Err(AuthorError::Missing { what: lacking.unwrap_or_else(|| "clang".into()), hint: FIX.into() })
}

fn candidates() -> Vec<Candidate> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let private = toolchain::private_dir().map(|dir| dir.join("c")).filter(|dir| dir.join("complete").is_file());
    let mut sysroots: Vec<PathBuf> = set("WASI_SYSROOT").into_iter().collect();
    let mut found = Vec::new();
    let sdk = set("WASI_SDK_PATH").or_else(|| Some(PathBuf::from("/opt/wasi-sdk")));
    if let Some(sdk) = sdk.filter(|sdk| is_program(&sdk.join("bin/clang"))) {
        found.push(Candidate {
            clang: sdk.join("bin/clang"),
            linkers: vec![sdk.join("bin/wasm-ld")],
            sysroots: vec![sdk.join("share/wasi-sysroot")],
            libraries: None,
        });
    }
    sysroots.extend(["/usr", "/usr/share/wasi-sysroot"].map(PathBuf::from));
    sysroots.extend(private.iter().map(|dir| dir.join("root/usr")));
    if let Some(own) = toolchain::find(Tool::Clang) {
        let beside = own.path.canonicalize().ok().and_then(|p| Some(p.parent()?.join("wasm-ld")));
        let linkers = beside.into_iter().chain(toolchain::find(Tool::WasmLd).map(|f| f.path)).collect();
        found.push(Candidate { clang: own.path, linkers, sysroots, libraries: None });
    }
    if let Some(dir) = private {
        found.push(Candidate {
            clang: dir.join("bin/clang"),
            linkers: vec![dir.join("bin/wasm-ld")],
            sysroots: vec![dir.join("root/usr")],
            libraries: Some(library_path(&dir)),
        });
    }
    found
}

/// Folders of the libraries that an unpacked clang loads, before those that are set already.
fn library_path(dir: &Path) -> OsString {
    let entries = std::fs::read_dir(dir.join("root/usr/lib")).into_iter().flatten().flatten();
    let machine =
        entries.filter(|e| e.file_name().to_str().is_some_and(|n| n.ends_with("-linux-gnu"))).map(|e| e.path());
    let mut folders: Vec<PathBuf> = machine.collect();
    folders.push(dir.join("bin/../lib"));
    let mut joined = std::env::join_paths(folders).unwrap_or_default();
    if let Some(set) = std::env::var_os("LD_LIBRARY_PATH").filter(|v| !v.is_empty()) {
        joined.push(":");
        joined.push(set);
    }
    joined
}

/// The compiler with its parts, or which part it lacks.
fn complete(candidate: &Candidate) -> std::result::Result<Compiler, String> {
    let clang = &candidate.clang;
    let shown = clang.display();
    let ask = |args: &[&str]| {
        let mut command = Command::new(clang);
        if let Some(libraries) = &candidate.libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        toolchain::answer_of(command.args(args))
    };
    let version = ask(&["--version"]).ok_or_else(|| format!("a clang that runs (not `{shown}`)"))?;
    let version = version.lines().next().unwrap_or_default().trim().to_owned();
    if !ask(&["--print-targets"]).is_some_and(|targets| targets.contains("wasm32")) {
        return Err(format!("a clang that knows wasm32 (not `{shown}`)"));
    }
    let linker = candidate.linkers.iter().find(|path| is_program(path));
    let linker = linker.ok_or_else(|| format!("wasm-ld for `{shown}`"))?.clone();
    let triples = ["wasm32-wasi", "wasm32-wasip1"];
    let library =
        |sysroot: &PathBuf| triples.into_iter().find(|t| sysroot.join("lib").join(t).join("libc.a").is_file());
    let sysroot = candidate.sysroots.iter().find_map(|sysroot| Some((sysroot.clone(), library(sysroot)?)));
    let (sysroot, triple) = sysroot.ok_or("wasi-libc")?;
    let target = format!("--target={triple}");
    let builtins = ask(&[&target, "--rtlib=compiler-rt", "-print-libgcc-file-name"]).unwrap_or_default();
    if !Path::new(builtins.trim()).is_file() {
        return Err(format!("compiler-rt for wasm32 for `{shown}`"));
    }
    Ok(Compiler { clang: clang.clone(), version, linker, sysroot, triple, libraries: candidate.libraries.clone() })
}

/// Builds the component `made`; what built it comes back.
///
/// # Errors
/// A tool is missing or failed.
pub fn build(build: &Build<'_>, made: &Path) -> Result<String> {
    let project = build.project;
    let compiler = compiler()?;
    let module = build.dir.join("module.wasm");
    let mut step =
        build.step("clang", &compiler.clang).current_dir(&project.folder).args(arguments(project, &compiler)?);
    if let Some(libraries) = &compiler.libraries {
        step = step.env("LD_LIBRARY_PATH", libraries);
    }
    step.args(["-o".as_ref(), module.as_os_str()]).run()?;
    let mut bytes = std::fs::read(&module).map_err(AuthorError::io("cannot read", &module))?;
    embed_world(&mut bytes, &project.manifest)?;
    let component = cosmos_plugin::componentize(&bytes).map_err(|error| explained(error, &project.manifest))?;
    std::fs::write(made, component).map_err(AuthorError::io("cannot write", made))?;
    Ok(format!("{}, {}", compiler.version, compiler.triple))
}

fn arguments(project: &Project, compiler: &Compiler) -> Result<Vec<OsString>> {
    let sdk = project.sdk();
    let mut arguments: Vec<OsString> = vec![format!("--target={}", compiler.triple).into()];
    let with = |flag: &str, path: &Path| {
        let mut argument = OsString::from(flag);
        argument.push(path);
        argument
    };
    arguments.push(with("--sysroot=", &compiler.sysroot));
    arguments.push(with("-fuse-ld=", &compiler.linker));
    // The author's folders are nobody's business who gets the component.
    let mut map = with("-ffile-prefix-map=", &project.folder);
    map.push("=.");
    arguments.push(map);
    arguments.extend(
        ["-mexec-model=reactor", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror=implicit"].map(OsString::from),
    );
    arguments.extend(["-ffunction-sections", "-fdata-sections"].map(OsString::from));
    // With the stack below the data an overflow traps instead of overwriting it.
    arguments.extend(["-Wl,--stack-first".into(), format!("-Wl,-z,stack-size={STACK_BYTES}").into()]);
    arguments.push("-Wl,--strip-debug".into());
    for export in &project.manifest.exports {
        arguments.push(format!("-DCOSMOS_EXPORT_{}", export.name().to_ascii_uppercase()).into());
    }
    arguments.push(with("-I", &sdk));
    arguments.extend(project.manifest.sources.iter().map(OsString::from));
    for source in SDK_SOURCES {
        let path = sdk.join(source);
        if !path.is_file() {
            let hint = "set `sdk` in plugin.toml to the folder with cosmos_plugin.h, or take it from a new project";
            return Err(AuthorError::project(format!("the SDK's `{}` is missing", path.display()), hint));
        }
        arguments.push(path.into());
    }
    // The mathematics of libc is a library of its own.
    arguments.push("-lm".into());
    Ok(arguments)
}

/// Writes the section from which the component's world is made.
fn embed_world(module: &mut Vec<u8>, manifest: &Manifest) -> Result<()> {
    let wrong = |error: String| AuthorError::project(format!("the world of `{}`: {error}", manifest.name), "");
    let text = wit::single_file(manifest);
    let group = wit_parser::UnresolvedPackageGroup::parse("plugin.wit", &text).map_err(|e| wrong(format!("{e:?}")))?;
    let mut resolve = wit_parser::Resolve::default();
    let package = resolve.push_group(group).map_err(|e| wrong(format!("{e:?}")))?;
    let world = resolve.select_world(&[package], Some(wit::WORLD)).map_err(|e| wrong(format!("{e:#}")))?;
    wit_component::embed_component_metadata(module, &resolve, world, StringEncoding::UTF8)
        .map_err(|e| wrong(format!("{e:#}")))
}

/// A host function that the code calls and `plugin.toml` does not name is the usual reason.
fn explained(error: PluginError, manifest: &Manifest) -> AuthorError {
    let text = error.to_string();
    let unnamed = ["log", "table", "chat-template"].into_iter().find(|name| {
        text.contains(&format!("cosmos:plugin/{name}@")) && !manifest.imports.iter().any(|i| i.name() == *name)
    });
    match unnamed {
        Some(name) => AuthorError::project(
            format!("the code calls the host's `{name}`, which `imports` in plugin.toml does not name"),
            format!("write `imports = [\"{name}\"]`; whoever runs the plugin must then grant it"),
        ),
        None => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Export, Import, Language};

    fn manifest(imports: Vec<Import>) -> Manifest {
        Manifest {
            name: "x".into(),
            language: Language::C,
            sources: vec!["x.c".into()],
            sdk: "sdk".into(),
            exports: vec![Export::Reward],
            imports,
        }
    }

    #[test]
    fn the_world_goes_into_the_module() {
        let mut module = b"\0asm\x01\0\0\0".to_vec();
        embed_world(&mut module, &manifest(vec![Import::Log])).unwrap();
        let text = String::from_utf8_lossy(&module);
        assert!(text.contains("component-type") && text.contains("cosmos:plugin/reward@0.2.0"));
        assert!(!text.contains("cosmos:plugin/dataset@0.2.0"));
        // The world is there, the exports that it promises are not.
        let error = cosmos_plugin::componentize(&module).unwrap_err().to_string();
        assert!(error.contains("metadata") || error.contains("reward"), "{error}");
    }

    #[test]
    fn a_call_that_the_manifest_does_not_name_is_explained() {
        let refused = || PluginError::Componentize {
            module: "m".into(),
            detail: "module requires an import interface named `cosmos:plugin/log@0.2.0`".into(),
        };
        let error = explained(refused(), &manifest(vec![]));
        assert!(error.to_string().contains("`log`") && error.hint().unwrap().contains("imports"), "{error}");
        assert!(matches!(explained(refused(), &manifest(vec![Import::Log])), AuthorError::Plugin(_)));
    }
}
