//! Runs that are asked to leave, or killed, end where an undisturbed run ends, bit for bit.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Models, distil, metrics, succeed, text, weights_hash};

const STEPS: u64 = 8;
const LONG: [&str; 2] = ["train.max_num_steps=8", "train.train_batch_per_replica=48"];

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}

fn start(models: &Models, run: &Path, resume: bool) -> Child {
    let mut command = distil(models, run, &LONG);
    if resume {
        command.arg("--resume");
    }
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until the run has recorded a step; a run that ended before is fine too.
fn wait_for_steps(child: &mut Child, run: &Path, steps: usize) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while child.try_wait().unwrap().is_none() {
        let lines = std::fs::read_to_string(run.join("metrics.jsonl")).map(|t| t.lines().count()).unwrap_or(0);
        if lines >= steps {
            return;
        }
        assert!(Instant::now() < deadline, "no step within two minutes");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_run_that_was_asked_to_leave_goes_on_bit_for_bit() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole/run");
    succeed(&mut distil(&models, &whole, &LONG));
    for name in ["-TERM", "-USR1"] {
        let run = dir.path().join(name).join("run");
        let mut child = start(&models, &run, false);
        wait_for_steps(&mut child, &run, 2);
        signal(&child, name);
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(75), "{name}");
        let output = succeed(distil(&models, &run, &LONG).arg("--resume"));
        assert!(text(&output).contains("resumed at step"), "{}", text(&output));
        assert_eq!(weights_hash(&run, STEPS), weights_hash(&whole, STEPS), "{name}");
        assert_eq!(metrics(&run), metrics(&whole), "{name}");
    }
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_as_if_never_disturbed() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole/run");
    succeed(&mut distil(&models, &whole, &LONG));
    let run = dir.path().join("killed/run");
    for attempt in 0..6u64 {
        let mut child = start(&models, &run, attempt > 0);
        wait_for_steps(&mut child, &run, attempt as usize + 1);
        // Somewhere within the next step or its checkpoint; a fixed list, so that a failure can be repeated.
        std::thread::sleep(Duration::from_millis([0, 3, 17, 40, 8, 25][attempt as usize]));
        let _ = child.kill();
        child.wait().unwrap();
    }
    succeed(distil(&models, &run, &LONG).arg("--resume"));
    assert_eq!(weights_hash(&run, STEPS), weights_hash(&whole, STEPS));
    assert_eq!(metrics(&run), metrics(&whole));
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    succeed(&mut distil(&models, &run, &[]));
    let before = weights_hash(&run, 4);
    let newest = run.join("checkpoints/step_00000004/model.safetensors");
    let mut bytes = std::fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    std::fs::write(&newest, bytes).unwrap();
    let output = succeed(distil(&models, &run, &[]).arg("--resume"));
    assert!(
        text(&output).contains("does not match its hash") && text(&output).contains("resumed at step 3"),
        "{}",
        text(&output)
    );
    assert_eq!(weights_hash(&run, 4), before);
}

#[test]
fn a_run_that_diverges_stops_with_its_evidence() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let weights = models.teacher.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let end = bytes.len();
    // The last tensor of the file: enough of it that every token sees a NaN.
    bytes[end - 256..].chunks_exact_mut(4).for_each(|value| value.copy_from_slice(&f32::NAN.to_le_bytes()));
    std::fs::write(&weights, bytes).unwrap();
    let output = distil(&models, &run, &["train.max_num_steps=20", "host.bad_steps_max=2"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("not finite") && text(&output).contains("hint:"), "{}", text(&output));
    let evidence = std::fs::read_dir(&run)
        .unwrap()
        .filter_map(|e| e.ok())
        .any(|e| e.file_name().to_string_lossy().starts_with("bad_step_"));
    assert!(evidence, "{}", text(&output));
}

#[test]
fn a_student_that_blew_up_fails_the_run_and_names_the_step() {
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let output = distil(&models, &run, &["train.max_num_steps=20", "train.optm_lr=1e38", "train.optm_warmup_steps=0"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("after step 1:") && text(&output).contains("not finite"), "{}", text(&output));
}
