//! Many samples at once: every worker helps, and nobody can tell how many there were.

use cosmos_plugin::{Limits, RewardSample};

use crate::guests::{Bench, quick, samples};

fn texts(count: usize) -> Vec<String> {
    (0..count).map(|number| if number % 41 == 7 { "!".into() } else { "x".repeat(number % 90) }).collect()
}

fn many(count: usize) -> Vec<RewardSample> {
    let texts = texts(count);
    samples(&texts.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn results_are_in_order_whatever_the_number_of_workers() {
    let bench = Bench::new();
    for guest in ["panic", "wrong_length"] {
        let score = |workers: usize| bench.reward(guest, Limits { workers, ..quick() }).score(&many(700)).unwrap();
        let alone = score(1);
        for (item, (text, result)) in texts(700).iter().zip(&alone).enumerate() {
            match result {
                Ok(score) => assert_eq!(score.value, text.len() as f64),
                Err(failure) => assert_eq!((failure.item, text.as_str()), (item, "!")),
            }
        }
        assert_eq!(alone.iter().filter(|result| result.is_err()).count(), 17);
        for workers in [2, 7] {
            assert_eq!(score(workers), alone, "{guest} with {workers} workers");
        }
    }
}

#[test]
fn every_worker_has_an_instance_of_its_own() {
    // Each instance counts its own calls: one worker's counts go up to the number of batches, four share them.
    let bench = Bench::new();
    let largest = |workers| {
        let mut reward = bench.reward("counter", Limits { workers, ..quick() });
        let scores = reward.score(&many(20_000)).unwrap();
        scores.into_iter().map(|score| score.unwrap().value).fold(0.0, f64::max)
    };
    assert_eq!(largest(1), 313.0);
    assert!(largest(4) < 313.0);
}

#[test]
fn scoring_goes_on_while_its_caller_does_something_else() {
    let reward = Bench::new().reward("well_behaved", quick());
    let pending: Vec<_> = (0..20).map(|number| reward.start(many(number * 10)).unwrap()).collect();
    // The reward itself is not needed any more, and one that is not waited for is no harm.
    drop(reward);
    for (number, pending) in pending.into_iter().enumerate() {
        if number % 5 == 3 {
            drop(pending);
            continue;
        }
        let values: Vec<f64> = pending.wait().unwrap().into_iter().map(|score| score.unwrap().value).collect();
        let expected: Vec<f64> = texts(number * 10).iter().map(|text| text.len() as f64).collect();
        assert_eq!(values, expected);
    }
}

#[test]
fn what_is_taken_back_is_not_done() {
    let bench = Bench::new();
    let reward = bench.reward("endless_loop", Limits { workers: 1, ..quick() });
    let started = std::time::Instant::now();
    // 40 guilty samples at half a second each, were they not taken back.
    drop(reward.start(samples(&["!"; 40])).unwrap());
    let values = reward.start(samples(&["abc"])).unwrap().wait().unwrap();
    assert_eq!(values[0].as_ref().unwrap().value, 3.0);
    assert!(started.elapsed() < std::time::Duration::from_secs(15), "{:?}", started.elapsed());
}

#[test]
fn a_plugin_outlives_its_host_with_its_deadlines() {
    // Only the reward is left of host and plugin: its guest must still be stopped.
    let mut reward = Bench::new().reward("endless_loop", quick());
    let results = reward.score(&samples(&["!", "ab"])).unwrap();
    assert!(results[0].as_ref().unwrap_err().reason.contains("took longer than 500 ms, in `score`"), "{results:?}");
    assert_eq!(results[1].as_ref().unwrap().value, 2.0);
}
