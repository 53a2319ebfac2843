//! What `plugin test` and `plugin bench` share: the component with all that it imports, lent by this machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueHint;
use cosmos_author::cases::{self, Case};
use cosmos_author::folder_tables::FolderTables;
use cosmos_author::target::Target;
use cosmos_plugin::{Capabilities, Grant, TableSource};
use serde_json::{Map, Value};

use crate::failure::Failure;

/// What to try, and what it is lent. It is its author's own machine: all that the component imports is granted.
#[derive(Debug, clap::Args)]
pub struct Trial {
    /// A project's folder, or a component (.wasm)
    #[arg(value_name = "FOLDER|PLUGIN", default_value = ".", value_hint = ValueHint::AnyPath)]
    pub plugin: PathBuf,
    /// Cases (JSONL), a file or a folder of them [default: `cases` in the project's folder]
    #[arg(long, value_name = "FILE|FOLDER", value_hint = ValueHint::AnyPath)]
    pub cases: Option<PathBuf>,
    /// Settings, as JSON, of what no case gives settings to
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = settings)]
    pub settings: Map<String, Value>,
    /// Folder where datasets are looked for by their name, before the hub's cache and the hub
    #[arg(long, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub data: Option<PathBuf>,
    /// Model folder whose chat template is lent, and renders the cases' messages [default: ChatML for the messages]
    #[arg(long, short, value_name = "FOLDER", value_hint = ValueHint::DirPath)]
    pub model: Option<PathBuf>,
    /// Grant beside what the component imports, such as `dir:/path:ro`. May be repeated
    #[arg(long = "allow", value_name = "GRANT")]
    pub allow: Vec<String>,
}

fn settings(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("no JSON object: {error}"))
}

/// Everything that loading the component takes.
pub struct Loadable {
    /// The component and its project.
    pub target: Target,
    /// What it imports and what was allowed.
    pub grants: Vec<Grant>,
    /// From this machine.
    pub capabilities: Capabilities,
    /// A look at it, without a grant.
    pub inspection: cosmos_plugin::Inspection,
}

impl Trial {
    /// Finds the component and looks at what it needs.
    pub fn prepare(&self) -> Result<Loadable, Failure> {
        let target = Target::find(&self.plugin)?;
        let inspection = super::host()?.inspect(&target.component)?;
        let mut grants: Vec<Grant> = Vec::new();
        for text in inspection.needs.iter().chain(&self.allow) {
            grants.push(text.parse()?);
        }
        let mut capabilities = cosmos_run::lent(self.model.as_deref())?;
        if let Some(folder) = &self.data {
            if !folder.is_dir() {
                return Err(Failure::usage(format!("`{}` is no folder", folder.display()))
                    .with_hint("check the path after `--data`"));
            }
            let first = |otherwise| Arc::new(FolderTables::new(folder.clone(), otherwise)) as Arc<dyn TableSource>;
            capabilities.table = capabilities.table.map(first);
        }
        Ok(Loadable { target, grants, capabilities, inspection })
    }

    /// The cases; none when there is neither a project nor `--cases`.
    pub fn cases(&self, target: &Target) -> Result<Option<Vec<Case>>, Failure> {
        let files = target.case_files(self.cases.as_deref())?;
        Ok(files.map(|files| cases::read(&files)).transpose()?)
    }
}

/// `path` as the user would write it from here.
pub fn shown(path: &Path) -> String {
    path.strip_prefix(".").unwrap_or(path).display().to_string()
}
