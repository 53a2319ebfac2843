//! `plugin new`, `build` and `toolchain`, as far as no compiler is needed; `examples/plugins/check.sh` does the rest.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::{assert_told, cosmos_host, here_temporary, write};

/// A folder of this name in every run, empty.
fn folder(name: &str) -> PathBuf {
    let folder = here_temporary().join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn text(path: &Path) -> &str {
    path.to_str().expect("an ASCII path")
}

#[test]
fn new_projects_are_whole_and_never_overwrite() {
    for lang in ["rust", "python", "js", "c"] {
        let place = folder(&format!("new-{lang}"));
        let made = place.join("mine");
        let output = cosmos_host()
            .args(["plugin", "new", "--lang", lang, "my-reward", "--dir", text(&made)])
            .output()
            .expect("the binary starts");
        assert!(output.status.success(), "{lang}: {output:?}");
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(said.contains(&format!("cd {}", text(&made))) && said.contains("plugin build"), "{said}");
        for file in ["plugin.toml", "README.md", ".gitignore", "sdk", "cases"] {
            assert!(made.join(file).exists(), "{lang} lacks {file}");
        }
        // The second time it would overwrite.
        let before = std::fs::read(made.join("plugin.toml")).unwrap();
        let again = cosmos_host()
            .args(["plugin", "new", "--lang", lang, "other", "--dir", text(&made)])
            .output()
            .expect("the binary starts");
        assert_eq!(again.status.code(), Some(2));
        assert_eq!(std::fs::read(made.join("plugin.toml")).unwrap(), before);
    }
    let full = here_temporary().join("new-rust/mine");
    if full.exists() {
        assert_told("plugin_new_not_empty", &["plugin", "new", "--lang", "rust", "x", "--dir", text(&full)]);
    }
    assert_told("plugin_new_bad_name", &["plugin", "new", "--lang", "rust", "../x"]);
    assert_told("plugin_new_no_language", &["plugin", "new", "x"]);
    assert_told("plugin_new_keyword", &["plugin", "new", "--lang", "rust", "match"]);
}

#[test]
fn projects_that_cannot_be_built_say_why() {
    let empty = folder("build-empty");
    assert_told("plugin_build_no_project", &["plugin", "build", text(&empty)]);
    assert_told("plugin_build_no_folder", &["plugin", "build", text(&empty.join("none"))]);
    write(&empty, "plugin.toml", b"name = \"x\"\nlanguage = \"cobol\"\nexports = [\"reward\"]\n");
    assert_told("plugin_build_bad_manifest", &["plugin", "build", text(&empty)]);
    write(&empty, "plugin.toml", b"name = \"x\"\nlanguage = \"c\"\nsources = [\"gone.c\"]\nexports = [\"reward\"]\n");
    assert_told("plugin_build_no_source", &["plugin", "build", text(&empty)]);
}

/// A machine with no compiler at all: what is missing and the command that gets it, exit 2, for every language.
#[test]
fn missing_toolchains_end_with_2_and_the_command() {
    let bare = folder("bare-machine");
    for (lang, command) in [("rust", "rustup"), ("python", "--install"), ("js", "install"), ("c", "apt-get install")] {
        let project = bare.join(lang);
        let run = |arguments: &[&str]| {
            let mut bare_host = cosmos_host();
            bare_host.env_remove("RUSTC").env_remove("WASI_SDK_PATH").env("WASI_SYSROOT", &bare);
            bare_host.env("PATH", &bare).env("HOME", &bare).env("XDG_CACHE_HOME", &bare);
            bare_host.args(arguments).output().expect("the binary starts")
        };
        assert!(run(&["plugin", "new", "--lang", lang, "x", "--dir", text(&project)]).status.success());
        for arguments in [["plugin", "toolchain", lang], ["plugin", "build", text(&project)]] {
            let output = run(&arguments);
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
            assert!(said.contains("missing") && said.contains("hint: ") && said.contains(command), "{said}");
        }
    }
}

/// A compiler that fails: its last lines in the error, all of its output in a file.
#[test]
fn a_failing_compiler_is_quoted() {
    let place = folder("failing-compiler");
    let project = place.join("project");
    let made = cosmos_host().args(["plugin", "new", "--lang", "c", "x", "--dir", text(&project)]).output();
    assert!(made.expect("the binary starts").status.success());
    // A wasi-sdk whose clang answers every question and then cannot compile.
    let sdk = place.join("sdk");
    for part in ["bin", "share/wasi-sysroot/lib/wasm32-wasi"] {
        std::fs::create_dir_all(sdk.join(part)).unwrap();
    }
    write(&sdk.join("share/wasi-sysroot/lib/wasm32-wasi"), "libc.a", b"");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in\n  --version) echo 'clang 99' ;;\n  --print-targets) echo wasm32 ;;\n  *-print-libgcc-file-name) echo {0} ;;\n  *) echo 'x.c:3:1: error: no such thing' >&2; exit 1 ;;\nesac\n",
        sdk.join("share/wasi-sysroot/lib/wasm32-wasi/libc.a").display()
    );
    for (name, body) in [("clang", script.as_str()), ("wasm-ld", "#!/bin/sh\n")] {
        write(&sdk.join("bin"), name, body.as_bytes());
        std::fs::set_permissions(sdk.join("bin").join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let output = cosmos_host().env("WASI_SDK_PATH", &sdk).args(["plugin", "build", text(&project)]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("`clang` failed (exit status: 1)") && said.contains("x.c:3:1: error: no such thing"),
        "{said}"
    );
    assert!(std::fs::read_to_string(project.join("build/clang.log")).unwrap().contains("no such thing"));
    assert!(!project.join("build/x.wasm").exists());
}
