//! What a member of a step had to report dies with it. Criterion: the step, which the other member holds, is neither made again
//! nor left out: each step is in the metrics once, and the weights are those of the undisturbed run.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::super::roles::{Roles, has_redis, settings};
use super::super::{Models, metrics, weights_hash};
use super::alone;

const STEPS: u64 = 6;

/// Stands between a role and the controller, and keeps its first report of a step made.
struct Gate {
    url: String,
    kept: Arc<AtomicBool>,
}

impl Gate {
    fn before(controller: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let kept = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&kept);
        // The threads end with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (controller, flag) = (controller.clone(), Arc::clone(&flag));
                // A role that is killed may break off in the middle.
                std::thread::spawn(move || drop(pass(stream, &controller, &flag)));
            }
        });
        Self { url, kept }
    }
}

/// Passes one request on, and its answer back.
fn pass(stream: TcpStream, controller: &str, kept: &AtomicBool) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut head, mut bytes) = (String::new(), 0);
    loop {
        let at = head.len();
        if reader.read_line(&mut head)? == 0 {
            return Ok(());
        }
        let line = head[at..].to_ascii_lowercase();
        if let Some(length) = line.strip_prefix("content-length:") {
            bytes = length.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; bytes];
    reader.read_exact(&mut body)?;
    let is_report = String::from_utf8_lossy(&body).contains(r#""outcome":"trained""#);
    if kept.load(Ordering::SeqCst) || (is_report && !kept.swap(true, Ordering::SeqCst)) {
        // Nothing comes through any more, and the line is not cut.
        let _ = reader.read(&mut [0]);
        return Ok(());
    }
    let mut onward = TcpStream::connect(controller.trim_start_matches("http://"))?;
    onward.write_all(head.as_bytes())?;
    onward.write_all(&body)?;
    std::io::copy(&mut onward, &mut &stream)?;
    Ok(())
}

fn two_policies(models: &Models) -> Vec<String> {
    // Nobody is to be taken for lost who is only slow.
    let patient = "host.silent_ms_max=60000";
    let own = ["train.train_batch_per_replica=16", "policy.parallelism.n_init_replicas=2", patient];
    settings(models).into_iter().chain(own.map(str::to_string)).collect()
}

#[test]
fn a_member_that_is_killed_before_it_reports_a_step() {
    if !has_redis() {
        return;
    }
    let _alone = alone();
    let models = Models::new();
    let dir = tempfile::tempdir().unwrap();
    let mut whole = Roles::new(&dir.path().join("whole"), two_policies(&models));
    whole.start(&["policy-0", "policy-1", "rollout-0", "teacher-0"]);
    whole.wait_for_end(0);
    // The one that publishes the weights has done so by then.
    for victim in ["policy-1", "policy-0"] {
        let mut roles = Roles::new(&dir.path().join(victim), two_policies(&models));
        let other = if victim == "policy-0" { "policy-1" } else { "policy-0" };
        roles.start(&[other, "rollout-0", "teacher-0"]);
        let (url, token) = roles.control();
        let gate = Gate::before(url);
        roles.role_at(victim, &gate.url, &token);
        roles.wait_until("its report", || gate.kept.load(Ordering::SeqCst));
        roles.kill_and_restart(victim);
        roles.wait_for_end(0);
        let steps: Vec<u64> = metrics(&roles.run).iter().map(|row| row["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "{victim}\n{}", roles.log());
        let said = roles.log();
        assert!(said.contains(&format!("is recorded without what {victim} had to tell of it")), "{said}");
        assert!(!said.contains("the run went back"), "{said}");
        // All members tell of every other step: one line of the log, said once, is all that is missing.
        assert_eq!(said.matches("is recorded without").count(), 1, "{said}");
        let summary = std::fs::read_to_string(roles.run.join("summary.json")).unwrap();
        let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
        assert_eq!(summary["samples"], STEPS * 32, "{summary:#}");
        assert_eq!(weights_hash(&roles.run, STEPS), weights_hash(&whole.run, STEPS), "{victim}\n{said}");
    }
}
