//! Guests with the C library's imports see a machine without files, network, environment or time.

use std::time::{Duration, Instant};

use cosmos_plugin::Grant;

use crate::guests::{Bench, outcomes, quick};

#[test]
fn the_world_outside_is_fixed_and_empty() {
    let bench = Bench::new();
    let mut reward = bench.reward("wasi", quick());
    let mut one = |completion: &str| outcomes(&mut reward, &[completion])[0].clone();
    assert_eq!(one("environment"), Ok(0.0));
    assert_eq!(one("clock"), Ok(176_722.0));
    assert_eq!(one("monotonic"), Ok(0.0));
    // 8: bad file descriptor, there is no preopened directory.
    assert_eq!(one("directory"), Ok(8.0));
    let drawn = one("random").unwrap();
    assert_eq!(one("random"), Ok(drawn));
    assert_eq!(outcomes(&mut bench.reward("wasi", quick()), &["random"]), [Ok(drawn)]);
}

#[test]
fn a_granted_directory_is_there_and_a_missing_one_is_an_error() {
    let bench = Bench::new();
    let dir = |path: std::path::PathBuf| Grant::Dir { path, read_only: true };
    let plugin = bench.load_with("wasi", &[dir(bench.folder.path().into())], quick()).unwrap();
    assert_eq!(outcomes(&mut plugin.reward("r", "").unwrap(), &["directory"]), [Ok(0.0)]);
    let error = bench.load_with("wasi", &[dir(bench.folder.path().join("missing"))], quick()).unwrap_err();
    assert!(error.to_string().contains("missing") && error.to_string().contains("cannot be opened"), "{error}");
}

#[test]
fn a_sleeping_guest_is_woken_by_its_deadline() {
    let started = Instant::now();
    let mut reward = Bench::new().reward("wasi", quick());
    let results = outcomes(&mut reward, &["zzz"]);
    assert!(results[0].as_ref().unwrap_err().contains("took longer than 500 ms"), "{results:?}");
    assert_eq!(outcomes(&mut reward, &["environment"]), [Ok(0.0)]);
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn the_reason_of_a_trap_has_the_guests_last_words() {
    let mut reward = Bench::new().reward("wasi", quick());
    let results = outcomes(&mut reward, &["w"]);
    let reason = results[0].as_ref().unwrap_err();
    assert!(reason.contains("its last words:   it broke"), "{reason}");
    let results = outcomes(&mut reward, &["x"]);
    assert!(results[0].as_ref().unwrap_err().contains("exit code"), "{results:?}");
}

#[test]
fn a_core_module_gives_the_same_component_every_time() {
    assert_eq!(crate::guests::reward_component("wasi"), crate::guests::reward_component("wasi"));
}
