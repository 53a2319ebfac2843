//! The plugins under `plugins/dist`, as a run uses them.

use std::path::PathBuf;

use cosmos_plugin::{Capabilities, Limits, Plugin, PluginHost, Prompt, RewardSample};

fn shipped(name: &str) -> Option<PathBuf> {
    let path = cosmos_testkit::repo_root().join("plugins/dist").join(format!("{name}.wasm"));
    if !path.exists() {
        eprintln!("skipped: {} is not built (plugins/build.sh)", path.display());
        return None;
    }
    Some(path)
}

fn countdown(path: &std::path::Path) -> Plugin {
    PluginHost::new(None).unwrap().load(path, &[], Limits::default(), Capabilities::default()).unwrap()
}

#[test]
fn countdown_gives_examples_and_grades_them() {
    let Some(path) = shipped("countdown") else { return };
    let plugin = countdown(&path);
    assert_eq!(plugin.info().name, "countdown");
    let mut validation = plugin.dataset("validation", "").unwrap();
    assert!(validation.len() > 70, "{}", validation.len());
    let indices: Vec<u64> = (0..70).collect();
    let examples: Vec<_> = validation.get(&indices).unwrap().into_iter().map(Result::unwrap).collect();
    assert_eq!(examples.len(), 70);
    let mut reward = plugin.reward("countdown", "").unwrap();
    let sample = |example: &cosmos_plugin::Example, completion: &str| RewardSample {
        prompt: match &example.prompt {
            Prompt::Text(text) => text.clone(),
            Prompt::Messages(messages) => messages.iter().map(|message| message.content.as_str()).collect(),
        },
        completion: completion.into(),
        reference: example.reference.clone(),
        metadata: example.metadata.clone(),
    };
    let wrong: Vec<_> = examples.iter().map(|example| sample(example, "no idea")).collect();
    let right: Vec<_> =
        examples.iter().filter_map(|example| Some(sample(example, example.response.as_deref()?))).collect();
    assert!(!right.is_empty());
    for (samples, value) in [(wrong, 0.0), (right, 1.0)] {
        for score in reward.score(&samples).unwrap() {
            assert_eq!(score.unwrap().value, value);
        }
    }
}

#[test]
fn countdown_checks_its_settings() {
    let Some(path) = shipped("countdown") else { return };
    let plugin = countdown(&path);
    let fits = serde_json::json!({"custom": {"countdown": {"numbers": 4}}});
    assert_eq!(plugin.check_settings(&fits), []);
    let problems = plugin.check_settings(&serde_json::json!({"custom": {"countdown": {"numbers": 9, "ops": 3}}}));
    let paths: Vec<_> = problems.iter().map(|problem| problem.path.as_str()).collect();
    assert_eq!(paths, ["custom.countdown.numbers", "custom.countdown.ops"], "{problems:?}");
}

#[test]
fn every_shipped_plugin_can_be_inspected() {
    let Ok(folder) = std::fs::read_dir(cosmos_testkit::repo_root().join("plugins/dist")) else { return };
    let host = PluginHost::new(None).unwrap();
    for entry in folder.map(Result::unwrap) {
        if entry.path().extension().is_some_and(|ending| ending == "wasm") {
            let seen = host.inspect(&entry.path()).unwrap();
            let description = seen.description.unwrap_or_else(|| panic!("{:?}", seen.description_error));
            assert!(!description.version.is_empty() && seen.unknown_imports.is_empty(), "{description:?}");
            // What it imports it must also ask for in `wants`, so that `plugin check` tells the whole truth.
            assert!(seen.needs.iter().all(|need| need == "log" || description.wants.contains(need)), "{description:?}");
        }
    }
}
