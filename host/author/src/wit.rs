//! The WIT package, and the world that one project is built against.

use std::fmt::Write as _;
use std::path::Path;

use crate::error::{AuthorError, Result};
use crate::manifest::Manifest;
use crate::project::Project;

/// The published package that new plugins are built against.
pub const PACKAGE: &str = include_str!("../../../wit/since-v0.2.0/plugin.wit");
/// Its version.
pub const VERSION: &str = "0.2.0";
/// Name of the generated world.
pub const WORLD: &str = "app";

/// Writes the package and the project's world [`WORLD`] into `dir`, which is made if it is not there.
///
/// # Errors
/// A file cannot be written.
pub fn write(project: &Project, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(AuthorError::io("cannot make folder", dir))?;
    for (name, text) in [("plugin.wit", PACKAGE.to_owned()), ("app.wit", world(&project.manifest))] {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(AuthorError::io("cannot write", &path))?;
    }
    Ok(())
}

/// The world with exactly the manifest's imports and exports.
pub fn world(manifest: &Manifest) -> String {
    format!("package cosmos:plugin@{VERSION};\n\n{}", bare_world(manifest))
}

/// The package and the world in one text.
pub fn single_file(manifest: &Manifest) -> String {
    format!("{PACKAGE}\n{}", bare_world(manifest))
}

fn bare_world(manifest: &Manifest) -> String {
    let mut text = format!("world {WORLD} {{\n");
    // Writing to a String cannot fail.
    for import in &manifest.imports {
        let _ = writeln!(text, "  import {};", import.name());
    }
    text.push_str("  export metadata;\n");
    for export in &manifest.exports {
        let _ = writeln!(text, "  export {};", export.name());
    }
    text.push_str("}\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Export, Import, Language};

    #[test]
    fn the_world_has_what_the_manifest_names() {
        let manifest = Manifest {
            name: "x".into(),
            language: Language::C,
            sources: vec!["x.c".into()],
            sdk: "sdk".into(),
            exports: vec![Export::Reward, Export::Environment],
            imports: vec![Import::Log],
        };
        assert_eq!(
            world(&manifest),
            "package cosmos:plugin@0.2.0;\n\nworld app {\n  import log;\n  export metadata;\n  export reward;\n  export environment;\n}\n"
        );
        assert!(PACKAGE.starts_with(&format!("package cosmos:plugin@{VERSION};")));
    }
}
