//! The C project: one file of code, the SDK's header and sources beside it.

use super::{File, Kind, cases, sdk, template};

/// Its files.
pub fn files(kind: Kind) -> Vec<File> {
    let code = match kind {
        Kind::Reward => template!["c/reward.c" => "src/{{ident}}.c"],
        Kind::Dataset => template!["c/dataset.c" => "src/{{ident}}.c"],
        Kind::Both => template!["c/both.c" => "src/{{ident}}.c"],
        Kind::Environment => template!["c/environment.c" => "src/{{ident}}.c"],
    };
    let mut files = code.to_vec();
    files.extend(cases(kind));
    files.extend(template!["c/plugin.toml" => "plugin.toml", "c/README.md" => "README.md"]);
    files.extend(sdk![
        "c/cosmos_plugin.h" => "sdk/cosmos_plugin.h",
        "c/cosmos_plugin.c" => "sdk/cosmos_plugin.c",
        "c/bindings.h" => "sdk/bindings.h",
        "c/bindings.c" => "sdk/bindings.c",
    ]);
    files
}
