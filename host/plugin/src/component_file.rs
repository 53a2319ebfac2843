//! Reads a component's file and judges it by its names, before anything is compiled.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};
use wasmparser::{Encoding, Parser, Payload};

use crate::PluginError;
use crate::voice::one_line;

/// The versions of `cosmos:plugin` that this host serves, by major and minor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Api {
    V0_1,
    V0_2,
}

impl Api {
    /// As the errors print them.
    pub(crate) const SERVED: &str = "0.1.x and 0.2.x";
    const NEWEST: (u64, u64) = (0, 2);

    /// The one of a released version `x.y.z`.
    pub(crate) fn of(version: &str) -> Option<Self> {
        match major_minor(version)? {
            (0, 1) => Some(Self::V0_1),
            (0, 2) => Some(Self::V0_2),
            _ => None,
        }
    }
}

/// The interfaces that a component exports beside `metadata`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offers {
    pub(crate) dataset: bool,
    pub(crate) reward: bool,
    pub(crate) environment: bool,
}

/// What a component is, judged by its names.
#[derive(Debug)]
pub(crate) struct Kind {
    pub(crate) api: Api,
    /// The version as it is written.
    pub(crate) version: String,
    pub(crate) offers: Offers,
}

/// Imports and exports at a component's top level.
const NAMES_MAX: u32 = 10_000;
/// What tells WebAssembly from other files.
const HEAD_BYTES: u64 = 256;
/// One name. It is printed in errors, so it is also escaped.
const NAME_BYTES_MAX: usize = 512;

/// The world of `cosmos:plugin` that has a component's exports. It is a name for people: what a plugin can do depends
/// on each export alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum World {
    /// Datasets only.
    DatasetPlugin,
    /// Rewards only.
    RewardPlugin,
    /// Datasets and rewards.
    Plugin,
    /// Environments only.
    EnvironmentPlugin,
    /// Another choice of interfaces, in a world of the author's own.
    Custom,
}

impl World {
    /// Its name in the WIT package.
    pub fn name(self) -> &'static str {
        match self {
            Self::DatasetPlugin => "dataset-plugin",
            Self::RewardPlugin => "reward-plugin",
            Self::Plugin => "plugin",
            Self::EnvironmentPlugin => "environment-plugin",
            Self::Custom => "custom",
        }
    }

    pub(crate) fn of(offers: Offers) -> Self {
        match (offers.dataset, offers.reward, offers.environment) {
            (true, true, false) => Self::Plugin,
            (true, false, false) => Self::DatasetPlugin,
            (false, true, false) => Self::RewardPlugin,
            (false, false, true) => Self::EnvironmentPlugin,
            _ => Self::Custom,
        }
    }
}

/// A component, parsed as far as its imports and exports.
#[derive(Debug)]
pub(crate) struct ComponentFile {
    pub(crate) path: PathBuf,
    pub(crate) bytes: Vec<u8>,
    pub(crate) sha256: String,
    pub(crate) imports: Vec<String>,
    pub(crate) exports: Vec<String>,
}

impl ComponentFile {
    pub(crate) fn read(path: &Path, bytes_max: u64) -> Result<Self, PluginError> {
        let bytes = read_limited(path, bytes_max)?;
        let (imports, exports) = scan(path, &bytes)?;
        let sha256 = crate::cache::hex(&Sha256::digest(&bytes));
        Ok(Self { path: path.into(), bytes, sha256, imports, exports })
    }

    /// The file's name without its ending: the plugin's name until it has described itself.
    pub(crate) fn stem(&self) -> String {
        let stem = self.path.file_stem().unwrap_or_default().to_string_lossy();
        one_line(&stem, 128)
    }

    /// The version of the package, and what it offers.
    pub(crate) fn kind(&self) -> Result<Kind, PluginError> {
        let wrong = |detail: String| PluginError::WrongWorld { path: self.path.clone(), detail };
        let ours: Vec<(&str, &str)> = self.exports.iter().filter_map(|name| own_interface(name)).collect();
        if ours.is_empty() {
            let exports = self.exports.iter().take(8).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            let exports = if exports.is_empty() { "nothing".into() } else { exports };
            return Err(wrong(format!("it exports {exports}")));
        }
        let imported = self.imports.iter().filter_map(|name| own_interface(name));
        for (_, version) in ours.iter().copied().chain(imported) {
            self.check_version(version)?;
        }
        // A component may carry the exports of two versions: the newer counts.
        let versions = ours.iter().filter(|(interface, _)| *interface == "metadata");
        let newest = versions.filter_map(|(_, version)| Some((Api::of(version)?, *version))).max();
        let Some((api, version)) = newest else {
            return Err(wrong("the export `metadata` is missing".into()));
        };
        let has = |interface: &str| ours.iter().any(|(name, v)| *name == interface && Api::of(v) == Some(api));
        let offers = Offers {
            dataset: has("dataset"),
            reward: has("reward"),
            environment: api >= Api::V0_2 && has("environment"),
        };
        if !(offers.dataset || offers.reward || offers.environment) {
            return Err(wrong(format!(
                "beside `metadata@{version}` it exports neither `dataset` nor `reward` nor `environment`"
            )));
        }
        Ok(Kind { api, version: version.into(), offers })
    }

    fn check_version(&self, version: &str) -> Result<(), PluginError> {
        if Api::of(version).is_some() {
            return Ok(());
        }
        Err(PluginError::WrongVersion {
            path: self.path.clone(),
            found: if version.is_empty() { "(none)".into() } else { version.into() },
            supported: Api::SERVED.into(),
            newer: major_minor(version).is_some_and(|numbers| numbers > Api::NEWEST),
        })
    }
}

/// Interface and version of a name like `cosmos:plugin/reward@0.1.0`.
pub(crate) fn own_interface(name: &str) -> Option<(&str, &str)> {
    let rest = name.strip_prefix("cosmos:plugin/")?;
    Some(rest.split_once('@').unwrap_or((rest, "")))
}

/// The first two numbers of a released version `x.y.z`.
fn major_minor(version: &str) -> Option<(u64, u64)> {
    let mut numbers = version.split('.').map(|number| number.parse::<u64>().ok());
    match (numbers.next()??, numbers.next()??, numbers.next()??, numbers.next()) {
        (major, minor, _, None) => Some((major, minor)),
        _ => None,
    }
}

fn read_limited(path: &Path, bytes_max: u64) -> Result<Vec<u8>, PluginError> {
    let failed = |source| PluginError::Read { path: path.into(), source };
    // A pipe must not make the opening wait for its writer.
    let opened = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let mut file = opened.map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(std::io::Error::other("it is not a file")));
    }
    let too_large = |bytes| PluginError::TooLarge { path: path.into(), bytes, bytes_max };
    if metadata.len() > bytes_max {
        return Err(too_large(metadata.len()));
    }
    // Whatever is no WebAssembly is refused by its start, without reading the rest.
    let mut bytes = Vec::with_capacity(metadata.len().min(bytes_max) as usize);
    file.by_ref().take(HEAD_BYTES.min(bytes_max)).read_to_end(&mut bytes).map_err(failed)?;
    check_magic(path, &bytes)?;
    let rest_bytes_max = bytes_max.saturating_add(1).saturating_sub(bytes.len() as u64);
    file.take(rest_bytes_max).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > bytes_max {
        return Err(too_large(bytes.len() as u64));
    }
    Ok(bytes)
}

/// Names of the top level's imports and exports. Nested modules and components are skipped, not read.
fn scan(path: &Path, bytes: &[u8]) -> Result<(Vec<String>, Vec<String>), PluginError> {
    check_magic(path, bytes)?;
    let malformed = |error: wasmparser::BinaryReaderError| PluginError::Malformed {
        path: path.into(),
        detail: one_line(&error.to_string(), 500),
    };
    let too_many = || PluginError::Malformed {
        path: path.into(),
        detail: format!("it has more than {NAMES_MAX} imports or exports"),
    };
    let truncated =
        || PluginError::Malformed { path: path.into(), detail: "it ends in the middle of a section".into() };
    let (mut imports, mut exports) = (Vec::new(), Vec::new());
    let mut parser = Parser::new(0);
    let mut rest = bytes;
    loop {
        let (payload, consumed) = match parser.parse(rest, true).map_err(malformed)? {
            wasmparser::Chunk::Parsed { payload, consumed } => (payload, consumed),
            wasmparser::Chunk::NeedMoreData(_) => return Err(truncated()),
        };
        rest = rest.get(consumed..).ok_or_else(truncated)?;
        match payload {
            Payload::Version { encoding: Encoding::Module, .. } => {
                return Err(PluginError::CoreModule { path: path.into() });
            }
            Payload::ModuleSection { unchecked_range, .. } | Payload::ComponentSection { unchecked_range, .. } => {
                rest = rest.get(unchecked_range.len()..).ok_or_else(truncated)?;
            }
            Payload::ComponentImportSection(section) => {
                if section.count() > NAMES_MAX {
                    return Err(too_many());
                }
                for import in section {
                    imports.push(one_line(import.map_err(malformed)?.name.name, NAME_BYTES_MAX));
                }
            }
            Payload::ComponentExportSection(section) => {
                if section.count() > NAMES_MAX {
                    return Err(too_many());
                }
                for export in section {
                    exports.push(one_line(export.map_err(malformed)?.name.name, NAME_BYTES_MAX));
                }
            }
            Payload::End(_) => return Ok((imports, exports)),
            _ => {}
        }
        if imports.len().max(exports.len()) > NAMES_MAX as usize {
            return Err(too_many());
        }
    }
}

fn check_magic(path: &Path, bytes: &[u8]) -> Result<(), PluginError> {
    if bytes.starts_with(b"\0asm") {
        return Ok(());
    }
    let text = bytes.trim_ascii_start();
    let found = if bytes.is_empty() {
        "the file is empty"
    } else if text.starts_with(b"(") || text.starts_with(b";;") {
        "it is WebAssembly text"
    } else if bytes.starts_with(b"\x7fELF") {
        "it is a compiled program or library"
    } else if std::str::from_utf8(&bytes[..bytes.len().min(256)]).is_ok() {
        "it is text"
    } else {
        "its first bytes are not `\\0asm`"
    };
    Err(PluginError::NotWasm { path: path.into(), found: found.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_major_and_minor() {
        assert_eq!(major_minor("0.1.7"), Some((0, 1)));
        assert_eq!(major_minor("1.0.0"), Some((1, 0)));
        for version in ["", "0.1", "0.1.0-rc1", "0.1.0.0", "a.b.c"] {
            assert_eq!(major_minor(version), None, "{version}");
        }
        assert_eq!(own_interface("cosmos:plugin/reward@0.1.0"), Some(("reward", "0.1.0")));
        assert_eq!(own_interface("cosmos:plugin/reward"), Some(("reward", "")));
        assert_eq!(own_interface("wasi:cli/run@0.2.0"), None);
    }

    #[test]
    fn the_file_is_judged_by_its_first_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.wasm");
        let found = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let error = ComponentFile::read(&path, 1000).unwrap_err();
            assert!(error.hint().is_some(), "{error}");
            error.to_string()
        };
        assert!(found(b"").contains("empty"));
        assert!(found(b" (component)").contains("WebAssembly text"));
        assert!(found(b"import os").contains("it is text"));
        assert!(found(b"\x7fELF\x02").contains("compiled program"));
        assert!(found(b"\xff\xfe").contains("first bytes"));
        assert!(found(b"\0asm").contains("not a valid component"));
        assert!(found(&[0; 1001]).contains("above the limit of 1000"));
        assert!(found(&wat::parse_str("(module)").unwrap()).contains("core WebAssembly module"));
        let missing = ComponentFile::read(&folder.path().join("no.wasm"), 1000).unwrap_err();
        assert!(missing.to_string().contains("no.wasm"));
        assert!(ComponentFile::read(folder.path(), 1000).is_err());
        assert!(ComponentFile::read(Path::new("/dev/zero"), 1000).unwrap_err().to_string().contains("not a file"));
    }
}
