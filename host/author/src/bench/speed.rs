//! Scores a second, and how long a call takes.

use std::time::{Duration, Instant};

use cosmos_plugin::{PluginError, Reward, RewardSample};
use serde::Serialize;

use super::machine::computed_s;
use super::{ROUNDS, median};
use crate::error::Result;

/// Calls whose time is kept; percentiles of the first millions say it all.
const CALLS_KEPT: usize = 4_000_000;

/// One way of scoring.
#[derive(Debug, Clone, Serialize)]
pub struct Speed {
    /// Samples of a call into the plugin host, which hands them to the guest in batches of at most 64.
    pub samples_per_call: usize,
    /// Instances at once, a core each.
    pub workers: usize,
    /// Median of the rounds.
    pub scores_per_second: f64,
    /// The slowest round.
    pub scores_per_second_min: f64,
    /// The fastest round.
    pub scores_per_second_max: f64,
    /// Calls in the same time.
    pub calls_per_second: f64,
    /// Processor time of a score in microseconds, host and guest together, whatever else ran on the machine.
    pub computed_us_per_score: Option<f64>,
    /// Microseconds of a call: half of them took no longer.
    pub call_us_p50: f64,
    /// 99 of 100 took no longer.
    pub call_us_p99: f64,
    /// The call's by its samples.
    pub score_us_p50: f64,
    /// The call's by its samples.
    pub score_us_p99: f64,
}

/// What happened in one round.
struct Tally {
    scores: usize,
    seconds: f64,
    calls_s: Vec<f32>,
}

/// Calls of `samples_per_call` samples, one after the other, to a reward of `workers` instances.
pub(super) fn measure(
    reward: &mut Reward,
    samples: &[RewardSample],
    samples_per_call: usize,
    workers: usize,
    round_s: f64,
) -> Result<Speed> {
    let samples = filled(samples, samples_per_call);
    // Not measured: the first calls make the instances and fill the caches.
    run(reward, &samples, samples_per_call, round_s / 10.0)?;
    let computed = computed_s();
    let rounds = (0..ROUNDS).map(|_| run(reward, &samples, samples_per_call, round_s));
    let rounds = rounds.collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(summary(samples_per_call, workers, rounds, computed))
}

/// Repeated until there is a whole call.
fn filled(samples: &[RewardSample], samples_per_call: usize) -> Vec<RewardSample> {
    let len = samples.len().next_multiple_of(samples_per_call);
    samples.iter().cycle().take(len).cloned().collect()
}

fn run(
    reward: &mut Reward,
    samples: &[RewardSample],
    samples_per_call: usize,
    seconds: f64,
) -> std::result::Result<Tally, PluginError> {
    let mut tally = Tally { scores: 0, seconds: 0.0, calls_s: Vec::new() };
    let limit = Duration::from_secs_f64(seconds);
    let start = Instant::now();
    'time: loop {
        for call in samples.chunks(samples_per_call) {
            let before = Instant::now();
            reward.score(call)?;
            let took = before.elapsed();
            tally.scores += call.len();
            if tally.calls_s.len() < CALLS_KEPT {
                tally.calls_s.push(took.as_secs_f32());
            }
            if start.elapsed() >= limit {
                break 'time;
            }
        }
    }
    tally.seconds = start.elapsed().as_secs_f64();
    Ok(tally)
}

fn summary(samples_per_call: usize, workers: usize, rounds: Vec<Tally>, computed_before: Option<f64>) -> Speed {
    let computed = computed_before.and_then(|before| Some(computed_s()? - before));
    let mut rates: Vec<f64> = rounds.iter().map(|tally| tally.scores as f64 / tally.seconds).collect();
    let scores: usize = rounds.iter().map(|tally| tally.scores).sum();
    let mut calls: Vec<f32> = rounds.into_iter().flat_map(|tally| tally.calls_s).collect();
    let rate = median(&mut rates);
    let (p50, p99) = (percentile(&mut calls, 0.50), percentile(&mut calls, 0.99));
    Speed {
        samples_per_call,
        workers,
        scores_per_second: rate,
        scores_per_second_min: rates.first().copied().unwrap_or(0.0),
        scores_per_second_max: rates.last().copied().unwrap_or(0.0),
        calls_per_second: rate / samples_per_call as f64,
        computed_us_per_score: computed.map(|seconds| seconds * 1e6 / scores.max(1) as f64),
        call_us_p50: p50,
        call_us_p99: p99,
        score_us_p50: p50 / samples_per_call as f64,
        score_us_p99: p99 / samples_per_call as f64,
    }
}

/// Microseconds that the part `q` of the calls did not exceed.
fn percentile(calls_s: &mut [f32], q: f64) -> f64 {
    if calls_s.is_empty() {
        return 0.0;
    }
    let rank = ((calls_s.len() as f64 * q).ceil() as usize).clamp(1, calls_s.len()) - 1;
    f64::from(*calls_s.select_nth_unstable_by(rank, f32::total_cmp).1) * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let mut calls: Vec<f32> = (1..=200).rev().map(|n| n as f32 * 1e-6).collect();
        assert_eq!(percentile(&mut calls, 0.50).round(), 100.0);
        assert_eq!(percentile(&mut calls, 0.99).round(), 198.0);
        assert_eq!(percentile(&mut [2e-6], 0.99).round(), 2.0);
        assert_eq!(percentile(&mut [], 0.5), 0.0);
    }

    #[test]
    fn the_median_round_counts() {
        let rounds = [10, 30, 20].map(|scores| Tally { scores, seconds: 2.0, calls_s: vec![1e-6] });
        let speed = summary(2, 1, rounds.into(), None);
        assert_eq!((speed.scores_per_second, speed.calls_per_second), (10.0, 5.0));
        assert_eq!((speed.scores_per_second_min, speed.scores_per_second_max), (5.0, 15.0));
        assert_eq!(speed.score_us_p50, speed.call_us_p50 / 2.0);
    }

    #[test]
    fn a_call_is_always_full() {
        let sample = RewardSample { prompt: String::new(), completion: "a".into(), reference: None, metadata: vec![] };
        assert_eq!(filled(&vec![sample.clone(); 3], 64).len(), 64);
        assert_eq!(filled(&vec![sample; 65], 64).len(), 128);
    }
}
