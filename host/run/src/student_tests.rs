//! Updates within the backward and after it, as a run makes them.

use cosmos_config::ConfigFile;
use cosmos_engine::objective::SftSample;

use super::*;
use crate::policy::{PolicyRole, StepOutcome};
use crate::rollout::Completion;
use crate::sft;

fn config(update: &str, clip: f64, mini_batch: usize) -> Config {
    let toml = format!(
        "[train]\nseed = 5\noptm_lr = 1e-2\noptm_warmup_steps = 0\noptm_grad_norm_clip = {clip}\ntrain_batch_per_replica = 6\n\
         [host]\nrandom_init = true\nupdate_in_backward = \"{update}\"\n\
         [train.train_policy]\ntype = \"grpo\"\nmini_batch = {mini_batch}\n"
    );
    // What a file says is refused before a run; here it is what the run finds.
    let config =
        ConfigFile::parse("run.toml", &toml.replace("always", "auto")).unwrap().resolve("20260102030405").unwrap();
    let mut config = config.config;
    if update == "always" {
        config.host.update_in_backward = UpdateInBackward::Always;
    }
    config
}

fn student(config: &Config) -> Student {
    Student::load(config, &cosmos_testkit::repo_root().join("configs/quickstart/student"), 10).unwrap()
}

fn completions() -> Vec<Completion> {
    let completion = |sample: u64| {
        let id = |i: u64| ((sample * 7 + i * 3) % 11) as u32;
        let json = serde_json::json!({"sample": sample, "version": 0, "prompt": "", "prompt_ids": [id(1), id(2)],
            "tokens": (3..6 + sample % 3).map(id).collect::<Vec<_>>(), "text": "", "stopped": true, "logprobs": [],
            "candidate_ids": [], "advantage": 0, "teachers": []});
        let mut completion = serde_json::from_value::<Completion>(json).unwrap();
        completion.advantage = sample as f32 - 2.5;
        completion
    };
    (0..6).map(completion).collect()
}

/// One step on all completions.
fn policy_step(student: &mut Student, config: &Config, step: u64) -> Result<StepOutcome> {
    let role = PolicyRole::new(config, config.train.train_policy.grpo().unwrap())?;
    role.step(student, &mut [], None, &completions(), HashMap::new(), step)
}

fn sft_step(student: &mut Student, mini_batch: usize, step: u64) -> Result<StepOutcome> {
    let samples: Vec<SftSample> =
        (0..4).map(|row| SftSample::response((0..7).map(|t| (row * 5 + t * 3) % 11).collect(), 2)).collect();
    sft::step(student, &samples, mini_batch, step)
}

type Steps<'a> = &'a dyn Fn(&mut Student, u64) -> Result<StepOutcome>;

/// Losses, norms and the bits of weights and moments after three steps.
fn trained(config: &Config, make: Steps<'_>) -> (Vec<f64>, Vec<f64>, Vec<u32>) {
    let mut student = student(config);
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for step in 0..3 {
        let outcome = make(&mut student, step).unwrap();
        assert_eq!(outcome.skipped, 0);
        losses.push(outcome.report.total);
        norms.push(outcome.grad_norm);
    }
    assert_eq!(student.optimizer_steps(), 3);
    let tensors = student.weights(true).unwrap().into_iter().chain(student.optimizer_state(true).unwrap());
    (losses, norms, tensors.flat_map(|tensor| tensor.values).map(f32::to_bits).collect())
}

#[test]
fn a_run_gets_the_same_weights_wherever_it_updates() {
    let policy = |config: &Config| trained(config, &|student, step| policy_step(student, config, step));
    let sft = |config: &Config| trained(config, &|student, step| sft_step(student, 4, step));
    for make in [&policy as &dyn Fn(&Config) -> _, &sft] {
        let after = make(&config("never", 0.0, 6));
        for update in ["auto", "always"] {
            let within = make(&config(update, 0.0, 6));
            assert_eq!((&after.0, &after.2), (&within.0, &within.2), "{update}");
            for (a, b) in after.1.iter().zip(&within.1) {
                assert!((a / b - 1.0).abs() < 1e-12 && *a > 0.0, "{update}: {a} and {b}");
            }
        }
    }
}

#[test]
fn an_update_that_needs_all_gradients_waits_for_them() {
    let (clipped, several) = (config("auto", 1.0, 6), config("auto", 0.0, 2));
    assert!(!student(&clipped).updates_in_backward(1).unwrap());
    let student_of_several = student(&several);
    assert!(student_of_several.updates_in_backward(1).unwrap() && !student_of_several.updates_in_backward(3).unwrap());
    policy_step(&mut student(&several), &several, 0).unwrap();
    for (config, needle) in [
        (config("always", 1.0, 6), "gradients are clipped to a norm of 1"),
        (config("always", 0.0, 2), "an update is made of 3 micro-batches"),
    ] {
        let error = policy_step(&mut student(&config), &config, 0).unwrap_err();
        assert!(error.to_string().contains(needle) && error.hint().is_some(), "{error}");
    }
    let error = sft_step(&mut student(&config("always", 0.0, 6)), 1, 0).unwrap_err();
    assert!(error.to_string().contains("4 micro-batches"), "{error}");
}

#[test]
fn weights_that_are_not_finite_leave_a_step_out_wherever_it_updates() {
    for update in ["auto", "never"] {
        let config = config(update, 0.0, 6);
        let mut student = student(&config);
        let last = student.model.params().len() - 1;
        let mut values = student.model.read_param(last);
        values[0] = f32::NAN;
        student.model.write_param(last, &values).unwrap();
        let bits = |student: &Student| -> Vec<u32> {
            student.weights(true).unwrap().into_iter().flat_map(|t| t.values).map(f32::to_bits).collect()
        };
        let before = bits(&student);
        let outcome = policy_step(&mut student, &config, 0).unwrap();
        assert_eq!((outcome.skipped, student.optimizer_steps()), (1, 0), "{update}");
        assert!(!outcome.grad_norm.is_finite() && before == bits(&student), "{update}");
    }
}
