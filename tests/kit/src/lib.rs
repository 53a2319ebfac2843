//! Where the tests find golden vectors and real data.
//!
//! Golden vectors come from `$COSMOS_GOLDEN_DIR`, else `../shared/golden` beside the checkout, else the copy in
//! `tests/golden`. A part that the chosen folder lacks is skipped by name.

pub mod mutate;

use std::path::{Path, PathBuf};

/// The root of this repository.
pub fn repo_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .expect("the checkout this test was built from still exists")
}

/// The golden folder in use.
pub fn golden_root() -> PathBuf {
    if let Some(dir) = std::env::var_os("COSMOS_GOLDEN_DIR") {
        return PathBuf::from(dir);
    }
    let shared = repo_root().join("../shared/golden");
    if shared.is_dir() { shared } else { repo_root().join("tests/golden") }
}

/// `part` (a file or folder) of the golden folder in use, or `None` with a line that says it was skipped.
pub fn golden(part: &str) -> Option<PathBuf> {
    let path = golden_root().join(part);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: `{part}` is not in {}", golden_root().display());
    None
}

/// `part` of the real data beside the checkout (`$COSMOS_DATA_DIR`, default `../shared/data`), or `None` with a line that says it was skipped.
pub fn shared_data(part: &str) -> Option<PathBuf> {
    let root =
        std::env::var_os("COSMOS_DATA_DIR").map(PathBuf::from).unwrap_or_else(|| repo_root().join("../shared/data"));
    let path = root.join(part);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: `{part}` is not in {}", root.display());
    None
}

/// A JSON file.
pub fn read_json(path: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The lines of a JSONL file.
pub fn read_jsonl(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines()
        .filter(|l| !l.trim().is_empty())
        .map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        .collect()
}
