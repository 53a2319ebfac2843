//! One process: one policy that brings its state, one rollout. The orders come as a single loop would perform them.

use std::collections::VecDeque;

use crate::*;

pub fn plan() -> Plan {
    Plan {
        dataset_len: 10,
        epochs: 2,
        n_generation: 4,
        train_batch: 8,
        policy_replicas: 1,
        steps_max: None,
        allowed_outdated_steps: 0,
        steps_ahead_max: 0,
        sync_weight_interval: 1,
        prompts_per_order_max: u64::MAX,
        validation_freq: 3,
        validate_before: true,
        save_freq: 4,
        save_last: true,
    }
}

pub fn join(replica: &str, role: Role, holds: Option<u64>) -> Event {
    Event::Joined { replica: replica.into(), role, holds, address: None }
}

pub fn done(replica: &str, order: OrderId, outcome: Outcome) -> Event {
    Event::Done { replica: replica.into(), order, outcome }
}

/// Joins both roles and performs orders until the run is over or `orders_max` are done; `keep` says which prompts bring
/// completions.
fn drive(controller: &mut Controller, orders_max: usize, keep: impl Fn(u64) -> bool) -> Vec<Order> {
    let n = controller.plan().n();
    let mut todo = VecDeque::new();
    let step = controller.step();
    todo.extend(controller.apply(join("policy-0", Role::Policy, Some(step))).unwrap());
    todo.extend(controller.apply(join("rollout-0", Role::Rollout, None)).unwrap());
    let mut orders = Vec::new();
    while let Some(Dispatch { replica, id, order }) = todo.pop_front() {
        orders.push(order.clone());
        let outcome = match order {
            Order::Generate { prompts, only, .. } => {
                let kept = prompts.into_iter().filter(|prompt| keep(*prompt)).flat_map(|p| p * n..p * n + n);
                Outcome::Generated { samples: kept.filter(|s| only.is_empty() || only.contains(s)).collect() }
            }
            Order::Train { .. } => Outcome::Trained,
            Order::Load { .. } => Outcome::Loaded,
            Order::Save { .. } => Outcome::Saved,
            Order::Validate { .. } => Outcome::Validated,
            Order::Leave | Order::Finish => {
                todo.extend(controller.apply(Event::Removed { replica }).unwrap());
                continue;
            }
        };
        if orders.len() == orders_max {
            break;
        }
        todo.extend(controller.apply(done(&replica, id, outcome)).unwrap());
        assert!(todo.len() <= 1 || controller.is_over(), "one thing at a time: {todo:?}");
        assert!(orders.len() < 100_000, "the run does not end");
    }
    orders
}

fn trained(orders: &[Order]) -> Vec<Vec<u64>> {
    let steps = orders.iter().filter_map(|order| match order {
        Order::Train { share, .. } => Some(share.iter().map(|s| s.sample).collect()),
        _ => None,
    });
    steps.collect()
}

#[test]
fn orders_come_one_after_the_other() {
    let mut controller = Controller::new(plan());
    let orders = drive(&mut controller, usize::MAX, |_| true);
    assert_eq!(trained(&orders).concat(), (0..80).collect::<Vec<_>>());
    assert_eq!(orders[0], Order::Validate { step: 0, part: 0, parts: 1 });
    let validated = orders.iter().filter_map(|order| match order {
        Order::Validate { step, .. } => Some(*step),
        _ => None,
    });
    assert_eq!(validated.collect::<Vec<_>>(), [0, 3, 6, 9, 10]);
    let saved = orders.iter().filter_map(|order| match order {
        Order::Save { step, last, hand_over: false, .. } => Some((*step, *last)),
        _ => None,
    });
    assert_eq!(saved.collect::<Vec<_>>(), [(4, false), (8, false), (10, true)]);
    assert_eq!(orders[orders.len() - 2..], [Order::Finish, Order::Finish]);
    assert!(controller.is_over() && !controller.gave_up() && !controller.was_stopped());
}

#[test]
fn completions_left_over_wait_for_the_next_step_within_the_allowed_staleness() {
    let fresh = Plan { n_generation: 16, allowed_outdated_steps: 1, ..plan() };
    let orders = drive(&mut Controller::new(fresh.clone()), usize::MAX, |_| true);
    assert_eq!(trained(&orders).len(), 40);
    let orders = drive(&mut Controller::new(Plan { allowed_outdated_steps: 0, ..fresh }), usize::MAX, |_| true);
    let dropped = orders.iter().map(|order| match order {
        Order::Train { outdated, .. } => outdated.len(),
        _ => 0,
    });
    assert!(dropped.sum::<usize>() > 0, "stale halves are dropped, never trained on");
}

#[test]
fn a_run_whose_generations_all_fail_ends() {
    let mut controller = Controller::new(Plan { validation_freq: 0, ..plan() });
    let orders = drive(&mut controller, usize::MAX, |_| false);
    assert!(controller.gave_up() && controller.is_over());
    assert!(orders.len() < 100);
}

#[test]
fn a_filter_that_drops_a_few_prompts_in_a_row_does_not_end_the_run() {
    let plan = Plan { validation_freq: 0, dataset_len: 10_000, train_batch: 4, epochs: 1, ..plan() };
    let mut controller = Controller::new(plan.clone());
    let orders = drive(&mut controller, usize::MAX, |prompt| prompt % 10 == 9);
    assert_eq!((controller.cursor(), trained(&orders).len(), controller.gave_up()), (10_000, 1000, false));
    // Everything is dropped: it gives up long before the prompts run out.
    let mut controller = Controller::new(plan);
    drive(&mut controller, usize::MAX, |_| false);
    assert!(controller.gave_up() && controller.cursor() < 100);
}

#[test]
fn a_resumed_run_goes_on_as_if_never_stopped() {
    let whole = drive(&mut Controller::new(plan()), usize::MAX, |p| p % 5 != 2);
    for stop_after in 1..whole.len() - 1 {
        let mut controller = Controller::new(plan());
        // The last of these orders is under way when the run breaks off.
        let first = drive(&mut controller, stop_after, |p| p % 5 != 2);
        let text = serde_json::to_string(&controller.memory()).unwrap();
        let memory: Memory = serde_json::from_str(&text).unwrap();
        // Some completions in flight may have been lost since the checkpoint: they are written again.
        let less = memory.clone().keeping(|sample| sample.sample % 3 != 0, &plan());
        for memory in [memory, less] {
            let mut controller = Controller::resume(plan(), memory);
            let second = drive(&mut controller, usize::MAX, |p| p % 5 != 2);
            let steps = trained(&first[..stop_after - 1]).into_iter().chain(trained(&second));
            assert_eq!(steps.collect::<Vec<_>>(), trained(&whole), "stopped after {stop_after}");
        }
    }
}

#[test]
fn a_stop_saves_what_was_done_and_leaves() {
    let mut controller = Controller::new(plan());
    drive(&mut controller, 4, |_| true);
    let Some((id, Order::Generate { .. })) = controller.order_of("rollout-0") else { panic!("generates") };
    // A process that is asked to leave breaks its work off.
    assert!(controller.apply(Event::StopRequested).unwrap().is_empty());
    let failed = Event::Failed { replica: "rollout-0".into(), order: id, reason: "asked to leave".into() };
    let saves = controller.apply(failed).unwrap();
    let [Dispatch { replica, id, order: Order::Save { step: 1, last: false, .. } }] = saves.as_slice() else {
        panic!("{saves:?}")
    };
    let leaves = controller.apply(done(replica, *id, Outcome::Saved)).unwrap();
    assert!(leaves.len() == 2 && leaves.iter().all(|d| d.order == Order::Leave));
    assert!(controller.was_stopped() && controller.is_over() && !controller.is_deserted());
    // Nothing was done: nothing to save.
    let mut controller = Controller::new(Plan { validation_freq: 0, ..plan() });
    controller.apply(join("policy-0", Role::Policy, Some(0))).unwrap();
    let leaves = controller.apply(Event::StopRequested).unwrap();
    assert_eq!(leaves.iter().map(|d| &d.order).collect::<Vec<_>>(), [&Order::Leave]);
}
