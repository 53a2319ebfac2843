//! Runs in which nothing breaks, or nothing but replicas.

use std::time::Duration;

use cosmos_controller::{Event, Order, Outcome, Role};
use serde_json::json;

use super::*;
use crate::{ControlError, End, Need, fetch_status};

fn generated() -> Outcome {
    Outcome::Generated { samples: vec![] }
}

#[test]
fn a_run_from_join_to_the_end_with_every_report_once() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, reports) = start(folder.path(), 5);
    let rollout = client(folder.path(), "rollout-0");
    assert_eq!(rollout.join(None, None, &identity()).unwrap(), json!({"broker": "here"}));
    for prompt in 0..5 {
        let (id, given) = order(&rollout);
        assert_eq!(prompt_of(&given), prompt);
        assert_eq!(order(&rollout).0, id, "the same order comes until it is reported");
        assert!(rollout.done(id, generated(), json!({"prompt": prompt})).unwrap());
        assert!(!rollout.done(id, generated(), json!({})).unwrap(), "a second report comes to nothing");
        assert!(!rollout.failed(id, "too late").unwrap());
    }
    assert_eq!(order(&rollout).1, Order::Finish);
    assert_eq!(endpoint.end(), None, "not before everybody has left");
    rollout.leave().unwrap();
    rollout.leave().unwrap();
    assert_eq!(endpoint.wait(Duration::from_secs(60)), Some(End::Done));
    let got: Vec<Report> = reports.try_iter().collect();
    assert_eq!(got.iter().map(|r| r.payload["prompt"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    assert!(got.iter().all(|r| r.replica == "rollout-0" && matches!(r.order, Order::Generate { .. })));
    endpoint.stop();
    assert!(!folder.path().join("control.json").exists());
}

#[test]
fn a_question_is_held_until_there_is_an_order() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, _reports) = start(folder.path(), 1);
    let (first, second) = (client(folder.path(), "a"), client(folder.path(), "b"));
    first.join(None, None, &identity()).unwrap();
    second.join(None, None, &identity()).unwrap();
    let (id, _) = order(&first);
    assert_eq!(second.next(10).unwrap(), Turn::Idle);
    let held = std::thread::spawn(move || (second.next(15_000).unwrap(), second));
    until("the long poll", || {
        let status = endpoint.status().unwrap();
        status["replicas"][1]["seen_ms_ago"] == 0
    });
    first.done(id, generated(), json!(null)).unwrap();
    assert!(matches!(held.join().unwrap().0, Turn::Order(_, Order::Finish)));
}

#[test]
fn the_silent_are_lost_and_then_removed_and_may_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    options.deadlines = Deadlines { silent_ms_max: 200, gone_ms_max: 1_000, ..Deadlines::default() };
    let (endpoint, _reports) = Endpoint::start(options, Rounds::new(2)).unwrap();
    let (silent, other) = (client(folder.path(), "silent"), client(folder.path(), "other"));
    silent.join(None, None, &identity()).unwrap();
    let (lost, given) = order(&silent);
    until("its loss", || endpoint.status().unwrap()["replicas"][0]["state"] == "lost");
    assert!(!silent.done(lost, generated(), json!(null)).unwrap(), "its order is no longer its own");
    assert_eq!(silent.next(0).unwrap(), Turn::Rejoin);
    // Somebody else gets what it had.
    other.join(None, None, &identity()).unwrap();
    let (id, again) = order(&other);
    assert_eq!((prompt_of(&given), id == lost), (prompt_of(&again), false));
    let beating = other.beat_while(id).unwrap();
    until("its removal", || {
        endpoint.status().unwrap()["replicas"].as_array().unwrap().iter().all(|r| r["name"] == "other")
    });
    assert!(!beating.is_withdrawn());
    silent.join(None, None, &identity()).unwrap();
    assert_eq!(prompt_of(&order(&silent).1), 1);
}

#[test]
fn heartbeats_keep_a_busy_replica_and_tell_it_when_its_order_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    options.deadlines = Deadlines { silent_ms_max: 400, gone_ms_max: 60_000, ..Deadlines::default() };
    let (endpoint, _reports) = Endpoint::start(options, Rounds::new(2)).unwrap();
    let busy = client(folder.path(), "busy");
    busy.join(None, None, &identity()).unwrap();
    let (id, _) = order(&busy);
    let beating = busy.beat_while(id).unwrap();
    busy.progress("3 of 8\nprompts");
    until("the progress", || endpoint.status().unwrap()["replicas"][0]["progress"] == "3 of 8 prompts");
    endpoint.inject(Event::Lost { replica: "busy".into() }).unwrap();
    until("the withdrawal", || beating.is_withdrawn());
}

#[test]
fn a_second_process_of_the_same_name_replaces_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let (_endpoint, _reports) = start(folder.path(), 3);
    let (old, new) = (client(folder.path(), "a"), client(folder.path(), "a"));
    old.join(None, None, &identity()).unwrap();
    let (id, _) = order(&old);
    new.join(None, None, &identity()).unwrap();
    assert!(new.incarnation() > old.incarnation());
    for refused in [old.next(0).unwrap_err(), old.done(id, generated(), json!(null)).unwrap_err()] {
        assert!(matches!(&refused, ControlError::Refused { kind, .. } if kind == "replaced"), "{refused}");
    }
    old.leave().unwrap();
    assert_eq!(prompt_of(&order(&new).1), 0);
}

#[test]
fn a_missing_role_fails_the_run_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    options.needs = vec![Role::Rollout.into(), Role::Teacher.into()];
    options.deadlines = Deadlines { absent_ms_max: 300, ..Deadlines::default() };
    let (endpoint, _reports) = Endpoint::start(options, Rounds::new(2)).unwrap();
    let rollout = client(folder.path(), "a");
    rollout.join(None, None, &identity()).unwrap();
    let Some(End::Failed(reason)) = endpoint.wait(Duration::from_secs(60)) else { panic!("it goes on") };
    assert!(reason.starts_with("no teacher has been there for"), "{reason}");
    let error = rollout.next(0).unwrap_err();
    assert!(matches!(&error, ControlError::RunFailed { reason } if reason.contains("teacher")), "{error}");
}

#[test]
fn the_last_of_a_kind_stays_until_the_run_is_saved() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    let one_of = |kind: &'static str| Need::some_of(Role::Teacher, kind, move |name| name.starts_with(kind));
    options.needs = vec![one_of("math"), one_of("code")];
    let (endpoint, _reports) = Endpoint::start(options, Rounds::new(9)).unwrap();
    let teacher = |name| {
        let teacher = client_as(folder.path(), name, Role::Teacher);
        teacher.join(None, None, &identity()).unwrap();
        teacher
    };
    let (first, second, code) = (teacher("math-0"), teacher("math-1"), teacher("code-0"));
    assert!(!first.wish_to_leave().unwrap(), "there is another of its kind");
    assert_eq!(endpoint.status().unwrap()["state"], "running");
    assert!(second.wish_to_leave().unwrap(), "`code-0` does not know what it knows");
    assert_eq!(endpoint.status().unwrap()["state"], "ending");
    drop(code);
}

#[test]
fn a_missing_kind_fails_the_run_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    options.needs = vec![Need::some_of(Role::Teacher, "teacher `math`", |name| name.starts_with("math"))];
    options.deadlines = Deadlines { absent_ms_max: 300, ..Deadlines::default() };
    let (endpoint, _reports) = Endpoint::start(options, Rounds::new(2)).unwrap();
    client_as(folder.path(), "code-0", Role::Teacher).join(None, None, &identity()).unwrap();
    let Some(End::Failed(reason)) = endpoint.wait(Duration::from_secs(60)) else { panic!("it goes on") };
    assert!(reason.starts_with("no teacher `math` has been there for"), "{reason}");
}

#[test]
fn a_policy_is_not_given_up_unless_the_run_may_go_on_without() {
    for may_leave in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(folder.path());
        options.deadlines = Deadlines {
            silent_ms_max: 50,
            gone_ms_max: 50,
            absent_ms_max: 400,
            policies_may_leave: may_leave,
            ..Deadlines::default()
        };
        let (endpoint, _reports) = Endpoint::start(options, Rounds::new(2)).unwrap();
        client_as(folder.path(), "policy-0", Role::Policy).join(None, None, &identity()).unwrap();
        if may_leave {
            until("its removal", || endpoint.status().unwrap()["replicas"].as_array().unwrap().is_empty());
            assert_eq!(endpoint.end(), None);
        } else {
            let Some(End::Failed(reason)) = endpoint.wait(Duration::from_secs(60)) else { panic!("it goes on") };
            assert!(reason.starts_with("policy `policy-0` has been lost"), "{reason}");
        }
    }
}

#[test]
fn planned_policies_that_never_come_are_not_waited_for_for_ever() {
    for may_leave in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(folder.path());
        options.deadlines = Deadlines { absent_ms_max: 300, policies_may_leave: may_leave, ..Deadlines::default() };
        let rounds = Rounds { missing: 2, ..Rounds::new(2) };
        let (endpoint, _reports) = Endpoint::start(options, rounds).unwrap();
        client_as(folder.path(), "policy-0", Role::Policy).join(None, None, &identity()).unwrap();
        if may_leave {
            until("going on", || endpoint.status().unwrap()["run"]["missing"].is_null());
            assert_eq!(endpoint.end(), None);
        } else {
            let Some(End::Failed(reason)) = endpoint.wait(Duration::from_secs(60)) else { panic!("it goes on") };
            assert!(reason.starts_with("2 policies of those planned have not come for"), "{reason}");
        }
    }
}

#[test]
fn orders_that_always_fail_end_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, _reports) = start(folder.path(), 1);
    let rollout = client(folder.path(), "a");
    rollout.join(None, None, &identity()).unwrap();
    let reason = loop {
        match rollout.next(1_000) {
            Ok(Turn::Order(id, _)) => drop(rollout.failed(id, "no such weights").unwrap()),
            Ok(_) => {}
            Err(error) => break error.to_string(),
        }
    };
    assert!(reason.contains("role `rollout`") && reason.contains("no such weights"), "{reason}");
    assert!(matches!(endpoint.end(), Some(End::Failed(_))));
}

#[test]
fn a_requested_stop_reaches_everybody_and_the_status_tells() {
    let folder = tempfile::tempdir().unwrap();
    let (endpoint, _reports) = start(folder.path(), 9);
    let rollout = client(folder.path(), "a");
    rollout.join(None, None, &identity()).unwrap();
    let (id, _) = order(&rollout);
    let status = fetch_status(&Target::Run(folder.path().into()), 10_000).unwrap();
    assert_eq!(status["state"], "running");
    assert_eq!(status["replicas"][0]["doing"], "generate");
    assert_eq!(status["replicas"][0]["role"], "rollout");
    assert_eq!(status["run"], json!({"done": 0, "total": 9}));
    endpoint.inject(Event::StopRequested).unwrap();
    rollout.done(id, generated(), json!(null)).unwrap();
    assert_eq!(order(&rollout).1, Order::Leave);
    rollout.leave().unwrap();
    assert_eq!(endpoint.wait(Duration::from_secs(60)), Some(End::Saved));
}

#[test]
fn another_config_name_or_role_is_refused_with_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    let (_endpoint, _reports) = start(folder.path(), 1);
    let other = Identity { config: [("train.seed".into(), "2".into())].into(), ..identity() };
    let error = client(folder.path(), "a").join(None, None, &other).unwrap_err();
    assert!(
        error.to_string().contains("it was started differently from the run: `train.seed` is 2, and not 1"),
        "{error}"
    );
    assert!(error.is_usage() && error.hint().unwrap().contains("--set"));
    client(folder.path(), "a").join(None, None, &identity()).unwrap();
    let error = client_as(folder.path(), "a", Role::Policy).join(None, None, &identity()).unwrap_err();
    assert!(error.to_string().contains("`a` is that of another role (rollout)"), "{error}");
    let bad = ClientOptions {
        target: Target::Run(folder.path().into()),
        replica: "../x".into(),
        role: Role::Policy,
        wait_ms_max: 1,
    };
    assert!(matches!(Client::new(bad), Err(ControlError::Refused { kind, .. }) if kind == "name"));
}

#[test]
fn there_is_a_limit_on_replicas() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    options.deadlines.replicas_max = 1;
    let (_endpoint, _reports) = Endpoint::start(options, Rounds::new(2)).unwrap();
    client(folder.path(), "a").join(None, None, &identity()).unwrap();
    let second = ClientOptions {
        target: Target::Run(folder.path().into()),
        replica: "b".into(),
        role: Role::Rollout,
        wait_ms_max: 100,
    };
    let error = Client::new(second).unwrap().join(None, None, &identity()).unwrap_err();
    assert!(error.to_string().contains("has 1 replicas already"), "{error}");
}
