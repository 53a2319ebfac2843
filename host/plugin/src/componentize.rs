//! A core module with wit-bindgen's metadata in it becomes a component, so that authors need no `wasm-tools`.

use std::path::Path;

use wasi_preview1_component_adapter_provider::{
    WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
};
use wit_component::ComponentEncoder;

use crate::PluginError;

/// A core module above this is refused: the largest known guests have a quarter of it.
const MODULE_BYTES_MAX: u64 = 256 << 20;

/// Packages of a module's world; a guest of ours has one, and those of WASI a dozen.
const PACKAGES_MAX: usize = 256;

/// Makes a component of a core module.
///
/// The module must carry the `component-type` section that wit-bindgen writes. Imports of WASI preview 1 (C guests
/// with wasi-libc) go through the standard adapter. The same module always gives the same bytes, and the result is
/// validated.
///
/// # Errors
/// [`PluginError::Componentize`] says what the module lacks.
pub fn componentize(core_module: &[u8]) -> Result<Vec<u8>, PluginError> {
    encode(core_module).map_err(|detail| PluginError::Componentize { module: "the core module".into(), detail })
}

/// [`componentize`] from a file to a file; the target is replaced by rename.
///
/// # Errors
/// As [`componentize`], and when a file cannot be read or written.
pub fn componentize_file(module: &Path, component: &Path) -> Result<(), PluginError> {
    let read_error = |source| PluginError::Read { path: module.into(), source };
    let bytes_count = std::fs::metadata(module).map_err(read_error)?.len();
    if bytes_count > MODULE_BYTES_MAX {
        return Err(PluginError::TooLarge { path: module.into(), bytes: bytes_count, bytes_max: MODULE_BYTES_MAX });
    }
    let bytes = std::fs::read(module).map_err(read_error)?;
    let encoded = encode(&bytes)
        .map_err(|detail| PluginError::Componentize { module: format!("`{}`", module.display()), detail })?;
    let write_error = |source| PluginError::Write { path: component.into(), source };
    let mut temporary = component.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    std::fs::write(&temporary, encoded).map_err(write_error)?;
    std::fs::rename(&temporary, component).map_err(|source| {
        // The half-made file is of no use; the rename's error is the one to report.
        let _ = std::fs::remove_file(&temporary);
        write_error(source)
    })
}

fn encode(core_module: &[u8]) -> Result<Vec<u8>, String> {
    let scan = scan_module(core_module)?;
    if !scan.has_world {
        return Err("it has no `component-type` section, so its world is unknown".into());
    }
    let mut encoder = ComponentEncoder::default();
    encoder.module(core_module).map_err(|e| format!("{e:#}"))?;
    if scan.wants_preview1 {
        encoder
            .adapter(WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER)
            .map_err(|e| format!("{e:#}"))?;
    }
    encoder.validate(true).encode().map_err(|e| format!("{e:#}"))
}

struct ModuleScan {
    has_world: bool,
    wants_preview1: bool,
}

/// Validates the module first: the encoder trusts its input more than this crate may.
fn scan_module(bytes: &[u8]) -> Result<ModuleScan, String> {
    wasmparser::Validator::new().validate_all(bytes).map_err(|e| e.to_string())?;
    let mut scan = ModuleScan { has_world: false, wants_preview1: false };
    for payload in wasmparser::Parser::new(0).parse_all(bytes) {
        match payload.map_err(|e| e.to_string())? {
            wasmparser::Payload::Version { encoding: wasmparser::Encoding::Component, .. } => {
                return Err("it is a component already".into());
            }
            wasmparser::Payload::CustomSection(section) if section.name().starts_with("component-type") => {
                check_packages(section.data())?;
                scan.has_world = true;
            }
            wasmparser::Payload::ImportSection(imports) => {
                for import in imports.into_imports() {
                    let import = import.map_err(|e| e.to_string())?;
                    scan.wants_preview1 |= import.module == WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME;
                }
            }
            _ => {}
        }
    }
    Ok(scan)
}

/// Refuses packages that use each other in a circle: the encoder would go round until the stack ends, and the process
/// with it.
fn check_packages(section: &[u8]) -> Result<(), String> {
    let decoded = wit_component::decode(section).map_err(|e| format!("its `component-type` section: {e:#}"))?;
    let resolve = decoded.resolve();
    if resolve.packages.len() > PACKAGES_MAX {
        let count = resolve.packages.len();
        return Err(format!("its `component-type` section has {count} packages, the limit is {PACKAGES_MAX}"));
    }
    // Packages whose own uses are all known to end are taken away until none is left, or only circles.
    let mut left: Vec<_> = resolve.packages.iter().map(|(id, _)| id).collect();
    loop {
        let (before, known) = (left.len(), left.clone());
        left.retain(|id| resolve.package_direct_deps(*id).any(|used| known.contains(&used)));
        match left.first() {
            None => return Ok(()),
            Some(id) if left.len() == before => {
                let name = &resolve.packages[*id].name;
                return Err(format!(
                    "its `component-type` section has packages that use each other in a circle, such as `{name}`"
                ));
            }
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_components_and_plain_modules_are_refused() {
        assert!(componentize(b"").is_err());
        assert!(componentize(b"\0asm").is_err());
        let component = wat::parse_str("(component)").unwrap();
        assert!(componentize(&component).unwrap_err().to_string().contains("already"));
        let module = wat::parse_str("(module (func (export \"f\")))").unwrap();
        let error = componentize(&module).unwrap_err();
        assert!(error.to_string().contains("component-type"), "{error}");
        assert!(error.hint().is_some());
    }
}
