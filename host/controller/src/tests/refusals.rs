//! Every reason to refuse an event; the state stays as it was.

use super::one_process::{done, join, plan};
use crate::*;

/// A run whose rollout writes prompts 0 and 1 (samples 0 to 7).
fn writing() -> (Controller, OrderId) {
    let mut controller = Controller::new(Plan { validate_before: false, ..plan() });
    controller.apply(join("policy-0", Role::Policy, Some(0))).unwrap();
    let given = controller.apply(join("rollout-0", Role::Rollout, None)).unwrap();
    let [Dispatch { id, order: Order::Generate { prompts, .. }, .. }] = given.as_slice() else { panic!("{given:?}") };
    assert_eq!(prompts, &[0, 1]);
    (controller, *id)
}

fn refused(controller: &mut Controller, event: Event) -> Refused {
    let before = controller.clone();
    let refused = controller.apply(event).unwrap_err();
    assert_eq!(*controller, before, "{refused}");
    assert!(!refused.hint().is_empty() && !refused.to_string().is_empty());
    refused
}

#[test]
fn names_and_addresses_have_bounds() {
    let (mut controller, _) = writing();
    for len in [0, NAME_BYTES_MAX + 1, 1 << 20] {
        let refused = refused(&mut controller, join(&"n".repeat(len), Role::Teacher, None));
        assert_eq!(refused, Refused::Name { bytes: len });
    }
    controller.apply(join(&"n".repeat(NAME_BYTES_MAX), Role::Teacher, None)).unwrap();
    let at = |len: usize| Event::Joined {
        replica: "policy-1".into(),
        role: Role::Policy,
        holds: None,
        address: Some("a".repeat(len)),
    };
    let wrong = refused(&mut controller, at(ADDRESS_BYTES_MAX + 1));
    assert_eq!(wrong, Refused::Address { replica: "policy-1".into(), bytes: ADDRESS_BYTES_MAX + 1 });
    controller.apply(at(ADDRESS_BYTES_MAX)).unwrap();
}

#[test]
fn a_name_stays_with_its_role_until_it_is_removed() {
    let (mut controller, _) = writing();
    for _ in 0..2 {
        let wrong = refused(&mut controller, join("rollout-0", Role::Policy, Some(0)));
        let (known, claimed) = (Role::Rollout, Role::Policy);
        assert_eq!(wrong, Refused::OtherRole { replica: "rollout-0".into(), known, claimed });
        controller.apply(Event::Lost { replica: "rollout-0".into() }).unwrap();
    }
    controller.apply(Event::Removed { replica: "rollout-0".into() }).unwrap();
    controller.apply(join("rollout-0", Role::Policy, None)).unwrap();
}

#[test]
fn there_is_room_for_so_many_and_no_more() {
    let (mut controller, _) = writing();
    for i in 2..REPLICAS_MAX {
        controller.apply(join(&format!("t{i}"), Role::Teacher, None)).unwrap();
    }
    let wrong = refused(&mut controller, join("one-more", Role::Teacher, None));
    assert_eq!(wrong, Refused::TooMany { replica: "one-more".into() });
    controller.apply(join("t2", Role::Teacher, None)).unwrap();
    controller.apply(Event::Removed { replica: "t2".into() }).unwrap();
    controller.apply(join("one-more", Role::Teacher, None)).unwrap();
}

#[test]
fn orders_that_were_never_given_are_foreign_and_old_ones_are_late() {
    let (mut controller, id) = writing();
    for foreign in [0, id.0 + 1, u64::MAX] {
        let order = OrderId(foreign);
        let wrong = Refused::NoSuchOrder { replica: "rollout-0".into(), order };
        assert_eq!(refused(&mut controller, done("rollout-0", order, Outcome::Validated)), wrong);
        let failed = Event::Failed { replica: "rollout-0".into(), order, reason: "x".into() };
        assert_eq!(refused(&mut controller, failed), wrong);
    }
    // Of somebody else, of nobody: not even an error, for it may have been its own once.
    let before = controller.clone();
    for name in ["policy-0", "nobody"] {
        let answer = Outcome::Generated { samples: vec![0] };
        assert!(controller.apply(done(name, id, answer)).unwrap().is_empty());
        let failed = Event::Failed { replica: name.into(), order: id, reason: "x".into() };
        assert!(controller.apply(failed).unwrap().is_empty());
    }
    assert_eq!(controller, before);
    // Reported twice.
    let all = Outcome::Generated { samples: (0..8).collect() };
    controller.apply(done("rollout-0", id, all.clone())).unwrap();
    let before = controller.clone();
    assert!(controller.apply(done("rollout-0", id, all)).unwrap().is_empty());
    assert_eq!(controller, before);
}

#[test]
fn an_outcome_answers_its_own_order() {
    let gone = || Outcome::SamplesGone { samples: vec![] };
    let written = || Outcome::Generated { samples: vec![] };
    let others = [Outcome::Trained, Outcome::Loaded, Outcome::Saved, Outcome::Validated, gone()];
    let (mut controller, id) = writing();
    for outcome in others {
        let wrong = refused(&mut controller, done("rollout-0", id, outcome));
        assert_eq!(wrong, Refused::OtherOutcome { replica: "rollout-0".into(), order: id });
    }
    let given = controller.apply(done("rollout-0", id, Outcome::Generated { samples: (0..8).collect() })).unwrap();
    let [Dispatch { id, order: Order::Train { .. }, .. }] = given.as_slice() else { panic!("{given:?}") };
    for outcome in [written(), Outcome::Loaded, Outcome::Saved, Outcome::Validated, Outcome::WeightsGone] {
        let wrong = refused(&mut controller, done("policy-0", *id, outcome));
        assert_eq!(wrong, Refused::OtherOutcome { replica: "policy-0".into(), order: *id });
    }
}

#[test]
fn samples_are_those_asked_for_and_ascending() {
    let (mut controller, id) = writing();
    let cases =
        [(vec![8], 8), (vec![0, 1, 1], 1), (vec![3, 2], 2), (vec![7, u64::MAX], u64::MAX), ((0..9).collect(), 8)];
    for (samples, sample) in cases {
        let wrong = refused(&mut controller, done("rollout-0", id, Outcome::Generated { samples }));
        assert_eq!(wrong, Refused::Samples { replica: "rollout-0".into(), order: id, sample });
    }
    let given = controller.apply(done("rollout-0", id, Outcome::Generated { samples: (0..8).collect() })).unwrap();
    let id = given[0].id;
    let wrong = refused(&mut controller, done("policy-0", id, Outcome::SamplesGone { samples: vec![3, 9] }));
    assert_eq!(wrong, Refused::Samples { replica: "policy-0".into(), order: id, sample: 9 });
    // Two that are gone are asked for again, and no others.
    let given = controller.apply(done("policy-0", id, Outcome::SamplesGone { samples: vec![3, 5] })).unwrap();
    let [Dispatch { id, order: Order::Generate { only, .. }, .. }] = given.as_slice() else { panic!("{given:?}") };
    assert_eq!(only, &[3, 5]);
    let wrong = refused(&mut controller, done("rollout-0", *id, Outcome::Generated { samples: vec![3, 4] }));
    assert_eq!(wrong, Refused::Samples { replica: "rollout-0".into(), order: *id, sample: 4 });
}
