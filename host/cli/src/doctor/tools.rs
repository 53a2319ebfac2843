//! Caches and programs that some commands use.

use std::path::{Path, PathBuf};

use cosmos_author::manifest::Language;

use super::files::{answer, entries, program};
use super::{Finding, Status};

fn home() -> Option<PathBuf> {
    std::env::var_os("HOME").filter(|h| !h.is_empty()).map(PathBuf::from)
}

/// Whether files could be made in `folder`, or in the nearest folder above it that exists.
fn creatable(folder: &Path) -> bool {
    folder.ancestors().find(|f| f.exists()).is_some_and(|f| rustix::fs::access(f, rustix::fs::Access::WRITE_OK).is_ok())
}

fn cache_folder(id: &'static str, needed_for: &'static str, folder: Option<PathBuf>, fix: &str) -> Finding {
    let Some(folder) = folder else {
        return Finding::new(id, needed_for, Status::Problem, "no place for it: HOME is not set").fix(fix);
    };
    let shown = folder.display().to_string();
    let finding = if creatable(&folder) {
        Finding::new(id, needed_for, Status::Ok, shown.clone())
    } else {
        Finding::new(id, needed_for, Status::Problem, format!("{shown} cannot be written")).fix(fix)
    };
    finding.detail("path", shown).detail("exists", folder.is_dir())
}

pub fn plugin_cache() -> Finding {
    cache_folder(
        "plugin_cache",
        "compiled plugins (without it, each start compiles them again)",
        cosmos_plugin::PluginHost::default_cache_dir(),
        "set XDG_CACHE_HOME to a folder you own",
    )
}

pub fn hub_cache() -> Finding {
    let folder = std::env::var_os("HF_HUB_CACHE").map(PathBuf::from).or_else(|| {
        let root = std::env::var_os("HF_HOME").map(PathBuf::from).or_else(|| Some(home()?.join(".cache/huggingface")));
        Some(root?.join("hub"))
    });
    let count = |prefix: &str| {
        let names = folder.as_deref().map(|f| entries(f).collect::<Vec<_>>()).unwrap_or_default();
        names.iter().filter(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(prefix))).count()
    };
    let (models, datasets) = (count("models--"), count("datasets--"));
    let token = std::env::var_os("HF_TOKEN").is_some();
    let offline = std::env::var("HF_HUB_OFFLINE")
        .is_ok_and(|v| matches!(v.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on"));
    let endpoint = std::env::var("HF_ENDPOINT").unwrap_or_else(|_| "https://huggingface.co".to_owned());
    let mut finding =
        cache_folder("hub_cache", "models and datasets named by hub id", folder, "set HF_HOME to a folder you own");
    if finding.status == Status::Ok {
        let mode = if offline { ", offline" } else { "" };
        finding.found = format!("{}: {models} models, {datasets} datasets{mode}", finding.found);
    }
    finding
        .detail("models", models)
        .detail("datasets", datasets)
        .detail("token", token)
        .detail("offline", offline)
        .detail("endpoint", endpoint)
}

/// Whether plugins can be built from `language`; the search is `plugin build`'s own.
pub fn wasm(id: &'static str, language: Language, needed_for: &'static str) -> Finding {
    let needs = cosmos_author::toolchain::needs(language);
    let missing: Vec<&str> = needs.iter().filter(|need| need.found.is_none()).map(|need| need.what).collect();
    if !missing.is_empty() {
        let fix = format!("cosmos-host plugin toolchain {} --install", language.name());
        return Finding::new(id, needed_for, Status::Missing, format!("{} missing", missing.join(", "))).fix(fix);
    }
    // The last need is the one that makes components; the others are what it runs on.
    let found = needs.last().and_then(|need| need.found.clone()).unwrap_or_default();
    Finding::new(id, needed_for, Status::Ok, found)
}

pub fn redis() -> Finding {
    optional_program(
        "redis",
        "redis-server",
        &["--version"],
        "runs of several processes (one process needs no broker)",
        "apt-get install redis-server (6.2 or newer)",
    )
}

pub fn slurm() -> Finding {
    let finding = optional_program(
        "slurm",
        "sbatch",
        &["--version"],
        "jobs on a cluster",
        "on a cluster's login node; on one machine: apt-get install slurm-wlm munge",
    );
    finding.detail("inside_job", std::env::var_os("SLURM_JOB_ID").is_some())
}

fn optional_program(id: &'static str, name: &str, version: &[&str], needed_for: &'static str, fix: &str) -> Finding {
    match program(name) {
        None => Finding::new(id, needed_for, Status::Missing, format!("{name} is not in PATH"))
            .detail("path", None::<String>)
            .fix(fix),
        Some(path) => {
            let version = answer(&path, version).and_then(|text| text.lines().next().map(|l| l.trim().to_owned()));
            let found = version.clone().unwrap_or_else(|| path.display().to_string());
            Finding::new(id, needed_for, Status::Ok, found)
                .detail("path", path.display().to_string())
                .detail("version", version)
        }
    }
}
