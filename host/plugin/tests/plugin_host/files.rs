//! Files that are no plugins, each with its own error and hint; the cache; and bytes at random.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use cosmos_plugin::{Capabilities, Grant, Limits, PluginError, PluginHost, World};
use proptest::prelude::*;

use crate::guests::{
    Bench, component, embedded, outcomes, quick, reward_component, reward_component_of, reward_module, text, wit,
    wit_of,
};

fn load(bench: &Bench, bytes: &[u8]) -> PluginError {
    let path = bench.file("file", bytes);
    let error = bench.host.load(&path, &[], quick(), Capabilities::default()).unwrap_err();
    assert!(error.to_string().contains("file"), "{error}");
    assert!(error.hint().is_some(), "{error}");
    error
}

fn parse(text: &str) -> Vec<u8> {
    wat::parse_str(text).unwrap()
}

#[test]
fn each_wrong_file_has_its_own_error() {
    let bench = Bench::new();
    let good = reward_component("well_behaved");
    assert!(matches!(load(&bench, b""), PluginError::NotWasm { .. }));
    assert!(matches!(load(&bench, b"(component)"), PluginError::NotWasm { .. }));
    assert!(matches!(load(&bench, b"\0asm\x01\0\0\0"), PluginError::CoreModule { .. }));
    assert!(matches!(load(&bench, b"\0asm garbage"), PluginError::Malformed { .. }));
    assert!(matches!(load(&bench, &parse("(component)")), PluginError::WrongWorld { .. }));
    for cut in [9, 100, good.len() / 2, good.len() - 1] {
        let error = load(&bench, &good[..cut]);
        assert!(matches!(error, PluginError::Malformed { .. } | PluginError::WrongWorld { .. }), "{cut}: {error}");
    }
    let limits = Limits { component_bytes_max: 100, ..quick() };
    let error = bench.host.load(&bench.file("p", &good), &[], limits, Capabilities::default()).unwrap_err();
    assert!(matches!(error, PluginError::TooLarge { bytes_max: 100, .. }), "{error}");
    let error = bench.host.load(Path::new("/no/such.wasm"), &[], quick(), Capabilities::default()).unwrap_err();
    assert!(matches!(error, PluginError::Read { .. }), "{error}");
    // A pipe that nobody writes to, and a device without end.
    let pipe = bench.folder.path().join("pipe.wasm");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for path in [pipe.as_path(), Path::new("/dev/zero")] {
        let error = bench.host.load(path, &[], quick(), Capabilities::default()).unwrap_err();
        assert!(error.to_string().contains("it is not a file"), "{error}");
    }
}

#[test]
fn a_wrong_world_names_what_is_there_and_what_is_missing() {
    let bench = Bench::new();
    let world = |exports: &str| parse(&format!("(component (instance $i) {exports})"));
    let command = load(&bench, &world("(export \"wasi:cli/run@0.2.0\" (instance $i))"));
    assert!(command.to_string().contains("`wasi:cli/run@0.2.0`"), "{command}");
    let reward = "(export \"cosmos:plugin/reward@0.1.0\" (instance $i))";
    let metadata = "(export \"cosmos:plugin/metadata@0.1.0\" (instance $i))";
    assert!(load(&bench, &world(reward)).to_string().contains("`metadata` is missing"));
    assert!(load(&bench, &world(metadata)).to_string().contains("neither `dataset` nor `reward` nor `environment`"));
    let empty = load(&bench, &world(&format!("{reward} {metadata}")));
    assert!(matches!(empty, PluginError::WrongInterface { .. }), "{empty}");
    assert!(empty.to_string().contains("describe"), "{empty}");
    let other = "(import \"wasi:http/types@0.2.0\" (instance))";
    let error = load(&bench, &parse(&format!("(component {other} (instance $i) {reward} {metadata})")));
    assert!(matches!(error, PluginError::UnknownImport { .. }), "{error}");
}

#[test]
fn another_type_in_the_interface_is_found_before_the_first_sample() {
    let bench = Bench::new();
    let changed = wit().replace("summary: string,", "summary: string,\n    license: string,");
    let error = load(&bench, &component(&reward_module("well_behaved"), &changed, "reward-plugin"));
    assert!(matches!(error, PluginError::WrongInterface { .. }), "{error}");
}

#[test]
fn older_and_newer_packages_are_told_apart_and_patches_are_taken() {
    let bench = Bench::new();
    let of = |version: &str| {
        let module = reward_module("well_behaved").replace("@0.1.0", &format!("@{version}"));
        component(&module, &wit().replace("@0.1.0", &format!("@{version}")), "reward-plugin")
    };
    for (version, is_newer) in [("0.0.9", false), ("0.3.0", true), ("1.0.0", true)] {
        match load(&bench, &of(version)) {
            error @ PluginError::WrongVersion { newer, .. } => {
                assert_eq!(newer, is_newer);
                let served = format!("built against `cosmos:plugin@{version}`, this host serves 0.1.x and 0.2.x");
                assert!(error.to_string().contains(&served), "{error}");
                assert_eq!(error.hint().unwrap().contains("update the host"), is_newer);
            }
            error => panic!("{error}"),
        }
    }
    let path = bench.file("patch", &of("0.1.7"));
    let plugin = bench.host.load(&path, &[], quick(), Capabilities::default()).unwrap();
    assert_eq!(outcomes(&mut plugin.reward("r", "").unwrap(), &["abc"]), [Ok(3.0)]);
    assert_eq!(bench.host.inspect(&path).unwrap().api_version, "0.1.7");
}

#[test]
fn both_versions_of_the_contract_are_served() {
    let bench = Bench::new();
    for version in ["0.1.0", "0.2.0"] {
        let path = bench.file("p", &reward_component_of("well_behaved", version));
        let seen = bench.host.inspect(&path).unwrap();
        assert_eq!((seen.world, seen.api_version.as_str()), (World::RewardPlugin, version));
        let plugin = bench.host.load(&path, &[], quick(), Capabilities::default()).unwrap();
        assert_eq!(outcomes(&mut plugin.reward("r", "").unwrap(), &["abc"]), [Ok(3.0)]);
    }
    // The types of 0.1 under the name of 0.2 are neither.
    let module = reward_module("well_behaved").replace("@0.1.0", "@0.2.0");
    let error = load(&bench, &component(&module, &wit().replace("@0.1.0", "@0.2.0"), "reward-plugin"));
    assert!(matches!(error, PluginError::WrongInterface { .. }), "{error}");
}

#[test]
fn an_older_import_serves_a_newer_export() {
    let bench = Bench::new();
    let newer = wit_of("0.2.0");
    let log =
        "interface log { enum level { trace, debug, info, warn, error } write: func(level: level, message: string); }";
    let mixed = format!(
        "{newer}\npackage cosmos:mixed {{ world mixed {{\n import cosmos:plugin/log@0.1.0;\n export cosmos:plugin/metadata@0.2.0;\n export cosmos:plugin/reward@0.2.0;\n }} }}\npackage cosmos:plugin@0.1.0 {{ {log} }}"
    );
    let module = reward_module("log_flood").replace("@0.1.0", "@0.2.0");
    let module = module.replace("cosmos:plugin/log@0.2.0", "cosmos:plugin/log@0.1.0");
    let bytes = component(&module, &mixed, "cosmos:mixed/mixed");
    let path = bench.file("mixed", &bytes);
    let error = bench.host.load(&path, &[], quick(), Capabilities::default()).unwrap_err();
    assert!(error.to_string().contains("`cosmos:plugin/log@0.1.0`"), "{error}");
    let plugin = bench.host.load(&path, &[Grant::Log], quick(), Capabilities::default()).unwrap();
    assert_eq!(outcomes(&mut plugin.reward("r", "").unwrap(), &["abc"]), [Ok(3.0)]);
}

#[test]
fn versions_of_the_future_and_of_nobody_are_refused() {
    let bench = Bench::new();
    for (version, hint) in [
        ("0.0.1", "rebuild the plugin"),
        ("0.3.0", "update the host"),
        ("1.0.0", "update the host"),
        ("99.99.99", "update the host"),
        ("0.1.0-rc.1", "rebuild the plugin"),
    ] {
        let module = reward_module("well_behaved").replace("@0.1.0", &format!("@{version}"));
        let wit = wit().replace("@0.1.0", &format!("@{version}"));
        let error = load(&bench, &component(&module, &wit, "reward-plugin"));
        assert!(matches!(error, PluginError::WrongVersion { .. }), "{version}: {error}");
        assert!(
            error.to_string().contains(&format!("built against `cosmos:plugin@{version}`, this host serves ")),
            "{error}"
        );
        assert!(error.hint().unwrap().contains(hint), "{version}: {:?}", error.hint());
    }
}

#[test]
fn inspection_needs_no_grants() {
    let bench = Bench::new();
    let path = bench.file("rows", &component(&text("table_rows"), &wit(), "dataset-plugin"));
    let seen = bench.host.inspect(&path).unwrap();
    assert_eq!(
        (seen.world, seen.needs.as_slice(), seen.wasi),
        (World::DatasetPlugin, &["table".to_string()][..], false)
    );
    let description = seen.description.as_ref().unwrap();
    assert_eq!((description.name.as_str(), description.wants.as_slice()), ("rows", &["table".to_string()][..]));
    assert_eq!(seen.sha256.len(), 64);
    let json = serde_json::to_value(&seen).unwrap();
    assert_eq!(
        (&json["world"], &json["description"]["datasets"][0]["role"]),
        (&"dataset-plugin".into(), &"train".into())
    );
    let wasi = bench.host.inspect(&bench.file("wasi", &reward_component("wasi"))).unwrap();
    assert!(wasi.wasi && wasi.description.is_some() && wasi.unknown_imports.is_empty());
    let other = "(import \"wasi:http/types@0.2.0\" (instance)) (instance $i)";
    let exports = ["metadata", "reward"].map(|name| format!("(export \"cosmos:plugin/{name}@0.1.0\" (instance $i))"));
    let seen =
        bench.host.inspect(&bench.file("http", &parse(&format!("(component {other} {})", exports.concat())))).unwrap();
    assert_eq!(seen.unknown_imports, ["wasi:http/types@0.2.0"]);
    assert!(seen.description_error.unwrap().contains("never provides"));
    let seen = bench.host.inspect(&bench.file("start", &reward_component("trap_in_start"))).unwrap();
    assert!(seen.description_error.unwrap().contains("a panic, an abort"));
}

#[test]
fn the_cache_is_hit_repaired_and_refused() {
    let bench = Bench::new();
    let folder = bench.folder.path().join("cache");
    let path = bench.file("p", &reward_component("well_behaved"));
    let load = || {
        let host = PluginHost::new(Some(folder.clone())).unwrap();
        let plugin = host.load(&path, &[], quick(), Capabilities::default()).unwrap();
        // The plugin outlives its host.
        drop(host);
        assert_eq!(outcomes(&mut plugin.reward("r", "").unwrap(), &["abcd"]), [Ok(4.0)]);
        plugin.load_times()
    };
    let entries = || {
        let mut entries: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        entries
    };
    let times = load();
    assert!(times.compile_ms.is_some() && times.cached_ms.is_none(), "{times:?}");
    let [entry] = entries().try_into().unwrap();
    let modified = || std::fs::metadata(&entry).unwrap().modified().unwrap();
    let written = modified();
    let times = load();
    assert!(times.compile_ms.is_none() && times.cached_ms.is_some(), "{times:?}");
    assert_eq!(modified(), written, "the second start compiled again");

    let whole = std::fs::read(&entry).unwrap();
    for broken in [vec![], whole[..whole.len() / 2].to_vec(), [&whole[..], b"x"].concat(), vec![b'x'; 5000]] {
        // A new file each time: the code of a plugin that is just being dropped is still mapped from the old one.
        std::fs::remove_file(&entry).unwrap();
        std::fs::write(&entry, &broken).unwrap();
        load();
        assert_eq!(std::fs::read(&entry).unwrap(), whole, "a broken entry was not replaced");
    }
    std::fs::set_permissions(&entry, std::fs::Permissions::from_mode(0o666)).unwrap();
    load();
    assert_eq!(std::fs::metadata(&entry).unwrap().permissions().mode() & 0o777, 0o600);

    // Another stack limit is another engine, though not other code; another component is another entry.
    bench.file("p", &reward_component("panic"));
    load();
    assert_eq!(entries().len(), 2);

    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o770)).unwrap();
    assert!(matches!(PluginHost::new(Some(folder.clone())), Err(PluginError::CacheFolder { .. })));
}

#[test]
fn compiling_has_a_deadline() {
    let bench = Bench::new();
    let function = "(func (result i32) ".to_string() + &"i32.const 1 i32.popcnt drop ".repeat(40_000) + "i32.const 0)";
    let module = reward_module("well_behaved").replacen("(module", &format!("(module {function}"), 1);
    let path = bench.file("large", &component(&module, &wit(), "reward-plugin"));
    let limits = Limits { compile_ms_max: 1, ..quick() };
    let error = bench.host.load(&path, &[], limits, Capabilities::default()).unwrap_err();
    assert!(matches!(error, PluginError::CompileTimeout { ms_max: 1, .. }), "{error}");
    assert!(error.hint().unwrap().contains("compile_ms_max"));
}

#[test]
fn packages_that_use_each_other_in_a_circle_are_refused() {
    let bytes = embedded(&text("table_rows"), &wit(), "dataset-plugin");
    // An interface that is moved into another package uses the first one, which uses it.
    let (name, moved) = (b"cosmos:plugin/", b"cosmos:plugjn/");
    let places = (0..bytes.len() - name.len()).filter(|at| bytes[*at..].starts_with(name));
    let refused = places.filter_map(|at| {
        let mut bytes = bytes.clone();
        bytes[at..at + moved.len()].copy_from_slice(moved);
        cosmos_plugin::componentize(&bytes).err().map(|e| e.to_string())
    });
    let refused: Vec<String> = refused.collect();
    assert!(refused.iter().any(|error| error.contains("use each other in a circle")), "{refused:#?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), head in 0..3u8) {
        let magic: &[u8] = match head {
            0 => b"",
            1 => b"\0asm\x01\0\0\0",
            _ => b"\0asm\x0d\0\x01\0",
        };
        bytes.splice(0..0, magic.iter().copied());
        let bench = Bench::new();
        let path = bench.file("p", &bytes);
        prop_assert!(bench.host.load(&path, &[], quick(), Capabilities::default()).is_err());
        prop_assert!(bench.host.inspect(&path).is_err());
        prop_assert!(cosmos_plugin::componentize(&bytes).is_err());
    }

    #[test]
    fn mutated_core_modules_never_panic(changes in proptest::collection::vec((any::<u32>(), any::<u8>()), 1..6)) {
        let mut bytes = embedded(&text("table_rows"), &wit(), "dataset-plugin");
        for (at, byte) in changes {
            let at = at as usize % bytes.len();
            bytes[at] = byte;
        }
        let _ = cosmos_plugin::componentize(&bytes);
    }

    #[test]
    fn mutated_components_never_panic(changes in proptest::collection::vec((any::<u32>(), any::<u8>()), 1..6), cut in any::<u32>()) {
        let mut bytes = component(&text("table_rows"), &wit(), "dataset-plugin");
        for (at, byte) in changes {
            let at = at as usize % bytes.len();
            bytes[at] = byte;
        }
        if cut % 4 == 0 {
            bytes.truncate(cut as usize / 4 % bytes.len());
        }
        let bench = Bench::new();
        let path = bench.file("p", &bytes);
        if let Ok(plugin) = bench.host.load(&path, &[Grant::Table], quick(), Capabilities::default()) {
            for offer in &plugin.info().datasets {
                let _ = plugin.dataset(&offer.name, "");
            }
        }
        let _ = bench.host.inspect(&path);
    }
}
