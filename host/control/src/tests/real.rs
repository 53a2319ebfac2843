//! The controller itself over HTTP, restarted and compacted in the middle of a run.

use std::path::PathBuf;

use cosmos_controller::{Controller, Order, Outcome, Plan, Role};
use serde_json::json;

use super::*;
use crate::End;

fn plan() -> Plan {
    Plan {
        dataset_len: 12,
        epochs: 2,
        n_generation: 4,
        train_batch: 8,
        policy_replicas: 1,
        steps_max: None,
        allowed_outdated_steps: 1,
        steps_ahead_max: 1,
        sync_weight_interval: 1,
        prompts_per_order_max: 2,
        validation_freq: 4,
        validate_before: true,
        save_freq: 4,
        save_last: true,
    }
}

fn work(folder: PathBuf, name: &'static str, role: Role) -> std::thread::JoinHandle<crate::Result<()>> {
    std::thread::spawn(move || {
        let client = client_as(&folder, name, role);
        client.join(None, None, &identity())?;
        loop {
            let (id, order) = match client.next(500)? {
                Turn::Order(id, order) => (id, order),
                Turn::Idle => continue,
                Turn::Rejoin => {
                    client.join(None, None, &identity())?;
                    continue;
                }
            };
            let outcome = match order {
                Order::Generate { prompts, only, .. } => {
                    let samples = prompts.into_iter().flat_map(|prompt| prompt * 4..prompt * 4 + 4);
                    Outcome::Generated { samples: samples.filter(|s| only.is_empty() || only.contains(s)).collect() }
                }
                Order::Train { .. } => Outcome::Trained,
                Order::Load { .. } => Outcome::Loaded,
                Order::Save { .. } => {
                    let state: Controller = serde_json::from_value(client.snapshot()?).unwrap();
                    assert!(state.step() <= 12);
                    Outcome::Saved
                }
                Order::Validate { .. } => Outcome::Validated,
                Order::Leave | Order::Finish => return client.leave(),
            };
            client.done(id, outcome, json!({"from": name}))?;
            // Slow enough for the restarts to come in between.
            std::thread::sleep(Duration::from_millis(3));
        }
    })
}

/// Pass: with restarts and compactions at arbitrary moments the run ends, and each sample is trained exactly once.
#[test]
fn a_run_of_the_controller_through_restarts_and_compactions() {
    let folder = tempfile::tempdir().unwrap();
    let begin = || {
        let mut options = options(folder.path());
        options.needs = vec![Role::Policy.into(), Role::Rollout.into()];
        Endpoint::start(options, Controller::new(plan())).unwrap()
    };
    let (mut endpoint, mut reports) = begin();
    let roles = [
        work(folder.path().into(), "policy-0", Role::Policy),
        work(folder.path().into(), "rollout-0", Role::Rollout),
        work(folder.path().into(), "rollout-1", Role::Rollout),
    ];
    let mut seen: BTreeMap<u64, Report> = BTreeMap::new();
    for round in 0..4 {
        std::thread::sleep(Duration::from_millis(15 + 10 * round));
        for report in reports.try_iter().take(3) {
            endpoint.recorded(report.seq);
            seen.insert(report.seq, report);
        }
        if round % 2 == 0 {
            assert!(endpoint.compact().unwrap(), "the controller's state can be written down");
        }
        endpoint.stop();
        (endpoint, reports) = begin();
    }
    for role in roles {
        role.join().unwrap().unwrap();
    }
    assert_eq!(endpoint.wait(Duration::from_secs(60)), Some(End::Done));
    seen.extend(reports.try_iter().map(|report| (report.seq, report)));
    let mut trained: Vec<u64> = Vec::new();
    for report in seen.values() {
        if let (Order::Train { share, .. }, Outcome::Trained) = (&report.order, &report.outcome) {
            trained.extend(share.iter().map(|sample| sample.sample));
        }
    }
    trained.sort();
    assert_eq!(trained, (0..96).collect::<Vec<_>>());
}
