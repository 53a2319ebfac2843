//! The JavaScript project.

use super::{File, Kind, sdk, template};

/// Its files.
pub fn files(kind: Kind) -> Vec<File> {
    let mut files = Vec::new();
    files.extend(template![
        "js/plugin.toml" => "plugin.toml",
        "js/package.json" => "package.json",
        "js/jsconfig.json" => "jsconfig.json",
        "js/README.md" => "README.md",
    ]);
    files.extend(match kind {
        Kind::Reward => template!["js/app_reward.js" => "app.js"],
        Kind::Dataset => template!["js/app_dataset.js" => "app.js"],
        Kind::Both => template!["js/app_both.js" => "app.js"],
        Kind::Environment => template!["js/app_environment.js" => "app.js"],
    });
    if matches!(kind, Kind::Reward | Kind::Both) {
        files.extend(template!["js/cases_reward.jsonl" => "cases/reward.jsonl"]);
    }
    if matches!(kind, Kind::Dataset | Kind::Both) {
        files.extend(template!["js/cases_dataset.jsonl" => "cases/dataset.jsonl"]);
    }
    if kind == Kind::Environment {
        files.extend(template!["js/cases_environment.jsonl" => "cases/environment.jsonl"]);
    }
    files.extend(sdk![
        "javascript/bridge.js" => "sdk/bridge.js",
        "javascript/cosmos-plugin.d.ts" => "sdk/cosmos-plugin.d.ts",
        "javascript/cosmos-plugin.js" => "sdk/cosmos-plugin.js",
        "javascript/definition.js" => "sdk/definition.js",
        "javascript/errors.js" => "sdk/errors.js",
        "javascript/host.js" => "sdk/host.js",
        "javascript/package.json" => "sdk/package.json",
        "javascript/settings.js" => "sdk/settings.js",
    ]);
    files
}
