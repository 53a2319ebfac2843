//! A plugin file is refused by name, or inspected without running away.
#![no_main]

use std::sync::OnceLock;

use cosmos_plugin::PluginHost;
use libfuzzer_sys::fuzz_target;

static HOST: OnceLock<(PluginHost, tempfile::TempDir)> = OnceLock::new();

fuzz_target!(|bytes: &[u8]| {
    let (host, folder) = HOST.get_or_init(|| {
        (PluginHost::new(None).expect("a host without a cache"), tempfile::tempdir().expect("a temporary folder"))
    });
    let path = folder.path().join("fuzz.wasm");
    std::fs::write(&path, bytes).expect("a writable temporary folder");
    let _ = host.inspect(&path);
});
