//! Every objective in a real step.

use super::{Models, distil, metrics, succeed};

#[test]
fn a_teacher_that_is_the_student_has_nothing_to_teach() {
    let models = Models::new();
    let same =
        Models { teacher: models.student.clone(), student: models.student.clone(), _dir: tempfile::tempdir().unwrap() };
    let dir = tempfile::tempdir().unwrap();
    for (name, sets) in [
        ("sampled", ["distillation.top_k=0", "train.max_num_steps=1"]),
        ("full", ["distillation.top_k=-1", "train.max_num_steps=1"]),
        ("top4", ["distillation.top_k=4", "train.max_num_steps=1"]),
    ] {
        let run = dir.path().join(name);
        succeed(&mut distil(&same, &run, &sets));
        let step = &metrics(&run)[0];
        let grad_norm = step["train/grad_norm"].as_f64().unwrap();
        assert!(grad_norm < 1e-4, "{name}: gradient norm {grad_norm}");
        let (_, kl) = step
            .as_object()
            .unwrap()
            .iter()
            .find(|(k, _)| k.starts_with("train/teacher_kl_") && !k.contains("adv"))
            .unwrap();
        assert!(kl.as_f64().unwrap().abs() < 1e-5, "{name}: {kl}");
    }
}

#[test]
fn every_objective_makes_steps() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&str, &[&str]); 12] = [
        (
            "sampled_discounted",
            &["distillation.top_k=0", "distillation.kl_discount_factor=0.9", "distillation.kl_clip=2.0"],
        ),
        ("tail", &["distillation.top_k=4", "distillation.top_k_mass=tail"]),
        ("renormalize", &["distillation.top_k=4", "distillation.top_k_mass=renormalize", "distillation.jsd_beta=0.5"]),
        ("raw", &["distillation.top_k=4", "distillation.top_k_mass=raw", "distillation.jsd_beta=0.0"]),
        ("teacher_support", &["distillation.top_k=4", "distillation.top_k_support=teacher"]),
        ("union_support", &["distillation.top_k=4", "distillation.top_k_support=union"]),
        ("recompute", &["distillation.top_k=4", "distillation.rollout_top_k_recompute=true"]),
        ("cosmos", &["distillation.top_k=4", "distillation.objective=cosmos_gjsd"]),
        ("include_prompt", &["distillation.top_k=-1", "distillation.include_prompt=true"]),
        (
            "mixed",
            &["train.train_policy.bypass_reward=false", "rollout.n_generation=4", "train.train_policy.kl_beta=0.1"],
        ),
        ("gspo", &["distillation.enable=false", "train.train_policy.variant=gspo", "rollout.n_generation=4"]),
        (
            "several_updates",
            &[
                "distillation.top_k=0",
                "train.train_policy.batch_size_per_optimize=8",
                "train.train_policy.mu_iterations=2",
                "train.train_policy.epsilon_low=0.2",
            ],
        ),
    ];
    for (name, sets) in cases {
        let run = dir.path().join(name);
        let sets: Vec<&str> = sets.iter().copied().chain(["train.max_num_steps=2"]).collect();
        succeed(&mut distil(&models, &run, &sets));
        let lines = metrics(&run);
        assert_eq!(lines.len(), 2, "{name}");
        for line in &lines {
            assert!(line["train/loss_avg"].is_number() && line["train/grad_norm"].is_number(), "{name}: {line:#}");
            assert_eq!(line["train/skipped_steps"], 0.0, "{name}: {line:#}");
        }
        if name == "tail" {
            assert!(lines[0]["train/teacher_kl_jsd_top4"].as_f64().unwrap() >= 0.0);
        }
        if name == "mixed" {
            assert!(
                lines[0]["train/reward_mean"].is_number() && lines[0]["train/kl_loss_avg"].is_number(),
                "{:#}",
                lines[0]
            );
        }
    }
}

/// Criterion: below 1e-4 in f32; with fewer bits the metric shows what they cost, and says so without being asked.
#[test]
fn the_mismatch_of_rollout_and_training_is_logged() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let mismatch = |name: &str, sets: &[&str]| -> (f64, f64) {
        let run = dir.path().join(name);
        let sets: Vec<&str> = sets.iter().copied().chain(["distillation.top_k=0", "train.max_num_steps=2"]).collect();
        succeed(&mut distil(&models, &run, &sets));
        let lines = metrics(&run);
        let of = |metric: &str| {
            let values = lines.iter().map(|line| line[format!("rollout/logprob_mismatch_{metric}")].as_f64());
            values.collect::<Option<Vec<f64>>>().unwrap_or_else(|| panic!("{name} logs no mismatch: {lines:#?}"))
        };
        let most = |values: Vec<f64>| values.into_iter().fold(0.0, f64::max);
        (most(of("mean")), most(of("max")))
    };
    let collected = "train.train_policy.collect_rollout_logprobs=true";
    let (mean, max) = mismatch("f32", &[collected]);
    assert!(max < 1e-4 && mean <= max, "{mean} {max}");
    // The first update of a step is made under the weights that sampled.
    let (_, max) = mismatch("several", &[collected, "train.train_policy.batch_size_per_optimize=8"]);
    assert!(max < 1e-4, "{max}");
    for (name, set) in [("bf16", "train.transfer_dtype=bfloat16"), ("int8", "rollout.quantization=int8")] {
        let (narrow_mean, narrow_max) = mismatch(name, &[set]);
        println!("{name}: mean {narrow_mean:.2e}, max {narrow_max:.2e}; f32: mean {mean:.2e}");
        assert!(
            narrow_mean > 10.0 * mean && narrow_max > narrow_mean && narrow_max < 1.0,
            "{name}: {narrow_mean} {narrow_max}"
        );
    }
}

#[test]
fn micro_batches_do_not_change_a_step() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let norms: Vec<f64> = ["16", "8", "4"]
        .iter()
        .map(|mini| {
            let run = dir.path().join(mini);
            let mini = format!("train.train_policy.mini_batch={mini}");
            // Sums over sequences are the reduction that does not depend on how a batch is cut.
            succeed(&mut distil(
                &models,
                &run,
                &[&mini, "train.max_num_steps=1", "train.train_policy.loss_type=seq-mean-token-sum"],
            ));
            metrics(&run)[0]["train/grad_norm"].as_f64().unwrap()
        })
        .collect();
    assert!(norms.iter().all(|n| (n / norms[0] - 1.0).abs() < 1e-4), "{norms:?}");
}
