//! What every broker does: the same tests over each of them.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use crate::{
    Broker, BrokerError, BrokerLimits, Completion, Delivery, Fetched, SampleId, TeacherRequest, TeacherResult,
};

/// Makes empty brokers of one kind, and lets their time pass.
pub(crate) trait Bench {
    fn broker(&self, limits: BrokerLimits) -> Arc<dyn Broker>;
    fn pass_ms(&self, ms: u64);
}

/// A test for each of these behaviours over the bench that the expression gives, if it gives one.
macro_rules! behaves {
    ($bench:expr) => {
        $crate::behaviour::behaves!($bench; a_request_becomes_a_result_once a_full_queue_names_itself
            a_dead_consumers_requests_are_handed_out_again_in_order a_request_that_kills_teachers_is_given_up
            a_refusal_reaches_the_trainer results_expire a_forgotten_sample_can_be_generated_again
            a_wrong_result_is_refused_and_the_request_stays unfetched_results_are_bounded
            threads_wait_for_each_other_and_for_no_longer_than_their_deadline every_result_is_available_exactly_once);
    };
    ($bench:expr; $($name:ident)*) => {
        $(#[test]
        fn $name() {
            if let Some(bench) = $bench {
                $crate::behaviour::$name(&bench);
            }
        })*
    };
}
pub(crate) use behaves;

pub(crate) fn id(prompt: u64) -> SampleId {
    SampleId { epoch: 1, prompt, generation: 0 }
}

pub(crate) fn request(prompt: u64) -> TeacherRequest {
    TeacherRequest {
        sample: id(prompt),
        weight_version: 7,
        prompt_ids: vec![1, prompt as u32],
        completion_ids: vec![2, 3],
        ..TeacherRequest::default()
    }
}

pub(crate) fn answer(delivery: &Delivery) -> TeacherResult {
    TeacherResult {
        sample: delivery.request.sample,
        weight_version: delivery.request.weight_version,
        teacher: "t".into(),
        token_logprobs_s: vec![-(delivery.request.prompt_ids[1] as f32); 2],
        ..TeacherResult::default()
    }
}

fn limits(requests_max: usize) -> BrokerLimits {
    BrokerLimits { requests_max, results_max: 1000, result_ms_max: 600_000, deliveries_max: 3 }
}

pub(crate) fn a_request_becomes_a_result_once(bench: &dyn Bench) {
    let broker = bench.broker(limits(4));
    broker.publish(request(5), 0).unwrap();
    // A copy changes nothing, before and after the result is there.
    broker.publish(request(5), 0).unwrap();
    let taken = broker.take("t", 10, 0).unwrap();
    assert_eq!((taken.len(), taken[0].attempt), (1, 1));
    assert_eq!(broker.complete(&taken[0], answer(&taken[0])), Ok(Completion::Stored));
    broker.publish(request(5), 0).unwrap();
    assert_eq!(broker.complete(&taken[0], answer(&taken[0])), Ok(Completion::Duplicate));
    let fetched = broker.fetch(&[id(5), id(6), id(5)], 0).unwrap();
    assert_eq!((fetched.results, fetched.missing), (vec![answer(&taken[0])], vec![id(6)]));
    // Fetched is gone, and a late copy of the result does not bring it back.
    assert_eq!(broker.complete(&taken[0], answer(&taken[0])), Ok(Completion::Duplicate));
    assert_eq!(broker.fetch(&[id(5)], 0).unwrap().missing, [id(5)]);
    let stats = broker.stats().unwrap();
    assert_eq!((stats.published, stats.completed, stats.duplicates, stats.results), (1, 1, 2, 0));
}

/// `start`, and the time it took, however busy the machine is.
fn assert_says_full(error: &BrokerError, start: &str) {
    let text = error.to_string();
    let ms = text.strip_prefix(start).and_then(|rest| rest.strip_suffix(" ms"));
    assert!(ms.is_some_and(|ms| ms.parse::<u64>().is_ok()), "{text}");
}

pub(crate) fn a_full_queue_names_itself(bench: &dyn Bench) {
    let broker = bench.broker(limits(2));
    broker.publish(request(1), 0).unwrap();
    broker.publish(request(2), 0).unwrap();
    let error = broker.publish(request(3), 0).unwrap_err();
    assert_says_full(&error, "queue `teacher requests` is full: 2 of 2 after waiting ");
    assert!(error.hint().unwrap().contains("teacher"));
}

pub(crate) fn a_dead_consumers_requests_are_handed_out_again_in_order(bench: &dyn Bench) {
    let broker = bench.broker(limits(10));
    for prompt in 1..=3 {
        broker.publish(request(prompt), 0).unwrap();
        bench.pass_ms(2);
    }
    let dead = broker.take("dead", 2, 0).unwrap();
    bench.pass_ms(5);
    assert_eq!(broker.reclaim(600_000).unwrap(), 0);
    assert_eq!(broker.reclaim(5).unwrap(), 2);
    let taken = broker.take("alive", 10, 0).unwrap();
    assert_eq!(
        taken.iter().map(|d| (d.request.sample.prompt, d.attempt)).collect::<Vec<_>>(),
        [(1, 2), (2, 2), (3, 1)]
    );
    // The dead one was only slow: its result counts, and the other is the duplicate.
    assert_eq!(broker.complete(&dead[0], answer(&dead[0])), Ok(Completion::Stored));
    assert_eq!(broker.complete(&taken[0], answer(&taken[0])), Ok(Completion::Duplicate));
}

pub(crate) fn a_request_that_kills_teachers_is_given_up(bench: &dyn Bench) {
    let broker = bench.broker(limits(10));
    broker.publish(request(1), 0).unwrap();
    for attempt in 1..=3 {
        assert_eq!(broker.take("t", 1, 0).unwrap()[0].attempt, attempt);
        broker.reclaim(0).unwrap();
    }
    assert!(broker.take("t", 1, 0).unwrap().is_empty());
    let fetched = broker.fetch(&[id(1)], 60_000).unwrap();
    assert_eq!(fetched.failed, [(id(1), "given up: 3 teachers took it and none answered".to_owned())]);
}

pub(crate) fn a_refusal_reaches_the_trainer(bench: &dyn Bench) {
    let broker = bench.broker(limits(10));
    broker.publish(request(1), 0).unwrap();
    let taken = broker.take("t", 1, 0).unwrap();
    assert_eq!(broker.fail(&taken[0], "too long"), Ok(Completion::Stored));
    assert_eq!(broker.fetch(&[id(1)], 60_000).unwrap().failed, [(id(1), "too long".to_owned())]);
    assert_eq!(broker.stats().unwrap().failed, 1);
}

pub(crate) fn results_expire(bench: &dyn Bench) {
    let broker = bench.broker(BrokerLimits { result_ms_max: 1500, ..limits(10) });
    broker.publish(request(1), 0).unwrap();
    let taken = broker.take("t", 1, 0).unwrap();
    broker.complete(&taken[0], answer(&taken[0])).unwrap();
    bench.pass_ms(2600);
    let stats = broker.stats().unwrap();
    assert_eq!((stats.completed, stats.results, stats.expired), (1, 0, 1));
    assert_eq!(broker.fetch(&[id(1)], 0).unwrap().missing, [id(1)]);
}

pub(crate) fn a_forgotten_sample_can_be_generated_again(bench: &dyn Bench) {
    let broker = bench.broker(limits(10));
    broker.publish(request(1), 0).unwrap();
    let old = broker.take("t", 1, 0).unwrap();
    let again = TeacherRequest { weight_version: 8, ..request(1) };
    let error = broker.publish(again.clone(), 0).unwrap_err();
    assert_eq!(error, BrokerError::SampleInUse { sample: id(1), held_version: 7, new_version: 8 });
    broker.forget(&[id(1)]).unwrap();
    broker.publish(again, 0).unwrap();
    // The old completion's scores must not be taken for the new one's.
    assert_eq!(broker.complete(&old[0], answer(&old[0])), Ok(Completion::Duplicate));
    let new = broker.take("t", 1, 0).unwrap();
    broker.complete(&new[0], answer(&new[0])).unwrap();
    assert_eq!(broker.fetch(&[id(1)], 0).unwrap().results[0].weight_version, 8);
}

pub(crate) fn a_wrong_result_is_refused_and_the_request_stays(bench: &dyn Bench) {
    let broker = bench.broker(limits(10));
    broker.publish(request(1), 0).unwrap();
    let taken = broker.take("t", 1, 0).unwrap();
    let wrong = TeacherResult { token_logprobs_s: vec![-1.0], ..answer(&taken[0]) };
    assert!(matches!(broker.complete(&taken[0], wrong), Err(BrokerError::BadMessage { .. })));
    assert_eq!(broker.stats().unwrap().delivered, 1);
}

pub(crate) fn unfetched_results_are_bounded(bench: &dyn Bench) {
    let broker = bench.broker(BrokerLimits { results_max: 1, ..BrokerLimits::default() });
    broker.publish(request(1), 0).unwrap();
    broker.publish(request(2), 0).unwrap();
    let taken = broker.take("t", 2, 0).unwrap();
    broker.complete(&taken[0], answer(&taken[0])).unwrap();
    let error = broker.complete(&taken[1], answer(&taken[1])).unwrap_err();
    assert_says_full(&error, "queue `teacher results` is full: 1 of 1 after waiting ");
    broker.fetch(&[id(1)], 0).unwrap();
    assert_eq!(broker.complete(&taken[1], answer(&taken[1])), Ok(Completion::Stored));
}

pub(crate) fn threads_wait_for_each_other_and_for_no_longer_than_their_deadline(bench: &dyn Bench) {
    let broker = bench.broker(BrokerLimits { requests_max: 2, ..BrokerLimits::default() });
    let ids: Vec<SampleId> = (0..200).map(id).collect();
    std::thread::scope(|scope| {
        let broker = &broker;
        for name in ["a", "b"] {
            scope.spawn(move || {
                while let Ok(taken) = broker.take(name, 3, 20_000) {
                    for delivery in taken {
                        broker.complete(&delivery, answer(&delivery)).unwrap();
                    }
                }
            });
        }
        scope.spawn(|| {
            for prompt in 0..200 {
                broker.publish(request(prompt), 20_000).unwrap();
            }
        });
        let fetched = broker.fetch(&ids, 20_000).unwrap();
        broker.close().unwrap();
        assert_eq!(fetched.results.iter().map(|r| r.sample).collect::<Vec<_>>(), ids);
    });
    assert_eq!(broker.publish(request(1), 20_000), Err(BrokerError::Closed { queue: "teacher requests" }));
    let begun = Instant::now();
    assert_eq!(broker.fetch(&[id(999)], 20_000).unwrap().missing, [id(999)]);
    assert!(begun.elapsed() < Duration::from_secs(10), "a closed broker has nothing to wait for");
    let open = bench.broker(BrokerLimits::default());
    assert_eq!(open.take("t", 1, 30).unwrap(), []);
    assert_eq!(open.fetch(&[id(1)], 30).unwrap().missing, [id(1)]);
}

#[derive(Debug, Clone)]
enum Act {
    Publish(u64),
    Take(usize),
    /// Completes the delivery with this index among all ever made: late, doubled, out of order.
    Complete(usize),
    /// A consumer dies: whoever holds a request now goes silent, and the broker takes it back.
    Reclaim,
    Fetch(Vec<u64>),
    Forget(u64),
    Pass(u64),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0..12_u64).prop_map(Act::Publish),
        4 => (1..4_usize).prop_map(Act::Take),
        5 => any::<usize>().prop_map(Act::Complete),
        1 => Just(Act::Reclaim),
        3 => proptest::collection::vec(0..12_u64, 1..5).prop_map(Act::Fetch),
        1 => (0..12_u64).prop_map(Act::Forget),
        1 => (1..500_u64).prop_map(Act::Pass),
    ]
}

/// Consumers die, results come twice, late and in any order. Each accepted request is then still answered exactly once
/// (or given up, or forgotten), with its own numbers, and the queue never holds more than it may.
pub(crate) fn every_result_is_available_exactly_once(bench: &dyn Bench) {
    proptest!(ProptestConfig::with_cases(200), |(acts in proptest::collection::vec(act(), 1..100))| {
        play(bench, acts);
    });
}

fn play(bench: &dyn Bench, acts: Vec<Act>) {
    const REQUESTS_MAX: usize = 5;
    let broker = bench.broker(limits(REQUESTS_MAX));

    let mut deliveries: Vec<Delivery> = Vec::new();
    // Accepted requests whose outcome nobody has seen yet.
    let mut open: HashSet<SampleId> = HashSet::new();
    for act in acts {
        match act {
            Act::Publish(prompt) => match broker.publish(request(prompt), 0) {
                Ok(()) => {
                    open.insert(id(prompt));
                }
                Err(error) => assert!(matches!(error, BrokerError::QueueFull { .. }), "{error}"),
            },
            Act::Take(max) => {
                let taken = broker.take("t", max, 0).unwrap();
                assert!(taken.iter().all(|d| open.contains(&d.request.sample)));
                deliveries.extend(taken);
            }
            Act::Complete(any) if !deliveries.is_empty() => {
                let delivery = &deliveries[any % deliveries.len()];
                broker.complete(delivery, answer(delivery)).unwrap();
            }
            Act::Complete(_) => {}
            Act::Reclaim => {
                broker.reclaim(0).unwrap();
            }
            Act::Fetch(prompts) => {
                let ids: Vec<SampleId> = prompts.into_iter().map(id).collect();
                let fetched = broker.fetch(&ids, 0).unwrap();
                for result in &fetched.results {
                    assert!(open.remove(&result.sample), "`{}` was there twice", result.sample);
                    assert_eq!(result.token_logprobs_s[0], -(result.sample.prompt as f32));
                }
                for (sample, _) in &fetched.failed {
                    assert!(open.remove(sample));
                }
            }
            Act::Forget(prompt) => {
                broker.forget(&[id(prompt)]).unwrap();
                open.remove(&id(prompt));
            }
            Act::Pass(ms) => bench.pass_ms(ms % 3),
        }
        let stats = broker.stats().unwrap();
        assert!(stats.waiting + stats.delivered <= REQUESTS_MAX);
        assert_eq!(stats.waiting + stats.delivered + stats.results, open.len());
    }
    // At the end a living consumer answers whatever is left.
    let ids: Vec<SampleId> = open.iter().copied().collect();
    let mut fetched = Fetched::default();
    for _ in 0..4 {
        broker.reclaim(0).unwrap();
        for delivery in broker.take("alive", 100, 0).unwrap() {
            assert_eq!(broker.complete(&delivery, answer(&delivery)), Ok(Completion::Stored));
        }
    }
    let last = broker.fetch(&ids, 0).unwrap();
    fetched.results.extend(last.results);
    fetched.failed.extend(last.failed);
    assert_eq!(fetched.results.len() + fetched.failed.len(), ids.len());
    assert!(last.missing.is_empty());
    let stats = broker.stats().unwrap();
    assert_eq!((stats.waiting, stats.delivered, stats.results), (0, 0, 0));
}
