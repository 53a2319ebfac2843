//! `plugin inspect`.

use std::path::PathBuf;

use clap::ValueHint;
use cosmos_author::target::Target;
use cosmos_plugin::{Inspection, Offer};

use super::workbench::shown;
use crate::commands::TableOrJson;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A project's folder, or a component (.wasm)
    #[arg(value_name = "FOLDER|PLUGIN", default_value = ".", value_hint = ValueHint::AnyPath)]
    plugin: PathBuf,
    /// To read, or JSON for programs
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    format: TableOrJson,
}

/// Runs it.
pub fn run(args: Args, out: &mut Output) -> Result<Exit, Failure> {
    let target = Target::find(&args.plugin)?;
    let inspection = super::host()?.inspect(&target.component)?;
    match args.format {
        TableOrJson::Json => out.json(&inspection)?,
        TableOrJson::Table => show(&inspection, out)?,
    }
    Ok(Exit::Done)
}

fn show(inspection: &Inspection, out: &mut Output) -> Result<(), Failure> {
    let mut row = |name: &str, values: &[String]| {
        let none = ["none".to_owned()];
        let values = if values.is_empty() { &none } else { values };
        values.iter().enumerate().try_for_each(|(index, value)| {
            out.line(format!("{:<14}{value}", if index == 0 { name } else { "" }).trim_end())
        })
    };
    let one = |text: &str| [text.to_owned()];
    let info = inspection.description.as_ref();
    if let Some(info) = info {
        row("plugin", &one(&format!("{} {}", info.name, info.version)))?;
        row("summary", &one(&info.summary))?;
    }
    row("file", &one(&shown(&inspection.path)))?;
    row("size", &one(&format!("{} bytes", inspection.bytes)))?;
    row("sha256", &one(&inspection.sha256))?;
    row("world", &one(&format!("{} of cosmos:plugin@{}", inspection.world.name(), inspection.api_version)))?;
    row("imports", &inspection.imports)?;
    row("exports", &inspection.exports)?;
    if !inspection.unknown_imports.is_empty() {
        row("refused", &inspection.unknown_imports)?;
    }
    row("needs grants", &listed(&inspection.needs))?;
    if let Some(info) = info {
        row("wants grants", &listed(&info.wants))?;
        row("datasets", &offers(&info.datasets))?;
        row("rewards", &offers(&info.rewards))?;
        row("environments", &info.environments)?;
        let schema = info.settings_schema.as_ref();
        let schema = schema.map(|s| serde_json::to_string_pretty(s).unwrap_or_else(|_| s.to_string()));
        let lines: Vec<String> = schema.iter().flat_map(|text| text.lines()).map(str::to_owned).collect();
        row("settings", &lines)?;
    }
    if let Some(error) = &inspection.description_error {
        row("silent", &one(error))?;
    }
    Ok(())
}

fn listed(grants: &[String]) -> Vec<String> {
    if grants.is_empty() { Vec::new() } else { vec![grants.join(", ")] }
}

/// Each name once, with all its roles.
fn offers(offers: &[Offer]) -> Vec<String> {
    let mut names: Vec<(&str, Vec<&str>)> = Vec::new();
    for offer in offers {
        match names.iter_mut().find(|(name, _)| *name == offer.name) {
            Some((_, roles)) => roles.push(&offer.role),
            None => names.push((&offer.name, vec![&offer.role])),
        }
    }
    names.into_iter().map(|(name, roles)| format!("{name} ({})", roles.join(", "))).collect()
}
