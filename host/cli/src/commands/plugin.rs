//! `plugin`: look at components, and try their rewards on recorded cases.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum, ValueHint};
use comfy_table::{Table, presets};
use cosmos_plugin::{Capabilities, Grant, Inspection, Limits, Plugin, PluginHost, componentize_file};

use crate::cases::{self, Case, Verdict};
use crate::commands::TableOrJson;
use crate::failure::{Exit, Failure};
use crate::output::Output;

/// What to do with a plugin.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what a component is, offers and wants, without granting it anything
    Inspect {
        /// Component file (.wasm)
        #[arg(value_hint = ValueHint::FilePath)]
        plugin: PathBuf,
        /// To read, or JSON for programs
        #[arg(long, value_name = "FORMAT", default_value = "table")]
        format: TableOrJson,
    },
    /// Say whether a run could load a component, and which grants it would need
    Check {
        /// Component file (.wasm)
        #[arg(value_hint = ValueHint::FilePath)]
        plugin: PathBuf,
    },
    /// Make a component of a core WebAssembly module, as `cargo build --target wasm32-unknown-unknown` leaves it
    Build {
        /// Core module (.wasm)
        #[arg(value_hint = ValueHint::FilePath)]
        module: PathBuf,
        /// Component to write
        #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
        out: PathBuf,
    },
    /// Score recorded cases with a reward; exit 1 when a score differs from the expected one
    #[command(
        after_help = "A case is a line of JSON: {\"id\": …, \"completion\": \"…\", \"reference\": …, \"score\": 1.0}, and optionally \
                            \"prompt\" and \"metadata\". The plugin may log; datasets and chat templates stay closed to it."
    )]
    Test {
        /// Component file (.wasm)
        #[arg(value_hint = ValueHint::FilePath)]
        plugin: PathBuf,
        /// Reward by name, or by role: train, validation or filter [default: the only one]
        #[arg(long, value_name = "NAME")]
        reward: Option<String>,
        /// Cases (JSONL)
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        cases: PathBuf,
        /// Settings of the reward as JSON
        #[arg(long, value_name = "JSON", default_value = "{}")]
        settings: String,
        /// Read-only directory to grant, as `dir:/path:ro`. May be repeated
        #[arg(long = "allow", value_name = "GRANT")]
        allow: Vec<String>,
        /// A table to read, or one JSON object a case
        #[arg(long, value_name = "FORMAT", default_value = "table")]
        format: CaseFormat,
    },
}

/// Forms of the verdicts.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum CaseFormat {
    Table,
    Jsonl,
}

/// Runs it.
pub fn run(command: Command, out: &mut Output) -> Result<Exit, Failure> {
    match command {
        Command::Inspect { plugin, format } => {
            let inspection = host()?.inspect(&plugin)?;
            match format {
                TableOrJson::Json => out.json(&inspection)?,
                TableOrJson::Table => show(&inspection, out)?,
            }
            Ok(Exit::Done)
        }
        Command::Check { plugin } => check(&host()?.inspect(&plugin)?, out),
        Command::Build { module, out: target } => {
            componentize_file(&module, &target)?;
            check(&host()?.inspect(&target)?, out)
        }
        Command::Test { plugin, reward, cases, settings, allow, format } => {
            let cases = cases::read(&cases)?;
            let host = host()?;
            let mut grants: Vec<Grant> = Vec::new();
            for text in host.inspect(&plugin)?.needs.iter().chain(&allow) {
                grants.push(text.parse()?);
            }
            let plugin = host.load(&plugin, &grants, Limits::default(), Capabilities::default())?;
            test(&plugin, reward.as_deref(), &settings, &cases, format, out)
        }
    }
}

fn host() -> Result<PluginHost, Failure> {
    Ok(PluginHost::new(PluginHost::default_cache_dir())?)
}

fn show(inspection: &Inspection, out: &mut Output) -> Result<(), Failure> {
    let list = |items: &[String]| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
    let mut rows = vec![
        ("file", inspection.path.display().to_string()),
        ("size", format!("{} bytes", inspection.bytes)),
        ("sha256", inspection.sha256.clone()),
        ("world", format!("{} of cosmos:plugin@{}", inspection.world.name(), inspection.api_version)),
        ("imports", list(&inspection.imports)),
        ("grants", list(&inspection.needs)),
    ];
    if !inspection.unknown_imports.is_empty() {
        rows.push(("refused", list(&inspection.unknown_imports)));
    }
    if let Some(info) = &inspection.description {
        let offers = |offers: &[cosmos_plugin::Offer]| {
            list(&offers.iter().map(|o| format!("{} ({})", o.name, o.role)).collect::<Vec<_>>())
        };
        rows.insert(0, ("plugin", format!("{} {}", info.name, info.version)));
        rows.insert(1, ("summary", info.summary.clone()));
        rows.push(("datasets", offers(&info.datasets)));
        rows.push(("rewards", offers(&info.rewards)));
        rows.push(("wants", list(&info.wants)));
        rows.push(("settings", info.settings_schema.as_ref().map_or("none".to_owned(), |s| s.to_string())));
    }
    if let Some(error) = &inspection.description_error {
        rows.push(("silent", error.clone()));
    }
    for (name, value) in rows {
        out.line(format!("{name:<9} {value}"))?;
    }
    Ok(())
}

fn check(inspection: &Inspection, out: &mut Output) -> Result<Exit, Failure> {
    let path = inspection.path.display();
    if !inspection.unknown_imports.is_empty() {
        let imports = inspection.unknown_imports.join("`, `");
        return Err(Failure::usage(format!("`{path}` imports `{imports}`, which this host never provides"))
            .with_hint("build it against the package in `wit/` alone"));
    }
    if let Some(error) = &inspection.description_error {
        return Err(Failure::usage(format!("`{path}` cannot describe itself: {error}")));
    }
    out.line(format!("{path}: ok, {} of cosmos:plugin@{}", inspection.world.name(), inspection.api_version))?;
    if !inspection.needs.is_empty() {
        let name = inspection.description.as_ref().map_or("NAME", |d| d.name.as_str());
        let allow: Vec<String> = inspection.needs.iter().map(|g| format!("{g:?}")).collect();
        out.line(format!(
            "a config that runs it grants what it imports:\n  [plugin.{name}]\n  allow = [{}]",
            allow.join(", ")
        ))?;
    }
    Ok(Exit::Done)
}

fn test(
    plugin: &Plugin,
    reward: Option<&str>,
    settings: &str,
    cases: &[Case],
    format: CaseFormat,
    out: &mut Output,
) -> Result<Exit, Failure> {
    let name = cases::reward_name(plugin.info(), reward)?;
    let mut reward = plugin.reward(&name, settings)?;
    let verdicts = cases::judge(&mut reward, cases)?;
    match format {
        CaseFormat::Jsonl => verdicts.iter().try_for_each(|v| out.json_line(v))?,
        CaseFormat::Table => table(&verdicts, out)?,
    }
    let wrong = verdicts.iter().filter(|v| !v.agrees()).count();
    if wrong == 0 {
        return Ok(Exit::Done);
    }
    Err(Failure::failed(format!("{wrong} of {} cases differ from their expected score", verdicts.len())))
}

fn table(verdicts: &[Verdict], out: &mut Output) -> Result<(), Failure> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(["id", "score", "expected", ""]);
    let number = |score: Option<f64>| score.map_or_else(|| "-".to_owned(), |s| s.to_string());
    for verdict in verdicts {
        let remark = match (&verdict.error, verdict.agrees()) {
            (Some(error), _) => error.as_str(),
            (None, false) => "differs",
            (None, true) => "",
        };
        let id = verdict.id.as_str().map_or_else(|| verdict.id.to_string(), str::to_owned);
        table.add_row([id, number(verdict.score), number(verdict.expected), remark.to_owned()]);
    }
    for line in table.lines() {
        out.line(line.trim_end())?;
    }
    Ok(())
}
