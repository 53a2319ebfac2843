//! Several policies: who is waited for, who is believed, and how far a run goes back.

use super::one_process::{done, join, plan};
use crate::*;

/// A run of `policies` that never validates or saves; two prompts of four completions make the share of a policy.
fn run(policies: u64) -> Controller {
    let plan = Plan { policy_replicas: policies, validation_freq: 0, save_freq: 0, epochs: 4, ..plan() };
    let mut controller = Controller::new(plan);
    for i in 0..policies {
        controller.apply(join(&format!("p{i}"), Role::Policy, None)).unwrap();
    }
    controller.apply(join("r", Role::Rollout, None)).unwrap();
    controller
}

fn lost(name: &str) -> Event {
    Event::Lost { replica: name.into() }
}

fn removed(name: &str) -> Event {
    Event::Removed { replica: name.into() }
}

/// Carries out what `who` is to do, and says what it was.
fn act(controller: &mut Controller, who: &str) -> Order {
    let (id, order) = controller.order_of(who).map(|(id, order)| (id, order.clone())).expect("an order");
    let n = controller.plan().n();
    let outcome = match &order {
        Order::Generate { prompts, only, .. } => {
            let all = prompts.iter().flat_map(|p| p * n..p * n + n);
            Outcome::Generated { samples: all.filter(|s| only.is_empty() || only.contains(s)).collect() }
        }
        Order::Train { .. } => Outcome::Trained,
        Order::Load { .. } => Outcome::Loaded,
        Order::Save { .. } => Outcome::Saved,
        Order::Validate { .. } => Outcome::Validated,
        Order::Leave | Order::Finish => panic!("it is over"),
    };
    controller.apply(done(who, id, outcome)).unwrap();
    order
}

fn doing<'a>(controller: &'a Controller, who: &str) -> Option<&'a Order> {
    controller.order_of(who).map(|(_, order)| order)
}

/// Everybody works until both policies have been told to make step `step`.
fn until_training(controller: &mut Controller, step: u64) {
    let trains = |c: &Controller, p| matches!(doing(c, p), Some(Order::Train { step: s, .. }) if *s == step);
    for _ in 0..1000 {
        if trains(controller, "p0") && trains(controller, "p1") {
            return;
        }
        for who in ["p0", "p1", "r"] {
            let later = trains(controller, who);
            if !later && controller.order_of(who).is_some() {
                act(controller, who);
            }
        }
    }
    panic!("step {step} is never made: {:#?}", controller.status());
}

fn fail(controller: &mut Controller, who: &str) {
    let (order, _) = controller.order_of(who).expect("an order");
    controller.apply(Event::Failed { replica: who.into(), order, reason: "broke down".into() }).unwrap();
}

#[test]
fn each_member_gets_its_own_share() {
    let mut controller = run(2);
    until_training(&mut controller, 1);
    for (who, samples) in [("p0", 0..8), ("p1", 8..16)] {
        let Some(Order::Train { share, members, .. }) = doing(&controller, who) else { panic!() };
        assert_eq!(share.iter().map(|s| s.sample).collect::<Vec<_>>(), samples.collect::<Vec<_>>());
        assert_eq!(members.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["p0", "p1"]);
    }
}

#[test]
fn a_step_that_lost_members_may_have_made_is_neither_counted_nor_taken_back() {
    let mut controller = run(2);
    until_training(&mut controller, 2);
    // Both have made it, and both were cut off before they could say so.
    controller.apply(lost("p0")).unwrap();
    controller.apply(lost("p1")).unwrap();
    assert_eq!((controller.step(), controller.status().training), (1, 16));
    controller.apply(join("p1", Role::Policy, Some(2))).unwrap();
    // One is enough: the step is made. The other is waited for, and brings the state, too.
    assert_eq!((controller.step(), controller.status().rollbacks), (2, 0));
    controller.apply(join("p0", Role::Policy, Some(2))).unwrap();
    let reads = |c: &Controller, who| matches!(doing(c, who), Some(Order::Load { publish: false, .. }));
    assert!(!reads(&controller, "p0") && !reads(&controller, "p1"));
    until_training(&mut controller, 3);
    assert_eq!(controller.status().rollbacks, 0);
}

#[test]
fn one_lost_member_that_may_have_made_the_step_is_waited_for() {
    let mut controller = run(2);
    until_training(&mut controller, 2);
    fail(&mut controller, "p0");
    controller.apply(lost("p1")).unwrap();
    assert_eq!((controller.step(), controller.status().training), (1, 16), "p1 may have made it");
    // It has not: the same samples are trained on under another attempt.
    controller.apply(join("p1", Role::Policy, Some(1))).unwrap();
    let Some(Order::Train { step: 2, attempt: 3, share, .. }) = doing(&controller, "p1") else {
        panic!("{:?}", doing(&controller, "p1"))
    };
    assert_eq!(share.iter().map(|s| s.sample).collect::<Vec<_>>(), (24..32).collect::<Vec<_>>());
}

#[test]
fn one_that_is_removed_is_not_waited_for() {
    let mut controller = run(2);
    until_training(&mut controller, 2);
    fail(&mut controller, "p0");
    controller.apply(lost("p1")).unwrap();
    controller.apply(removed("p1")).unwrap();
    let Some(Order::Train { step: 2, members, .. }) = doing(&controller, "p0") else { panic!() };
    assert_eq!(members.len(), 1);
}

#[test]
fn a_step_whose_only_maker_is_gone_is_taken_back_and_made_again() {
    let mut controller = run(2);
    until_training(&mut controller, 3);
    let made_of = |c: &Controller, who| match doing(c, who) {
        Some(Order::Train { share, attempt, .. }) => (share.iter().map(|s| s.sample).collect::<Vec<_>>(), *attempt),
        other => panic!("{other:?}"),
    };
    let (first, attempt) = made_of(&controller, "p1");
    fail(&mut controller, "p1");
    act(&mut controller, "p0");
    assert_eq!(controller.step(), 3);
    // It hands its state over, and dies at it.
    assert!(matches!(doing(&controller, "p0"), Some(Order::Save { step: 3, hand_over: true, .. })));
    controller.apply(lost("p0")).unwrap();
    assert_eq!((controller.step(), controller.status().rollbacks), (3, 0), "it may come back with the state");
    controller.apply(join("p0", Role::Policy, None)).unwrap();
    // No checkpoint was ever written, and still only one step is lost.
    assert_eq!((controller.step(), controller.status().rollbacks), (2, 1));
    until_training(&mut controller, 3);
    let (again, later) = made_of(&controller, "p1");
    assert_eq!(again, first);
    assert!(later > attempt);
    // The one who comes back with the step that was taken back is not taken for a holder of the new one.
    for who in ["p0", "p1"] {
        act(&mut controller, who);
    }
    assert_eq!((controller.step(), controller.status().rollbacks), (3, 1));
}

#[test]
fn a_state_of_a_step_that_was_taken_back_is_no_state_of_the_run() {
    let mut controller = run(2);
    until_training(&mut controller, 2);
    fail(&mut controller, "p1");
    act(&mut controller, "p0");
    controller.apply(lost("p0")).unwrap();
    // Given up, so the step is taken back; then it comes back with it after all.
    controller.apply(removed("p0")).unwrap();
    assert_eq!((controller.step(), controller.status().rollbacks), (1, 1));
    controller.apply(join("p0", Role::Policy, Some(2))).unwrap();
    for _ in 0..50 {
        assert_eq!(controller.step(), 1);
        if matches!(doing(&controller, "p0"), Some(Order::Load { step: 1, publish: false, .. })) {
            return;
        }
        for who in ["p1", "r"] {
            if controller.order_of(who).is_some() && !matches!(doing(&controller, who), Some(Order::Train { .. })) {
                act(&mut controller, who);
            }
        }
    }
    panic!("p0 is not given the run's state: {:#?}", controller.status());
}

#[test]
fn without_the_state_before_it_the_run_goes_back_to_the_checkpoint() {
    let mut controller = run(2);
    until_training(&mut controller, 3);
    controller.apply(lost("p0")).unwrap();
    controller.apply(lost("p1")).unwrap();
    controller.apply(join("p0", Role::Policy, None)).unwrap();
    controller.apply(join("p1", Role::Policy, None)).unwrap();
    assert_eq!((controller.step(), controller.status().rollbacks), (0, 1));
}

#[test]
fn a_claim_counts_only_if_the_run_knows_the_state() {
    let mut controller = run(1);
    let mut steps = 0;
    while controller.step() < 2 {
        for who in ["p0", "r"] {
            if controller.order_of(who).is_some() {
                act(&mut controller, who);
            }
        }
        steps += 1;
        assert!(steps < 100);
    }
    // A stranger that claims the run's step, and the known one that claims another.
    controller.apply(join("p1", Role::Policy, Some(controller.step()))).unwrap();
    let held = |c: &Controller, who: &str| c.status().replicas.iter().find(|r| r.name == who).and_then(|r| r.holds);
    assert_eq!(held(&controller, "p1"), None);
    controller.apply(join("p0", Role::Policy, Some(controller.step() + 5))).unwrap();
    assert_eq!(held(&controller, "p0"), None);
}

#[test]
fn one_that_may_hold_either_of_two_states_of_a_step_is_not_believed() {
    let mut controller = run(2);
    until_training(&mut controller, 2);
    // p0 makes step 2, which is taken back and made again by p1 alone.
    fail(&mut controller, "p1");
    act(&mut controller, "p0");
    controller.apply(lost("p0")).unwrap();
    let old = controller.clone();
    controller.apply(removed("p0")).unwrap();
    for _ in 0..100 {
        if controller.step() == 2 {
            break;
        }
        for who in ["p1", "r"] {
            if controller.step() < 2 && controller.order_of(who).is_some() {
                act(&mut controller, who);
            }
        }
    }
    assert_eq!((controller.step(), controller.status().rollbacks), (2, 1));
    // A stranger now, it is not believed.
    controller.apply(join("p0", Role::Policy, Some(2))).unwrap();
    assert_eq!(controller.status().replicas[0].holds, None);
    // Known to the run by another way: it has said that it holds step 2 of the old branch, is told to read step 2 of the
    // new one, and is lost over it.
    let mut held = old.roster.get("p0").and_then(|r| r.held).expect("it made step 2");
    assert_eq!(held.step, 2);
    let current = crate::roster::Held { step: 2, state: controller.lineage.state };
    assert_ne!(held, current);
    controller.roster.set_held("p0", Some(held), Some(current));
    controller.apply(lost("p0")).unwrap();
    controller.apply(join("p0", Role::Policy, Some(2))).unwrap();
    assert_eq!(controller.status().replicas[0].holds, None, "either may be in its memory");
    // Where both are the same there is nothing to doubt.
    held = current;
    controller.roster.set_held("p0", Some(held), Some(current));
    controller.apply(lost("p0")).unwrap();
    controller.apply(join("p0", Role::Policy, Some(2))).unwrap();
    assert_eq!(controller.status().replicas[0].holds, Some(2));
}

#[test]
fn planned_policies_that_never_come_can_be_given_up() {
    let plan = Plan { policy_replicas: 3, validate_before: false, ..plan() };
    let mut controller = Controller::new(plan);
    controller.apply(join("p0", Role::Policy, None)).unwrap();
    controller.apply(join("r", Role::Rollout, None)).unwrap();
    assert_eq!((controller.policies_missing(), controller.status().waits_for.as_str()), (2, "2 of 3 policies"));
    let before = controller.clone();
    controller.apply(removed("p2")).unwrap();
    assert_eq!(controller, before, "of one that has never joined nothing is known");
    controller.apply(Event::GoOnWithout { policies: 1 }).unwrap();
    assert_eq!((controller.policies_missing(), controller.group()), (1, 16));
    controller.apply(join("p1", Role::Policy, None)).unwrap();
    assert_eq!((controller.policies_missing(), controller.group()), (0, 16));
    // Nobody is missing: nothing to give up. One that comes late is taken in.
    controller.apply(Event::GoOnWithout { policies: u64::MAX }).unwrap();
    assert_eq!(controller.group(), 16);
    controller.apply(join("p2", Role::Policy, None)).unwrap();
    assert_eq!((controller.policies_missing(), controller.group()), (0, 24));
    controller.apply(removed("p1")).unwrap();
    assert_eq!((controller.policies_missing(), controller.group()), (0, 16));
}

#[test]
fn one_that_leaves_and_comes_back_does_not_shrink_the_run() {
    let mut controller = Controller::new(Plan { policy_replicas: 3, ..plan() });
    for _ in 0..5 {
        controller.apply(join("p0", Role::Policy, None)).unwrap();
        assert_eq!((controller.policies_missing(), controller.group()), (2, 24));
        controller.apply(removed("p0")).unwrap();
        assert_eq!((controller.policies_missing(), controller.group()), (2, 16));
    }
}

#[test]
fn weights_that_are_gone_are_published_again_before_anything_is_written() {
    let mut controller = run(1);
    while controller.order_of("r").is_none() {
        act(&mut controller, "p0");
    }
    let (id, _) = controller.order_of("r").expect("it writes");
    controller.apply(done("r", id, Outcome::WeightsGone)).unwrap();
    assert_eq!(doing(&controller, "r"), None);
    assert!(matches!(act(&mut controller, "p0"), Order::Load { step: 0, publish: true, .. }));
    assert!(matches!(doing(&controller, "r"), Some(Order::Generate { version: 0, .. })));
}

#[test]
fn who_failed_to_read_a_state_holds_none_and_the_state_is_handed_over_again() {
    let mut controller = run(2);
    until_training(&mut controller, 2);
    fail(&mut controller, "p1");
    act(&mut controller, "p0");
    assert!(matches!(act(&mut controller, "p0"), Order::Save { step: 2, hand_over: true, .. }));
    assert!(matches!(doing(&controller, "p1"), Some(Order::Load { step: 2, publish: false, .. })));
    fail(&mut controller, "p1");
    assert_eq!(controller.status().replicas[1].holds, None, "it may be half one state and half the other");
    assert!(matches!(act(&mut controller, "p0"), Order::Save { step: 2, hand_over: true, .. }));
    assert!(matches!(act(&mut controller, "p1"), Order::Load { step: 2, publish: false, .. }));
    assert_eq!(controller.status().replicas[1].holds, Some(2));
}

/// A run of `policies` that has saved steps 1 to `steps` and then lost what `p0` held.
fn saved(policies: u64, steps: u64) -> Controller {
    let plan = Plan { policy_replicas: policies, validation_freq: 0, save_freq: 1, epochs: 4, ..plan() };
    let mut controller = Controller::new(plan);
    let names: Vec<String> = (0..policies).map(|i| format!("p{i}")).chain(["r".to_string()]).collect();
    for name in &names {
        let role = if name == "r" { Role::Rollout } else { Role::Policy };
        controller.apply(join(name, role, None)).unwrap();
    }
    while controller.status().saved_step < steps {
        let who = names.iter().find(|name| controller.order_of(name).is_some()).expect("somebody works");
        act(&mut controller, who);
    }
    controller.apply(join("p0", Role::Policy, None)).unwrap();
    controller
}

fn cannot_read(controller: &mut Controller, who: &str) {
    let (id, _) = controller.order_of(who).expect("it reads");
    controller.apply(done(who, id, Outcome::StateGone)).unwrap();
}

#[test]
fn a_checkpoint_that_is_gone_is_passed_over_for_the_one_before() {
    let loads = |c: &Controller| match doing(c, "p0") {
        Some(Order::Load { step, since, publish: false }) => Some((*step, since.0)),
        _ => None,
    };
    let mut controller = saved(1, 3);
    let (third, since) = loads(&controller).expect("it reads");
    assert_eq!((third, controller.step()), (3, 3));
    cannot_read(&mut controller, "p0");
    let (second, earlier) = loads(&controller).expect("it reads");
    assert!(second == 2 && earlier < since, "{second} written for {earlier}, after {since}");
    assert_eq!((controller.step(), controller.status().saved_step, controller.status().rollbacks), (2, 2, 1));
    // An older controller that is given the same events goes on from there too.
    let text = serde_json::to_string(&controller).unwrap();
    assert_eq!(serde_json::from_str::<Controller>(&text).unwrap(), controller);
    cannot_read(&mut controller, "p0");
    cannot_read(&mut controller, "p0");
    // The start needs no checkpoint.
    assert_eq!((loads(&controller), controller.step(), controller.status().rollbacks), (Some((0, 0)), 0, 3));
    let (id, _) = controller.order_of("p0").expect("it reads");
    assert!(controller.apply(done("p0", id, Outcome::StateGone)).is_err());
    while controller.step() < 3 {
        let who = ["p0", "r"].into_iter().find(|who| controller.order_of(who).is_some()).expect("somebody works");
        act(&mut controller, who);
    }
    assert_eq!(controller.status().saved_step, 2);
}

#[test]
fn who_holds_the_state_of_a_checkpoint_that_is_gone_saves_it_again() {
    let mut controller = saved(2, 2);
    cannot_read(&mut controller, "p0");
    assert_eq!((controller.step(), controller.status().saved_step, controller.status().rollbacks), (2, 1, 0));
    let mut saved = Vec::new();
    while controller.step() < 3 {
        let who = ["p1", "p0", "r"].into_iter().find(|who| controller.order_of(who).is_some()).expect("somebody works");
        if let Order::Save { step, hand_over, .. } = act(&mut controller, who) {
            saved.push((who, step, hand_over));
        }
    }
    assert!(saved.contains(&("p1", 2, true)) && saved.contains(&("p1", 2, false)), "{saved:?}");
    assert_eq!(controller.status().rollbacks, 0);
}

/// A run of one policy and rollouts `r` and `s`, both at the validation of step 1.
fn validating() -> Controller {
    let plan = Plan { validation_freq: 1, save_freq: 0, prompts_per_order_max: 1, ..plan() };
    let mut controller = Controller::new(plan);
    for (name, role) in [("r", Role::Rollout), ("s", Role::Rollout), ("p0", Role::Policy)] {
        controller.apply(join(name, role, None)).unwrap();
    }
    let validates = |c: &Controller, who| matches!(doing(c, who), Some(Order::Validate { step: 1, .. }));
    for _ in 0..100 {
        if validates(&controller, "r") && validates(&controller, "s") {
            return controller;
        }
        for who in ["p0", "r", "s"] {
            if controller.order_of(who).is_some() && !validates(&controller, who) {
                act(&mut controller, who);
            }
        }
    }
    panic!("never validated: {:#?}", controller.status());
}

#[test]
fn a_validation_ends_with_its_last_share() {
    let mut controller = validating();
    assert_eq!(act(&mut controller, "s"), Order::Validate { step: 1, part: 1, parts: 2 });
    assert_eq!(doing(&controller, "s"), None);
    assert_eq!(act(&mut controller, "r"), Order::Validate { step: 1, part: 0, parts: 2 });
    assert!(matches!(doing(&controller, "s"), Some(Order::Generate { version: 1, .. })));
}

#[test]
fn a_share_of_a_validation_before_a_rollback_does_not_count_after_it() {
    let back = |controller: &mut Controller| {
        controller.apply(join("p0", Role::Policy, None)).unwrap();
        assert_eq!((controller.step(), controller.status().rollbacks), (0, 1));
        while controller.order_of("p0").is_some() {
            act(controller, "p0");
        }
    };
    let mut controller = validating();
    back(&mut controller);
    act(&mut controller, "r");
    assert_eq!(doing(&controller, "r"), Some(&Order::Validate { step: 0, part: 0, parts: 2 }));
    act(&mut controller, "s");
    assert_eq!(doing(&controller, "s"), Some(&Order::Validate { step: 0, part: 1, parts: 2 }));
    // Nor does its number, where there were more shares then.
    let mut controller = validating();
    controller.apply(lost("r")).unwrap();
    back(&mut controller);
    fail(&mut controller, "s");
    assert_eq!(doing(&controller, "s"), Some(&Order::Validate { step: 0, part: 0, parts: 1 }));
    controller.apply(join("t", Role::Rollout, None)).unwrap();
    assert_eq!(doing(&controller, "t"), None);
}

#[test]
fn samples_to_be_written_again_join_those_already_awaited() {
    let plan = plan();
    let mut lineage = crate::lineage::Lineage::new();
    let buffered = |sample| SampleRef { sample, order: OrderId(1), version: 0 };
    lineage.cursor = 1;
    lineage.buffer.extend([0, 3].map(|sample| (sample, buffered(sample))));
    lineage.open.insert(0, crate::lineage::Open { order: Some(OrderId(2)), only: vec![2] });
    let again = lineage.taken_up_again(&plan);
    assert_eq!(again.open[&0], crate::lineage::Open { order: None, only: vec![0, 2, 3] });
    assert!(again.buffer.is_empty());
}
