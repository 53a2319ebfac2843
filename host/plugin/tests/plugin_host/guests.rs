//! Test guests: text from `tests/guests` made into components without any WebAssembly toolchain.

use std::path::PathBuf;

use cosmos_plugin::{Capabilities, Grant, Limits, Plugin, PluginError, PluginHost, Reward, RewardSample};
use wit_component::StringEncoding;
use wit_parser::Resolve;

/// The contract's text.
pub fn wit() -> String {
    wit_of("0.1.0")
}

/// The contract's text of a version.
pub fn wit_of(version: &str) -> String {
    let folder = cosmos_testkit::repo_root().join("wit").join(format!("since-v{version}"));
    std::fs::read_to_string(folder.join("plugin.wit")).unwrap()
}

pub fn text(name: &str) -> String {
    std::fs::read_to_string(cosmos_testkit::repo_root().join("tests/guests").join(format!("{name}.wat"))).unwrap()
}

/// The core module of a hostile reward. An export that the guest brings itself is left out of the shared part.
pub fn reward_module(name: &str) -> String {
    let guest = text(name);
    let kept = |part: &&str| {
        ["(func (export \"cabi_realloc\")", "(func (export \"cabi_post_"]
            .iter()
            .all(|export| !(part.contains(export) && guest.contains(export)))
    };
    let base = text("reward_base");
    let base: Vec<&str> = base.split("\n\n").filter(kept).collect();
    format!("(module\n{guest}\n{}\n)", base.join("\n\n"))
}

/// A core module in text, with a world of `wit` embedded, as a component.
pub fn component(module: &str, wit: &str, world: &str) -> Vec<u8> {
    cosmos_plugin::componentize(&embedded(module, wit, world)).unwrap()
}

/// A core module in text with a world of `wit` embedded, as wit-bindgen leaves it.
pub fn embedded(module: &str, wit: &str, world: &str) -> Vec<u8> {
    let mut resolve = Resolve::default();
    let package = resolve.push_str("plugin.wit", wit).unwrap();
    let world = resolve.select_world(&[package], Some(world)).unwrap();
    let mut bytes = wat::parse_str(module).unwrap_or_else(|error| panic!("{error}"));
    wit_component::embed_component_metadata(&mut bytes, &resolve, world, StringEncoding::UTF8).unwrap();
    bytes
}

/// A hostile reward built against another version of the contract.
pub fn reward_component_of(name: &str, version: &str) -> Vec<u8> {
    // The descriptions differ by a list that is empty here, and the memory behind the older one is zero.
    let module = reward_module(name).replace("@0.1.0", &format!("@{version}"));
    component(&module, &wit_of(version), "reward-plugin")
}

pub fn reward_component(name: &str) -> Vec<u8> {
    component(&reward_module(name), &wit(), "reward-plugin")
}

/// A reward that opens sockets: the contract's world with those imports.
pub fn sockets_component() -> Vec<u8> {
    let sockets = std::fs::read_to_string(cosmos_testkit::repo_root().join("tests/guests/sockets.wit")).unwrap();
    let imports = ["instance-network", "tcp-create-socket", "tcp", "udp-create-socket", "udp", "ip-name-lookup"]
        .map(|interface| format!("  import wasi:sockets/{interface}@0.2.0;\n"));
    let world = "world reward-plugin {\n";
    let wit = wit().replace(world, &format!("{world}{}", imports.concat())) + &sockets;
    component(&reward_module("sockets"), &wit, "reward-plugin")
}

/// Limits that make the tests quick, and still leave a loaded machine some air.
pub fn quick() -> Limits {
    Limits { call_ms_max: 1000, item_ms_max: 500, init_ms_max: 2000, ..Limits::default() }
}

/// A host without a cache, and a folder for files.
pub struct Bench {
    pub host: PluginHost,
    pub folder: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self { host: PluginHost::new(None).unwrap(), folder: tempfile::tempdir().unwrap() }
    }

    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.folder.path().join(format!("{name}.wasm"));
        std::fs::write(&path, bytes).unwrap();
        path
    }

    pub fn load_with(&self, name: &str, grants: &[Grant], limits: Limits) -> Result<Plugin, PluginError> {
        self.host.load(&self.file(name, &reward_component(name)), grants, limits, Capabilities::default())
    }

    /// The reward of the guest `name`.
    pub fn reward(&self, name: &str, limits: Limits) -> Reward {
        self.load_with(name, &[], limits).unwrap().reward("r", "").unwrap()
    }
}

pub fn samples(completions: &[&str]) -> Vec<RewardSample> {
    let sample = |completion: &&str| RewardSample {
        prompt: "p".into(),
        completion: completion.to_string(),
        reference: None,
        metadata: vec![("k".into(), "v".into())],
    };
    completions.iter().map(sample).collect()
}

/// Scores as text, failures as their reasons.
pub fn outcomes(reward: &mut Reward, completions: &[&str]) -> Vec<Result<f64, String>> {
    let results = reward.score(&samples(completions)).unwrap();
    assert_eq!(results.len(), completions.len());
    for (item, result) in results.iter().enumerate() {
        if let Err(failure) = result {
            assert_eq!(failure.item, item);
            assert!(failure.to_string().contains(&format!("plugin `{}` failed on item {item}: ", failure.plugin)));
        }
    }
    results.into_iter().map(|result| result.map(|score| score.value).map_err(|failure| failure.reason)).collect()
}
