//! The golden suite: everything that software which nobody here wrote computed for us.

mod chat;
mod configs;
mod graders;
mod losses;
mod lr_schedules;
mod models;
mod wire;

/// Parts that a folder lacks are skipped by name; a folder that has none of them would let the whole suite pass on nothing.
#[test]
fn the_folder_has_golden_vectors() {
    let root = cosmos_testkit::golden_root();
    let parts = ["chat", "configs", "graders", "losses", "lr_schedules.json", "models", "wire"];
    assert!(parts.iter().any(|part| root.join(part).exists()), "{} has none of {parts:?}", root.display());
}
