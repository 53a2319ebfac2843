use std::time::Instant;

use proptest::prelude::*;

use super::*;
use crate::ManualClock;

fn id(prompt: u64) -> SampleId {
    SampleId { epoch: 1, prompt, generation: 0 }
}

fn request(prompt: u64) -> TeacherRequest {
    TeacherRequest {
        sample: id(prompt),
        weight_version: 7,
        prompt_ids: vec![1, prompt as u32],
        completion_ids: vec![2, 3],
        ..TeacherRequest::default()
    }
}

fn answer(delivery: &Delivery) -> TeacherResult {
    TeacherResult {
        sample: delivery.request.sample,
        weight_version: delivery.request.weight_version,
        teacher: "t".into(),
        token_logprobs_s: vec![-(delivery.request.prompt_ids[1] as f32); 2],
        ..TeacherResult::default()
    }
}

fn broker(requests_max: usize) -> (MemoryBroker, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::default());
    let limits = BrokerLimits { requests_max, results_max: 1000, result_ms_max: 10_000, deliveries_max: 3 };
    (MemoryBroker::with_clock(limits, clock.clone()), clock)
}

#[test]
fn a_request_becomes_a_result_once() {
    let (broker, _) = broker(4);
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

#[test]
fn a_full_queue_names_itself() {
    let (broker, _) = broker(2);
    broker.publish(request(1), 0).unwrap();
    broker.publish(request(2), 0).unwrap();
    let error = broker.publish(request(3), 0).unwrap_err();
    assert_eq!(error.to_string(), "queue `teacher requests` is full: 2 of 2 after waiting 0 ms");
    assert!(error.hint().unwrap().contains("teacher"));
}

#[test]
fn a_dead_consumers_requests_are_handed_out_again_in_order() {
    let (broker, clock) = broker(10);
    for prompt in 1..=3 {
        broker.publish(request(prompt), 0).unwrap();
        clock.advance_ms(1);
    }
    let dead = broker.take("dead", 2, 0).unwrap();
    clock.advance_ms(100);
    assert_eq!(broker.reclaim(101).unwrap(), 0);
    assert_eq!(broker.reclaim(100).unwrap(), 2);
    let taken = broker.take("alive", 10, 0).unwrap();
    assert_eq!(
        taken.iter().map(|d| (d.request.sample.prompt, d.attempt)).collect::<Vec<_>>(),
        [(1, 2), (2, 2), (3, 1)]
    );
    // The dead one was only slow: its result counts, and the other is the duplicate.
    assert_eq!(broker.complete(&dead[0], answer(&dead[0])), Ok(Completion::Stored));
    assert_eq!(broker.complete(&taken[0], answer(&taken[0])), Ok(Completion::Duplicate));
}

#[test]
fn a_request_that_kills_teachers_is_given_up() {
    let (broker, _) = broker(10);
    broker.publish(request(1), 0).unwrap();
    for attempt in 1..=3 {
        assert_eq!(broker.take("t", 1, 0).unwrap()[0].attempt, attempt);
        broker.reclaim(0).unwrap();
    }
    assert!(broker.take("t", 1, 0).unwrap().is_empty());
    let fetched = broker.fetch(&[id(1)], 60_000).unwrap();
    assert_eq!(fetched.failed, [(id(1), "given up: 3 teachers took it and none answered".to_owned())]);
}

#[test]
fn a_refusal_reaches_the_trainer() {
    let (broker, _) = broker(10);
    broker.publish(request(1), 0).unwrap();
    let taken = broker.take("t", 1, 0).unwrap();
    assert_eq!(broker.fail(&taken[0], "too long"), Ok(Completion::Stored));
    assert_eq!(broker.fetch(&[id(1)], 60_000).unwrap().failed, [(id(1), "too long".to_owned())]);
    assert_eq!(broker.stats().unwrap().failed, 1);
}

#[test]
fn results_expire() {
    let (broker, clock) = broker(10);
    broker.publish(request(1), 0).unwrap();
    let taken = broker.take("t", 1, 0).unwrap();
    broker.complete(&taken[0], answer(&taken[0])).unwrap();
    clock.advance_ms(9_999);
    assert_eq!(broker.stats().unwrap().results, 1);
    clock.advance_ms(1_001);
    let stats = broker.stats().unwrap();
    assert_eq!((stats.results, stats.expired), (0, 1));
}

#[test]
fn a_forgotten_sample_can_be_generated_again() {
    let (broker, _) = broker(10);
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

#[test]
fn a_wrong_result_is_refused_and_the_request_stays() {
    let (broker, _) = broker(10);
    broker.publish(request(1), 0).unwrap();
    let taken = broker.take("t", 1, 0).unwrap();
    let wrong = TeacherResult { token_logprobs_s: vec![-1.0], ..answer(&taken[0]) };
    assert!(matches!(broker.complete(&taken[0], wrong), Err(BrokerError::BadMessage { .. })));
    assert_eq!(broker.stats().unwrap().delivered, 1);
}

#[test]
fn unfetched_results_are_bounded() {
    let clock = Arc::new(ManualClock::default());
    let limits = BrokerLimits { results_max: 1, ..BrokerLimits::default() };
    let broker = MemoryBroker::with_clock(limits, clock);
    broker.publish(request(1), 0).unwrap();
    broker.publish(request(2), 0).unwrap();
    let taken = broker.take("t", 2, 0).unwrap();
    broker.complete(&taken[0], answer(&taken[0])).unwrap();
    let error = broker.complete(&taken[1], answer(&taken[1])).unwrap_err();
    assert_eq!(error.to_string(), "queue `teacher results` is full: 1 of 1 after waiting 0 ms");
    broker.fetch(&[id(1)], 0).unwrap();
    assert_eq!(broker.complete(&taken[1], answer(&taken[1])), Ok(Completion::Stored));
}

#[test]
fn threads_wait_for_each_other_and_for_no_longer_than_their_deadline() {
    let broker = MemoryBroker::new(BrokerLimits { requests_max: 2, ..BrokerLimits::default() });
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
    let open = MemoryBroker::default();
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Consumers die, results come twice, late and in any order. Each accepted request is then still answered exactly once
    /// (or given up, or forgotten), with its own numbers, and the queue never holds more than it may.
    #[test]
    fn every_result_is_available_exactly_once(acts in proptest::collection::vec(act(), 1..120)) {
        const REQUESTS_MAX: usize = 5;
        let (broker, clock) = broker(REQUESTS_MAX);
        let mut deliveries: Vec<Delivery> = Vec::new();
        // Accepted requests whose outcome nobody has seen yet.
        let mut open: HashSet<SampleId> = HashSet::new();
        for act in acts {
            match act {
                Act::Publish(prompt) => match broker.publish(request(prompt), 0) {
                    Ok(()) => { open.insert(id(prompt)); }
                    Err(error) => prop_assert!(matches!(error, BrokerError::QueueFull { .. }), "{error}"),
                },
                Act::Take(max) => {
                    let taken = broker.take("t", max, 0).unwrap();
                    prop_assert!(taken.iter().all(|d| open.contains(&d.request.sample)));
                    deliveries.extend(taken);
                }
                Act::Complete(any) if !deliveries.is_empty() => {
                    let delivery = &deliveries[any % deliveries.len()];
                    broker.complete(delivery, answer(delivery)).unwrap();
                }
                Act::Complete(_) => {}
                Act::Reclaim => { broker.reclaim(0).unwrap(); }
                Act::Fetch(prompts) => {
                    let ids: Vec<SampleId> = prompts.into_iter().map(id).collect();
                    let fetched = broker.fetch(&ids, 0).unwrap();
                    for result in &fetched.results {
                        prop_assert!(open.remove(&result.sample), "`{}` was there twice", result.sample);
                        prop_assert_eq!(result.token_logprobs_s[0], -(result.sample.prompt as f32));
                    }
                    for (sample, _) in &fetched.failed {
                        prop_assert!(open.remove(sample));
                    }
                }
                Act::Forget(prompt) => {
                    broker.forget(&[id(prompt)]).unwrap();
                    open.remove(&id(prompt));
                }
                Act::Pass(ms) => clock.advance_ms(ms % 10),
            }
            let stats = broker.stats().unwrap();
            prop_assert!(stats.waiting + stats.delivered <= REQUESTS_MAX);
            prop_assert_eq!(stats.waiting + stats.delivered + stats.results, open.len());
        }
        // At the end a living consumer answers whatever is left.
        let ids: Vec<SampleId> = open.iter().copied().collect();
        let mut fetched = Fetched::default();
        for _ in 0..4 {
            broker.reclaim(0).unwrap();
            for delivery in broker.take("alive", 100, 0).unwrap() {
                prop_assert_eq!(broker.complete(&delivery, answer(&delivery)), Ok(Completion::Stored));
            }
        }
        let last = broker.fetch(&ids, 0).unwrap();
        fetched.results.extend(last.results);
        fetched.failed.extend(last.failed);
        prop_assert_eq!(fetched.results.len() + fetched.failed.len(), ids.len());
        prop_assert!(last.missing.is_empty());
        let stats = broker.stats().unwrap();
        prop_assert_eq!((stats.waiting, stats.delivered, stats.results), (0, 0, 0));
    }
}
