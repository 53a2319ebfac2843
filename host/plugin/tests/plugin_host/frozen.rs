//! What was published stays: the WIT packages do not change, and components built against them load and answer as they
//! did. When one of these tests fails, the host is wrong, not the test.

use std::path::PathBuf;
use std::sync::Arc;

use cosmos_plugin::{Capabilities, Grant, Limits, Plugin, PluginHost, Prompt, TableRequest, TableRows, TableSource};
use sha2::{Digest, Sha256};

use crate::guests::{outcomes, samples};

fn sha256(path: &str) -> String {
    let bytes = std::fs::read(cosmos_testkit::repo_root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_published_package_does_not_change() {
    for (path, hash) in [
        ("wit/since-v0.1.0/plugin.wit", "2dbc86fe3e4a837c2d47b1995a9ad37c1afee36e6ac595d3c8879a0ca3bec3b2"),
        ("wit/since-v0.2.0/plugin.wit", "040254061ea9e76176be78de03b1e5f2cbb6cad9811369597ca449162e78a96c"),
    ] {
        assert_eq!(
            sha256(path),
            hash,
            "`{path}` is published: put it back, and make a new folder for what is new (docs/plugin-api.md says how)"
        );
    }
}

#[test]
fn the_frozen_components_are_those_that_were_built_then() {
    for (name, hash) in [
        ("countdown", "f198884e8f161df8a8841ea476e2e88b4d9a0b4abaca830bd495dc8c380cb0f8"),
        ("log_flood", "cdbe52b0e382ad2e32f9a8726f9bbdbb146a2732ea11c49f9b7b432aa280c3f6"),
        ("odd_scores", "03a5f02ea4eabcce02054e546247827f451ba332119c546a96aa355b5d671058"),
        ("table_rows", "e05455e4fa7f3444396720c401bcaa331547c355aca620b7b6d76472211e2d80"),
        ("wasi", "9d13e32c0f55ed863af70250a97c28a0c898160ffa47d849232aab269e28a7fc"),
        ("well_behaved", "9ac90cd1e971c0e775f73d67587c695ce385f58fe73cb16ed75feae151db5e08"),
    ] {
        assert_eq!(sha256(&format!("tests/frozen/v0.1.0/{name}.wasm")), hash, "{name}: take it back from the history");
    }
}

fn path(name: &str) -> PathBuf {
    cosmos_testkit::repo_root().join("tests/frozen/v0.1.0").join(format!("{name}.wasm"))
}

fn load(name: &str, grants: &[Grant], capabilities: Capabilities) -> Plugin {
    let host = PluginHost::new(None).unwrap();
    assert_eq!(host.inspect(&path(name)).unwrap().api_version, "0.1.0");
    host.load(&path(name), grants, Limits::default(), capabilities).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn countdown_of_0_1_0_gives_the_same_examples_and_scores() {
    let plugin = load("countdown", &[], Capabilities::default());
    assert_eq!((plugin.info().name.as_str(), plugin.info().version.as_str()), ("countdown", "0.1.0"));
    let settings = r#"{"dataset":{"name":"","test_size":null},"custom":{"countdown":{"max":6,"seed":3}}}"#;
    let mut recorded = String::new();
    for name in ["train", "validation"] {
        let mut dataset = plugin.dataset(name, settings).unwrap();
        recorded += &format!("{name} {}\n", dataset.len());
        for example in dataset.get(&[0, 1, 5]).unwrap() {
            let example = example.unwrap();
            let Prompt::Text(prompt) = &example.prompt else { panic!("{example:?}") };
            recorded += &format!(
                "{prompt} | {} | {} | {:?}\n",
                example.reference.as_deref().unwrap_or("-"),
                example.response.as_deref().unwrap_or("-"),
                example.metadata
            );
        }
    }
    let mut reward = plugin.reward("countdown", settings).unwrap();
    let mut cases = samples(&["(3+5)*2=16", "3+5*2=16", "no idea", "<answer>2*(5+3)=16</answer>", "3+5+2=10"]);
    for case in &mut cases {
        case.reference = Some(r#"{"nums": [3, 5, 2], "target": 16}"#.into());
    }
    for score in reward.score(&cases).unwrap() {
        let score = score.unwrap();
        recorded += &format!("{} {:?}\n", score.value, score.metrics);
    }
    let file = path("countdown").with_extension("txt");
    let expected = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    assert_eq!(recorded, expected, "{recorded}");
}

struct Three;

impl TableSource for Three {
    fn open(&self, source: &TableRequest) -> Result<Box<dyn TableRows>, String> {
        if source.name == "data" { Ok(Box::new(Three)) } else { Err(format!("no table `{}`", source.name)) }
    }
}

impl TableRows for Three {
    fn len(&self) -> u64 {
        3
    }

    fn columns(&self) -> Vec<String> {
        vec!["n".into()]
    }

    fn read(&self, start: u64, count: u32, _: &[String]) -> Result<Vec<String>, String> {
        Ok((start..start + u64::from(count)).map(|n| format!("{{\"n\":{n}}}")).collect())
    }
}

#[test]
fn the_text_guests_of_0_1_0_answer_as_they_did() {
    let reward = |name: &str, grants: &[Grant]| load(name, grants, Capabilities::default()).reward("r", "{}").unwrap();
    let scores = outcomes(&mut reward("well_behaved", &[]), &["?", "bb", "", "ümlaut"]);
    assert_eq!(scores, [Err("no\\nidea".into()), Ok(2.0), Ok(0.0), Ok(7.0)]);
    let scores = outcomes(&mut reward("odd_scores", &[]), &["n", "aa"]);
    assert_eq!(scores, [Err("the score is NaN".into()), Ok(2.0)]);
    let mut wasi = reward("wasi", &[]);
    for (completion, score) in [("environment", 0.0), ("clock", 176_722.0), ("monotonic", 0.0), ("directory", 8.0)] {
        assert_eq!(outcomes(&mut wasi, &[completion]), [Ok(score)], "{completion}");
    }
    // Seeded randomness: a reward that draws replays bit for bit under every later host.
    assert_eq!(outcomes(&mut wasi, &["random"]), [Ok(RANDOM)]);
    assert_eq!(outcomes(&mut reward("log_flood", &[Grant::Log]), &["x"]), [Ok(1.0)]);

    let capabilities = Capabilities { table: Some(Arc::new(Three)), chat: None };
    let plugin = load("table_rows", &[Grant::Table], capabilities);
    let mut rows = plugin.dataset("d", "").unwrap();
    assert_eq!(rows.len(), 3);
    let texts: Vec<_> = rows.get(&[2, 0]).unwrap().into_iter().map(|example| example.unwrap().prompt).collect();
    assert_eq!(texts, [Prompt::Text("{\"n\":2}".into()), Prompt::Text("{\"n\":0}".into())]);
}

/// What the guest `wasi` drew when it was frozen.
const RANDOM: f64 = 26873.0;
