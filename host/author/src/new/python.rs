//! The Python project.

use super::{File, Kind, sdk, template};

/// Its files.
pub fn files(kind: Kind) -> Vec<File> {
    let mut files = Vec::new();
    files.extend(template![
        "python/plugin.toml" => "plugin.toml",
        "python/pyproject.toml" => "pyproject.toml",
        "python/README.md" => "README.md",
    ]);
    files.extend(match kind {
        Kind::Reward => template!["python/app_reward.py" => "app.py"],
        Kind::Dataset => template!["python/app_dataset.py" => "app.py"],
        Kind::Both => template!["python/app_both.py" => "app.py"],
        Kind::Environment => template!["python/app_environment.py" => "app.py"],
    });
    if matches!(kind, Kind::Reward | Kind::Both) {
        files.extend(template!["python/cases_reward.jsonl" => "cases/reward.jsonl"]);
    }
    if matches!(kind, Kind::Dataset | Kind::Both) {
        files.extend(template!["python/cases_dataset.jsonl" => "cases/dataset.jsonl"]);
    }
    if kind == Kind::Environment {
        files.extend(template!["python/cases_environment.jsonl" => "cases/environment.jsonl"]);
    }
    files.extend(sdk![
        "python/cosmos_plugin/__init__.py" => "sdk/cosmos_plugin/__init__.py",
        "python/cosmos_plugin/_bridge.py" => "sdk/cosmos_plugin/_bridge.py",
        "python/cosmos_plugin/_errors.py" => "sdk/cosmos_plugin/_errors.py",
        "python/cosmos_plugin/_host.py" => "sdk/cosmos_plugin/_host.py",
        "python/cosmos_plugin/_registry.py" => "sdk/cosmos_plugin/_registry.py",
        "python/cosmos_plugin/_settings.py" => "sdk/cosmos_plugin/_settings.py",
        "python/cosmos_plugin/_types.py" => "sdk/cosmos_plugin/_types.py",
        "python/cosmos_plugin/chat_template.py" => "sdk/cosmos_plugin/chat_template.py",
        "python/cosmos_plugin/log.py" => "sdk/cosmos_plugin/log.py",
        "python/cosmos_plugin/py.typed" => "sdk/cosmos_plugin/py.typed",
        "python/cosmos_plugin/table.py" => "sdk/cosmos_plugin/table.py",
        "python/cosmos_plugin/testing.py" => "sdk/cosmos_plugin/testing.py",
    ]);
    files
}
