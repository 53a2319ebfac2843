//! The shipped plugins, through the sandbox: their graders on the golden vectors, on hostile text, and their datasets.
//!
//! `COSMOS_PLUGIN_DIST_FRESH` names another folder of components to test in place of `plugins/dist`; the build script's
//! check does so where its compiler makes other bytes than those shipped.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use cosmos_plugin::{
    Capabilities, ChatMessage, ChatRenderer, Grant, Limits, Plugin, PluginHost, Prompt, Reward, RewardSample,
    TableRequest, TableRows, TableSource,
};
use cosmos_testkit::{golden, read_jsonl, repo_root};
use serde_json::Value;

/// Scores are asked for in calls of this many samples.
const BATCH: usize = 64;

fn dist() -> PathBuf {
    std::env::var_os("COSMOS_PLUGIN_DIST_FRESH").map_or_else(|| repo_root().join("plugins/dist"), PathBuf::from)
}

fn load(name: &str, grants: &[Grant], capabilities: Capabilities) -> Plugin {
    let host = PluginHost::new(None).expect("a host without a cache starts");
    host.load(&dist().join(format!("{name}.wasm")), grants, Limits::default(), capabilities)
        .expect("a shipped component loads")
}

/// The plugin with the grants that it says it wants, and no more.
fn load_as_wanted(name: &str, capabilities: Capabilities) -> Plugin {
    let host = PluginHost::new(None).expect("a host without a cache starts");
    let path = dist().join(format!("{name}.wasm"));
    let wants = host
        .inspect(&path)
        .expect("a shipped component can be inspected")
        .description
        .expect("it describes itself")
        .wants;
    let grants: Vec<Grant> = wants.iter().map(|w| w.parse().expect("a wanted grant exists")).collect();
    load(name, &grants, capabilities)
}

fn sample(completion: &str, reference: &str) -> RewardSample {
    RewardSample {
        prompt: String::new(),
        completion: completion.to_owned(),
        reference: Some(reference.to_owned()),
        metadata: Vec::new(),
    }
}

fn scores(reward: &mut Reward, samples: &[RewardSample]) -> Vec<f64> {
    let mut all = Vec::new();
    for batch in samples.chunks(BATCH) {
        for (score, sample) in reward.score(batch).expect("the call itself works").into_iter().zip(batch) {
            all.push(score.unwrap_or_else(|f| panic!("{f:?} for {:.80}", sample.completion)).value);
        }
    }
    all
}

/// How many cases of `file` get another score than the golden one, and of how many; `None` when the file is not there.
fn differences(file: &str, plugin: &str, reward: &str) -> Option<(usize, usize)> {
    let cases = read_jsonl(&golden(&format!("graders/{file}"))?);
    assert!(!cases.is_empty(), "{file} is empty");
    let mut reward = load_as_wanted(plugin, Capabilities::default()).reward(reward, "{}").expect("the reward starts");
    let samples: Vec<RewardSample> = cases
        .iter()
        .map(|case| sample(case["completion"].as_str().expect("a completion"), &case["reference"].to_string()))
        .collect();
    let mut wrong = 0;
    for (case, score) in cases.iter().zip(scores(&mut reward, &samples)) {
        if case["score"].as_f64() != Some(score) {
            eprintln!("{file} {}: {score}, golden {}", case["id"], case["score"]);
            wrong += 1;
        }
    }
    Some((wrong, cases.len()))
}

#[test]
fn countdown_scores_are_the_golden_ones() {
    for plugin in ["countdown", "countdown-hf"] {
        if let Some((wrong, of)) = differences("countdown.jsonl", plugin, "countdown") {
            assert_eq!(wrong, 0, "{plugin}: {wrong} of {of} differ");
        }
    }
}

#[test]
fn math_scores_are_within_tolerance() {
    for (file, part) in [("math_real_completions.jsonl", 0.99), ("math_answer_pairs.jsonl", 0.97)] {
        if let Some((wrong, of)) = differences(file, "deepmath", "math") {
            let equal = 1.0 - wrong as f64 / of as f64;
            assert!(equal >= part, "{file}: {wrong} of {of} differ");
        }
    }
}

#[test]
fn a_reference_may_be_plain_text_or_a_json_string() {
    let mut reward = load_as_wanted("deepmath", Capabilities::default()).reward("math", "").expect("the reward starts");
    let samples =
        ["\\frac{1}{2}", "\"\\\\frac{1}{2}\"", "0.5", "\"0.5\""].map(|reference| sample("so \\boxed{1/2}", reference));
    assert_eq!(scores(&mut reward, &samples), [1.0; 4]);
}

#[test]
fn hostile_completions_score_zero_and_harm_nothing() {
    let deep = |open: &str, close: &str| format!("{}1{}", open.repeat(30_000), close.repeat(30_000));
    let texts = [
        "9**9**9**9".to_owned(),
        "9^{9^{9^{9^9}}}".to_owned(),
        "9!!!!!!!!".to_owned(),
        "__import__('os').system('true')".to_owned(),
        "1e999999999".to_owned(),
        "\0\u{202e}\u{feff}é".to_owned(),
        deep("(", ")"),
        deep("{", "}"),
        deep("[", "]"),
        deep("\\sqrt{", "}"),
        deep("|", "|"),
        "-".repeat(60_000) + "1",
        "1+".repeat(100_000) + "1",
        "x".repeat(500_000),
        "\\frac".repeat(30_000),
    ];
    let mut countdown =
        load_as_wanted("countdown", Capabilities::default()).reward("countdown", "").expect("the reward starts");
    let mut math = load_as_wanted("deepmath", Capabilities::default()).reward("math", "").expect("the reward starts");
    for text in &texts {
        for shaped in [format!("<answer>{text}=7</answer>"), format!("{text}=7"), text.clone()] {
            assert_eq!(scores(&mut countdown, &[sample(&shaped, r#"{"nums":[1,2],"target":7}"#)]), [0.0], "{text:.40}");
        }
        for shaped in [format!("\\boxed{{{text}}}"), format!("**{text}**"), text.clone()] {
            assert_eq!(scores(&mut math, &[sample(&shaped, "\"7\"")]), [0.0], "{text:.40}");
        }
    }
    let broken = countdown
        .score(&[sample("1+2=3", "not JSON"), sample("1+2=3", r#"{"nums":[2,1],"target":3}"#)])
        .expect("the call works");
    assert!(broken[0].is_err(), "a broken reference is an error of that sample");
    assert_eq!(broken[1].as_ref().map(|s| s.value), Ok(1.0), "and of that sample only");
}

#[test]
fn countdown_needs_no_grant_and_holds_problems_out() {
    let plugin = load("countdown", &[], Capabilities::default());
    assert!(plugin.info().wants.is_empty());
    let settings = r#"{"dataset":{"name":"","test_size":null},"custom":{"countdown":{"max":6,"seed":3}}}"#;
    let mut reward = plugin.reward("countdown", settings).expect("the reward starts");
    let mut pairs = Vec::new();
    for name in ["train", "validation"] {
        let mut dataset = plugin.dataset(name, settings).expect("the dataset opens");
        let mut seen = HashSet::new();
        let mut samples = Vec::new();
        let indices: Vec<u64> = (0..dataset.len()).collect();
        for batch in indices.chunks(BATCH) {
            for example in dataset.get(batch).expect("the call works") {
                let example = example.expect("every problem can be had");
                let Prompt::Text(prompt) = &example.prompt else { panic!("a text prompt") };
                let reference: Value =
                    serde_json::from_str(example.reference.as_deref().expect("a reference")).expect("JSON");
                let mut numbers: Vec<u64> =
                    reference["nums"].as_array().expect("numbers").iter().filter_map(Value::as_u64).collect();
                let listed: Vec<String> = numbers.iter().map(u64::to_string).collect();
                assert_eq!(*prompt, format!("{}={}:", listed.join(" "), reference["target"]));
                numbers.sort_unstable();
                seen.insert((numbers, reference["target"].as_u64()));
                samples.push(sample(example.response.as_deref().expect("a response"), &reference.to_string()));
            }
        }
        assert!(scores(&mut reward, &samples).iter().all(|s| *s == 1.0), "every canonical solution is right");
        pairs.push(seen);
    }
    assert!(!pairs[1].is_empty() && pairs[0].is_disjoint(&pairs[1]), "held-out problems are not trained on");
    let error =
        plugin.dataset("train", r#"{"custom":{"countdown":{"numbres":4}}}"#).expect_err("an unknown key is refused");
    assert!(error.to_string().contains("numbres"), "{error}");
}

/// A table in memory, the same for every request.
struct Rows(Vec<Value>);

impl TableSource for Rows {
    fn open(&self, source: &TableRequest) -> Result<Box<dyn TableRows>, String> {
        if source.name != "in/memory" {
            return Err(format!("no dataset `{}`", source.name));
        }
        Ok(Box::new(Rows(self.0.clone())))
    }
}

impl TableRows for Rows {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn columns(&self) -> Vec<String> {
        self.0.first().and_then(Value::as_object).map(|row| row.keys().cloned().collect()).unwrap_or_default()
    }

    fn read(&self, start: u64, count: u32, _columns: &[String]) -> Result<Vec<String>, String> {
        Ok(self.0[start as usize..][..count as usize].iter().map(Value::to_string).collect())
    }
}

struct Bracketed;

impl ChatRenderer for Bracketed {
    fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        options_json: &str,
    ) -> Result<String, String> {
        let options: Value = serde_json::from_str(options_json).map_err(|e| e.to_string())?;
        let turns: Vec<String> = messages.iter().map(|m| format!("[{}:{}]", m.role, m.content)).collect();
        Ok(format!("{}{add_generation_prompt}{}", turns.concat(), options["enable_thinking"]))
    }
}

fn capabilities(rows: Value) -> Capabilities {
    let Value::Array(rows) = rows else { panic!("a list of rows") };
    Capabilities { table: Some(Arc::new(Rows(rows))), chat: Some(Arc::new(Bracketed)) }
}

#[test]
fn deepmath_examples_are_the_recipes_own() {
    let rows = serde_json::json!([
        {"question": "1+1?", "problem": " 2+2? ", "solution": "it is \\boxed{3}, no, \\boxed{4}."},
        {"question": "q", "problem": "p", "solution": "5"},
        {"question": "r", "problem": "s", "solution": "6"},
    ]);
    let plugin = load_as_wanted("deepmath", capabilities(rows));
    let mut train = plugin
        .dataset("train", r#"{"dataset":{"name":"in/memory","split":["train"],"test_size":0.5}}"#)
        .expect("it opens");
    assert_eq!(train.len(), 3, "`test_size` shortens validation only");
    let example = train.get(&[0]).expect("the call works").remove(0).expect("a row");
    assert_eq!(
        example.prompt,
        Prompt::Text("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n".into())
    );

    let mut validation =
        plugin.dataset("validation", r#"{"dataset":{"name":"in/memory","test_size":0.7}}"#).expect("it opens");
    assert_eq!(validation.len(), 2);
    let examples: Vec<_> =
        validation.get(&[1, 0]).expect("the call works").into_iter().map(|e| e.expect("a row")).collect();
    assert_eq!(examples[0].reference.as_deref(), Some("\"5\""));
    assert_eq!(examples[1].reference.as_deref(), Some("\"4\""));
    let turn = "[user:2+2?\nPlease reason step by step, and put your final answer within \\boxed{}.]truetrue<think>\n";
    assert_eq!(examples[1].prompt, Prompt::Text(turn.into()));

    let mut zero = plugin.reward("zero", "").expect("the training reward starts");
    assert_eq!(scores(&mut zero, &[sample("\\boxed{4}", "\"4\"")]), [0.0]);
    for (settings, words) in [
        (r#"{"dataset":{"name":"elsewhere"}}"#, "no dataset `elsewhere`"),
        (r#"{"dataset":{"name":"in/memory"},"custom":{"deepmath":{"question_column":"ask"}}}"#, "no column `ask`"),
        ("{}", "dataset.name"),
    ] {
        let error = plugin.dataset("train", settings).expect_err("it is refused").to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn countdown_from_a_table() {
    let rows = serde_json::json!([{
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "1+2=3"}],
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}], "nums": [1, 2], "target": 3,
    }]);
    let plugin = load_as_wanted("countdown-hf", capabilities(rows));
    let settings = r#"{"dataset":{"name":"in/memory"}}"#;
    let get = |name: &str| {
        plugin.dataset(name, settings).expect("it opens").get(&[0]).expect("the call works").remove(0).expect("a row")
    };
    let message = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
    let train = get("train");
    assert_eq!(train.prompt, Prompt::Messages(vec![message("user", "q")]));
    assert_eq!(train.response.as_deref(), Some("1+2=3"));
    let validation = get("validation");
    assert_eq!(validation.prompt, Prompt::Messages(vec![message("system", "s"), message("user", "p")]));
    let reference: Value = serde_json::from_str(validation.reference.as_deref().expect("a reference")).expect("JSON");
    assert_eq!(reference, serde_json::json!({"nums": [1, 2], "target": 3}));
}

#[test]
fn the_shipped_components_are_the_recorded_ones() {
    let record = std::fs::read_to_string(dist().join("BUILT_WITH")).expect("the build script leaves its record");
    for name in ["countdown", "countdown-hf", "deepmath"] {
        let plugin = load_as_wanted(name, Capabilities::default());
        assert!(
            record.contains(&format!("{name}.wasm: {}", plugin.info().sha256)),
            "{name}.wasm is not what BUILT_WITH records"
        );
        assert_eq!(plugin.info().name, name);
    }
}
