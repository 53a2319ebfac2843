//! Any number of items, in batches that the contract allows. When a batch goes wrong its items are tried one by one,
//! each in an instance of its own, so that only the guilty one is lost.

use std::ops::Range;
use std::time::Duration;

use crate::since_v0_1_0::{self as wit, SampleError, dataset, reward};
use crate::voice::{REASON_BYTES_MAX, one_line};
use crate::worker::{Asked, Live, NotExported, Worker};
use crate::{Example, Limits, PluginError, RewardSample, SampleFailure, Score};

/// One kind of batch call.
pub(crate) trait BatchCall {
    type Item;
    /// The item as the guest takes it.
    type Lowered: Send + 'static;
    /// The guest's answer, before it is checked.
    type Raw: Send + 'static;
    type Output;

    /// Text of the item, in bytes.
    fn bytes(item: &Self::Item) -> usize;
    fn lower(item: &Self::Item) -> Self::Lowered;
    fn ask<'a>(live: &'a mut Live, items: &'a [Self::Lowered]) -> Asked<'a, Vec<Result<Self::Raw, SampleError>>>;
    fn check(raw: Self::Raw, limits: &Limits) -> Result<Self::Output, String>;
}

/// `dataset.get-batch`.
pub(crate) struct GetExamples;

impl BatchCall for GetExamples {
    type Item = u64;
    type Lowered = u64;
    type Raw = dataset::Example;
    type Output = Example;

    fn bytes(_: &u64) -> usize {
        size_of::<u64>()
    }

    fn lower(index: &u64) -> u64 {
        *index
    }

    fn ask<'a>(live: &'a mut Live, items: &'a [u64]) -> Asked<'a, Vec<Result<Self::Raw, SampleError>>> {
        Box::pin(async move {
            let guest = live.dataset.as_ref().ok_or(NotExported)?;
            guest.call_get_batch(&mut live.store, items).await
        })
    }

    fn check(raw: Self::Raw, _: &Limits) -> Result<Example, String> {
        wit::lift_example(raw)
    }
}

/// `reward.score-batch`.
pub(crate) struct ScoreSamples;

impl BatchCall for ScoreSamples {
    type Item = RewardSample;
    type Lowered = reward::Sample;
    type Raw = reward::Score;
    type Output = Score;

    fn bytes(sample: &RewardSample) -> usize {
        let metadata: usize = sample.metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
        sample.prompt.len() + sample.completion.len() + sample.reference.as_ref().map_or(0, String::len) + metadata
    }

    fn lower(sample: &RewardSample) -> reward::Sample {
        wit::lower_sample(sample)
    }

    fn ask<'a>(live: &'a mut Live, items: &'a [reward::Sample]) -> Asked<'a, Vec<Result<Self::Raw, SampleError>>> {
        Box::pin(async move {
            let guest = live.reward.as_ref().ok_or(NotExported)?;
            guest.call_score_batch(&mut live.store, items).await
        })
    }

    fn check(raw: Self::Raw, limits: &Limits) -> Result<Score, String> {
        wit::lift_score(raw, limits)
    }
}

/// Runs `items` through the guest: as many results as items, in their order.
///
/// # Errors
/// Only when the host itself fails; whatever the guest does ends in its samples' results.
pub(crate) fn run<C: BatchCall>(
    worker: &mut Worker,
    items: &[C::Item],
) -> Result<Vec<Result<C::Output, SampleFailure>>, PluginError> {
    let limits = worker.blueprint().limits.clone();
    let mut results = Vec::with_capacity(items.len());
    let mut start = 0;
    while start < items.len() {
        let range = next_batch(start, items.len(), &limits, |index| C::bytes(&items[index]));
        start = range.end;
        let outcome = if C::bytes(&items[range.start]) > limits.batch_bytes_max {
            let bytes = C::bytes(&items[range.start]);
            vec![Err(format!("it has {bytes} bytes, above `batch_bytes_max` = {}", limits.batch_bytes_max))]
        } else {
            run_batch::<C>(worker, &items[range.clone()], &limits)?
        };
        results.extend(range.zip(outcome).map(|(item, outcome)| {
            outcome.map_err(|reason| SampleFailure {
                plugin: worker.blueprint().plugin.clone(),
                item,
                reason: one_line(&reason, REASON_BYTES_MAX),
            })
        }));
    }
    Ok(results)
}

/// The longest batch from `start` within both limits; an item that is too large alone gets a batch alone.
fn next_batch(start: usize, len: usize, limits: &Limits, bytes: impl Fn(usize) -> usize) -> Range<usize> {
    let mut total = bytes(start);
    let mut end = start + 1;
    while end < len && end - start < limits.batch_items_max {
        total = total.saturating_add(bytes(end));
        if total > limits.batch_bytes_max {
            break;
        }
        end += 1;
    }
    start..end
}

type Outcomes<C> = Vec<Result<<C as BatchCall>::Output, String>>;

fn run_batch<C: BatchCall>(
    worker: &mut Worker,
    items: &[C::Item],
    limits: &Limits,
) -> Result<Outcomes<C>, PluginError> {
    let time = Duration::from_millis(limits.call_ms_max);
    let reason = match call::<C>(worker, items, false, time)? {
        Ok(raw) if raw.len() == items.len() => return Ok(raw.into_iter().map(|raw| check::<C>(raw, limits)).collect()),
        Ok(raw) => format!("returned {} results for {} items", raw.len(), items.len()),
        Err(reason) => reason,
    };
    tracing::warn!(
        plugin = worker.blueprint().plugin,
        "a batch of {} items failed and is retried item by item: {reason}",
        items.len()
    );
    let time = Duration::from_millis(limits.item_ms_max);
    items
        .iter()
        .map(|item| {
            Ok(match call::<C>(worker, std::slice::from_ref(item), true, time)? {
                Ok(raw) if raw.len() == 1 => raw.into_iter().map(|raw| check::<C>(raw, limits)).collect::<Vec<_>>(),
                Ok(raw) => vec![Err(format!("returned {} results for 1 item", raw.len()))],
                Err(reason) => vec![Err(reason)],
            })
        })
        .collect::<Result<Vec<_>, PluginError>>()
        .map(|outcomes| outcomes.into_iter().flatten().collect())
}

fn call<C: BatchCall>(
    worker: &mut Worker,
    items: &[C::Item],
    fresh: bool,
    time: Duration,
) -> Result<Result<Vec<Result<C::Raw, SampleError>>, String>, PluginError> {
    let lowered: Vec<C::Lowered> = items.iter().map(C::lower).collect();
    let answer = worker.call(fresh, time, move |live| Box::pin(async move { C::ask(live, &lowered).await }))?;
    Ok(answer.map_err(|stop| stop.reason_with_stage()))
}

fn check<C: BatchCall>(raw: Result<C::Raw, SampleError>, limits: &Limits) -> Result<C::Output, String> {
    match raw {
        Ok(raw) => C::check(raw, limits),
        Err(error) if error.message.trim().is_empty() => Err("the plugin gave no reason".into()),
        Err(error) => Err(error.message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_keep_both_limits_and_cover_everything() {
        let limits = Limits { batch_items_max: 3, batch_bytes_max: 10, ..Limits::default() };
        let sizes = [4, 6, 1, 11, 1, 1, 1, 1, 10, 10];
        let mut ranges = Vec::new();
        let mut start = 0;
        while start < sizes.len() {
            let range = next_batch(start, sizes.len(), &limits, |index| sizes[index]);
            start = range.end;
            ranges.push(range);
        }
        assert_eq!(ranges, [0..2, 2..3, 3..4, 4..7, 7..8, 8..9, 9..10]);
    }
}
