//! Runs with several plugins: names and weights, filters, mixed datasets, settings and their places, overlapped scoring.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use super::{host, metrics, succeed, text, weights_hash};

/// A plugin of `tests/guests/several.wat`.
pub(super) struct Guest {
    name: &'static str,
    /// Eight bytes, the first of which is replaced.
    prompt: &'static str,
    /// Rows to train and to validate on; no dataset when both are 0.
    rows: (u64, u64),
    /// Names and roles: 0 training, 1 validation, 2 filter.
    rewards: &'static [(&'static str, u8)],
}

const A: Guest =
    Guest { name: "a", prompt: "1 2 3=6:", rows: (40, 8), rewards: &[("length", 0), ("digit", 0), ("length", 1)] };
const B: Guest =
    Guest { name: "b", prompt: "1 5 4=9:", rows: (24, 4), rewards: &[("digit", 0), ("one", 1), ("one", 2)] };

/// Strings and lists in a guest's memory from 1024 on: the description first, what it points at behind it.
struct Memory(Vec<u8>);

impl Memory {
    fn put(&mut self, bytes: &[u8]) -> u32 {
        while !self.0.len().is_multiple_of(8) {
            self.0.push(0);
        }
        let at = 1024 + self.0.len() as u32;
        self.0.extend_from_slice(bytes);
        at
    }

    fn string(&mut self, text: &str) -> [u32; 2] {
        [self.put(text.as_bytes()), text.len() as u32]
    }

    fn offers(&mut self, offers: &[(&str, u8)]) -> [u32; 2] {
        let words: Vec<u32> = offers
            .iter()
            .flat_map(|(name, role)| {
                let [at, bytes] = self.string(name);
                [at, bytes, u32::from(*role)]
            })
            .collect();
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        [self.put(&bytes), offers.len() as u32]
    }
}

impl Guest {
    /// Writes the component to `dir` as `<file>.wasm`.
    fn build(&self, dir: &Path, file: &str) -> PathBuf {
        let mut memory = Memory(vec![0; 56]);
        let datasets: &[(&str, u8)] = if self.rows == (0, 0) { &[] } else { &[("train", 0), ("validation", 1)] };
        let parts = [
            memory.string(self.name),
            memory.string("1.0"),
            memory.string("a test"),
            memory.offers(datasets),
            memory.offers(self.rewards),
            [0, 0],
            [0, 0],
        ];
        for (place, word) in memory.0.chunks_exact_mut(4).zip(parts.concat()) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let describe: String = memory.0.iter().map(|byte| format!("\\{byte:02x}")).collect();
        let root = cosmos_testkit::repo_root();
        let module = fs::read_to_string(root.join("tests/guests/several.wat"))
            .unwrap()
            .replace("@describe@", &describe)
            .replace("@prompt@", self.prompt)
            .replace("@train@", &self.rows.0.to_string())
            .replace("@validation@", &self.rows.1.to_string());
        let wit = fs::read_to_string(root.join("wit/since-v0.1.0/plugin.wit")).unwrap();
        let mut resolve = wit_parser::Resolve::default();
        let package = resolve.push_str("plugin.wit", &wit).unwrap();
        let world = resolve.select_world(&[package], Some("plugin")).unwrap();
        let mut bytes = wat::parse_str(module).unwrap_or_else(|error| panic!("{error}"));
        wit_component::embed_component_metadata(&mut bytes, &resolve, world, wit_component::StringEncoding::UTF8)
            .unwrap();
        let path = dir.join(format!("{file}.wasm"));
        fs::write(&path, cosmos_plugin::componentize(&bytes).unwrap()).unwrap();
        path
    }
}

/// A folder with the plugins `a` and `b`, configurations and runs.
pub(super) struct Bench {
    pub(super) dir: tempfile::TempDir,
    a: PathBuf,
    b: PathBuf,
}

impl Bench {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (A.build(dir.path(), "a"), B.build(dir.path(), "b"));
        Self { dir, a, b }
    }

    /// A small GRPO configuration with `policy` in `[train.train_policy]` and `rest` at the end.
    pub(super) fn config(&self, policy: &str, rest: &str) -> PathBuf {
        let path = self.dir.path().join("run.toml");
        let text = format!(
            "[train]\ntimestamp = \"1\"\nmax_num_steps = 3\ntrain_batch_per_replica = 16\noptm_lr = 1e-3\noptm_warmup_steps = 0\nseed = 0\n\
             [train.ckpt]\nenable_checkpoint = true\nsave_freq = 1\nmax_keep = -1\nexport_safetensors = false\n\
             [policy]\nmodel_name_or_path = \"configs/quickstart/student\"\nmodel_max_length = 48\n\
             [rollout]\nn_generation = 4\nmax_response_length = 8\nseed = 0\n[distillation]\nenable = false\n\
             [train.train_policy]\ntype = \"grpo\"\nmini_batch = 8\non_policy = true\n{policy}\n{rest}\n"
        );
        fs::write(&path, text).unwrap();
        path
    }

    pub(super) fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, config: &Path, out: &str, plugins: &[&Path]) -> Command {
        let mut command = host();
        command.args(["run", "--config"]).arg(config).arg("--output-dir").arg(self.out(out));
        for plugin in plugins {
            command.arg("--plugin").arg(plugin);
        }
        command
    }

    pub(super) fn both(&self, config: &Path, out: &str) -> Command {
        self.command(config, out, &[&self.a, &self.b])
    }

    /// The run is refused with all of `expected` in its error, and nothing is written.
    pub(super) fn refused(&self, command: &mut Command, expected: &[&str]) {
        let output = command.output().unwrap();
        check(&output, 2, expected);
        assert!(!self.out("refused").exists(), "something was written: {}", text(&output));
    }
}

pub(super) fn check(output: &Output, code: i32, expected: &[&str]) {
    assert_eq!(output.status.code(), Some(code), "{}", text(output));
    for part in expected {
        assert!(text(output).contains(part), "`{part}` is not in {}", text(output));
    }
}

/// The lines of training steps.
pub(super) fn trained(run: &Path) -> Vec<Value> {
    metrics(run).into_iter().filter(|line| line["train/loss_avg"].is_number()).collect()
}

pub(super) fn number(line: &Value, name: &str) -> f64 {
    line[name].as_f64().unwrap_or_else(|| panic!("{name} is not in {line:#}"))
}

const TRAIN_A: &str = "[host]\ntrain_dataset = \"a/train\"\nvalidation_dataset = \"a/validation\"\n";

#[test]
fn rewards_of_two_plugins_are_added_by_weight_and_logged_by_name() {
    let bench = Bench::new();
    let config = bench.config(
        "reward_function = { \"a/length\" = 0.25, \"b\" = 2.0, \"b/one\" = 0.0 }",
        &format!("{TRAIN_A}[validation]\nenable = true\nfreq = 3\nval_before_train = true\nreward_function = [\"one\", \"a/digit\"]\n"),
    );
    let plan = succeed(bench.both(&config, "run").arg("--dry-run"));
    check(
        &plan,
        0,
        &[
            "plugin a 1.0",
            "grants: none",
            "training dataset: a/train (40 prompts)",
            "training reward: 0.25 x a/length + 2 x b/digit + 0 x b/one",
            "validation dataset: a/validation (8 prompts)",
            "validation reward: 1 x a/digit + 1 x b/one",
        ],
    );
    succeed(&mut bench.both(&config, "run"));
    let run = bench.out("run");
    let steps = trained(&run);
    assert_eq!(steps.len(), 3);
    for step in &steps {
        let sum = 0.25 * number(step, "reward/a/length") + 2.0 * number(step, "reward/b/digit");
        assert!((number(step, "train/reward_mean") - sum).abs() < 1e-12, "{step:#}");
        assert_eq!(number(step, "reward/b/one"), 1.0);
        assert_eq!(number(step, "reward/a/chars"), number(step, "reward/a/length"));
        // Both rewards of `b` report a number of that name.
        assert_eq!(number(step, "reward/b/chars"), number(step, "reward/b/one/chars"));
        assert_eq!((number(step, "reward/a/failed"), number(step, "reward/b/failed")), (0.0, 0.0));
    }
    let first = &metrics(&run)[0];
    let sum = number(first, "val/reward/a/digit") + number(first, "val/reward/b/one");
    assert!((number(first, "val/reward_avg") - sum).abs() < 1e-12, "{first:#}");
    let raw = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    assert!(raw.contains("\"reward/wait_seconds\"") && raw.contains("\"val/reward/wait_seconds\""), "{raw}");
    let plugins: Value = serde_json::from_str(&fs::read_to_string(run.join("plugins.json")).unwrap()).unwrap();
    let b = &plugins["plugins"][1];
    assert_eq!((b["name"].as_str(), b["version"].as_str()), (Some("b"), Some("1.0")));
    assert!(b["sha256"].as_str().unwrap().len() == 64 && b["file"].as_str().unwrap().ends_with("b.wasm"));
    let used = b["uses"].as_array().unwrap();
    assert!(used.iter().any(|u| u["name"] == "b/digit" && u["role"] == "train" && u["weight"] == 2.0), "{used:#?}");
    assert!(used.iter().any(|u| u["name"] == "b/one" && u["role"] == "validation"), "{used:#?}");
}

#[test]
fn names_that_are_unknown_or_unclear_are_refused_with_their_place() {
    let bench = Bench::new();
    let host = "[host]\ntrain_dataset = \"a/train\"\n";
    let cases: [(&str, &str, &[&str]); 12] = [
        // Two plugins offer a training dataset.
        (
            "reward_function = \"a/digit\"",
            "",
            &["several training datasets: `a/train`, `b/train`", "[host] train_dataset = \"a/train\""],
        ),
        // Three training rewards, none named.
        ("", host, &["several training rewards: `a/length`, `a/digit`, `b/digit`", "reward_function = \"a/length\""]),
        (
            "reward_function = \"digit\"",
            host,
            &["run.toml:26:19", "`digit`", "`a/digit`, `b/digit`", "write it in full"],
        ),
        (
            "reward_function = [\"b/one\", \"a/lenght\"]",
            host,
            &["run.toml:26:29", "`a/lenght`", "did you mean `a/length`?", "`b/one`"],
        ),
        (
            "reward_function = { \"b/one\" = 1.0, nothing = 2.0 }",
            host,
            &["run.toml:26:36", "`nothing`", "the plugins offer"],
        ),
        ("reward_function = { \"b/one\" = 1.0, one = 2.0 }", host, &["run.toml:26:36", "`b/one` twice"]),
        (
            "reward_function = { \"b/one\" = 1.0, gsm8k = 2.0 }",
            host,
            &["run.toml:26:36", "`gsm8k`", "no plugin offers"],
        ),
        (
            "reward_function = \"gsm8k\"",
            host,
            &["run.toml:26:19", "built into the original", "several could take the place"],
        ),
        (
            "reward_function = \"b/one\"",
            "[host]\ntrain_dataset = { \"a/train\" = 0.5, \"b/test\" = 0.5 }",
            &["run.toml:28:36", "`b/test`", "dataset"],
        ),
        (
            "reward_function = \"b/one\"",
            "[host]\ntrain_dataset = { \"a/train\" = 0.5, \"b/train\" = 0.0 }",
            &["run.toml:28:36", "above 0"],
        ),
        ("reward_function = \"b/one\"\nfilter_reward_metric = \"ones\"", host, &["run.toml:27:24", "`ones`"]),
        (
            "reward_function = \"b/one\"",
            "[host]\ntrain_dataset = \"a/train\"\n[host.rewards]\n\"c/train\" = \"b/one\"",
            &["run.toml:30:1", "`c/train`"],
        ),
    ];
    for (policy, rest, expected) in cases {
        let config = bench.config(policy, rest);
        bench.refused(&mut bench.both(&config, "refused"), expected);
    }
    // A group of one has nothing to compare.
    let config = bench.config("reward_function = \"b/one\"\nfilter_reward_metric = \"b/one\"", host);
    let alone = ["--set", "rollout.n_generation=1"];
    bench.refused(bench.both(&config, "refused").args(alone), &["run.toml:27:24", "rollout.n_generation"]);
    // Two plugins of one name.
    let twin = A.build(bench.dir.path(), "twin");
    let plugins: [&Path; 2] = [&bench.a, &twin];
    let config = bench.config("", "");
    bench.refused(
        &mut bench.command(&config, "refused", &plugins),
        &["two plugins are called `a`", "a.wasm", "twin.wasm"],
    );
}

#[test]
fn columns_are_trained_on_though_a_plugin_offers_a_dataset() {
    let bench = Bench::new();
    let rows = bench.dir.path().join("answers.jsonl");
    let line = |i: usize| format!("{{\"question\": \"1 {i} 2=3:\", \"answer\": \"{i}+2-1=3\"}}\n");
    fs::write(&rows, (1..=48).map(line).collect::<String>()).unwrap();
    let policy = "prompt_column_name = \"question\"\nresponse_column_name = \"answer\"";
    let columns = format!(
        "[train.train_policy.dataset]\nname = {rows:?}\n[validation]\nenable = true\nval_before_train = true\n\
         [host]\ntrain_dataset = \"columns\"\nvalidation_dataset = \"a/validation\"\n"
    );
    let config = bench.config(policy, &columns);
    let imitating = fs::read_to_string(&config).unwrap();
    let imitating = imitating.replace("type = \"grpo\"", "type = \"sft\"").replace("on_policy = true\n", "");
    fs::write(&config, imitating).unwrap();
    let run = || bench.command(&config, "run", &[&bench.a]);
    let plan = succeed(run().arg("--dry-run"));
    check(&plan, 0, &["columns of", "answers.jsonl (48 prompts)", "validation dataset: a/validation (8 prompts)"]);
    succeed(&mut run());
    let run = bench.out("run");
    let trained = trained(&run);
    assert_eq!(trained.len(), 3);
    // `4+2-1=3` and its end are eight characters, with two digits nine.
    assert!(
        trained.iter().all(|step| (16.0 * 8.0..=16.0 * 9.0).contains(&number(step, "train/tokens"))),
        "{trained:#?}"
    );
    assert!(number(&metrics(&run)[0], "val/reward_avg").is_finite());
    // Beside a dataset of a plugin they are refused.
    let config = bench.config("reward_function = \"b/one\"", "[host]\ntrain_dataset = [\"a/train\", \"columns\"]");
    bench.refused(&mut bench.both(&config, "refused"), &["run.toml:28:", "`columns` beside", "the columns alone"]);
}

#[test]
fn a_table_for_no_plugin_and_an_idle_plugin_are_warned_of() {
    let bench = Bench::new();
    let config = bench.config(
        "reward_function = \"a/digit\"",
        &format!("{TRAIN_A}[plugin.countdwn]\nallow = [\"log\"]\n[plugin.bb]\n"),
    );
    let plan = succeed(bench.both(&config, "run").arg("--dry-run"));
    check(
        &plan,
        0,
        &["`[plugin.countdwn]` is for a plugin that this run does not load", "plugin `b`", "nothing of it is used"],
    );
    // A table is found by the plugin's own name, too.
    let renamed = A.build(bench.dir.path(), "renamed");
    let config = bench.config("reward_function = \"renamed/digit\"", "[plugin.a]\nallow = [\"log\"]\n");
    let plan = succeed(bench.command(&config, "run", &[&renamed]).arg("--dry-run"));
    check(&plan, 0, &["renamed.wasm), grants: log", "1 x a/digit"]);
    assert!(!text(&plan).contains("does not load"), "{}", text(&plan));
}

#[test]
fn the_originals_own_rewards_give_way_to_the_only_one_there_is() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new();
    let only = Guest { name: "only", rewards: &[("digit", 0), ("one", 1)], ..A }.build(dir.path(), "only");
    let config = bench.config("reward_function = { gsm8k = 1.0, format = 0.2 }", "[validation]\nenable = true\n");
    let plan = succeed(bench.command(&config, "run", &[&only]).arg("--dry-run"));
    check(
        &plan,
        0,
        &[
            "names `format`, `gsm8k`, built into the original",
            "takes the place",
            "training reward: 1 x only/digit",
            "validation reward: 1 x only/one",
        ],
    );
    // Not given at all: no warning.
    let config = bench.config("", "");
    let plan = succeed(bench.command(&config, "run", &[&only]).arg("--dry-run"));
    check(&plan, 0, &["training reward: 1 x only/digit"]);
    assert!(!text(&plan).contains("built into"), "{}", text(&plan));
}

#[test]
fn groups_without_a_difference_are_dropped() {
    let bench = Bench::new();
    let config = bench.config("reward_function = \"a/length\"\nfilter_reward_metric = \"b/digit\"", TRAIN_A);
    succeed(bench.both(&config, "run").args(["--set", "host.samples_logged=16", "--set", "train.epoch=50"]));
    let run = bench.out("run");
    let steps = trained(&run);
    assert_eq!(steps.len(), 3);
    let ratios: Vec<f64> = steps.iter().map(|s| number(s, "rollout/filtered_ratio")).collect();
    assert!(ratios.iter().all(|r| (0.0..1.0).contains(r)) && ratios.iter().any(|r| *r > 0.0), "{ratios:?}");
    for step in &steps {
        assert!((0.0..=1.0).contains(&number(step, "rollout/filter_reward_mean")), "{step:#}");
        // Every group that was trained on has both kinds.
        let mean = number(step, "reward/b/digit");
        assert!((0.25..=0.75).contains(&mean), "{mean}");
    }
    let samples = cosmos_testkit::read_jsonl(&run.join("samples.jsonl"));
    for group in samples.chunks(4) {
        let starts = |s: &Value| s["completion"].as_str().unwrap().starts_with(['0', '1', '2', '3', '4']);
        let low = group.iter().filter(|s| starts(s)).count();
        assert!((1..4).contains(&low), "{group:#?}");
    }
    // The reward itself is the filter of the dapo variant.
    let config = bench.config("reward_function = \"b/digit\"\nvariant = \"dapo\"", TRAIN_A);
    succeed(bench.both(&config, "dapo").args(["--set", "train.epoch=50"]));
    assert!(trained(&bench.out("dapo")).iter().all(|s| (0.25..=0.75).contains(&number(s, "train/reward_mean"))));
}

#[test]
fn a_filter_that_drops_everything_ends_the_run() {
    let bench = Bench::new();
    let config = bench.config("reward_function = \"a/length\"\nfilter_reward_metric = \"b/one\"", TRAIN_A);
    let output = bench.both(&config, "run").args(["--set", "train.epoch=1000"]).output().unwrap();
    check(&output, 1, &["the filter left nothing to train on", "hint:", "filter_reward_metric"]);
}

#[test]
fn datasets_are_mixed_by_weight_and_a_resumed_run_takes_the_same_prompts() {
    let bench = Bench::new();
    let config = bench.config(
        "reward_function = \"a/digit\"",
        "[host]\nsamples_logged = 100\ntrain_dataset = { \"a/train\" = 3.0, \"b/train\" = 1.0 }\n[host.rewards]\n\"b/train\" = \"b/one\"\n",
    );
    let sets = ["--set", "train.max_num_steps=8", "--set", "train.epoch=4", "--set", "train.save_ckpt_at_exit=true"];
    let plan = succeed(bench.both(&config, "whole/run").args(sets).arg("--dry-run"));
    // 40 of a and 13 of b until a is used up.
    check(
        &plan,
        0,
        &[
            "from 53 prompts x 4",
            "3 x a/train (40 prompts) + 1 x b/train (24 prompts)",
            "1 x a/digit for a/train + 1 x b/one for b/train",
        ],
    );
    succeed(bench.both(&config, "whole/run").args(sets));
    let whole = bench.out("whole/run");
    let samples = fs::read_to_string(whole.join("samples.jsonl")).unwrap();
    let of = |run: &Path| cosmos_testkit::read_jsonl(&run.join("samples.jsonl"));
    let prompts: Vec<(bool, f64)> = of(&whole)
        .iter()
        .map(|s| (s["prompt"].as_str().unwrap().ends_with(" 5 4=9:"), s["reward"].as_f64().unwrap()))
        .collect();
    let from_b = prompts.iter().filter(|(b, _)| *b).count();
    assert!(from_b > 0 && from_b < prompts.len() / 2, "{from_b} of {}", prompts.len());
    // Completions for b are scored by b's reward alone.
    assert!(prompts.iter().all(|(b, reward)| !b || *reward == 1.0));
    // Cut off after the third step, in the middle of an epoch.
    let cut = bench.out("cut/run");
    fs::create_dir_all(&cut).unwrap();
    succeed(Command::new("cp").arg("-r").arg(format!("{}/.", whole.display())).arg(&cut));
    for step in 4..=8 {
        fs::remove_dir_all(cut.join(format!("checkpoints/step_{step:08}"))).unwrap();
    }
    let output = succeed(bench.both(&config, "cut/run").args(sets).arg("--resume"));
    assert!(text(&output).contains("resumed at step 3"), "{}", text(&output));
    assert_eq!(weights_hash(&cut, 8), weights_hash(&whole, 8));
    assert_eq!(metrics(&cut), metrics(&whole));
    assert_eq!(fs::read_to_string(cut.join("samples.jsonl")).unwrap(), samples);
}

#[test]
fn joined_datasets_are_validated_one_by_one() {
    let bench = Bench::new();
    let config = bench.config(
        "reward_function = \"a/digit\"",
        "[host]\ntrain_dataset = [\"b/train\", \"a/train\"]\nvalidation_dataset = [\"a/validation\", \"b/validation\"]\n\
         [validation]\nenable = true\nval_before_train = true\nreward_function = \"a/length\"\n[host.rewards]\n\"b/validation\" = { one = 3.0 }\n",
    );
    let plan = succeed(bench.both(&config, "run").arg("--dry-run"));
    check(&plan, 0, &["from 64 prompts x 1", "validation on 12 held-out prompts"]);
    succeed(&mut bench.both(&config, "run"));
    let first = &metrics(&bench.out("run"))[0];
    assert_eq!(number(first, "val/b/validation/reward_avg"), 3.0);
    assert_eq!(number(first, "val/a/validation/reward_avg"), number(first, "val/reward/a/length"));
    let mean = (8.0 * number(first, "val/a/validation/reward_avg") + 4.0 * 3.0) / 12.0;
    assert!((number(first, "val/reward_avg") - mean).abs() < 1e-9, "{first:#}");
}

#[test]
fn scores_do_not_depend_on_the_number_of_workers() {
    let bench = Bench::new();
    let policy = "reward_function = { \"a/length\" = 0.3, \"b/digit\" = 0.7 }\nfilter_reward_metric = \"a/length\"";
    let config =
        bench.config(policy, &format!("{TRAIN_A}[validation]\nenable = true\nreward_function = \"a/length\"\n"));
    for workers in ["1", "4"] {
        let (a, b) = (format!("plugin.a.workers={workers}"), format!("plugin.b.workers={workers}"));
        let sets = ["--set", &a, "--set", &b, "--set", "host.decode_slots=3", "--set", "train.epoch=9"];
        succeed(bench.both(&config, workers).args(sets));
    }
    let (one, four) = (bench.out("1"), bench.out("4"));
    assert_eq!(metrics(&one), metrics(&four));
    assert_eq!(weights_hash(&one, 3), weights_hash(&four, 3));
}

#[test]
fn failed_samples_are_counted_and_cost_nothing_else() {
    let bench = Bench::new();
    let frail = Guest { name: "frail", rewards: &[("broken", 0)], rows: (0, 0), ..A }.build(bench.dir.path(), "frail");
    let config = bench.config("reward_function = [\"a/length\", \"frail\"]", "");
    let plugins: [&Path; 2] = [&bench.a, &frail];
    let output = succeed(&mut bench.command(&config, "run", &plugins));
    check(&output, 0, &["reward `frail/broken` of sample 0 left out", "broken"]);
    for step in trained(&bench.out("run")) {
        assert_eq!((number(&step, "reward/frail/failed"), number(&step, "reward/a/failed")), (16.0, 0.0));
        assert_eq!(number(&step, "train/reward_mean"), number(&step, "reward/a/length"));
    }
}

#[test]
fn bypassed_rewards_are_scored_for_the_record_when_asked() {
    let bench = Bench::new();
    let config = bench.config("reward_function = \"a/length\"", TRAIN_A);
    let sets =
        ["--set", "distillation.enable=true", "--set", "distillation.model_name_or_path=configs/quickstart/teacher"];
    let small = ["--set", "distillation.mini_batch=8", "--set", "distillation.batch_size_per_replica=8"];
    succeed(bench.both(&config, "silent").args(sets).args(small));
    succeed(bench.both(&config, "scored").args(sets).args(small).args(["--set", "host.score_bypassed=true"]));
    let (silent, scored) = (trained(&bench.out("silent")), trained(&bench.out("scored")));
    for (silent, scored) in silent.iter().zip(&scored) {
        assert!(silent["reward/a/length"].is_null() && scored["reward/a/length"].is_number(), "{scored:#}");
        assert_eq!(silent["train/loss_avg"], scored["train/loss_avg"]);
        assert_eq!(number(scored, "rollout/advantage_max"), 0.0);
    }
    assert_eq!(weights_hash(&bench.out("silent"), 3), weights_hash(&bench.out("scored"), 3));
}

#[test]
fn settings_are_checked_against_the_declared_schema_and_laid_over_each_other() {
    let bench = Bench::new();
    let countdown = "plugins/dist/countdown.wasm";
    let run = |rest: &str| {
        let config = bench.config("", rest);
        bench.command(&config, "refused", &[Path::new(countdown)])
    };
    let cases: [(&str, &[&str]); 5] = [
        ("[custom.countdown]\nnumbers = 3\nmax = 500", &["run.toml:29:7", "`custom.countdown.max`", "99", "inspect"]),
        ("[custom.countdown]\nnumbres = 3", &["run.toml:28:", "numbres"]),
        ("[custom.countdown]\nops = 3", &["run.toml:28:7", "`custom.countdown.ops`"]),
        (
            "[custom.countdown]\nmax = 9\n[plugin.countdown.settings.countdown]\nmax = 0",
            &["run.toml:30:7", "`plugin.countdown.settings.countdown.max`"],
        ),
        (
            "[plugin.countdown.settings]\nmax = 9",
            &[
                "run.toml:28:1",
                "`plugin.countdown.settings.max` is no setting",
                "[plugin.countdown.settings.countdown]",
            ],
        ),
    ];
    for (rest, expected) in cases {
        bench.refused(&mut run(rest), expected);
    }
    let prompts = |rest: &str| {
        let plan = text(&succeed(run(rest).arg("--dry-run")));
        plan.split("countdown/train (").nth(1).unwrap().split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    let common = prompts("[custom.countdown]\nmax = 5");
    let own = prompts("[custom.countdown]\nmax = 5\n[plugin.countdown.settings.countdown]\nmax = 4");
    assert_eq!(own, prompts("[custom.countdown]\nmax = 4"));
    assert!(own < common, "{own} and {common}");
}

#[test]
fn eval_takes_several_plugins_and_weighs_their_rewards() {
    let bench = Bench::new();
    let eval = |extra: &[&str]| {
        let mut command = host();
        command.args(["eval", "--model", "configs/quickstart/student", "--max-tokens", "6", "--format", "json"]);
        command.arg("--plugin").arg(&bench.a).arg("--plugin").arg(&bench.b).args(extra);
        command
    };
    let named = ["--dataset", "b/validation", "--reward", "a/length=0.5", "--reward", "one"];
    let output = succeed(&mut eval(&named));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["prompts"], 4);
    let sum = 0.5 * number(&report["rewards"], "a/length") + number(&report["rewards"], "b/one");
    assert!((number(&report, "reward_avg") - sum).abs() < 1e-12, "{report:#}");
    let output = eval(&["--reward", "one"]).output().unwrap();
    check(&output, 2, &["several validation datasets", "`a/validation`, `b/validation`"]);
    let output = eval(&["--dataset", "b", "--reward", "ones"]).output().unwrap();
    check(&output, 2, &["`ones`", "no plugin offers"]);
    let output = eval(&["--dataset", "b", "--reward", "one=much"]).output().unwrap();
    check(&output, 2, &["`much` is no weight"]);
}
