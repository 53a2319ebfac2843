//! Components with something wrong in them, at random but mostly valid: the loader refuses them or runs them within
//! their limits. The fuzz target `component` does the same for as long as one likes.

use std::sync::OnceLock;

use cosmos_plugin::{Capabilities, Grant, Limits};
use cosmos_testkit::mutate::mutate;
use proptest::prelude::*;

use crate::guests::{Bench, samples};

/// The frozen guests but the largest, which take half a second to compile.
fn seeds() -> &'static [Vec<u8>] {
    static SEEDS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        ["well_behaved", "odd_scores", "table_rows", "log_flood", "wasi"]
            .map(|name| {
                let path = cosmos_testkit::repo_root().join(format!("tests/frozen/v0.1.0/{name}.wasm"));
                std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
            })
            .into()
    })
}

/// Limits so tight that no case takes long.
fn tight() -> Limits {
    Limits {
        memory_bytes_max: 16 << 20,
        init_ms_max: 300,
        call_ms_max: 200,
        item_ms_max: 100,
        compile_ms_max: 20_000,
        compile_bytes_max: 1 << 30,
        ..Limits::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_changed_the_host_stands(
        seed in 0..5usize,
        other in 0..5usize,
        script in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let bench = Bench::new();
        let path = bench.file("p", &mutate(&seeds()[seed], &seeds()[other], &script));
        let loaded = bench.host.load(&path, &[Grant::Log, Grant::Table], tight(), Capabilities::default());
        match loaded {
            Err(error) => prop_assert!(!error.to_string().chars().any(char::is_control), "{error:?}"),
            Ok(plugin) => {
                prop_assert!(!script.is_empty() || seed == 2 || !plugin.info().rewards.is_empty());
                for offer in plugin.info().rewards.iter().take(1) {
                    if let Ok(mut reward) = plugin.reward(&offer.name, "") {
                        prop_assert_eq!(reward.score(&samples(&["a", "!", ""])).unwrap().len(), 3);
                    }
                }
                for offer in plugin.info().datasets.iter().take(1) {
                    if let Ok(mut dataset) = plugin.dataset(&offer.name, "") {
                        prop_assert_eq!(dataset.get(&[0, 1]).unwrap().len(), 2);
                    }
                }
            }
        }
    }
}
