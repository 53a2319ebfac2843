//! A plugin file is refused by name, or loads and runs within its limits.
//!
//! The input chooses a valid component (test guests in text, the shipped and the frozen plugins), and is then the script
//! of what to change in it; some inputs put a random module or component into it, and some are the file itself.
#![no_main]

use std::path::Path;
use std::sync::OnceLock;

use cosmos_plugin::{Capabilities, Limits, PluginHost, RewardSample};
use cosmos_testkit::mutate::mutate;
use libfuzzer_sys::arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;

struct Bench {
    host: PluginHost,
    folder: tempfile::TempDir,
    seeds: Vec<Vec<u8>>,
}

static BENCH: OnceLock<Bench> = OnceLock::new();

fn bench() -> Bench {
    let root = cosmos_testkit::repo_root();
    let mut seeds: Vec<Vec<u8>> = Vec::new();
    for folder in ["tests/frozen/v0.1.0", "plugins/dist"] {
        let Ok(entries) = std::fs::read_dir(root.join(folder)) else { continue };
        let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        let is_wasm = |path: &Path| path.extension().is_some_and(|ending| ending == "wasm");
        seeds.extend(paths.iter().filter(|path| is_wasm(path)).filter_map(|path| std::fs::read(path).ok()));
    }
    // Small ones compile in a millisecond, large ones in half a second.
    seeds.sort_by_key(Vec::len);
    assert!(!seeds.is_empty(), "run this in a checkout");
    let host = PluginHost::new(None).expect("a host without a cache");
    Bench { host, folder: tempfile::tempdir().expect("a temporary folder"), seeds }
}

/// A valid module or component that nobody would write.
fn random_section(script: &[u8]) -> Option<(u8, Vec<u8>)> {
    let mut entropy = Unstructured::new(script);
    if entropy.arbitrary::<bool>().ok()? {
        let component = wasm_smith::Component::new(&wasm_smith::Config::default(), &mut entropy).ok()?;
        return Some((4, component.to_bytes()));
    }
    let module = wasm_smith::Module::new(wasm_smith::Config::default(), &mut entropy).ok()?;
    Some((1, module.to_bytes()))
}

fn file(bench: &Bench, input: &[u8]) -> Vec<u8> {
    let Some(([kind, choice], script)) = input.split_first_chunk() else { return input.to_vec() };
    // The frozen text guests, which are small, most of the time.
    let few = bench.seeds.iter().filter(|seed| seed.len() < 20_000).count().max(1);
    let count = if kind % 16 == 0 { bench.seeds.len() } else { few };
    let seed = &bench.seeds[usize::from(*choice) % count];
    match kind % 8 {
        0 => script.to_vec(),
        1 => {
            let mut bytes = seed.clone();
            if let Some((id, section)) = random_section(script) {
                let mut len = section.len();
                bytes.push(id);
                while len > 0x7f {
                    bytes.push(len as u8 | 0x80);
                    len >>= 7;
                }
                bytes.push(len as u8);
                bytes.extend(section);
            }
            bytes
        }
        _ => mutate(seed, &bench.seeds[usize::from(*choice) / count % count], script),
    }
}

fuzz_target!(|input: &[u8]| {
    let bench = BENCH.get_or_init(bench);
    let path = bench.folder.path().join("fuzz.wasm");
    std::fs::write(&path, file(bench, input)).expect("a writable temporary folder");
    let limits = Limits {
        memory_bytes_max: 16 << 20,
        init_ms_max: 500,
        call_ms_max: 200,
        item_ms_max: 100,
        compile_ms_max: 10_000,
        compile_bytes_max: 1 << 30,
        ..Limits::default()
    };
    let Ok(plugin) = bench.host.load(&path, &[], limits, Capabilities::default()) else {
        // What no grant helps is refused here too, or described.
        let _ = bench.host.inspect(&path);
        return;
    };
    for offer in plugin.info().rewards.iter().take(2) {
        if let Ok(mut reward) = plugin.reward(&offer.name, "") {
            let sample = |completion: &str| RewardSample {
                prompt: "1 2=3:".into(),
                completion: completion.into(),
                reference: Some("{\"nums\": [1, 2], \"target\": 3}".into()),
                metadata: vec![("k".into(), "v".into())],
            };
            let scores = reward.score(&[sample("1+2=3"), sample("!"), sample("")]).expect("the host does not fail");
            assert_eq!(scores.len(), 3);
        }
    }
    for offer in plugin.info().datasets.iter().take(2) {
        if let Ok(mut dataset) = plugin.dataset(&offer.name, "") {
            let examples = dataset.get(&[0, u64::MAX]).expect("the host does not fail");
            assert_eq!(examples.len(), 2);
        }
    }
});
