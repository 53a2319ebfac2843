//! `plugin check`.

use std::path::PathBuf;

use clap::ValueHint;
use cosmos_author::target::Target;
use cosmos_plugin::{Grant, Inspection};

use super::workbench::shown;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A project's folder, or a component (.wasm)
    #[arg(value_name = "FOLDER|PLUGIN", default_value = ".", value_hint = ValueHint::AnyPath)]
    plugin: PathBuf,
}

/// Runs it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let target = Target::find(&args.plugin)?;
    check(&super::host()?.inspect(&target.component)?, out)
}

/// Says whether a run could load the component, and what its config must grant.
pub fn check(inspection: &Inspection, out: &mut Output) -> Result<Exit, Failure> {
    let path = shown(&inspection.path);
    if !inspection.unknown_imports.is_empty() {
        let imports = inspection.unknown_imports.join("`, `");
        return Err(Failure::usage(format!("`{path}` imports `{imports}`, which this host never provides"))
            .with_hint("build it against the package in `wit/` alone: no HTTP, sockets or other host interfaces"));
    }
    let info = match (&inspection.description, &inspection.description_error) {
        (Some(info), _) => info,
        (None, error) => {
            let error = error.as_deref().unwrap_or("it says nothing");
            return Err(Failure::usage(format!("`{path}` cannot describe itself: {error}"))
                .with_hint("`metadata.describe` must return without settings and without any grant"));
        }
    };
    out.line(format!(
        "{path}: ok, {} {}, {} of cosmos:plugin@{}",
        info.name,
        info.version,
        inspection.world.name(),
        inspection.api_version
    ))?;
    // Directories are no import of their own, so only the plugin can say that it wants one.
    let dirs = info.wants.iter().filter(|want| matches!(want.parse(), Ok(Grant::Dir { .. })));
    let allow: Vec<String> = inspection.needs.iter().chain(dirs.clone()).map(|grant| format!("{grant:?}")).collect();
    if allow.is_empty() {
        out.line("It needs no grant.")?;
    } else {
        let name = toml_key(&info.name);
        out.line(format!(
            "A config that runs it grants what it imports:\n\n[plugin.{name}]\nallow = [{}]",
            allow.join(", ")
        ))?;
    }
    for note in notes(inspection, &info.wants) {
        out.line(format!("\nnote: {note}"))?;
    }
    Ok(Exit::Done)
}

/// Where what it says and what it imports are not the same.
fn notes(inspection: &Inspection, wants: &[String]) -> Vec<String> {
    let mut notes = Vec::new();
    for want in wants {
        let used = match want.parse() {
            Ok(Grant::Dir { .. }) => inspection.wasi,
            _ => inspection.needs.contains(want),
        };
        if !used {
            notes
                .push(format!("it wants `{want}`, but imports nothing that needs it: drop it from `wants`, or use it"));
        }
    }
    for need in inspection.needs.iter().filter(|need| !wants.contains(need)) {
        notes.push(format!(
            "it imports what `{need}` grants, but its `wants` does not name it: users read `wants` first"
        ));
    }
    notes
}

fn toml_key(name: &str) -> String {
    let bare = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
    if bare { name.to_owned() } else { format!("{name:?}") }
}
