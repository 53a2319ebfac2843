//! `plugin new`: a project that builds and passes its own cases as it stands.
//!
//! The templates and the SDKs are embedded in the program: no registry has the SDKs, and a project must go on building
//! when the host that made it is gone.

mod c;
mod js;
mod python;
mod rust;

use std::path::{Path, PathBuf};

use crate::error::{AuthorError, Result};
use crate::manifest::{self, Export, Language};

/// What the new plugin is to export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Scores.
    Reward,
    /// Prompts.
    Dataset,
    /// Prompts and their scores.
    Both,
    /// Conversations of several turns.
    Environment,
}

impl Kind {
    /// All, in the order in which they are listed.
    pub const ALL: [Self; 4] = [Self::Reward, Self::Dataset, Self::Both, Self::Environment];

    /// As `--kind` writes it, and in the names of templates.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reward => "reward",
            Self::Dataset => "dataset",
            Self::Both => "both",
            Self::Environment => "environment",
        }
    }

    /// The manifest's `exports`.
    pub fn exports(self) -> &'static [Export] {
        match self {
            Self::Reward => &[Export::Reward],
            Self::Dataset => &[Export::Dataset],
            Self::Both => &[Export::Dataset, Export::Reward],
            Self::Environment => &[Export::Environment],
        }
    }
}

/// A file of a new project.
#[derive(Debug, Clone, Copy)]
pub struct File {
    /// Where, inside the project; may hold the same `{{…}}` as the text of a template.
    pub path: &'static str,
    /// What.
    pub text: &'static str,
    /// Whether `{{name}}` and the like in it are filled in. The SDK's files are taken as they are.
    pub is_template: bool,
}

/// Files of `host/author/templates/`: `template!["rust/lib.rs" => "src/lib.rs", …]`.
macro_rules! template {
    ($($from:literal => $path:literal),* $(,)?) => {
        [$($crate::new::File {
            path: $path,
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/templates/", $from)),
            is_template: true,
        }),*]
    };
}
/// Files of `plugins/sdk/`: `sdk!["rust/src/lib.rs" => "sdk/src/lib.rs", …]`.
macro_rules! sdk {
    ($($from:literal => $path:literal),* $(,)?) => {
        [$($crate::new::File {
            path: $path,
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../plugins/sdk/", $from)),
            is_template: false,
        }),*]
    };
}
pub(crate) use {sdk, template};

/// The golden cases of the Rust and the C templates, which are the same plugins in two languages.
fn cases(kind: Kind) -> [File; 1] {
    match kind {
        Kind::Reward => template!["cases/reward.jsonl" => "cases/{{name}}.jsonl"],
        Kind::Dataset => template!["cases/dataset.jsonl" => "cases/{{name}}.jsonl"],
        Kind::Both => template!["cases/both.jsonl" => "cases/{{name}}.jsonl"],
        Kind::Environment => template!["cases/environment.jsonl" => "cases/{{name}}.jsonl"],
    }
}

/// What to make.
#[derive(Debug, Clone)]
pub struct NewOptions {
    /// Name of the plugin.
    pub name: String,
    /// In which language.
    pub language: Language,
    /// What it exports.
    pub kind: Kind,
    /// Where; without it a folder of the plugin's name in the current one.
    pub folder: Option<PathBuf>,
}

/// What was made.
#[derive(Debug, Clone)]
pub struct Made {
    /// The project's folder.
    pub folder: PathBuf,
    /// Its files, relative to it.
    pub files: Vec<PathBuf>,
}

/// Makes a project.
///
/// # Errors
/// The name is none, or the folder holds something already.
pub fn new(options: &NewOptions) -> Result<Made> {
    manifest::check_name(&options.name).map_err(|message| {
        AuthorError::project(message, "for example `cosmos-host plugin new --lang rust my-reward`")
    })?;
    if options.language == Language::Rust && RUST_KEYWORDS.contains(&options.name.as_str()) {
        return Err(AuthorError::project(
            format!("`{}` cannot name a crate: Rust or the SDK uses the word", options.name),
            "choose another name",
        ));
    }
    let files = filled(options);
    let folder = options.folder.clone().unwrap_or_else(|| PathBuf::from(&options.name));
    refuse_full(&folder)?;
    write(&files, &folder)?;
    Ok(Made { folder, files: files.into_iter().map(|(path, _)| path.into()).collect() })
}

/// Cargo refuses them as names of packages.
const RUST_KEYWORDS: [&str; 53] = [
    "Self",
    "abstract",
    "alloc",
    "as",
    "async",
    "await",
    "become",
    "box",
    "break",
    "const",
    "continue",
    "core",
    "crate",
    "do",
    "dyn",
    "else",
    "enum",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "if",
    "impl",
    "in",
    "let",
    "loop",
    "macro",
    "match",
    "mod",
    "move",
    "mut",
    "override",
    "priv",
    "pub",
    "ref",
    "return",
    "self",
    "serde",
    "serde_json",
    "static",
    "std",
    "struct",
    "super",
    "test",
    "trait",
    "true",
    "try",
    "type",
    "use",
    "while",
    "yield",
];

/// Paths and texts with everything filled in.
fn filled(options: &NewOptions) -> Vec<(String, String)> {
    let mut files = match options.language {
        Language::Rust => rust::files(options.kind),
        Language::Python => python::files(options.kind),
        Language::Js => js::files(options.kind),
        Language::C => c::files(options.kind),
    };
    files.extend(template!["gitignore" => ".gitignore"]);
    let exports: Vec<String> = options.kind.exports().iter().map(|e| format!("{:?}", e.name())).collect();
    let ident = options.name.replace('-', "_").to_ascii_lowercase();
    let fill = |text: &str| {
        text.replace("{{name}}", &options.name)
            .replace("{{ident}}", &ident)
            .replace("{{Type}}", &type_name(&options.name))
            .replace("{{exports}}", &format!("[{}]", exports.join(", ")))
            .replace("{{kind}}", options.kind.name())
    };
    let fill_file = |f: File| (fill(f.path), if f.is_template { fill(f.text) } else { f.text.to_owned() });
    files.into_iter().map(fill_file).collect()
}

/// `my-reward` as `MyReward`.
fn type_name(name: &str) -> String {
    let parts = name.split(['-', '_']).filter(|p| !p.is_empty());
    parts.map(|p| p[..1].to_ascii_uppercase() + &p[1..]).collect()
}

fn refuse_full(folder: &Path) -> Result<()> {
    match std::fs::read_dir(folder) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(AuthorError::project(
                format!("`{}` is not empty", folder.display()),
                "choose another name, or another place with `--dir`",
            )),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(AuthorError::io("cannot open folder", folder)(error)),
    }
}

/// All files in a folder beside `folder`, then that folder under its name: a half-made project never shows.
fn write(files: &[(String, String)], folder: &Path) -> Result<()> {
    let mut staged = folder.as_os_str().to_owned();
    staged.push(format!(".{}.new", std::process::id()));
    let staged = PathBuf::from(staged);
    let written = write_all(files, &staged)
        .and_then(|()| std::fs::rename(&staged, folder).map_err(AuthorError::io("cannot make folder", folder)));
    if written.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_dir_all(&staged);
    }
    written
}

fn write_all(files: &[(String, String)], folder: &Path) -> Result<()> {
    for (path, text) in files {
        let path = folder.join(path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(AuthorError::io("cannot make folder", parent))?;
        }
        std::fs::write(&path, text).map_err(AuthorError::io("cannot write", &path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Project;

    fn options(name: &str, language: Language, kind: Kind, folder: &Path) -> NewOptions {
        NewOptions { name: name.into(), language, kind, folder: Some(folder.into()) }
    }

    #[test]
    fn every_template_is_a_project_with_nothing_left_to_fill_in() {
        let place = tempfile::tempdir().unwrap();
        for language in Language::ALL {
            for kind in Kind::ALL {
                let folder = place.path().join(format!("{language}-{}", kind.name()));
                let made = new(&options("my-Plugin", language, kind, &folder)).unwrap();
                let project = Project::open(&made.folder).unwrap();
                assert_eq!((project.manifest.language, &*project.manifest.exports), (language, kind.exports()));
                for wanted in ["README.md", ".gitignore"] {
                    assert!(folder.join(wanted).is_file(), "{language}: {wanted}");
                }
                let cases = std::fs::read_dir(folder.join("cases")).unwrap().count();
                assert!(cases > 0, "{language} {} has cases", kind.name());
                for path in made.files.iter().filter(|p| !p.starts_with("sdk")) {
                    let text = std::fs::read_to_string(folder.join(path)).unwrap();
                    // Braces of C stand before quotes, never before a letter.
                    let left = text
                        .match_indices("{{")
                        .find(|(at, _)| text[at + 2..].starts_with(|c: char| c.is_ascii_alphabetic()));
                    assert_eq!(left, None, "{language}: {}", path.display());
                }
            }
        }
    }

    #[test]
    fn a_full_folder_and_a_bad_name_are_refused() {
        let place = tempfile::tempdir().unwrap();
        let full = place.path().join("full");
        std::fs::create_dir(&full).unwrap();
        new(&options("x", Language::Rust, Kind::Reward, &full)).unwrap();
        let error = new(&options("x", Language::Rust, Kind::Reward, &full)).unwrap_err();
        assert!(error.to_string().contains("not empty") && error.is_usage(), "{error}");
        for name in ["", "../x", "fn", "a b"] {
            let error = new(&options(name, Language::Rust, Kind::Reward, &place.path().join("y"))).unwrap_err();
            assert!(error.hint().is_some(), "{error}");
        }
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1, "nothing is left behind");
    }

    #[test]
    fn type_names() {
        assert_eq!((type_name("my-reward").as_str(), type_name("x").as_str()), ("MyReward", "X"));
        assert_eq!(type_name("a--b_c2"), "ABC2");
    }
}
