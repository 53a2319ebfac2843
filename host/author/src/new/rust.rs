//! The Rust project: a crate with the SDK in its folder `sdk`.

use super::{File, Kind, cases, sdk, template};

/// Its files.
pub fn files(kind: Kind) -> Vec<File> {
    let code = match kind {
        Kind::Reward => template!["rust/reward.rs" => "src/lib.rs"],
        Kind::Dataset => template!["rust/dataset.rs" => "src/lib.rs"],
        Kind::Both => template!["rust/both.rs" => "src/lib.rs"],
        Kind::Environment => template!["rust/environment.rs" => "src/lib.rs"],
    };
    let mut files = code.to_vec();
    files.extend(cases(kind));
    files.extend(template![
        "rust/plugin.toml" => "plugin.toml",
        "rust/Cargo.toml" => "Cargo.toml",
        "rust/README.md" => "README.md",
    ]);
    files.extend(sdk![
        "rust/Cargo.toml" => "sdk/Cargo.toml",
        "rust/src/lib.rs" => "sdk/src/lib.rs",
        "rust/src/bindings.rs" => "sdk/src/bindings.rs",
        "rust/src/bridge.rs" => "sdk/src/bridge.rs",
        "rust/src/export.rs" => "sdk/src/export.rs",
        "rust/src/panics.rs" => "sdk/src/panics.rs",
        "rust/src/records.rs" => "sdk/src/records.rs",
        "rust/src/settings.rs" => "sdk/src/settings.rs",
    ]);
    files
}
