//! A config file is refused with a place, or resolves to a fixed point.
#![no_main]

use cosmos_config::ConfigFile;
use libfuzzer_sys::fuzz_target;

const NOW: &str = "20260102030405";

fuzz_target!(|text: &str| {
    let Ok(file) = ConfigFile::parse("fuzz.toml", text) else { return };
    let Ok(resolved) = file.resolve(NOW) else { return };
    // An empty file has no start time, but what is written of it has a `[train]`, which gets one.
    if resolved.config.train.timestamp.is_empty() {
        return;
    }
    let written = resolved.to_toml().expect("what was read can be written");
    let again = ConfigFile::parse("again.toml", &written).expect("what we wrote is TOML").resolve(NOW).expect("and still right");
    assert_eq!(resolved.to_json(), again.to_json());
});
