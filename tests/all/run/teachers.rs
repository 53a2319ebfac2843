//! Runs with several teachers: who answers for what, mixtures, metrics, resuming, and what is refused.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::several::{Bench, check, number, trained};
use super::{metrics, succeed, text, weights_hash};

const SETS: [&str; 6] = [
    "--set",
    "distillation.enable=true",
    "--set",
    "distillation.mini_batch=8",
    "--set",
    "distillation.batch_size_per_replica=8",
];

const DATASETS: &str = "[host]\ntrain_dataset = [\"a/train\", \"b/train\"]\n";

/// One entry of the list of teachers; `student` is what the run itself starts from.
fn teacher(name: &str, model: &str, rest: &str) -> String {
    format!(
        "[[distillation.teachers]]\nname = \"{name}\"\nmodel_name_or_path = \"configs/quickstart/{model}\"\n{rest}\n"
    )
}

fn config(bench: &Bench, rest: &str, teachers: &[String]) -> PathBuf {
    bench.config("reward_function = \"a/length\"", &format!("{DATASETS}{rest}\n{}", teachers.concat()))
}

#[test]
fn each_dataset_is_compared_with_its_teachers() {
    let bench = Bench::new();
    let teachers = [
        teacher("math", "teacher", "datasets = [\"a/train\"]\nweight = 2.0"),
        teacher("self", "student", "datasets = [\"b/train\"]\nmini_batch = 4"),
    ];
    let validation = "validation_dataset = [\"a/validation\", \"b/validation\"]\nvalidate_teacher = true\n[validation]\nenable = true\nfreq = 3\n\
        val_before_train = true\nreward_function = \"a/digit\"\n";
    let config = config(&bench, validation, &teachers);
    let plan = succeed(bench.both(&config, "run").args(SETS).arg("--dry-run"));
    check(
        &plan,
        0,
        &[
            "teacher math: configs/quickstart/teacher, weight 2, for a/train",
            "teacher self: configs/quickstart/student, weight 1, for b/train",
            "teacher self: ",
            " parameters",
        ],
    );
    for top_k in ["0", "4", "-1"] {
        let top_k = format!("distillation.top_k={top_k}");
        let run = bench.out(&top_k);
        succeed(bench.both(&config, &top_k).args(SETS).args(["--set", &top_k]));
        let steps = trained(&run);
        assert_eq!(steps.len(), 3);
        for step in &steps {
            let (math, own) = (number(step, "teacher/math/completions"), number(step, "teacher/self/completions"));
            assert!(math + own == 16.0 && math > 0.0 && own > 0.0, "{math} and {own}");
            assert_eq!(number(step, "train/teacher_missing_samples"), 0.0);
            let depth = number(step, "teacher/queue_depth_max");
            assert_eq!(
                depth,
                number(step, "teacher/math/queue_depth_max").max(number(step, "teacher/self/queue_depth_max"))
            );
        }
        // The student is its own teacher for `b`: at the first step they are the same.
        let (math, own) = (number(&steps[0], "teacher/math/kl"), number(&steps[0], "teacher/self/kl"));
        assert!(own.abs() < 1e-4 && math.abs() > 1e-2, "{top_k}: {own} and {math}");
        let first = &metrics(&run)[0];
        assert!(number(first, "val/teacher_kl") > 0.0);
        let rewards = ["math", "self"].map(|name| number(first, &format!("val/teacher/{name}/reward_avg")));
        assert_eq!(number(first, "val/teacher_reward_avg"), rewards[0].max(rewards[1]));
    }
}

#[test]
fn a_list_of_one_is_the_simple_form_and_twins_are_one() {
    let bench = Bench::new();
    let simple = config(&bench, "", &[]);
    let model = ["--set", "distillation.model_name_or_path=configs/quickstart/teacher"];
    let full = ["--set", "distillation.top_k=-1"];
    succeed(bench.both(&simple, "simple").args(SETS).args(model).args(full));
    let list = config(&bench, "", &[teacher("only", "teacher", "")]);
    succeed(bench.both(&list, "list").args(SETS).args(full));
    assert_eq!(weights_hash(&bench.out("simple"), 3), weights_hash(&bench.out("list"), 3));
    // Two copies of a teacher are a mixture that equals each of them.
    let twins =
        config(&bench, "", &[teacher("one", "teacher", "weight = 0.3"), teacher("two", "teacher", "weight = 5.0")]);
    succeed(bench.both(&twins, "twins").args(SETS).args(full));
    for (simple, twins) in trained(&bench.out("simple")).iter().zip(trained(&bench.out("twins"))) {
        for name in ["train/loss_avg", "train/grad_norm", "train/teacher_kl_jsd_full"] {
            let (a, b) = (number(simple, name), number(&twins, name));
            assert!((a - b).abs() < 1e-4 * a.abs().max(1e-3), "{name}: {a} and {b}");
        }
        assert_eq!(
            (number(&twins, "teacher/one/completions"), number(&twins, "teacher/two/completions")),
            (16.0, 16.0)
        );
    }
}

#[test]
fn a_resumed_run_goes_on_with_the_same_teachers() {
    let bench = Bench::new();
    let teachers = [
        teacher("math", "teacher", "datasets = [\"a/train\", \"b/train\"]"),
        teacher("self", "student", "datasets = [\"b/train\"]\nweight = 0.5"),
    ];
    let config = config(&bench, "", &teachers);
    // Generations of 24 completions for steps of 16: a checkpoint holds some, with their teachers.
    let sets = ["--set", "rollout.batch_size=6", "--set", "train.train_policy.on_policy=false"];
    succeed(bench.both(&config, "whole/run").args(SETS).args(sets));
    let (whole, cut) = (bench.out("whole/run"), bench.out("cut/run"));
    fs::create_dir_all(&cut).unwrap();
    succeed(Command::new("cp").arg("-r").arg(format!("{}/.", whole.display())).arg(&cut));
    for step in 2..=3 {
        fs::remove_dir_all(cut.join(format!("checkpoints/step_{step:08}"))).unwrap();
    }
    let resumed = succeed(bench.both(&config, "cut/run").args(SETS).args(sets).arg("--resume"));
    assert!(text(&resumed).contains("resumed at step 1"), "{}", text(&resumed));
    assert_eq!(weights_hash(&whole, 3), weights_hash(&cut, 3));
    assert_eq!(metrics(&whole), metrics(&cut));
    let samples = cosmos_testkit::read_jsonl(&whole.join("samples.jsonl"));
    let own = |s: &serde_json::Value| {
        s["weight_versions"] == serde_json::json!([[s["weight_version"], s["token_ids"].as_array().unwrap().len()]])
    };
    assert!(!samples.is_empty() && samples.iter().all(own), "{:#}", samples[0]);
    // What a run writes down can be run.
    succeed(bench.both(&whole.join("config.toml"), "again").arg("--dry-run"));
}

#[test]
fn teachers_that_do_not_fit_are_refused_before_anything_is_written() {
    let bench = Bench::new();
    let only_a = || teacher("math", "teacher", "datasets = [\"a/train\"]");
    let both = || teacher("wide", "student", "");
    let refused = |teachers: &[String], rest: &str, sets: &[&str], expected: &[&str]| {
        let config = config(&bench, rest, teachers);
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        bench.refused(bench.both(&config, "refused").args(SETS).args(sets), expected);
    };
    refused(&[only_a()], "", &[], &["run.toml:", "no teacher answers for the dataset `b/train`", "`datasets`"]);
    let candidates = ["distillation.top_k=4", "distillation.top_k_support=union"];
    refused(&[only_a(), both()], "", &candidates, &["`math`, `wide` answer for `a/train` together", "student"]);
    let simple = ["distillation.model_name_or_path=configs/quickstart/teacher"];
    refused(
        &[both()],
        "",
        &simple,
        &["`distillation.model_name_or_path` and `[[distillation.teachers]]` exclude each other"],
    );
    refused(&[both(), both()], "", &[], &["two teachers have the name `wide`"]);
    let gone = teacher("gone", "nowhere", "");
    refused(&[both(), gone], "", &[], &["run.toml:", "distillation.teachers[1].model_name_or_path", "nowhere"]);
    let validation =
        "validation_dataset = \"b/validation\"\n[validation]\nenable = true\nreward_function = \"a/digit\"\n";
    let train_a = bench.config(
        "reward_function = \"a/length\"",
        &format!("[host]\ntrain_dataset = \"a/train\"\n{validation}{}", only_a()),
    );
    let expected = ["no teacher answers for the validation dataset `b/validation`"];
    bench.refused(bench.both(&train_a, "refused").args(SETS), &expected);
}

#[test]
fn a_name_that_is_no_dataset_is_warned_of() {
    let bench = Bench::new();
    let teachers =
        [teacher("wide", "student", ""), teacher("math", "teacher", "datasets = [\"a/train\", \"a/trian\"]")];
    let config = config(&bench, "", &teachers);
    let output = succeed(bench.both(&config, "run").args(SETS).arg("--dry-run"));
    check(
        &output,
        0,
        &["teacher `math` names `a/trian`, which this run does not use; its datasets are `a/train`, `b/train`"],
    );
}
