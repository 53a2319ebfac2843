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
    let dir = |path: std::path::PathBuf| Grant::Dir { path };
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
    assert!(reason.contains("its last words: Traceback: /   it broke"), "{reason}");
    let results = outcomes(&mut reward, &["x"]);
    assert!(results[0].as_ref().unwrap_err().contains("exit code"), "{results:?}");
}

#[test]
fn a_core_module_gives_the_same_component_every_time() {
    assert_eq!(crate::guests::reward_component("wasi"), crate::guests::reward_component("wasi"));
}

#[test]
fn a_granted_directory_is_read_only_and_has_no_way_out() {
    let bench = Bench::new();
    let outside = bench.folder.path().join("outside");
    let granted = bench.folder.path().join("granted");
    std::fs::create_dir_all(granted.join("inner")).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("secret"), "s").unwrap();
    std::fs::write(granted.join("data"), "d").unwrap();
    std::fs::write(granted.join("inner/more"), "m").unwrap();
    let link = |target: &std::path::Path, name: &str| std::os::unix::fs::symlink(target, granted.join(name)).unwrap();
    link(&outside.join("secret"), "link");
    link("../outside".as_ref(), "folder");
    link("data".as_ref(), "within");
    link("/proc/self/root".as_ref(), "root");

    let plugin = bench.load_with("files", &[Grant::Dir { path: granted.clone() }], quick()).unwrap();
    let mut reward = plugin.reward("r", "").unwrap();
    let mut attempt = |what: &str| outcomes(&mut reward, &[what])[0].clone().unwrap();
    let read = |byte: u8| 1000.0 + f64::from(byte);
    for (path, byte) in [("data", b'd'), ("inner/more", b'm'), ("inner/../data", b'd'), ("within", b'd')] {
        assert_eq!(attempt(&format!("r{path}")), read(byte), "{path}");
    }
    let absolute = outside.join("secret");
    let ways_out = [
        "../outside/secret",
        "inner/../../outside/secret",
        absolute.to_str().unwrap(),
        "link",
        "folder/secret",
        "root/etc/passwd",
        "/etc/passwd",
        "./.././granted/../outside/secret",
    ];
    for path in ways_out {
        let error = attempt(&format!("r{path}"));
        assert!(error > 0.0 && error < 1000.0, "{path} was read: {error}");
    }
    for change in ["wdata", "cnew", "udata", "dnew", "lnew", "tdata", "uinner/more", "clink", "wfolder/secret"] {
        let error = attempt(change);
        assert!(error > 0.0 && error < 1000.0, "{change}: {error}");
    }
    assert_eq!(std::fs::read_dir(&granted).unwrap().count(), 6);
    assert_eq!(std::fs::read(granted.join("data")).unwrap(), b"d");
    assert_eq!(std::fs::read(outside.join("secret")).unwrap(), b"s");
}
